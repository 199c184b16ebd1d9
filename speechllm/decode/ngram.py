"""N-gram language models over words, for shallow fusion: `WordScorer` makes them a part of the search."""

from __future__ import annotations

from collections.abc import Sequence
from math import log
from pathlib import Path
from typing import Any

from speechllm.errors import UserError

# The log10 probability of a word is at least this: kenlm gives -100 to the words that a file without <unk> lacks, with
# which no text would ever have one.
LEAST_LOG10 = -10.0


class KenLM:
    """An n-gram language model over words that kenlm (Heafield, WMT 2011) reads: ARPA, or binary. A `WordModel`.

    The file must have been made from text that is written like the texts of the model (case, punctuation), its words
    separated as `WordScorer` does.

    Raises:
      FileNotFoundError: there is no such file.
      UserError: kenlm is not installed, or cannot read the file.
    """

    def __init__(self, path: str | Path) -> None:
        try:
            import kenlm
        except ImportError as error:
            raise UserError(
                "n-gram language models need kenlm: pip install kenlm (pip builds it, with a C++ compiler)"
            ) from error
        if not Path(path).is_file():
            raise FileNotFoundError(f"{path}: no such n-gram language model")
        config = kenlm.Config()
        config.show_progress = False
        try:
            self._model = kenlm.Model(str(path), config)
        except OSError as error:
            reason = str(error.__cause__ or error)
            raise UserError(f"{path}: kenlm cannot read it as an n-gram language model: {reason}") from error
        self._new_state = kenlm.State

    def start(self, utterance: int) -> Any:
        """The same for all utterances."""
        state = self._new_state()
        self._model.BeginSentenceWrite(state)
        return state

    def read(self, texts: Sequence[tuple[Any, tuple[str, ...]]]) -> list[tuple[float, Any]]:
        """See `WordModel`; no word costs more than `LEAST_LOG10`."""
        return [self._read(state, words) for state, words in texts]

    def expect(self, texts: Sequence[tuple[Any, str]]) -> list[float]:
        """Nothing: of an n-gram a word is known when it has ended."""
        return [0.0] * len(texts)

    def _read(self, state: Any, words: tuple[str, ...]) -> tuple[float, Any]:
        total = 0.0
        for word in words:
            following = self._new_state()
            total += max(self._model.BaseScore(state, word, following), LEAST_LOG10) * log(10)
            state = following
        return total, state
