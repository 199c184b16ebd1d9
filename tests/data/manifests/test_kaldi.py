"""Kaldi data directories: segments, commands, durations, and what can be wrong."""

import numpy as np
import pytest
import soundfile

from speechllm.data import ManifestError, read_manifest
from speechllm.data.audio import load_samples
from speechllm.data.manifests.manifest import describe_cut, iter_objects
from tests.data.corpora import true_cuts, write_corpus, write_kind


@pytest.fixture
def data(tmp_path):
    lines = write_corpus(tmp_path)
    return write_kind("kaldi", tmp_path, lines), lines, tmp_path / "kaldi"


def problems(source) -> list[str]:
    return [str(found) for _, found in iter_objects(source) if isinstance(found, ManifestError)]


@pytest.mark.parametrize("durations", ["utt2dur", "reco2dur", "headers"])
@pytest.mark.parametrize("command", [False, True])
def test_durations_and_commands(data, durations, command):
    source, lines, folder = data
    (folder / "utt2dur").rename(folder / durations)
    if command:
        rows = [row.split() for row in (folder / "wav.scp").read_text().splitlines()]
        (folder / "wav.scp").write_text("".join(f"{name} cat {path} |\n" for name, path in rows))
    cuts = list(read_manifest(source))
    assert [describe_cut(cut).duration for cut in cuts] == pytest.approx([line["duration"] for line in lines], abs=1e-3)
    assert {cut.recording.sources[0].type for cut in cuts} == {"command" if command else "file"}
    for cut, true in zip(cuts, true_cuts(folder.parent, lines), strict=True):
        assert np.array_equal(load_samples(cut), load_samples(true))


def test_segments(data):
    source, lines, folder = data
    (folder / "segments").write_text("u1 u0 0.05 0.25\nu2 u6 0.1 -1\nu9 u6 0.2 0.3 1\n")
    first, second, third = list(read_manifest(source))
    assert [first.id, second.id, third.id] == ["u1", "u2", "u9"]
    assert describe_cut(first).text == lines[1]["text"].strip() and describe_cut(third).text == ""
    assert first.supervisions[0].speaker == "someone"
    for cut, recording, start, end in ((first, 0, 0.05, 0.25), (second, 6, 0.1, None), (third, 6, 0.2, 0.3)):
        samples, rate = soundfile.read(folder.parent / lines[recording]["audio_filepath"], dtype="float32")
        end = len(samples) if end is None else round(end * rate)
        assert np.array_equal(load_samples(cut), samples[round(start * rate) : end])


def test_an_utterance_without_text_has_an_empty_one(data):
    source, lines, folder = data
    (folder / "text").unlink()
    (folder / "utt2lang").unlink()
    assert {(describe_cut(cut).text, describe_cut(cut).lang) for cut in read_manifest(source)} == {("", None)}


def test_bad_segments_are_named(data):
    source, _, folder = data
    (folder / "segments").write_text("a nobody 0 1\nb u0 0.2 0.1\nc u0 x 0.1\nd u0\ne u0 0 0.2\n")
    for line, (message, found) in enumerate(
        zip(("nobody is not in wav.scp", "ends at 0.1", "start: expected", "2 fields"), problems(source), strict=True),
        start=1,
    ):
        assert f"segments:{line}: " in found and message in found


def test_bad_tables_are_named(data):
    source, lines, folder = data
    (folder / "utt2dur").unlink()
    rows = (folder / "wav.scp").read_text().splitlines()
    rows[1] = "u1 missing.wav"
    rows[2] = "u2 data/raw.ark:42"
    rows[3] = "u3"
    rows[4] = "u4 false |"
    rows.append(rows[0])
    (folder / "wav.scp").write_text("\n".join(rows))
    with open(folder / "text", "ab") as file:
        file.write(b"u5 again\n")
    (folder / "utt2lang").write_bytes(b"u6 \xff\n")
    found = problems(source)
    expected = ["wav.scp:8: u0 is in wav.scp twice", "text:8: u5 is in text twice", "wav.scp:2: ", "wav.scp:3: "]
    expected += ["wav.scp:4: wav.scp has no audio of u3", "wav.scp:5: ", "wav.scp:7: not UTF-8"]
    assert len(found) == len(expected)
    assert all(message in problem for message, problem in zip(expected, found, strict=True))
    assert "inside a Kaldi archive" in found[3]
    good = [found["id"] for _, found in iter_objects(source) if not isinstance(found, ManifestError)]
    assert good == ["u0", "u5"]
