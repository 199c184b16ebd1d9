"""Manifests of both kinds, and lines that cannot be used."""

import json

import pytest
from lhotse import CutSet

from speechllm.data import ManifestError, SourceConfig, read_manifest

from .conftest import write_manifest

GOOD = {"audio_filepath": "x/1.wav", "duration": 1.5, "text": "one", "lang": "en"}


def test_nemo_lines_without_opening_the_audio(tmp_path):
    lines = [
        GOOD,
        {"audio_filepath": "/abs/2.flac", "duration": 2, "text": "two", "source_lang": "de"},
        {"audio_filepath": "3.wav", "duration": 1.0, "offset": 2.5, "text": "three", "id": "third"},
    ]
    cuts = read_manifest(write_manifest(tmp_path / "m.jsonl", lines), lang="xx")
    assert cuts.is_lazy
    first, second, third = cuts
    assert (first.id, first.duration, first.supervisions[0].text) == ("x/1", 1.5, "one")
    assert first.recording.sources[0].source == str(tmp_path / "x/1.wav")
    assert second.recording.sources[0].source == "/abs/2.flac"
    assert [cut.supervisions[0].language for cut in cuts] == ["en", "de", "xx"]
    assert (third.id, third.start, third.end) == ("third", 2.5, 3.5)


def test_lhotse_cuts(corpus, tmp_path):
    eager = [cut.drop_features() for cut in read_manifest(corpus / "a.jsonl")]
    for name in ("cuts.jsonl", "cuts.jsonl.gz"):
        CutSet.from_cuts(eager).to_file(tmp_path / name)
        cuts = list(read_manifest(tmp_path / name))
        assert [cut.id for cut in cuts] == [cut.id for cut in eager]
        assert {cut.supervisions[0].language for cut in cuts} == {"en"}


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
        (b'{"audio": "x.wav"}', "neither a NeMo line"),
        (b'{"type": "MonoCut", "id": "x"}', ""),
    ],
)
def test_a_bad_line_is_named(line, message, tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_bytes(json.dumps(GOOD).encode() + b"\n\n" + line + b"\n")
    with pytest.raises(ManifestError, match=r"m\.jsonl:3: ") as caught:
        list(read_manifest(path))
    assert message in str(caught.value)


def test_missing_manifest_and_bad_weight(tmp_path):
    with pytest.raises(ManifestError, match="no such manifest"):
        read_manifest(tmp_path / "none.jsonl")
    with pytest.raises(ValueError, match="weight"):
        SourceConfig("x", weight=0)
