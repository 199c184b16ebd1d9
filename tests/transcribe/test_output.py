"""Results of a run: files that are whole, what is done already, what is reported."""

import json

import numpy as np
import pytest

from speechllm.transcribe.inputs import Inputs, audio_input
from speechllm.transcribe.output import Output, transcribe_all
from speechllm.transcribe.segments import SegmentOptions
from tests.transcribe.conftest import EXPECTED, Listener


def test_folders_to_standard_output(audio, capsys):
    status = transcribe_all(Inputs([audio, audio / "none.wav"]), Listener(), SegmentOptions(), Output())
    out, err = capsys.readouterr()
    names = [audio / name for name in ("a.wav", "b.flac", "deep/c.MP3", "deep/er/d.ogg")]
    assert out == "".join(f"{name}\t{text}\n" for name, text in zip(names, EXPECTED.values(), strict=True))
    assert status == 1
    assert f"{audio}/bad.wav" in err and f"missing file: {audio}/none.wav" in err
    assert err.endswith("error: 2 of 6 could not be transcribed\n")


def test_a_folder_for_results_is_filled_once(audio, tmp_path, capsys):
    output = Output("json", tmp_path / "out")

    def run(output: Output, **options) -> Listener:
        listener = Listener(timestamps=True)
        status = transcribe_all(Inputs([audio]), listener, SegmentOptions(**options), output)
        assert status == 1  # the broken one
        return listener

    def batched(listener: Listener) -> int:
        return sum(len(batch.feature_lens) for batch in listener.batches)

    assert batched(run(output)) == 4
    files = sorted(str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*") if path.is_file())
    assert files == [f"{id}.json" for id in EXPECTED]
    for id, text in EXPECTED.items():
        record = json.loads((tmp_path / f"out/{id}.json").read_text())
        assert (record["id"], record["text"]) == (id, text)
        assert [word["word"] for segment in record["segments"] for word in segment["words"]] == text.split()
    assert batched(run(output)) == 0
    assert "4 of 5 were done before" in capsys.readouterr().err
    (tmp_path / "out/deep/c.json").unlink()
    assert batched(run(output)) == 1
    assert batched(run(Output("json", tmp_path / "out", overwrite=True))) == 4


def test_an_interrupted_run_leaves_whole_files_alone(audio, tmp_path):
    class Stopped(Exception):
        pass

    def stops(batches):
        for i, found in enumerate(Listener()(batches)):
            if i == 2:
                raise Stopped
            yield found

    output, options = Output("txt", tmp_path / "out"), SegmentOptions(batch_seconds=0.1)
    with pytest.raises(Stopped):
        transcribe_all(Inputs([audio]), stops, options, output)
    there = {path for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert 0 < len(there) < 4
    assert transcribe_all(Inputs([audio]), Listener(), options, output) == 1
    assert {id: (tmp_path / f"out/{id}.txt").read_text() for id in EXPECTED} == {
        id: f"{text}\n" for id, text in EXPECTED.items()
    }


def test_two_inputs_do_not_get_the_same_file(audio, tmp_path, capsys):
    inputs = Inputs([audio / "a.wav", audio / "deep/../a.wav", audio / "b.flac"])
    assert transcribe_all(inputs, Listener(), SegmentOptions(), Output("txt", tmp_path / "out")) == 1
    assert "a.txt is for" in capsys.readouterr().err
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a.txt", "b.txt"]


def test_results_stay_inside_their_folder(tmp_path):
    output = Output("txt", tmp_path)
    for id, expected in (("/etc/x", "etc/x.txt"), ("../../y.z", "y.z.txt"), ("a@1.5", "a@1.5.txt"), ("..", "...txt")):
        assert output.file_of(audio_input(np.zeros(1), id)) == tmp_path / expected
