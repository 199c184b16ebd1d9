"""`speechllm plot`: curves of training runs."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_plot(commands: argparse._SubParsersAction) -> None:
    plot = commands.add_parser(
        "plot",
        help="curves of training runs",
        description="Draw loss, WER and CER of training runs over steps into one picture, and print the best of each.",
    )
    plot.add_argument("exp_dirs", nargs="+", type=Path, metavar="EXP", help="the --exp-dir of a run")
    plot.add_argument(
        "--output", type=Path, metavar="FILE", help="PNG (default: EXP/plot.png for one run, plot.png for several)"
    )
    plot.set_defaults(run=run_plot)


def run_plot(args: argparse.Namespace) -> int:
    from speechllm.train.plot import plot_runs, read_run, table

    output = args.output or (args.exp_dirs[0] / "plot.png" if len(args.exp_dirs) == 1 else Path("plot.png"))
    runs = [read_run(exp_dir) for exp_dir in args.exp_dirs]
    plot_runs(runs, output)
    print(table(runs))
    print(f"written to {output}")
    return 0
