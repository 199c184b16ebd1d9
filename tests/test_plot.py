"""Runs read back from TensorBoard files, their table and their picture."""

import pytest
from torch.utils.tensorboard import SummaryWriter

from speechllm.errors import UserError
from speechllm.plot import plot_runs, read_run, table


@pytest.fixture
def exp_dir(tmp_path):
    """Ten steps, then resumed from step 6 with other values."""
    folder = tmp_path / "exp-a"
    for first, offset in ((1, 0.0), (7, -0.5)):
        with SummaryWriter(folder / "tensorboard", purge_step=first if first > 1 else None) as writer:
            for step in range(first, 11):
                writer.add_scalar("train/tot_loss", 10 - step + offset, step)
            writer.add_scalar("valid/wer", 40 + offset, 10)
    return folder


def test_a_resumed_run_is_one_curve(exp_dir):
    run = read_run(exp_dir)
    steps, values = run.scalars["train/tot_loss"]
    assert steps == list(range(1, 11))
    assert values == [9, 8, 7, 6, 5, 4, 2.5, 1.5, 0.5, -0.5]


def test_table_and_picture(exp_dir, tmp_path):
    runs = [read_run(exp_dir), read_run(exp_dir)]
    head, row, _ = table(runs).splitlines()
    assert "WER % (step)" in head and "39.5 (10)" in row and row.startswith("exp-a")
    plot_runs(runs, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_folders_without_a_run(tmp_path):
    with pytest.raises(UserError, match="no folder tensorboard"):
        read_run(tmp_path)
    (tmp_path / "tensorboard").mkdir()
    with pytest.raises(UserError, match="nothing was logged"):
        read_run(tmp_path)
