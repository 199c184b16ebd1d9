"""Results of a run: files that are whole, what is done already, what is reported."""

import errno
import json
import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import soundfile

from speechllm.data.share import Share
from speechllm.errors import UserError
from speechllm.prompt.request import Request
from speechllm.transcribe.inputs import Inputs, audio_input
from speechllm.transcribe.output import Output, transcribe_all
from speechllm.transcribe.segments import SegmentOptions
from tests.transcribe.conftest import EXPECTED, RATE, Listener, melody


def files_in(folder):
    """The results in a folder: what is about them is hidden."""
    files = (str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    return sorted(file for file in files if not file.startswith("."))


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
    assert files_in(tmp_path / "out") == [f"{id}.json" for id in EXPECTED]
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

    class Stops(Listener):
        def __call__(self, batches):
            for i, found in enumerate(super().__call__(batches)):
                if i == 2:
                    raise Stopped
                yield found

    output, options = Output("txt", tmp_path / "out"), SegmentOptions(batch_seconds=0.1)
    with pytest.raises(Stopped):
        transcribe_all(Inputs([audio]), Stops(), options, output)
    assert 0 < len(files_in(tmp_path / "out")) < 4
    assert transcribe_all(Inputs([audio]), Listener(), options, output) == 1
    assert {id: (tmp_path / f"out/{id}.txt").read_text() for id in EXPECTED} == {
        id: f"{text}\n" for id, text in EXPECTED.items()
    }


def test_two_inputs_do_not_get_the_same_file(audio, tmp_path, capsys):
    inputs = Inputs([audio / "a.wav", audio / "deep/../a.wav", audio / "b.flac"])
    assert transcribe_all(inputs, Listener(), SegmentOptions(), Output("txt", tmp_path / "out")) == 1
    assert "a.txt is for" in capsys.readouterr().err
    assert files_in(tmp_path / "out") == ["a.txt", "b.txt"]


def test_results_stay_inside_their_folder(tmp_path):
    output = Output("txt", tmp_path)
    for id, expected in (("/etc/x", "etc/x.txt"), ("../../y.z", "y.z.txt"), ("a@1.5", "a@1.5.txt"), ("..", "...txt")):
        assert output.file_of(audio_input(np.zeros(1), id)) == tmp_path / expected


def transcribed(paths, folder, made_with="model", **more) -> tuple[int, int]:
    """Exit status, and how many segments were recognized."""
    listener = Listener()
    output = Output("txt", folder, made_with=made_with)
    status = transcribe_all(Inputs(paths, **more), listener, SegmentOptions(), output)
    return status, sum(len(batch.feature_lens) for batch in listener.batches)


@pytest.fixture
def days(tmp_path):
    for day, words in (("day1", ["do"]), ("day2", ["re", "mi"])):
        (tmp_path / day).mkdir()
        soundfile.write(tmp_path / day / "rec001.wav", melody(words, 0.2), RATE)
    return tmp_path / "day1", tmp_path / "day2"


def test_a_result_is_of_one_recording(days, tmp_path, capsys):
    out = tmp_path / "out"
    for _ in range(2):
        for day in days:
            assert transcribed([day / "rec001.wav"], out)[0] == 0
    assert "1 of 1 were done before" in capsys.readouterr().err
    assert (out / "rec001.txt").read_text() == "do\n"
    assert (out / "day2/rec001.txt").read_text() == "re mi\n"
    assert transcribed(days, tmp_path / "both") == (0, 2)
    assert files_in(tmp_path / "both") == ["day1/rec001.txt", "day2/rec001.txt"]


def test_another_model_language_or_recording_is_not_done(days, tmp_path):
    out, file = tmp_path / "out", days[0] / "rec001.wav"
    assert transcribed([file], out) == (0, 1)
    assert transcribed([file], out) == (0, 0)
    assert transcribed([file], out, made_with="other model") == (0, 1)
    assert transcribed([file], out, made_with="other model", request=Request(language="en")) == (0, 1)
    assert transcribed([file], out, made_with="other model", request=Request(language="en")) == (0, 0)
    soundfile.write(file, melody(["fa", "la"], 0.2), RATE)
    assert transcribed([file], out, made_with="other model", request=Request(language="en")) == (0, 1)
    assert (out / "rec001.txt").read_text() == "fa la\n"


def test_what_people_have_written_stays(days, tmp_path, capsys):
    out, file = tmp_path / "out", days[0] / "rec001.wav"
    out.mkdir()
    (out / "rec001.txt").write_text("notes of my own\n")
    assert transcribed([file], out) == (1, 0)
    assert "rec001.txt is there, and it is not known what it is of" in capsys.readouterr().err
    (out / "rec001.txt").unlink()
    assert transcribed([file], out) == (0, 1)
    (out / "rec001.txt").write_text("Do!\n")
    assert transcribed([file], out) == (0, 0)  # corrected by hand
    assert transcribed([file], out, made_with="other") == (1, 0)
    assert "and changed since" in capsys.readouterr().err
    assert (out / "rec001.txt").read_text() == "Do!\n"


def test_a_run_killed_between_index_and_result_goes_on(days, tmp_path, monkeypatch):
    out, file = tmp_path / "out", days[0] / "rec001.wav"
    transcribed([file], out)
    soundfile.write(file, melody(["fa", "la"], 0.2), RATE)

    def killed(*names):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("os.replace", killed)
        transcribed([file], out)
    assert sorted(path.name for path in out.glob("*")) == [".transcribed.jsonl", "rec001.txt"]
    with open(out / ".transcribed.jsonl", "a") as index:
        index.write('{"file": "rec001.txt", "sha')  # a line that a full disk has cut off
    assert transcribed([file], out) == (0, 1)
    assert transcribed([file], out) == (0, 0)
    assert (out / "rec001.txt").read_text() == "fa la\n"


def test_a_full_disk_says_so_and_leaves_nothing_half_written(days, tmp_path, monkeypatch):
    def full(path, data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("pathlib.Path.write_bytes", full)
    with pytest.raises(UserError, match="rec001.txt: cannot be written: No space left on device"):
        transcribed([days[0] / "rec001.wav"], tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_runs_into_one_folder_at_the_same_time(audio, tmp_path):
    with ThreadPoolExecutor(4) as pool:
        runs = [pool.submit(transcribed, [audio], tmp_path / "out") for _ in range(4)]
    assert {run.result()[0] for run in runs} == {1}  # the broken one
    assert files_in(tmp_path / "out") == [f"{id}.txt" for id in EXPECTED]
    assert transcribed([audio], tmp_path / "out") == (1, 0)


@pytest.mark.parametrize(
    "id", ["n" * 300, "\u00fc" * 200, "folder" * 60 + "/x", "a\0b", "\ud800", os.fsdecode(b"\xff" * 254)]
)
def test_any_id_is_a_name(tmp_path, id):
    samples = melody(["do"], 0.1)
    file = Output("json", tmp_path).file_of(audio_input(samples, id))
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("")
    assert file.suffix == ".json"
    assert file != Output("json", tmp_path).file_of(audio_input(samples, id + "x"))


def test_a_result_that_cannot_have_its_name_ends_nothing(audio, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    (out / "deep").write_text("a file where a folder is needed")
    (out / "a.txt").mkdir()
    assert transcribed([audio], out)[0] == 1
    assert files_in(out) == ["b.txt", "deep"]
    err = capsys.readouterr().err
    assert "a.txt: cannot be read: Is a directory" in err and "deep/c.txt: cannot be written: " in err
    assert transcribed(["n" * 300 + ".wav", audio / "b.flac"], tmp_path / "other")[0] == 1
    (result,) = files_in(tmp_path / "other")
    assert result.endswith("b.txt")


def shared(paths, folder, rank, world_size, recognizer=None, **more) -> tuple[int, int]:
    """As `transcribed`, of one process of several."""
    share, listener = Share(rank, world_size), recognizer or Listener()
    output = Output("txt", folder, made_with="model", share=share, **more)
    status = transcribe_all(Inputs(paths, share=share), listener, SegmentOptions(batch_seconds=0.1), output)
    return status, sum(len(batch.feature_lens) for batch in listener.batches)


def contents(folder):
    return {file: (folder / file).read_text() for file in files_in(folder)}


def test_processes_that_share_inputs_make_what_one_makes(audio, tmp_path, capsys):
    """One of them killed and started again; then with another number of them, of which all finds its work done."""

    class Killed(Listener):
        def __call__(self, batches):
            yield from list(super().__call__(batches))[:1]
            raise KeyboardInterrupt

    (audio / "bad.wav").unlink()
    transcribed([audio], tmp_path / "one")
    out = tmp_path / "shared"
    assert shared([audio], out, 1, 2) == (0, 2)
    with pytest.raises(KeyboardInterrupt):
        shared([audio], out, 0, 2, Killed())
    assert len(files_in(out)) == 3
    assert shared([audio], out, 0, 2) == (0, 1)
    assert contents(out) == contents(tmp_path / "one") and len(contents(out)) == 4
    for rank, world_size in ((0, 1), (0, 3), (1, 3), (2, 3)):
        assert shared([audio], out, rank, world_size) == (0, 0)
    (audio / "b.flac").unlink()
    soundfile.write(audio / "b.flac", melody(["sol"], 0.2), RATE)
    assert [shared([audio], out, rank, 2)[1] for rank in (0, 1, 0, 1)] == [0, 1, 0, 0]
    assert (out / "b.txt").read_text() == "sol\n"


def test_standard_outputs_of_several_processes_are_that_of_one(audio, capsys):
    def lines(rank, world_size):
        share = Share(rank, world_size)
        transcribe_all(Inputs([audio], share=share), Listener(), SegmentOptions(), Output(share=share))
        return capsys.readouterr().out.splitlines()

    assert sorted([*lines(0, 2), *lines(1, 2)]) == sorted(lines(0, 1))


def test_what_another_process_has_written_meanwhile_stays(days, tmp_path, capsys):
    class Slow(Listener):
        def __call__(self, batches):
            for found in super().__call__(batches):
                (tmp_path / "out").mkdir()
                (tmp_path / "out/rec001.txt").write_text("of another\n")
                yield found

    assert shared([days[0] / "rec001.wav"], tmp_path / "out", 0, 2, Slow()) == (1, 1)
    assert "rec001.txt has been written meanwhile, by another process" in capsys.readouterr().err
    assert (tmp_path / "out/rec001.txt").read_text() == "of another\n"
