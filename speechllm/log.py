"""Logging for the recipes: to the terminal and to a file, in icefall's format."""

from __future__ import annotations

import logging
import sys
from datetime import datetime
from pathlib import Path

FORMAT = "%(asctime)s %(levelname)s [%(filename)s:%(lineno)d] %(message)s"


def setup_logging(folder: str | Path | None = None, name: str = "log", rank: int = 0) -> None:
    """Log to stderr, and to `folder/NAME-DATE` where a folder is given. Ranks above 0 log warnings only."""
    handlers: list[logging.Handler] = [logging.StreamHandler(sys.stderr)]
    if folder is not None and rank == 0:
        Path(folder).mkdir(parents=True, exist_ok=True)
        date = datetime.now().strftime("%Y-%m-%d-%H-%M-%S")
        handlers.append(logging.FileHandler(Path(folder) / f"{name}-{date}", encoding="utf-8"))
    logging.basicConfig(
        format=FORMAT, level=logging.INFO if rank == 0 else logging.WARNING, handlers=handlers, force=True
    )
