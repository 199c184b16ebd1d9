"""What a recognizer takes and gives, and what it asks of a model: a batch of speech, and protocols.

`speechllm.model.SpeechLLM` and `speechllm.model.encoder_model.EncoderModel` satisfy the protocols; nothing here or in
the recognizers knows how they are built.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from speechllm.decode.options import RecogniseOptions, RecognizeOptions
from speechllm.decode.result import Recognition
from speechllm.encoder.transducer import Transducer
from speechllm.errors import UserError
from speechllm.llm.interface import LanguageModel
from speechllm.prompt.interleave import StreamingConfig
from speechllm.prompt.label import LabelTemplate, ReadLabel
from speechllm.prompt.request import Request
from speechllm.prompt.splice import Spliced
from speechllm.prompt.template import PromptConfig
from speechllm.text.tokenizer import Beginnings, Tokenizer

__all__ = [
    "FRAME_SECONDS",
    "ContinuousRecognizer",
    "Recognizable",
    "RecognizableEncoder",
    "RecognizableSpeechLLM",
    "RecogniseOptions",
    "RecognizeOptions",
    "Recognizer",
    "Speech",
    "StreamChunk",
    "StreamableModel",
    "StreamableSpeechLLM",
    "check_length",
]

# From one frame of features to the next.
FRAME_SECONDS = 0.01


class Speech(NamedTuple):
    """A batch: features (N, T, F), feature_lens (N,), and what is asked for each of the N utterances."""

    features: Tensor
    feature_lens: Tensor
    requests: Sequence[Request]

    @classmethod
    def padded(cls, features: Sequence[Tensor], requests: Sequence[Request]) -> Speech:
        """Of the features (T, F) of each utterance."""
        lens = torch.tensor([len(rows) for rows in features])
        return cls(pad_sequence([*features], batch_first=True), lens, requests)

    def rows(self, numbers: Sequence[int]) -> Speech:
        """The rows with these numbers, without padding that is not needed any more."""
        lens = self.feature_lens[list(numbers)]
        features = self.features[list(numbers), : max(lens.tolist(), default=0)]
        return Speech(features, lens, [self.requests[i] for i in numbers])


class Recognizer(Protocol):
    """Recognizes batches of speech: `SpeechLLMRecognizer`, `EncoderRecognizer`."""

    def __call__(self, batches: Iterable[Speech]) -> Iterator[list[Recognition]]:
        """The results of each batch, in order."""
        ...

    def check(self, request: Request, frames: int | None = None) -> None:
        """Whether an utterance can be recognized; `frames`: of its features, where they are known.

        Raises:
          UserError: says what it lacks, or is asked for in vain.
        """
        ...


class ContinuousRecognizer(Recognizer, Protocol):
    """A recognizer that utterances also join and leave while others are recognized, as in a server's loop."""

    @property
    def free(self) -> int:
        """How many may join now."""
        ...

    def join(self, speech: Speech) -> list[int]:
        """Take utterances in; a number for each.

        Raises:
          UserError: an utterance that `check` refuses.
        """
        ...

    def step(self) -> list[tuple[int, Recognition]]:
        """Compute a little for each; the numbers and results of those that are finished."""
        ...

    def leave(self, numbers: Iterable[int]) -> None:
        """Nobody waits for these any more."""
        ...


class Recognizable(Protocol):
    """What recognizers ask of a model; the methods are described at `speechllm.model.base.SpeechModel`."""

    tokenizer: Tokenizer
    blank_id: int

    @property
    def ctc_head(self) -> nn.Module | None: ...

    @property
    def device(self) -> torch.device: ...

    @property
    def seconds_per_position(self) -> float:
        """Of audio, one position of the language model; without one, one frame of the encoder's output."""
        ...

    @property
    def min_frames(self) -> int: ...

    @property
    def max_seconds(self) -> float: ...

    def text(self, token_ids: Sequence[int]) -> str: ...


