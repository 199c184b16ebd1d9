"""The languages that a run has trained on, to be stored with the model."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from speechllm.data import Batch
from speechllm.scoring.counting import language_label


class TrainedLanguages:
    """What one process has trained on: `en` for transcripts of English, `en>de` for translations into German. Speech of
    unknown language adds nothing.

    Args:
      before: those of a stage before.
    """

    def __init__(self, before: Iterable[str] = ()) -> None:
        self._found = set(before)

    def add(self, batches: Iterable[Batch]) -> None:
        """To be called with all batches that are trained on."""
        for batch in batches:
            self._found.update(label for label in map(language_label, batch.requests) if label is not None)

    def state_dict(self) -> list[str]:
        return sorted(self._found)

    def load_state_dict(self, state: Iterable[str]) -> None:
        self._found.update(state)


def languages_of(checkpoint: dict[str, Any]) -> list[str] | None:
    """Those of all processes, as a checkpoint has them; None of one of an earlier version, which does not."""
    if "languages" not in checkpoint:
        return None
    return sorted(set().union(*checkpoint["languages"]))
