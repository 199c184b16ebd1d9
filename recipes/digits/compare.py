#!/usr/bin/env python3
"""Train variants of one configuration alike, decode them, and print a table; compare.sh is its command.

What is compared is in a file: `common`, settings of all variants, and `variants`, the settings of each, named as on the
command line (`model.projector.kind: conv`). Each variant has a folder in --exp-dir; one that was stopped goes
on where it was, one that is finished is not trained again.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from speechllm.errors import UserError
from speechllm.files import replaced_file
from speechllm.train.checkpoint import load_checkpoint
from speechllm.train.plot import read_run

ROOT = Path(__file__).resolve().parents[2]
AVERAGED = 5  # checkpoints
HEADER = ("variant", "WER %, language model", "WER %, CTC", "trained, M", "audio s/s", "memory, GB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="VARIANT", help="these alone (default: all)")
    parser.add_argument("--config", type=Path, default=ROOT / "configs/digits.yaml", help="(default: %(default)s)")
    parser.add_argument(
        "--variants", type=Path, default=ROOT / "recipes/digits/compare.yaml", help="(default: %(default)s)"
    )
    parser.add_argument(
        "--exp-dir", type=Path, default=ROOT / "recipes/digits/exp-compare", help="(default: %(default)s)"
    )
    parser.add_argument("--test-set", default="test", help="of data.test (default: %(default)s)")
    args = parser.parse_args()
    try:
        common, variants = read_variants(args.variants, args.names)
        rows = []
        for name, settings in variants.items():
            print(f"== {name}: {settings or 'as it is'}", flush=True)
            folder = args.exp_dir / re.sub(r"\W+", "-", name)
            rows.append(compare(name, args.config, common | settings, folder, args.test_set))
            table = markdown([HEADER, *rows])
            with replaced_file(args.exp_dir / "table.md") as tmp:
                tmp.write_text(table, encoding="utf-8")
    except (UserError, FileNotFoundError) as e:
        sys.exit(f"error: {e}")
    print(f"\n{table}", end="")


def read_variants(path: Path, names: list[str]) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """The settings of all variants, and those of each that is asked for.

    Raises:
      FileNotFoundError, UserError: there is no such file, it has another form, or there is no variant of that name.
    """
    tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(tree, dict) or set(tree) != {"common", "variants"}:
        raise UserError(f"{path}: needs `common` and `variants`, and nothing else")
    if unknown := [name for name in names if name not in tree["variants"]]:
        raise UserError(f"{path}: no variant {unknown[0]!r}; there are {', '.join(tree['variants'])}")
    return tree["common"], {name: tree["variants"][name] or {} for name in names or tree["variants"]}


def compare(name: str, config: Path, settings: dict[str, Any], exp_dir: Path, test_set: str) -> tuple[str, ...]:
    """Train, average and decode; a row of the table."""
    steps = settings["train.num_steps"]
    overrides = [part for key, value in settings.items() for part in (f"--{key}", yaml_text(value))]
    run("recipes/train.py", "--config", str(config), "--exp-dir", str(exp_dir), *overrides)
    model = exp_dir / f"iter-{steps}-avg-{AVERAGED}"
    run("tools/average_ckpt.py", "--exp-dir", str(exp_dir), "--iter", str(steps), "--avg", str(AVERAGED))
    run("recipes/decode.py", "--config", str(exp_dir / "config.yaml"), "--exp-dir", str(exp_dir), "--model", str(model))
    scalars = read_run(exp_dir).scalars
    # a run of fewer steps than train.log_every_n has none
    speeds = scalars.get("train/audio_seconds_per_second", ((), ()))[1]
    memory = scalars.get("train/peak_memory_gb", ((), ()))[1]
    return (
        name,
        word_error_rate(exp_dir / "greedy_search", test_set, model.name),
        word_error_rate(exp_dir / "ctc_greedy_search", test_set, model.name),
        f"{trained_parameters(exp_dir / f'checkpoint-{steps}.pt') / 1e6:.2f}",
        f"{statistics.median(speeds):.0f}" if speeds else "-",
        f"{max(memory):.2f}" if memory else "-",
    )


def yaml_text(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True, width=10**6).removesuffix("\n...\n").strip()


def run(script: str, *arguments: str) -> None:
    """Raises:
    UserError: it failed; what it said is on the screen.
    """
    command = [sys.executable, str(ROOT / script), *arguments]
    if subprocess.run(command, cwd=ROOT, env=os.environ, check=False).returncode != 0:
        raise UserError(f"this failed, see above: {shlex.join(command)}")


def word_error_rate(folder: Path, test_set: str, model: str) -> str:
    """Of the only setting in the summary; - where there was no such search."""
    summary = folder / f"wer-summary-{test_set}-{model}.txt"
    return summary.read_text(encoding="utf-8").splitlines()[1].split("\t")[1] if summary.exists() else "-"


def trained_parameters(checkpoint: Path) -> int:
    """A checkpoint has what is trained, and a few counts that are no floating-point numbers."""
    weights = load_checkpoint(checkpoint)["model"]
    return sum(t.numel() for t in weights.values() if t.is_floating_point())


def markdown(rows: list[tuple[str, ...]]) -> str:
    header, *others = rows
    lines = [header, ("---", *["---:"] * (len(header) - 1)), *others]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


if __name__ == "__main__":
    main()
