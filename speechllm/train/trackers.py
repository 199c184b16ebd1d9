"""Where the numbers of a run go besides its log: TensorBoard, and the services that accelerate has trackers for."""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from speechllm.config import ConfigError

TRACKERS = ("tensorboard", "wandb", "trackio", "mlflow", "swanlab", "comet_ml", "clearml", "aim")
_PROJECT = "speechllm"


def tracker_names(report_to: str) -> list[str]:
    """The names in `train.report_to`.

    Raises:
        ValueError: one is not known.
    """
    names = [name.strip() for name in report_to.split(",") if name.strip() not in ("", "none")]
    for name in names:
        if name not in TRACKERS:
            raise ValueError(f"report_to: {name!r} is none of {', '.join(TRACKERS)}, none")
    return list(dict.fromkeys(names))


def check_installed(names: Sequence[str]) -> None:
    """Whether the packages of trackers are there.

    Raises:
        ConfigError: one is not.
    """
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise ConfigError(f"train.report_to: {name} is not installed: pip install {name.replace('_', '-')}")


class Trackers:
    """All of a run's, opened together; for process 0.

    Services get the run's folder as its name, and an id that follows from it: a run that goes on is the same run there,
    where the service can do so.

    Args:
        names: of `tracker_names`.
        step: that the run goes on from; what TensorBoard has of later steps is taken back.
        config: of the experiment, as plain values.
    """

    def __init__(self, names: Sequence[str], exp_dir: Path, step: int, config: Mapping[str, Any]) -> None:
        self._writer = SummaryWriter(exp_dir / "tensorboard", purge_step=step + 1) if "tensorboard" in names else None
        self._services = [_opened(name, exp_dir) for name in names if name != "tensorboard"]
        for service in self._services:
            service.store_init_configuration(_flat(config))

    def scalars(self, kind: str, values: Mapping[str, float], step: int) -> None:
        """Write numbers as `KIND/NAME`."""
        named = {f"{kind}/{name}": value for name, value in values.items()}
        if self._writer is not None:
            for name, value in named.items():
                self._writer.add_scalar(name, value, step)
        for service in self._services:
            service.log(named, step=step)

    def text(self, name: str, text: str, step: int) -> None:
        """Write a text; the services have numbers only."""
        if self._writer is not None:
            self._writer.add_text(name, text.replace("\n", "  \n"), step)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
        for service in self._services:
            service.finish()


def _opened(name: str, exp_dir: Path) -> Any:
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    folder = exp_dir.absolute()
    run = f"{folder.parent.name}-{folder.name}"
    id = hashlib.sha256(str(folder).encode()).hexdigest()[:16]
    options: dict[str, Any] = {
        "wandb": {"name": run, "id": id, "resume": "allow", "dir": str(exp_dir)},
        "trackio": {"name": run, "resume": "allow"},
        "mlflow": {"run_name": run},
        "swanlab": {"experiment_name": run, "id": id, "resume": "allow", "logdir": str(exp_dir / "swanlab")},
        "aim": {"logging_dir": str(exp_dir)},
    }.get(name, {})
    tracker = LOGGER_TYPE_TO_CLASS[name](_PROJECT, **options)
    if hasattr(tracker, "start"):  # those of accelerate before 1.10 start when they are made
        tracker.start()
    return tracker


def _flat(values: Mapping[str, Any], inside: str = "") -> dict[str, Any]:
    """`{section.key: value}`, values that a service may not know as text."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{inside}{name}.")
        else:
            flat[inside + name] = value if isinstance(value, (str, int, float, bool)) else str(value)
    return flat
