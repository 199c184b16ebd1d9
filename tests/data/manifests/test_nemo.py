"""NeMo's lines, and its tarred form with what can be wrong in it."""

import gzip
import json
from dataclasses import replace

import numpy as np
import pytest
import soundfile
import torch
from lhotse import CutSet, NumpyFilesWriter, Recording

from speechllm.data import ManifestError, SourceConfig, UtteranceError, read_manifest
from speechllm.data.audio import cut_blocks, load_precomputed, load_samples
from speechllm.data.check import CheckOptions, check_manifests
from speechllm.data.convert import convert_to_cuts, convert_to_shar
from speechllm.data.features import fbank_extractor, plain_fbank
from speechllm.data.index import open_index
from speechllm.data.manifests.manifest import LINE_ERRORS, describe, describe_cut, iter_objects, to_cut
from speechllm.data.manifests.stream import stream_cuts
from tests.data.conftest import write_manifest, write_tone
from tests.data.corpora import flat_name, streamed, true_cuts, write_corpus, write_kind, write_tar

LINE = {"audio_filepath": "x/1.wav", "duration": 1.5}


def said(source=None, **fields):
    return describe(LINE | fields, source or SourceConfig("m.jsonl"))


def test_lines_without_opening_the_audio(tmp_path):
    lines = [
        LINE | {"text": "one", "lang": "en"},
        {"audio_filepath": "/abs/2.flac", "duration": 2, "text": "two", "source_lang": "de"},
        {"audio_filepath": "3.wav", "duration": 1.0, "offset": 2.5, "text": "three", "id": "third"},
    ]
    source = SourceConfig(str(write_manifest(tmp_path / "m.jsonl", lines)), lang="xx")
    first, second, third = cuts = list(read_manifest(source))
    assert (first.id, first.duration, first.supervisions[0].text) == ("x/1", 1.5, "one")
    assert first.recording.sources[0].source == str(tmp_path / "x/1.wav")
    assert second.recording.sources[0].source == "/abs/2.flac"
    assert [cut.supervisions[0].language for cut in cuts] == ["en", "de", "xx"]
    assert (third.id, third.start, third.end) == ("third", 2.5, 3.5)


def test_ids():
    assert said(audio_filepath="a.b/c").id == "a.b/c"
    assert said(audio_filepath="a.b/c.flac").id == "a.b/c"
    assert said(offset=12345.678).id != said(offset=12345.679).id
    assert said(offset=0).id == "x/1"
    assert said(id=7).id == "7"


def test_words_are_where_they_are_in_the_utterance():
    alignment = {"word": [["one", 2.75, 0.25], ["two", 3.5, 0.5, 0.9]], "phone": [["w", 2.75, 0.125]]}
    line = LINE | {"text": "one two", "offset": 2.5, "alignment": alignment}
    source = SourceConfig("m.jsonl")
    expected = (("one", 0.25, 0.5), ("two", 1.0, 1.5))
    cut = to_cut(line, source)
    assert describe(line, source).words == describe_cut(cut).words == expected
    stored = cut.to_dict()
    assert describe(stored, source).words == expected
    assert describe_cut(cut.pad(5.0)).words is None
    assert said().words is said(alignment={"phone": []}).words is None
    for item in (["one", "2", 3], ["one", -2, 1], [3, 1, 1], ["one", 1], ["one", 1, float("nan")]):
        with pytest.raises(LINE_ERRORS):
            said(alignment={"word": [item]})


def test_texts_and_tasks():
    assert said(text=None).text == ""
    assert said(asr_text=" a ").text == "a"
    assert said(text="b", asr_text="a").text == "b"
    for name in ("ast", "s2t_translation", "translate"):
        for field in ("task", "taskname"):
            entry = said(**{field: name}, text="a", answer="b", source_lang="en", target_lang="de")
            assert (entry.task, entry.text, entry.target, entry.lang, entry.target_lang) == (
                "ast",
                "a",
                "b",
                "en",
                "de",
            )
    assert said(taskname="ast", answer="a", ast_text="b").target == "b"
    assert said(taskname="asr", answer="a").target == "a"
    default = SourceConfig("m.jsonl", task="ast", lang="fr", target_lang="en")
    assert said(default, ast_text="b").target == "b"
    assert said(default, task="asr", text="a", ast_text="b").target == "a"
    assert (said(default).lang, said(default).target_lang, said(default, lang="it").lang) == ("fr", "en", "it")


