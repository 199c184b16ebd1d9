"""Runs read back from TensorBoard files, their table and their picture."""

import math
import subprocess
import sys

import pytest
from torch.utils.tensorboard import SummaryWriter

from speechllm.cli.main import main
from speechllm.errors import UserError
from speechllm.train.plot import plot_runs, read_run, table


@pytest.fixture
def exp_dir(tmp_path):
    """Ten steps, then resumed from step 6 with other values."""
    folder = tmp_path / "exp-a"
    for first, offset in ((1, 0.0), (7, -0.5)):
        with SummaryWriter(folder / "tensorboard", purge_step=first if first > 1 else None) as writer:
            for step in range(first, 11):
                writer.add_scalar("train/tot_loss", 10 - step + offset, step)
            writer.add_scalar("valid/wer", 40 + offset, 10)
        # Files are read in the order of their names, which have the second; within one, that of a counter: 10 before 9.
        (written,) = (folder / "tensorboard").glob("*.*.*.*.*")
        written.rename(written.with_name(f"events.out.tfevents.{first:010d}"))
    return folder


def test_a_resumed_run_is_one_curve(exp_dir, capfd):
    run = read_run(exp_dir)
    steps, values = run.scalars["train/tot_loss"]
    assert steps == list(range(1, 11))
    assert values == [9, 8, 7, 6, 5, 4, 2.5, 1.5, 0.5, -0.5]
    assert capfd.readouterr().err == ""  # TensorBoard would warn of a crash


def test_a_file_cut_short_does_not_hide_what_came_after_it(exp_dir):
    first, _ = sorted((exp_dir / "tensorboard").iterdir())
    first.write_bytes(first.read_bytes()[:-7])
    assert read_run(exp_dir).scalars["train/tot_loss"][0] == list(range(1, 11))


def test_the_best_value_is_finite(tmp_path):
    with SummaryWriter(tmp_path / "tensorboard") as writer:
        for step, value in enumerate([math.nan, 3.0, 2.0, math.inf], start=1):
            writer.add_scalar("valid/loss", value, step)
            writer.add_scalar("valid/wer", math.nan, step)
    run = read_run(tmp_path)
    assert (run.best("valid/loss"), run.best("valid/wer")) == ("2 (3)", "-")


def test_command_line(exp_dir, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for argv, output in (
        (["exp-a"], "exp-a/plot.png"),
        (["exp-a"] * 2, "plot.png"),
        (["exp-a", "--output", "x/y"], "x/y"),
    ):
        with pytest.raises(SystemExit) as caught:
            main(["plot", *argv])
        assert caught.value.code == 0
        assert (tmp_path / output).read_bytes().startswith(b"\x89PNG")
        assert capsys.readouterr().out.endswith(f"written to {output}\n")


def test_a_picture_that_cannot_be_written_is_an_error(exp_dir, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file/plot.png: cannot be written"):
        plot_runs([read_run(exp_dir)], tmp_path / "file" / "plot.png")


def test_help_does_not_load_the_library():
    script = (
        "import sys, speechllm.cli.main\n"
        "try: speechllm.cli.main.main(['plot', '--help'])\n"
        "except SystemExit as e: assert e.code == 0\n"
        "assert not {'torch', 'tensorboard', 'numpy', 'matplotlib'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, stdout=subprocess.DEVNULL)


def test_table_and_picture(exp_dir, tmp_path):
    runs = [read_run(exp_dir), read_run(exp_dir)]
    head, row, _ = table(runs).splitlines()
    assert "WER % (step)" in head and "39.5 (10)" in row and row.startswith(str(exp_dir))
    plot_runs(runs, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_folders_without_a_run(tmp_path):
    with pytest.raises(UserError, match="no folder tensorboard"):
        read_run(tmp_path)
    (tmp_path / "tensorboard").mkdir()
    with pytest.raises(UserError, match="nothing was logged"):
        read_run(tmp_path)
