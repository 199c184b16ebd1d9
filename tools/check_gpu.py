#!/usr/bin/env python3
"""Check and measure speechllm on a GPU: correctness first, then speed, within a given time.

    tools/check_gpu.sh                                      # about 8 minutes; installs what is missing
    tools/check_gpu.sh --minutes 20 --wheels wheels         # offline, with the wheels of a folder
    python tools/check_gpu.py --device cpu --minutes 3      # the same program at tiny sizes: does it run?

OUTPUT/check-gpu.md (a table) and check-gpu.json have each row as soon as it is known, so a run that is stopped keeps
what it has; OUTPUT/logs has what each part printed. docs/gpu.md explains the rows. What has no time left is skipped.
What fails is a row with the last lines of its error, and the rest goes on. The exit status is 1 if a row failed.
"""

from __future__ import annotations

import argparse
import configparser
import contextlib
import json
import os
import platform
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LAST_LINES = 8  # of what a program printed before it failed
STOPPING_SECONDS = 5.0  # for a program to end by itself
SAVING_SECONDS = 20.0  # for a training run that is told to stop
TUNING = "SPEECHLLM_FLA_TUNING"
PARTS = ("tests", "wkv", "rwkv", "train", "digits")
DECODING_SECONDS = 45.0  # kept for averaging and decoding after the training of the digits

Row = dict[str, object]


# ---- The report -----------------------------------------------------------------------------------------------


class Report:
    """The rows so far, on disk and on the screen."""

    def __init__(self, folder: Path, environment: Mapping[str, str], minutes: float):
        self.folder = folder
        self.rows: list[Row] = []
        self._head = {
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "minutes": minutes,
            "environment": dict(environment),
        }
        self._write()

    def add(self, part: str, row: Mapping[str, object]) -> None:
        """Args: row: `case`, `status` (ok, failed, skipped or no time), and `figures` or `error`."""
        self.rows.append({"part": part, **row})
        self._write()
        print(f"{part}: {row['case']}: {result_text(row)}", flush=True)

    def _write(self) -> None:
        """Replaces both files: whoever reads them, or stops this program, finds whole ones."""
        environment = self._head["environment"]
        lines = [
            f"# speechllm on {environment['device']}",
            "",
            f"{self._head['date']}, {self._head['minutes']:g} minutes",
        ]
        lines += ["", *(f"- {name}: {value}" for name, value in environment.items())]
        lines += ["", "| part | case | result |", "|---|---|---|"]
        lines += [f"| {row['part']} | {cell(str(row['case']))} | {cell(result_text(row))} |" for row in self.rows]
        replace_text(self.folder / "check-gpu.md", "\n".join(lines) + "\n")
        content = json.dumps({**self._head, "rows": self.rows}, ensure_ascii=False, indent=1)
        replace_text(self.folder / "check-gpu.json", content + "\n")