def problems(source) -> list[str]:
    return [str(found) for _, found in iter_objects(source) if isinstance(found, ManifestError)]


@pytest.fixture
def tarred(tmp_path):
    lines = write_corpus(tmp_path)
    return write_kind("tarred", tmp_path, lines), lines


def test_each_line_and_member_must_have_the_other(tarred, tmp_path):
    source, lines = tarred
    path = tmp_path / "manifest_0.json"
    first, second, third = path.read_text().splitlines()
    lost = json.dumps(json.loads(second) | {"audio_filepath": "gone.wav"})
    path.write_text("\n".join([first, lost, "{", third]))
    found = problems(source)
    assert len(found) == 3
    assert "manifest_0.json:2: " in found[0] and "'gone.wav' is not in" in found[0]
    assert "manifest_0.json:3: invalid JSON" in found[1]
    assert f"audio_0.tar:{json.loads(second)['audio_filepath']}: no line of" in found[2]
    assert sum(not isinstance(f, ManifestError) for _, f in iter_objects(source)) == len(lines) - 1
    cuts, errors = streamed(source)
    assert {cut.id for cut in cuts} == {line["id"] for line in lines} - {"u1"}
    assert all(any(problem in error for error in errors) for problem in found)


@pytest.mark.parametrize("broken", [lambda data: data[: len(data) // 2], gzip.compress, lambda data: b"nonsense" * 200])
def test_a_damaged_tar_file_is_named_and_the_others_are_read(broken, tarred, tmp_path):
    source, lines = tarred
    tar = tmp_path / "audio_0.tar"
    tar.write_bytes(broken(tar.read_bytes()))
    assert f"{tar}: not a whole, uncompressed tar file" in problems(source)[0]
    good = [to_cut(obj, source) for _, obj in iter_objects(source) if not isinstance(obj, ManifestError)]
    assert {line["id"] for line in lines[3:]} <= {cut.id for cut in good}
    true = {cut.id: cut for cut in true_cuts(tmp_path, lines)}
    for cut in good:
        assert np.array_equal(load_samples(cut), load_samples(true[cut.id]))
    cuts, errors = streamed(source)
    assert {line["id"] for line in lines[3:]} <= {cut.id for cut in cuts}
    if broken is gzip.compress:  # a stream unpacks it as it comes
        assert len(cuts) == len(lines)
    else:
        assert len(errors) == 1 and f"{tar}: not a whole, uncompressed tar file" in errors[0]


def test_names_in_the_tar(tmp_path):
    lines = write_corpus(tmp_path, 3)
    data = [(tmp_path / line["audio_filepath"]).read_bytes() for line in lines]
    names = [lines[0]["audio_filepath"], flat_name(lines[1]["audio_filepath"]), "./c.wav", "c-sub2.wav"]
    tar = write_tar(tmp_path / "a.tar", dict(zip(names, (*data, data[0]), strict=True)))
    about = [0, 1, 2, 2, 0]  # the utterance that each line is about; c-sub2.wav has a member of its own
    paths = [lines[0]["audio_filepath"], lines[1]["audio_filepath"], "c.wav", "c-sub1.wav", "c-sub2.wav"]
    manifest = write_manifest(
        tmp_path / "m.json",
        [
            lines[i] | {"audio_filepath": path, "id": str(number)}
            for number, (i, path) in enumerate(zip(about, paths, strict=True))
        ],
    )
    source = SourceConfig(str(manifest), tar_path=str(tar))
    true = [load_samples(cut) for cut in true_cuts(tmp_path, lines)]
    for cuts in (read_manifest(source), streamed(source)[0]):
        samples = {cut.id: load_samples(cut) for cut in cuts}
        assert len(samples) == len(about)
        for number, i in enumerate(about):
            assert np.array_equal(samples[str(number)], true[i])


def test_shards_must_go_together(tarred, tmp_path):
    source, lines = tarred
    with pytest.raises(ManifestError, match="3 manifests, and 2 tar files"):
        write_manifest(tmp_path / "manifest_2.json", [])
        read_manifest(replace(source, path=str(tmp_path / "manifest_{0..2}.json")))
    one = write_manifest(tmp_path / "one.json", [lines[0] | {"shard_id": 5}, lines[1]])
    found = problems(replace(source, path=str(one)))
    assert "one.json:1: shard_id: 5 is not among the 2 tar files" in found[0]
    assert "one.json:2: missing field 'shard_id'" in found[1]
    (tmp_path / "audio_1.tar").rename(tmp_path / "audio_x.tar")
    with pytest.raises(ManifestError, match="must end in the numbers"):
        problems(SourceConfig(str(one), tar_path=str(tmp_path / "audio_{0,x}.tar")))


def test_streams_through_commands(tarred, tmp_path):
    source, lines = tarred
    piped = SourceConfig(
        f"pipe:cat {tmp_path}/manifest_{{0..1}}.json", tar_path=f"pipe:cat {tmp_path}/audio_{{0..1}}.tar", stream=True
    )
    assert {cut.id for cut in stream_cuts(piped, seed=0, epoch=0)} == {line["id"] for line in lines}


@pytest.mark.parametrize("kind", ["nemo", "nemo.gz", "nemo shards", "tarred", "tarred, one manifest"])
@pytest.mark.parametrize("missing", [False, True])
def test_without_a_duration_it_is_the_whole_file(kind, missing, tmp_path):
    lines = write_corpus(tmp_path)
    true = {cut.id: cut for cut in true_cuts(tmp_path, lines)}
    for line in lines[::2]:
        line["duration"] = None
        if missing:
            del line["duration"]
    lines[3] |= {"duration": None, "offset": 0.25}
    lines[5] |= {"duration": None, "offset": 9.0}  # beyond its end
    source = write_kind(kind, tmp_path, lines)
    assert "offset: 9 s is beyond the 0.800 s of the file" in problems_of_description(source)
    cuts, errors = streamed(source)
    assert len(errors) == 1 and len(cuts) == 6
    for cut in (*cuts, *(to_cut(obj, source) for _, obj in iter_objects(source) if obj["id"] != "u5")):
        samples, start = load_samples(true[cut.id]), 4000 if cut.id == "u3" else 0
        assert cut.duration == pytest.approx((len(samples) - start) / 16000, abs=1e-3)
        if cut.id != "u3":  # at 8 kHz a part is resampled with other neighbors
            assert np.array_equal(load_samples(cut), samples)
    index = open_index(source)
    assert index.durations.tolist() == pytest.approx(
        [true[f"u{i}"].duration - 0.25 * (i == 3) for i in (0, 1, 2, 3, 4, 6)]
    )


def problems_of_description(source) -> str:
    found = []
    for _, obj in iter_objects(source):
        try:
            describe(obj, source)
        except LINE_ERRORS as error:
            found.append(str(error))
    return "\n".join(found)


@pytest.mark.parametrize(
    ("said", "of_source", "rows"),
    [
        ({}, None, [0, 1, 2]),
        ({"channel": 1}, None, [1]),
        ({"channel": 0}, 2, [0]),
        ({"channel": None}, 2, [2]),
        ({"channel": [0, 2]}, None, [0, 2]),
        ({"channel": "average"}, 2, [0, 1, 2]),
        ({"channel_selector": 2}, None, [2]),
    ],
)
def test_channels(said, of_source, rows, tmp_path):
    samples = np.random.default_rng(0).uniform(-0.5, 0.5, (8000, 3)).astype(np.float32)
    soundfile.write(tmp_path / "x.wav", samples, 16000, subtype="FLOAT")
    path = write_manifest(tmp_path / "m.jsonl", [{"audio_filepath": "x.wav", "duration": 0.5, "text": "a"} | said])
    source = SourceConfig(str(path), channel=of_source)
    (cut,) = read_manifest(source)
    expected = samples[:, rows].mean(axis=1)
    np.testing.assert_allclose(load_samples(cut), expected, atol=1e-7)
    np.testing.assert_allclose(np.concatenate(list(cut_blocks(cut))), expected, atol=1e-7)
    for convert, output in ((convert_to_cuts, "cuts.jsonl"), (convert_to_shar, "shar")):
        convert(source, tmp_path / output)
        (again,) = read_manifest(tmp_path / output)
        assert describe_cut(again) == describe_cut(cut)
        np.testing.assert_allclose(load_samples(again), expected, atol=1e-4)
        np.testing.assert_allclose(np.concatenate(list(cut_blocks(again))), expected, atol=1e-4)


def test_a_channel_that_is_not_there(tmp_path):
    write_tone(tmp_path / "x.wav", 0.5, seed=0, channels=2)
    line = {"audio_filepath": "x.wav", "duration": 0.5, "text": "a", "channel": 2}
    (cut,) = read_manifest(write_manifest(tmp_path / "m.jsonl", [line]))
    with pytest.raises(UtteranceError, match=r"no such channel: .*2 is not among \[0, 1\]"):
        load_samples(cut)


@pytest.mark.parametrize("kind", ["nemo", "nemo.gz", "nemo shards", "lhotse", "lhotse.gz", "lhotse shards"])
@pytest.mark.parametrize("place", ["manifest", "current", "both"])
def test_relative_paths_are_beside_the_manifest_or_from_the_current_directory(kind, place, tmp_path, monkeypatch):
    """As NeMo has them: ./tests/wavs/en_0000.wav of a manifest in tests/json/."""
    beside, current = tmp_path / "data/tests/json", tmp_path / "here"
    line = {"audio_filepath": "./tests/wavs/en_0000.wav", "duration": 0.5, "text": "a", "id": "u"}
    for folder, seed in ((beside, 1), (current, 2)):
        folder.mkdir(parents=True)
        if place in ("both", "manifest" if folder is beside else "current"):
            write_tone(folder / line["audio_filepath"], 0.5, seed=seed)
    monkeypatch.chdir(current)
    objects = [line]
    if kind.startswith("lhotse"):
        found = (current if place == "current" else beside) / line["audio_filepath"]
        cut = Recording.from_file(found, recording_id="u").to_cut()
        cut.recording.sources[0].source = line["audio_filepath"]
        objects = [cut.to_dict(), cut.pad(duration=0.7).to_dict()]
    if kind.endswith("gz"):
        (beside / "m.jsonl.gz").write_bytes(gzip.compress("\n".join(map(json.dumps, objects)).encode()))
        source = SourceConfig(str(beside / "m.jsonl.gz"))
    elif kind.endswith("shards"):
        write_manifest(beside / "m_0.jsonl", objects)
        write_manifest(beside / "m_1.jsonl", [])
        source = SourceConfig(str(beside / "m_{0..1}.jsonl"))
    else:
        source = SourceConfig(str(write_manifest(beside / "m.jsonl", objects)))
    seed = 2 if place == "current" else 1
    write_tone(tmp_path / "true.wav", 0.5, seed=seed)
    true = soundfile.read(tmp_path / "true.wav", dtype="float32")[0]
    index = open_index(source)
    for cut in (*read_manifest(source), *streamed(source)[0], *(index.cut(i) for i in range(len(index)))):
        np.testing.assert_array_equal(load_samples(cut)[:8000], true)
    assert not check_manifests([source], CheckOptions()).problem_counts.keys() - {"empty text", "duplicate id"}


def test_features_of_lhotse_cuts_are_beside_the_manifest_too(tmp_path, monkeypatch):
    lines = write_corpus(tmp_path, 3)[::2]
    cuts = CutSet.from_cuts(true_cuts(tmp_path, lines)).compute_and_store_features(
        fbank_extractor(), tmp_path / "data/feats", storage_type=NumpyFilesWriter
    )
    for cut in cuts:
        cut.recording, cut.features.storage_path = None, "feats"
    cuts.to_file(tmp_path / "data/cuts.jsonl")
    monkeypatch.chdir(tmp_path)
    for cut, true in zip(read_manifest("data/cuts.jsonl"), true_cuts(tmp_path, lines), strict=True):
        torch.testing.assert_close(load_precomputed(cut, "fbank"), plain_fbank(torch.from_numpy(load_samples(true))))
