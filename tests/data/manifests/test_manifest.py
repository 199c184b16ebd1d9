"""Manifests of all kinds: one corpus is the same in each, lines that cannot be used, and what is lazy."""

import itertools
import json
import pickle
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
from lhotse import CutSet

from speechllm.data import ManifestError, SourceConfig, read_manifest
from speechllm.data.audio import load_samples
from speechllm.data.manifests.manifest import (
    LINE_ERRORS,
    describe,
    describe_cut,
    is_plain,
    iter_objects,
    manifest_files,
    to_cut,
)
from speechllm.data.manifests.stream import stream_cuts
from tests.data.conftest import write_manifest
from tests.data.corpora import KINDS, TARRED, entries, streamed, true_cuts, write_corpus, write_kind

GOOD = {"audio_filepath": "x/1.wav", "duration": 1.5, "text": "one", "lang": "en"}


def rounded(found):
    """Durations in manifests are rounded, those in cuts are not."""
    return [replace(entry, duration=round(entry.duration, 3)) for entry in found]


@pytest.mark.parametrize("kind", KINDS)
def test_one_corpus_is_the_same_in_all_kinds(kind, tmp_path):
    lines = write_corpus(tmp_path)
    source = write_kind(kind, tmp_path, lines)
    cuts = read_manifest(source)
    found = rounded(describe_cut(cut) for cut in cuts)
    assert [(e.id, e.duration, e.text, e.lang, e.task) for e in found] == [
        (line["id"], line["duration"], line["text"].strip(), "en", "asr") for line in lines
    ]
    for cut, true in zip(cuts, true_cuts(tmp_path, lines), strict=True):
        assert np.array_equal(load_samples(cut), load_samples(true))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("defaults", [{}, {"lang": "xx", "target_lang": "de", "task": "ast", "channel": 0}])
def test_describe_is_what_the_cut_says(kind, defaults, tmp_path):
    lines = write_corpus(tmp_path)
    for line in lines[::2]:
        line["lang"] = "it"
    source = replace(write_kind(kind, tmp_path, lines), **defaults)
    objects = [obj for _, obj in iter_objects(source)]
    for obj in objects:
        stored = json.loads(json.dumps(obj))
        assert describe(stored, source) == describe_cut(to_cut(stored, source))
        assert stored == obj  # to_cut leaves it as it is
    if defaults:
        found = {(entry.target_lang, entry.task, entry.lang in ("it", "en")) for entry in entries(source)}
        assert found == {("de", "ast", True)}


@pytest.mark.parametrize(
    ("said", "previous", "hotwords"),
    [
        ({}, None, None),
        ({"previous": "", "hotwords": []}, "", ()),
        ({"previous": "before", "hotwords": ["a b", "c"]}, "before", ("a b", "c")),
        ({"hotwords": "a, b"}, None, ("a, b",)),
    ],
)
def test_what_the_prompt_needs_is_the_same_in_lines_and_cuts(said, previous, hotwords):
    cut = to_cut(GOOD | said, SourceConfig("m.jsonl"))
    stored = json.loads(json.dumps(cut.to_dict()))
    for entry in (
        describe(GOOD | said, SourceConfig("m.jsonl")),
        describe_cut(cut),
        describe(stored, SourceConfig("m.jsonl")),
        describe_cut(to_cut(stored, SourceConfig("m.jsonl"))),
    ):
        assert (entry.previous, entry.hotwords) == (previous, hotwords)
    for wrong in ({"hotwords": [1]}, {"hotwords": {}}, {"previous": ["x"]}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))}: expected a "):
            describe(GOOD | wrong, SourceConfig("m.jsonl"))


@pytest.mark.parametrize(
    "custom",
    [
        {"task": "ast", "ast_text": "eins", "target_lang": "de"},
        {"taskname": "s2t_translation", "answer": "eins", "source_lang": "en", "target_lang": "de"},
    ],
)
@pytest.mark.parametrize("level", ["supervision", "cut", "mixed"])
def test_translations_in_lhotse_cuts(custom, level, tmp_path):
    (cut,) = true_cuts(tmp_path, write_corpus(tmp_path, 1))
    cut.supervisions[0].language = None if "source_lang" in custom else "en"
    (cut.supervisions[0] if level != "cut" else cut).custom = dict(custom)
    if level == "mixed":
        cut = cut.pad(duration=5.0)
    source = SourceConfig("cuts.jsonl", lang="xx", task="asr", target_lang="yy")
    entry = describe(cut.to_dict(), source)
    assert (entry.task, entry.target, entry.lang, entry.target_lang) == ("ast", "eins", "en", "de")
    assert entry == describe_cut(to_cut(cut.to_dict(), source))