def replace_text(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", "<br>")


def result_text(row: Mapping[str, object]) -> str:
    """`audio s/s: 1250; memory, GB: 12.5`, or `failed: ...`."""
    if row["status"] == "ok":
        figures: Mapping[str, object] = row.get("figures") or {}
        return "; ".join(f"{name}: {figure_text(x)}" for name, x in figures.items()) or "ok"
    return f"{row['status']}: {row['error']}" if row.get("error") else str(row["status"])


def figure_text(value: object) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def last_lines(log: Path) -> str:
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return "\n".join(lines[-LAST_LINES:])


# ---- The environment ------------------------------------------------------------------------------------------


def requirements() -> list[str]:
    """What setup.cfg wants to be installed."""
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg", encoding="utf-8")
    lines = [line.strip() for line in setup["options"]["install_requires"].splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


def check_packages() -> list[str]:
    """The packages whose version is outside the range of setup.cfg: `transformers 5.17.0 (>=5.23)`.

    Raises:
      SystemExit: some are not installed.
    """
    try:
        from packaging.requirements import Requirement
    except ModuleNotFoundError:
        sys.exit("error: the package packaging is not installed; tools/check_gpu.sh installs what is needed")
    missing, outside = [], []
    for requirement in map(Requirement, requirements()):
        if requirement.marker is not None and not requirement.marker.evaluate():
            continue
        try:
            found = version(requirement.name)
        except PackageNotFoundError:
            missing.append(str(requirement))
            continue
        if not requirement.specifier.contains(found, prereleases=True):
            outside.append(f"{requirement.name} {found} ({requirement.specifier})")
    if missing:
        sys.exit(
            f"error: not installed for {sys.executable}: {', '.join(missing)}; tools/check_gpu.sh installs them, "
            "offline from a folder of wheels with --wheels DIR"
        )
    return outside


def describe_environment(device: str) -> dict[str, str]:
    """Card, driver and versions; ends the program where something is missing."""
    outside = check_packages()
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
        sys.exit(
            f"error: PyTorch {torch.__version__} ({built}) sees no GPU; --device cpu runs this program at tiny sizes"
        )
    environment = {"device": "the CPU, at tiny sizes"}
    if device == "cuda":
        card = torch.cuda.get_device_properties(0)
        environment = {
            "device": card.name,
            "memory": f"{card.total_memory / 1e9:.1f} GB",
            "compute capability": f"{card.major}.{card.minor}, {card.multi_processor_count} multiprocessors",
            "driver": driver_version(),
            "CUDA of PyTorch": str(torch.version.cuda),
        }
    names = ("torch", "torchaudio", "triton", "fla-core", "k2", "transformers", "peft", "accelerate", "lhotse")
    environment["processor"] = f"{os.cpu_count()} CPUs, {platform.machine()}"
    environment["packages"] = ", ".join([f"Python {platform.python_version()}", *map(installed, names)])
    environment["tuning of fla's kernels"] = "on" if os.environ.get(TUNING) == "1" else "off"
    environment["revision"] = revision()
    if outside:
        environment["outside the ranges of setup.cfg"] = ", ".join(outside)
    return environment


def installed(name: str) -> str:
    try:
        return f"{name} {version(name)}"
    except PackageNotFoundError:
        return f"no {name}"


def driver_version() -> str:
    return first_line("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")


def revision() -> str:
    return first_line("git", "-C", str(ROOT), "describe", "--always", "--dirty")


def first_line(*command: str) -> str:
    try:
        lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    except (OSError, subprocess.CalledProcessError):
        lines = []
    return lines[0] if lines else "unknown"


# ---- Running programs -----------------------------------------------------------------------------------------


class Program:
    """A program in a process group of its own, what it prints in a log, to be stopped whatever it has started."""

    def __init__(self, command: list[str], log: Path):
        self.log = log
        path = os.pathsep.join([str(ROOT), str(ROOT / "tools"), *filter(None, [os.environ.get("PYTHONPATH")])])
        with log.open("a", encoding="utf-8") as file:
            self._process = subprocess.Popen(
                command,
                cwd=ROOT,
                env={**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"},
                stdout=file,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )

    def wait(
        self, deadline: float, each: Callable[[], object] = lambda: None, grace: float = STOPPING_SECONDS
    ) -> int | None:
        """The exit status, or None if it had to be stopped at `deadline`; `each` is called while it runs."""
        try:
            while (status := self._process.poll()) is None and time.monotonic() < deadline:
                each()
                time.sleep(0.1)
        finally:  # also if this program is interrupted
            self.stop(grace)
        return status

    def stop(self, grace: float = STOPPING_SECONDS) -> None:
        """Tells the program to end, if it still runs, then ends what is left of its group: a training run must save
        before its workers are gone."""
        if self._process.poll() is not None:
            return
        self._process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(grace)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


@dataclass(frozen=True)
class Part:
    """A program that appends rows to the file of its option `--rows`.

    Attributes:
      until: the share of the whole time after which it is stopped; what it leaves is for the next ones.
    """

    name: str
    until: float
    command: list[str]


def run_part(report: Report, part: Part, deadline: float) -> None:
    rows = report.folder / "logs" / f"{part.name}.rows"
    rows.unlink(missing_ok=True)
    log = rows.with_suffix(".log")
    log.unlink(missing_ok=True)
    taken, failures = 0, 0

    def take_rows() -> None:
        nonlocal taken, failures
        lines = rows.read_text(encoding="utf-8").splitlines(keepends=True) if rows.exists() else []
        for line in lines[taken:]:
            if not line.endswith("\n"):  # still being written
                break
            row = json.loads(line)
            report.add(part.name, row)
            taken, failures = taken + 1, failures + (row["status"] == "failed")

    if time.monotonic() < deadline:
        status = Program([*part.command, "--rows", str(rows)], log).wait(deadline, take_rows)
        take_rows()
    else:
        status = None
    if status is None:
        report.add(part.name, {"case": "the rest" if taken else "all", "status": "no time"})
    elif status != 0 and not failures:
        report.add(part.name, {"case": "the program", "status": "failed", "error": last_lines(log)})


# ---- The parts ------------------------------------------------------------------------------------------------


def cuda_tests() -> list[str]:
    """The files that have tests marked for CUDA: others need packages that have no part in this. Those of whole
    training runs, which take longest, come last."""
    files = (ROOT / "tests").rglob("test_*.py")
    marked = [file for file in files if "pytest.mark.cuda" in file.read_text(encoding="utf-8")]
    return sorted((str(file.relative_to(ROOT)) for file in marked), key=lambda name: ("recipes" in name, name))


def parts(device: str) -> list[Part]:
    """In the order of what matters most."""
    options: dict[str, str] = {
        # batch and heads of the 2.9B model
        # without the loop over 2048 positions, which takes a minute
        "wkv": "--batch 8 --length 2048 --heads 40 --repeat 5 --skip fla-pytorch --skip rwkv7-hf --skip plain-loop",
        "rwkv": "--batch 4 --length 1024 --batches 1 8 64 256",
        "train": "--sizes digits 0.1b 0.4b 1.5b --ways lora all --steps 4",
    }
    if device == "cpu":
        options = {
            "wkv": "--batch 1 --length 32 --heads 1 --repeat 1 --skip fla-pytorch --skip rwkv7-hf",
            "rwkv": "--sizes 2x128 --vocab 500 --batch 1 --length 32 --batches 1 2 --tokens 2 --repeat 1",
            "train": "--sizes digits --batch-seconds 4 --steps 1",
        }
    pytest = ["-m", "pytest", "-q", "-m", "cuda", "-p", "no:cacheprovider", "-p", "pytest_rows"]
    pytest += ["--continue-on-collection-errors", *cuda_tests()]
    benches = {
        name: [sys.executable, f"tools/bench_{name}.py", "--device", device, *options[name].split()] for name in options
    }
    return [
        Part("tests", 0.5, [sys.executable, *pytest]),
        Part("wkv", 0.58, benches["wkv"]),
        Part("rwkv", 0.7, benches["rwkv"]),
        Part("train", 0.78, benches["train"]),
    ]


class Digits:
    """configs/digits.yaml in bf16, from the recordings to its WER; a run that was stopped goes on in the next one.

    The corpus is made while the other parts run: that takes one CPU a minute or two.
    """

    def __init__(self, folder: Path, device: str, sounds_dir: Path):
        self._folder, self._cpu = folder / "digits", device == "cpu"
        self._folder.mkdir(exist_ok=True)
        self._log = folder / "logs" / "digits.log"
        self._log.unlink(missing_ok=True)
        self._data = self._folder / "data" if self._cpu else ROOT / "recipes" / "digits" / "data"
        self._config = self._folder / "digits.yaml"
        text = (ROOT / "configs" / "digits.yaml").read_text(encoding="utf-8")
        self._config.write_text(text.replace("recipes/digits/data", str(self._data)), encoding="utf-8")
        sounds = ["--sounds-dir", str(sounds_dir)] if sounds_dir.is_dir() else []  # else it downloads them
        sizes = "--strings-per-language 8 --valid-per-language 1 --test-per-language 1" if self._cpu else ""
        prepare = ["recipes/digits/prepare_corpus.py", "--output-dir", str(self._data), *sounds, *sizes.split()]
        self._preparing = Program([sys.executable, *prepare], self._log)

    def run(self, report: Report, deadline: float) -> None:
        try:
            report.add(
                "digits", {"case": "configs/digits.yaml, bf16", "status": "ok", "figures": self._measure(deadline)}
            )
        except TimeoutError:
            report.add("digits", {"case": "configs/digits.yaml, bf16", "status": "no time"})
        except RuntimeError as e:
            report.add("digits", {"case": "configs/digits.yaml, bf16", "status": "failed", "error": str(e)})

    def _measure(self, deadline: float) -> dict[str, object]:
        """The steps made, the WER, and the seconds that training and decoding took.

        Raises:
          TimeoutError: no time for any of it.
          RuntimeError: a program failed; the message has its last lines.
        """
        self._check(self._preparing.wait(deadline))
        self._run("recipes/digits/train_tokenizer.py", "--data-dir", self._data, "--vocab-size", 400, until=deadline)
        # The kernels of fla would first be tuned to heads of 32: a minute or more, for a model that is done in two.
        settings = "--train.mixed_precision bf16 --model.llm.wkv_backend chunked --train.valid_every_n 1000000"
        settings += (
            " --train.num_steps 4 --train.ctc_only_steps 2 --optim.warmup_steps 1 --train.save_every_n 2"
            if self._cpu
            else " --data.num_workers 4"
        )
        start = time.monotonic()
        until = deadline - (0 if self._cpu else DECODING_SECONDS + SAVING_SECONDS)
        self._run("recipes/train.py", "--config", self._config, "--exp-dir", self._folder / "exp", *settings.split(),
                  until=until, stoppable=True)  # fmt: skip
        trained = time.monotonic()
        step = max(
            (int(file.stem.split("-")[1]) for file in (self._folder / "exp").glob("checkpoint-*.pt")), default=None
        )
        if step is None:
            raise TimeoutError
        average = self._folder / "exp" / f"iter-{step}-avg"
        count = 2 if self._cpu else 5
        self._run("tools/average_ckpt.py", "--exp-dir", self._folder / "exp", "--iter", step, "--avg", count,
                  "--output", average, until=deadline)  # fmt: skip
        self._run("recipes/decode.py", "--config", self._config, "--exp-dir", self._folder / "exp", "--model", average,
                  until=deadline)  # fmt: skip
        seconds = {"training, s": trained - start, "decoding, s": time.monotonic() - trained}
        return {"steps": step, **error_rates(self._log.read_text(encoding="utf-8")), **seconds}

    def _run(self, *command: object, until: float, stoppable: bool = False) -> None:
        """Args: stoppable: stopping it is no failure, as it saves what it has."""
        if time.monotonic() >= until:
            raise TimeoutError
        program = Program([sys.executable, *map(str, command)], self._log)
        status = program.wait(until, grace=SAVING_SECONDS if stoppable else STOPPING_SECONDS)
        if status is not None or not stoppable:
            self._check(status)

    def _check(self, status: int | None) -> None:
        if status is None:
            raise TimeoutError
        if status != 0:
            raise RuntimeError(last_lines(self._log))

    def stop(self) -> None:
        self._preparing.stop()


def error_rates(printed: str) -> dict[str, float]:
    """The rates of all languages together in the table of recipes/decode.py: `test, greedy_search WER %: 0.67`."""
    rates, columns = {}, []
    for line in printed.splitlines():
        cells = re.split(r"\s{2,}", line.strip())
        if cells[:2] == ["test set", "language"]:
            columns = cells[2:]
        elif columns and len(cells) == len(columns) + 2 and cells[1] == "all":
            values = zip(columns, cells[2:], strict=True)
            rates |= {f"{cells[0]}, {name}": float(value) for name, value in values if name.endswith("WER %")}
    if not rates:
        raise RuntimeError("recipes/decode.py printed no error rates")
    return rates


def main() -> int:
    start = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=8.0, help="the time for everything (default: %(default)g)")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda",
                        help="cpu: tiny sizes, to try the program itself (default: %(default)s)")  # fmt: skip
    parser.add_argument("--output", type=Path, default=Path("gpu-check"), metavar="DIR",
                        help="folder for the table, the JSON file and the logs (default: %(default)s)")  # fmt: skip
    parser.add_argument("--sounds-dir", type=Path, default=ROOT / "recipes" / "digits" / "sounds", metavar="DIR",
                        help="recordings of the digits, downloaded if missing (default: %(default)s)")  # fmt: skip
    parser.add_argument("--skip", action="append", default=[], choices=PARTS, metavar="PART",
                        help=f"leave a part out, may be repeated: {', '.join(PARTS)}")  # fmt: skip
    parser.add_argument("--tune", action="store_true",
                        help="let Triton tune the kernels of fla: minutes on a machine's first run")  # fmt: skip
    args = parser.parse_args()
    if args.minutes <= 0:
        parser.error(f"--minutes must be above 0, got {args.minutes:g}")
    os.environ[TUNING] = str(int(args.tune))
    environment = describe_environment(args.device)
    folder = args.output.resolve()
    (folder / "logs").mkdir(parents=True, exist_ok=True)
    report = Report(folder, environment, args.minutes)
    whole = 60 * args.minutes - STOPPING_SECONDS  # what runs last must have time to stop
    # As a signal by default, SIGTERM would end this program and leave those that it has started.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    digits = None if "digits" in args.skip else Digits(folder, args.device, args.sounds_dir.resolve())
    try:
        for part in parts(args.device):
            if part.name not in args.skip:
                run_part(report, part, start + part.until * whole)
        if digits:
            digits.run(report, start + whole)
    finally:
        if digits:
            digits.stop()
    print(f"{folder / 'check-gpu.md'}: {len(report.rows)} rows in {time.monotonic() - start:.0f} s", flush=True)
    return int(any(row["status"] == "failed" for row in report.rows))


if __name__ == "__main__":
    sys.exit(main())
