"""Kaldi data directories: segments, commands, durations, and what can be wrong."""

from dataclasses import replace

import numpy as np
import pytest
import soundfile

from speechllm.data import ManifestError, read_manifest
from speechllm.data.audio import cut_blocks, load_samples
from speechllm.data.check import CheckOptions, check_manifests
from speechllm.data.manifests.kaldi import kaldi_files
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
    expected += ["wav.scp:4: wav.scp has no audio of u3", "wav.scp:5: ", "wav.scp:7: utt2lang of u6: not UTF-8"]
    assert len(found) == len(expected)
    assert all(message in problem for message, problem in zip(expected, found, strict=True))
    assert "inside a Kaldi archive" in found[3]
    good = [found["id"] for _, found in iter_objects(source) if not isinstance(found, ManifestError)]
    assert good == ["u0", "u5"]


@pytest.mark.parametrize("command", [False, True])
@pytest.mark.parametrize(
    ("segments", "table", "rows"),
    [
        ("a call 0 0.5 0\nb call 0 0.5 1\nc call 0.25 0.5 1\n", None, [[0], [1], [1]]),
        ("a call-A 0 0.5\nb call-B 0 0.5\nc call-B 0.25 -1\n", "call-A x A\ncall-B x B\n", [[0], [1], [1]]),
        ("a call-A 0 0.5\nb call-B 0 0.5\nc call-B 0.25 -1\n", "call-A x 1\ncall-B x 2\n", [[0], [1], [1]]),
        ("a call-A 0 0.5\nb call-B 0 0.5\nc call-B 0.25 -1\n", "call-A x 0\ncall-B x 1\n", [[0], [1], [1]]),
        ("a call-A 0 0.5 1\nb call-B 0 0.5 0\nc call-B 0.25 -1\n", "call-A x A\ncall-B x B\n", [[1], [0], [1]]),
        ("a call 0 0.5\nb call 0 0.5\nc call 0.25 -1\n", None, [[0, 1]] * 3),
    ],
)
def test_channels(segments, table, rows, command, tmp_path):
    """Of a telephone call, whose speakers have a channel each."""
    samples = np.random.default_rng(0).uniform(-0.5, 0.5, (8000, 2)).astype(np.float32)
    soundfile.write(tmp_path / "call.wav", samples, 16000, subtype="FLOAT")
    where = f"cat {tmp_path}/call.wav |" if command else f"{tmp_path}/call.wav"
    names = dict.fromkeys(line.split()[1] for line in segments.splitlines())
    (tmp_path / "wav.scp").write_text("".join(f"{name} {where}\n" for name in names))
    (tmp_path / "segments").write_text(segments)
    (tmp_path / "text").write_text("a one\nb two\nc three\n")
    if table is not None:
        (tmp_path / "reco2file_and_channel").write_text(table)
    cuts = list(read_manifest(tmp_path))
    assert [describe_cut(cut).text for cut in cuts] == ["one", "two", "three"]
    assert len(kaldi_files(tmp_path)) == (3 if table is None else 4)
    for i, cut in enumerate(cuts):
        expected = samples[4000 if i == 2 else 0 :, rows[i]].mean(axis=1)
        np.testing.assert_allclose(load_samples(cut), expected, atol=1e-7)
        np.testing.assert_allclose(np.concatenate(list(cut_blocks(cut))), expected, atol=1e-7)


def test_a_channel_that_the_command_has_cut_out_already(tmp_path):
    """As the sph2pipe -c 2 of Switchboard's wav.scp does."""
    samples = np.random.default_rng(0).uniform(-0.5, 0.5, 8000).astype(np.float32)
    soundfile.write(tmp_path / "b.wav", samples, 16000, subtype="FLOAT")
    (tmp_path / "wav.scp").write_text(f"call-B cat {tmp_path}/b.wav |\n")
    (tmp_path / "reco2file_and_channel").write_text("call-B call B\n")
    (cut,) = read_manifest(tmp_path)
    np.testing.assert_array_equal(load_samples(cut), samples)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("segments", "u u0 0 0.2 left\n", "segments:1: segments: expected a channel, found 'left'"),
        ("reco2file_and_channel", "u0 u0 left\n", "wav.scp:1: reco2file_and_channel: expected a channel"),
    ],
)
def test_bad_channels_are_named(data, name, content, message):
    source, _, folder = data
    (folder / name).write_text(content)
    assert message in problems(source)[0]


@pytest.mark.parametrize("segments", [False, True])
def test_texts_without_audio_are_reported(data, segments):
    source, lines, folder = data
    if segments:
        (folder / "segments").write_text("".join(f"{line['id']} {line['id']} 0 0.2\n" for line in lines))
    with open(folder / "text", "a") as file:
        file.write("gone lost words\n")
    assert not problems(source)
    report = check_manifests([source], CheckOptions())
    (problem,) = report.problems["text without audio"]
    table = "segments" if segments else "wav.scp"
    assert problem.location.endswith("text:8") and problem.details == f"gone has a text, and no audio in {table}"


def test_fields_are_not_for_kaldi(data):
    source, _, _ = data
    with pytest.raises(ManifestError, match="text_field and lang_field are not for Kaldi"):
        iter_objects(replace(source, text_field="text"))


def test_the_table_that_is_not_utf8_is_named(data):
    source, _, folder = data
    (folder / "text").write_bytes((folder / "text").read_bytes() + b"u99 caf\xe9\n")
    (folder / "wav.scp").write_text((folder / "wav.scp").read_text() + "u99 a.wav\n")
    (folder / "utt2dur").write_text((folder / "utt2dur").read_text() + "u99 1.0\n")
    (message,) = problems(source)
    assert "text of u99: not UTF-8: 'utf-8' codec can't decode byte 0xe9" in message
