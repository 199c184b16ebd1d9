"""What a CTC head hears in streams, greedily: the words and times that it has of the whole (`ctc.ctc_greedy`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor, nn

from speechllm.decode.ctc import TokenSpan
from speechllm.decode.interface import StreamableModel
from speechllm.decode.result import StreamedWord
from speechllm.decode.streaming_words import text_pieces, word_pieces
from speechllm.decode.timestamps import TOKEN_SECONDS, words_from_alignment
from speechllm.prompt.request import Request
from speechllm.text.tokenizer import Tokenizer


@dataclass
class _Span:
    """Frames [start, end) in which one token is the most probable class; `log_prob` is summed over them."""

    token: int
    start: int
    end: int
    log_prob: float


@dataclass
class CTCText:
    """Of one stream: what is heard and not written yet.

    Attributes:
      frames: heard so far, of the encoder's output.
      spans: of the tokens that no written word has.
      last_class: of the last frame.
    """

    frames: int = 0
    spans: list[_Span] = field(default_factory=list)
    last_class: int | None = None

    unstable = ""

    def tensors(self) -> dict[str, Tensor]:
        return {}

    def counts(self) -> dict[str, Any]:
        return asdict(self)


class CTCDecoder:
    """Greedy CTC, chunk by chunk.

    A word is written when the next one begins, or 0.2 s after its last token: no token is taken to last longer
    (`timestamps.words_from_alignment`).

    Args:
      model: in evaluation mode.
      head, tokenizer: its CTC head, and that of the head's pieces.
    """

    def __init__(self, model: StreamableModel, head: nn.Module, tokenizer: Tokenizer) -> None:
        self.model, self.head, self.tokenizer = model, head, tokenizer
        # one at least: a token that the next frame may go on with is not done
        self._longest_token = max(1, round(TOKEN_SECONDS / model.frame_seconds))

    def start(self, language: str | None, context: Request | None) -> CTCText:
        """A head has no prompt, so neither of the two counts."""
        return CTCText()

    def load(self, tensors: Mapping[str, Tensor], counts: dict[str, Any]) -> CTCText:
        """From what `CTCText.tensors` and `counts` gave."""
        return CTCText(**counts | {"spans": [_Span(**span) for span in counts["spans"]]})

    def restart(self, text: CTCText) -> list[StreamedWord]:
        """A head reads no text, so there is nothing to begin anew."""
        return []

    def decode(
        self, texts: Sequence[CTCText], encoder_out: Tensor, lens: Tensor, is_end: bool
    ) -> list[list[StreamedWord]]:
        """The new words of N streams, `written` left at 0: encoder_out (N, T, D), lens (N,)."""
        if encoder_out.shape[1]:
            best = self.head(encoder_out).float().log_softmax(-1).max(-1)
            rows = zip(texts, best.indices.tolist(), best.values.tolist(), lens.tolist(), strict=True)
            for text, classes, log_probs, length in rows:
                self._hear(text, classes[:length], log_probs[:length])
        return [self._written(text, is_end) for text in texts]

    def _hear(self, text: CTCText, classes: Sequence[int], log_probs: Sequence[float]) -> None:
        for token, log_prob in zip(classes, log_probs, strict=True):
            if token != self.model.blank_id:
                if token != text.last_class:
                    text.spans.append(_Span(token, text.frames, text.frames, 0.0))
                text.spans[-1].end += 1
                text.spans[-1].log_prob += log_prob
            text.last_class = token
            text.frames += 1

    def _written(self, text: CTCText, is_end: bool) -> list[StreamedWord]:
        spans = text.spans
        if not spans:
            return []
        words = word_pieces(text_pieces([span.token for span in spans], self.tokenizer))
        if not is_end and text.frames - spans[-1].end < self._longest_token:
            words = words[:-1]
        while words and not words[-1].ends_piece:  # its last token has the beginning of the next word too
            words.pop()
        if not words:
            return []
        timed = words_from_alignment(
            [TokenSpan(s.token, s.start, s.end, s.log_prob / (s.end - s.start)) for s in spans],
            self.tokenizer,
            self.model.frame_seconds,
            text.frames,
        )
        kept = words[-1].last + 1
        text.spans = spans[kept:]
        return [
            StreamedWord(**asdict(word), written=0.0, joined=found.joined)
            for word, found in zip(timed[: len(words)], words, strict=True)
        ]