@pytest.mark.parametrize("level", ["plain", "mixed"])
def test_defaults_reach_cuts_without_supervisions(level, tmp_path):
    (cut,) = true_cuts(tmp_path, write_corpus(tmp_path, 1))
    cut.supervisions = []
    cut = cut.pad(duration=5.0) if level == "mixed" else cut
    source = SourceConfig("cuts.jsonl", lang="xx", task="ast", target_lang="yy")
    entry = describe(cut.to_dict(), source)
    assert (entry.lang, entry.task, entry.target_lang, entry.text) == ("xx", "ast", "yy", "")
    assert entry == describe_cut(to_cut(cut.to_dict(), source))


@pytest.mark.parametrize("kind", KINDS)
def test_a_stream_has_each_utterance_once(kind, tmp_path):
    lines = write_corpus(tmp_path)
    source = replace(write_kind(kind, tmp_path, lines), stream=True)
    passes = [[cut.id for cut in stream_cuts(source, seed=1, epoch=epoch)] for epoch in range(6)]
    in_order = [line["id"] for line in lines]
    assert all(sorted(ids) == in_order for ids in passes)
    assert passes == [[cut.id for cut in stream_cuts(source, seed=1, epoch=epoch)] for epoch in range(6)]
    assert (len(set(map(tuple, passes))) > 1) == (kind in TARRED)
    true = {cut.id: cut for cut in true_cuts(tmp_path, lines)}
    for cut in stream_cuts(source, seed=1, epoch=1):
        assert describe_cut(cut).text == describe_cut(true[cut.id]).text
        assert np.array_equal(load_samples(cut), load_samples(true[cut.id]))
        assert cut.recording.sources[0].type != "memory" and len(pickle.dumps(cut)) < 3000  # its audio is still unread


@pytest.mark.parametrize("kind", ["tarred", "shar", "nemo", "lhotse.gz"])
@pytest.mark.parametrize("world_size", [2, 5])
def test_ranks_share_out_a_stream(kind, world_size, tmp_path):
    lines = write_corpus(tmp_path)
    source = replace(write_kind(kind, tmp_path, lines), stream=True)
    for epoch in range(3):
        shares = [[cut.id for cut in stream_cuts(source, 1, epoch, rank, world_size)] for rank in range(world_size)]
        assert sorted(itertools.chain(*shares)) == [line["id"] for line in lines]
        assert len(shares[1]) > 0


