"""The languages that a run has trained on, to be stored with the model."""

from __future__ import annotations

from collections.abc import Iterable

from accelerate.utils import gather_object

from speechllm.data import Batch
from speechllm.scoring.counting import language_label


class TrainedLanguages:
    """`en` for transcripts of English, `en>de` for translations into German; speech of unknown language adds nothing.

    Args:
      before: of a stage before.
    """

    def __init__(self, before: Iterable[str] = ()) -> None:
        self._found = set(before)

    def add(self, batch: Batch) -> None:
        """To be called with every batch that is trained on."""
        labels = map(language_label, batch.languages, batch.target_languages)
        self._found.update(label for label in labels if label is not None)

    def state_dict(self) -> list[str]:
        """Those of all processes, each of which must call it."""
        self._found.update(gather_object(sorted(self._found)))
        return sorted(self._found)

    def load_state_dict(self, state: Iterable[str]) -> None:
        self._found.update(state)
