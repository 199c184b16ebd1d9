"""Pictures and a table of training runs, from their TensorBoard files."""

from __future__ import annotations

import importlib.util
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import SCALARS, EventAccumulator

from speechllm.errors import UserError
from speechllm.files import describe_write_error, replaced_file

# (title, [(tag, line style)]) of each panel.
_PANELS = (
    ("loss of a label token", [("train/tot_loss", "-"), ("valid/loss", "o--")]),
    ("error rate, percent", [("valid/wer", "o-"), ("valid/cer", "s:"), ("valid/ctc_wer", "^--")]),
)


@dataclass(frozen=True)
class Run:
    """The scalars of one run: steps and values by tag."""

    name: str
    scalars: dict[str, tuple[list[int], list[float]]]

    def best(self, tag: str) -> str:
        """`VALUE (STEP)` of the lowest value that is finite."""
        steps, values = self.scalars.get(tag, ([], []))
        finite = [(value, step) for value, step in zip(values, steps, strict=True) if math.isfinite(value)]
        if not finite:
            return "-"
        value, step = min(finite)
        return f"{value:.4g} ({step})"

    def last(self, tag: str) -> str:
        return f"{self.scalars[tag][1][-1]:.4g}" if tag in self.scalars else "-"


def read_run(exp_dir: Path) -> Run:
    """The scalars in EXP_DIR/tensorboard. Where a run was resumed, what came after the checkpoint counts once.

    Raises:
      UserError: there are none.
    """
    folder = exp_dir / "tensorboard"
    if not folder.is_dir():
        raise UserError(
            f"{exp_dir}: no folder tensorboard: not the folder of a run, or of one with --tensorboard false"
        )
    logging.getLogger("tensorboard").setLevel(logging.ERROR)  # it warns of each resumption as of a crash
    events = EventAccumulator(str(folder), size_guidance={SCALARS: 0}).Reload()
    scalars = {}
    for tag in events.Tags()["scalars"]:
        by_step = {event.step: event.value for event in events.Scalars(tag)}  # the last of a step counts
        scalars[tag] = (sorted(by_step), [by_step[step] for step in sorted(by_step)])
    if not scalars:
        raise UserError(f"{folder}: nothing was logged yet")
    return Run(str(exp_dir), scalars)  # the last part alone is `exp` in every recipe


def table(runs: Sequence[Run]) -> str:
    """Best validation results with their steps, and the throughput, of each run."""
    rows: list[tuple[str, ...]] = [("run", "loss (step)", "WER % (step)", "CER % (step)", "last step", "audio s/s")]
    for run in runs:
        last = max(steps[-1] for steps, _ in run.scalars.values())
        best = [run.best(f"valid/{name}") for name in ("loss", "wer", "cer")]
        rows.append((run.name, *best, str(last), run.last("train/audio_seconds_per_second")))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def plot_runs(runs: Sequence[Run], output: Path) -> None:
    """Loss and error rates over steps, a color for each run, as PNG.

    Raises:
      UserError: matplotlib is not installed, or `output` cannot be written.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError("pictures need matplotlib: pip install 'speechllm[plot]'")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.0, 8.0), layout="constrained")
    for axis, (title, lines) in zip(figure.subplots(len(_PANELS), 1, sharex=True), _PANELS, strict=True):
        axis.set_ylabel(title)
        axis.set_yscale("log" if title.startswith("loss") else "linear")
        axis.grid(alpha=0.3)
        for i, run in enumerate(runs):
            for tag, style in lines:
                if tag in run.scalars:
                    label = f"{run.name}: {tag}" if len(runs) > 1 else tag
                    axis.plot(*run.scalars[tag], style, color=f"C{i}", label=label, markersize=3)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize="small")
    axis.set_xlabel("step")
    try:
        with replaced_file(output) as tmp:
            figure.savefig(tmp, format="png", dpi=100)
    except OSError as e:
        raise UserError(describe_write_error(output, e)) from e


def plot_if_possible(exp_dir: Path) -> None:
    """EXP_DIR/plot.png, where matplotlib is installed."""
    if importlib.util.find_spec("matplotlib") is not None:
        plot_runs([read_run(exp_dir)], exp_dir / "plot.png")