def test_a_bad_line_in_a_stream_is_named(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_text("\n".join([json.dumps(GOOD), "{", json.dumps(GOOD | {"duration": -1}), json.dumps(GOOD)]))
    cuts, errors = streamed(SourceConfig(str(path)))
    assert len(cuts) == 2
    assert "m.jsonl:2: invalid JSON" in errors[0] and "m.jsonl:3: duration" in errors[1]


def test_lines_are_read_one_at_a_time(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_text("".join(json.dumps(GOOD) + "\n" for _ in range(3)) + "nonsense\n")
    cuts = read_manifest(path)
    assert cuts.is_lazy
    assert len(list(islice(cuts, 3))) == 3
    assert [cut.id for cut in islice(pickle.loads(pickle.dumps(cuts)), 2)] == ["x/1", "x/1"]
    with pytest.raises(ManifestError, match=r"m\.jsonl:4: "):
        list(cuts)


def test_lhotse_cuts_with_recordings_only_in_the_manifest(corpus, tmp_path):
    eager = [cut.drop_features() for cut in read_manifest(corpus / "a.jsonl")]
    for name in ("cuts.jsonl", "cuts.jsonl.gz"):
        CutSet.from_cuts(eager).to_file(tmp_path / name)
        assert [describe_cut(cut) for cut in read_manifest(tmp_path / name)] == [describe_cut(cut) for cut in eager]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"audio_filepath": "x.wav", ', "invalid JSON"),
        (b'{"audio_filepath": "\xff.wav"}', "not UTF-8"),
        (b"[1, 2]", "expected a JSON object, found list"),
        (b'{"audio_filepath": "x.wav", "text": "a"}', "missing field 'duration'"),
        (b'{"audio_filepath": "x.wav", "duration": "1"}', "duration: expected seconds, found '1'"),
        (b'{"audio_filepath": "x.wav", "duration": NaN}', "duration: expected seconds"),
        (b'{"audio_filepath": "x.wav", "duration": 0}', "more than 0 seconds"),
        (b'{"audio_filepath": "x.wav", "duration": 1, "offset": -1}', "offset: expected seconds"),
        (b'{"audio_filepath": "x.wav", "duration": 1, "text": 5}', "text: expected a string"),
        (b'{"audio_filepath": "x.wav", "duration": 1, "task": "tts"}', "task: 'tts' is none of"),
        (b'{"audio_filepath": 3, "duration": 1, "id": "x"}', "audio_filepath: expected a path"),
        (b'{"audio": "x.wav"}', "neither a NeMo line"),
        (b'{"type": "MonoCut", "id": "x"}', ""),
        (b'{"type": "MonoCut", "id": "x", "start": 0, "duration": 1, "channel": 0, "supervisions": [7]}', ""),
        (b'{"type": "MonoCut", "id": "x", "start": 0, "duration": 1, "channel": 0, "recording": 5}', ""),
        (b'{"type": "MonoCut", "id": "x", "start": 0, "duration": -1, "channel": 0}', "duration"),
        (b'{"type": "Nothing", "id": "x"}', "Nothing"),
    ],
)
def test_a_bad_line_is_named(line, message, tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_bytes(json.dumps(GOOD).encode() + b"\n\n" + line + b"\n")
    with pytest.raises(ManifestError, match=r"m\.jsonl:3: ") as caught:
        list(read_manifest(path))
    assert message in str(caught.value)


@pytest.mark.parametrize("pattern", ["*/m.jsonl", "[ab]/m.jsonl", "{a,b}/m.jsonl", "a*/m.jsonl"])
def test_patterns_of_files_of_lines(pattern, tmp_path):
    """The paths in each are against its own folder."""
    folders = ["a", "b"] if pattern != "a*/m.jsonl" else ["a"]
    for folder in folders:
        (tmp_path / folder).mkdir()
        lines = write_corpus(tmp_path / folder)
        write_manifest(tmp_path / folder / "m.jsonl", lines)
    found = [cut.recording.sources[0].source for cut in read_manifest(tmp_path / pattern)]
    assert found == [str(tmp_path / folder / line["audio_filepath"]) for folder in folders for line in lines]
    with pytest.raises(ManifestError, match="no such manifest file"):
        read_manifest(tmp_path / "no*.jsonl")


def test_a_stated_kind_must_be_that_of_the_lines(tmp_path):
    (cut,) = true_cuts(tmp_path, write_corpus(tmp_path, 1))
    for obj, kind in ((GOOD, "lhotse"), (cut.to_dict(), "nemo")):
        for function in (describe, to_cut):
            with pytest.raises(LINE_ERRORS):
                function(obj, SourceConfig("m.jsonl", kind=kind))


@pytest.mark.parametrize("kind", KINDS)
def test_missing_files_are_an_error_at_once(kind, tmp_path):
    source = write_kind(kind, tmp_path, write_corpus(tmp_path))
    files = manifest_files(source)
    assert all(file.is_file() for file in files)
    assert is_plain(source) == (kind in ("nemo", "lhotse"))
    for file in files:
        file.unlink()
    for function in (manifest_files, read_manifest, iter_objects):
        with pytest.raises(ManifestError, match="no such|no cuts|neither"):
            function(source)


def test_a_directory_of_no_kind(tmp_path):
    with pytest.raises(ManifestError, match="neither a wav.scp"):
        read_manifest(tmp_path)
    with pytest.raises(ManifestError, match="wav.scp: no such file"):
        read_manifest(SourceConfig(str(tmp_path), kind="kaldi"))
    with pytest.raises(ManifestError, match="only be read as streams"):
        read_manifest(SourceConfig("pipe:cat m.jsonl", stream=True))
    assert write_manifest(tmp_path / "wav.scp", []) and read_manifest(tmp_path).is_lazy