class RecognizableEncoder(Recognizable, Protocol):
    """What `EncoderRecognizer` asks of a model: an encoder with a CTC head, a transducer, or both."""

    @property
    def transducer(self) -> Transducer | None: ...

    def encode(self, features: Tensor, feature_lens: Tensor) -> tuple[Tensor, Tensor]:
        """features (N, T, F), (N,) -> encoder_out (N, T', D), (N,)."""
        ...


class RecognizableSpeechLLM(Recognizable, Protocol):
    """What `SpeechLLMRecognizer` asks of a model; the methods are described at `SpeechLLM`."""

    label_template: LabelTemplate
    ctc_tokenizer: Tokenizer
    """Of the CTC head's pieces; mostly `tokenizer` itself."""

    @property
    def llm(self) -> LanguageModel: ...

    @property
    def frame_seconds(self) -> float:
        """Of audio, one frame of the encoder's output."""
        ...

    def encode(self, features: Tensor, feature_lens: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """features (N, T, F), (N,) -> encoder_out (N, T', D), (N,), audio_embeds (N, T'', D_llm), (N,)."""
        ...

    def spliced(self, audio_lens: Tensor, requests: Sequence[Request]) -> Spliced: ...

    def embed(self, spliced: Spliced, audio_embeds: Tensor, audio_lens: Tensor) -> Tensor:
        """-> inputs_embeds (N, L, D_llm)."""
        ...

    def read_label(self, token_ids: Sequence[int]) -> ReadLabel: ...

    def ctc_label_ids(self, text: str) -> list[int]: ...

    def ctc_beginnings(self, text: str, words: Sequence[str]) -> Beginnings: ...

    def ctc_text(self, token_ids: Sequence[int]) -> str: ...


class PromptHolder(Protocol):
    @property
    def prompt(self) -> PromptConfig: ...

    @property
    def streaming(self) -> StreamingConfig | None: ...


class StreamableModel(Protocol):
    """What `streaming.StreamingRecognizer` asks of a model: a causal encoder with a CTC head, or what
    `StreamableSpeechLLM` has."""

    blank_id: int
    tokenizer: Tokenizer

    @property
    def encoder(self) -> nn.Module:
        """A `speechllm.encoder.Zipformer`; any other is refused."""

    @property
    def llm(self) -> LanguageModel | None: ...

    @property
    def config(self) -> PromptHolder: ...

    @property
    def ctc_head(self) -> nn.Module | None: ...

    @property
    def device(self) -> torch.device: ...

    @property
    def frame_seconds(self) -> float:
        """Of audio, one frame of the encoder's output."""

    def encoding(self) -> AbstractContextManager[object]:
        """The context that the encoder computes in."""


class StreamChunk(Protocol):
    """A chunk of audio that a model has learned to write after."""

    @property
    def seconds(self) -> float: ...

    @property
    def encoder_frames(self) -> int:
        """Of 20 ms."""

    @property
    def left_context_frames(self) -> int: ...

    @property
    def positions(self) -> int:
        """Of the language model."""


class StreamableSpeechLLM(StreamableModel, Protocol):
    """What `streaming_search.TextDecoder` asks of a model that has learned to write while it listens."""

    ctc_tokenizer: Tokenizer

    @property
    def llm(self) -> LanguageModel: ...

    @property
    def projector(self) -> nn.Module:
        """encoder_out (N, T', D), (N,) of one chunk -> audio_embeds (N, T'', D_llm), (N,)."""

    @property
    def chunks(self) -> Mapping[float, StreamChunk]:
        """By their seconds."""

    def embed(self, spliced: Spliced, audio_embeds: Tensor, audio_lens: Tensor) -> Tensor:
        """-> inputs_embeds (N, L, D_llm)."""

    def ctc_label_ids(self, text: str) -> list[int]: ...


def check_length(model: Recognizable, frames: int | None) -> None:
    """Whether the encoder can hear so much.

    Raises:
      UserError: features of so many frames are longer than the encoder can hear.
    """
    if frames is not None and frames * FRAME_SECONDS > model.max_seconds:
        raise UserError(
            f"has {frames * FRAME_SECONDS:.2f} s of audio, and the encoder hears at most {model.max_seconds:g} s"
        )
