"""What recognizing is asked for, and what it asks of a model: options, a batch of speech, and two protocols.

`speechllm.model.SpeechLLM` and `speechllm.model.encoder_model.EncoderModel` satisfy the protocols; nothing here or in
the recognizers knows how they are built.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from speechllm.decode.result import Recognition
from speechllm.decode.search import SearchOptions
from speechllm.encoder.transducer import Transducer
from speechllm.errors import UserError
from speechllm.llm.interface import LanguageModel
from speechllm.prompt.label import LabelTemplate, ReadLabel
from speechllm.prompt.request import Request
from speechllm.prompt.splice import Spliced
from speechllm.prompt.template import PromptConfig
from speechllm.text.tokenizer import Tokenizer

# From one frame of features to the next.
FRAME_SECONDS = 0.01


@dataclass(frozen=True)
class RecognizeOptions:
    """How speech is recognized.

    Attributes:
      search: of the language model.
      fallback: what becomes of a text that a guard has stopped, because it repeats itself or is longer than the audio
        can say: `cut`, it ends there; `ctc`, the text of the CTC head is taken instead, where there is one. None leaves
        it to the caller: `transcribe` takes `ctc`, `recognize` and recipes/decode.py `cut`.
      ctc_weight: of the CTC head's scores in the search (arXiv 1609.06773); 0: they have no part in it.
      ctc_beam: of the CTC head's own search; 1 is greedy search.
      timestamps: find the words' times with the CTC head, where the model does not write them itself.
      hotwords: a file of phrases that the search prefers (see `hotwords.Hotwords.from_file`), and their weight.
      ngram: a kenlm model that takes part in the search, and its weight.
      initial_state: a state file of RWKV-7 (`RWKV7State.save`), tuned or of a text read before, that prompts go on
        from.

    Raises:
      UserError: a value is out of range, or has no effect with the others.
    """

    search: SearchOptions = field(default_factory=SearchOptions)
    fallback: Literal["cut", "ctc"] | None = None
    ctc_weight: float = 0.0
    ctc_beam: int = 1
    timestamps: bool = False
    hotwords: str | None = None
    hotword_weight: float = 1.0
    ngram: str | None = None
    ngram_weight: float = 0.3
    initial_state: str | None = None

    def __post_init__(self) -> None:
        if self.fallback not in (None, "cut", "ctc"):
            raise UserError(f"fallback: unknown {self.fallback!r}, choose from cut, ctc")
        if self.ctc_weight < 0:
            raise UserError(f"ctc_weight: must be at least 0, got {self.ctc_weight}")
        if self.ctc_beam < 1:
            raise UserError(f"ctc_beam: must be at least 1, got {self.ctc_beam}")
        for name, why in self.without_effect().items():
            if getattr(self, name) != RecognizeOptions.__dataclass_fields__[name].default:
                raise UserError(f"{name}: {why}")

    def without_effect(self) -> dict[str, str]:
        """The names of the options that change nothing beside the others, and what is wrong with giving them; those of
        `search` aside."""
        found = {}
        if self.hotwords is None:
            found["hotword_weight"] = "is the weight of hotwords, and none are given"
        if self.ngram is None:
            found["ngram_weight"] = "is the weight of an n-gram model, and none is given"
        if self.search.method == "sample":
            why = "has no part in sampling: search with method greedy or beam"
            found |= dict.fromkeys(("ctc_weight", "hotwords", "ngram"), why)
        return found


RecogniseOptions = RecognizeOptions  # its name in 0.1


@dataclass(frozen=True)
class StreamingOptions:
    """How a stream is recognized.

    Attributes:
      beam: hypotheses that are followed, each with a state of its own; 1 is greedy search. A word is written when all
        of them have it, so that none is ever taken back.
      stable_seconds: with a beam, how long a word may wait for that; then it is written as the best hypothesis has it,
        and the others are given up.
      ctc: the CTC head writes, greedily, also where there is a language model.
      hotwords: a file of phrases that the search prefers (see `context.Hotwords.from_file`), and their weight.
      endpoint_seconds: after so much audio without a new word a segment ends; None: there is one. Nothing is lost: the
        states go on.
      fresh_segments: the language model reads a new segment from the prompt on, as if the stream began there. It then
        knows nothing of what was before; a model of transformers has to, or its cache would grow without end.
      tokens_per_second: longest text for a second of audio.
      max_rows: of a step of the language model: hypotheses of all streams that are computed together.

    Raises:
      UserError: a value is out of range, or has no effect with the others.
    """

    beam: int = 1
    stable_seconds: float = 1.0
    ctc: bool = False
    hotwords: str | None = None
    hotword_weight: float = 1.0
    endpoint_seconds: float | None = None
    fresh_segments: bool = False
    tokens_per_second: float = 12.5
    max_rows: int = 64

    def __post_init__(self) -> None:
        for name, holds, what in (
            ("beam", self.beam >= 1, "at least 1"),
            ("stable_seconds", self.stable_seconds >= 0, "at least 0"),
            ("endpoint_seconds", self.endpoint_seconds is None or self.endpoint_seconds > 0, "above 0"),
            ("tokens_per_second", self.tokens_per_second > 0, "above 0"),
            ("max_rows", self.max_rows >= self.beam, "at least the beam"),
        ):
            if not holds:
                raise UserError(f"{name}: must be {what}, got {getattr(self, name)}")
        for name, why in self.without_effect().items():
            if getattr(self, name) != StreamingOptions.__dataclass_fields__[name].default:
                raise UserError(f"{name}: {why}")

    def without_effect(self) -> dict[str, str]:
        """The names of the options that change nothing beside the others, and what is wrong with giving them."""
        found = {}
        if self.ctc:
            why = "is for the language model's search, and the CTC head writes"
            found |= dict.fromkeys(("beam", "hotwords", "fresh_segments", "tokens_per_second"), why)
        if self.beam == 1:
            found["stable_seconds"] = "is for a beam, and there is one hypothesis"
        if self.hotwords is None:
            found["hotword_weight"] = "is the weight of hotwords, and none are given"
        if self.endpoint_seconds is None:
            found["fresh_segments"] = "is for segments, and endpoint_seconds gives none"
        return found


class Speech(NamedTuple):
    """A batch: features (N, T, F), feature_lens (N,), and what is asked for each of the N utterances."""

    features: Tensor
    feature_lens: Tensor
    requests: Sequence[Request]

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


class Recognizable(Protocol):
    """What recognizers ask of a model; the methods are described at `speechllm.model.base.SpeechModel`."""

    tokenizer: Tokenizer
    blank_id: int
    ctc_head: nn.Module | None

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

    transducer: Transducer | None

    def encode(self, features: Tensor, feature_lens: Tensor) -> tuple[Tensor, Tensor]:
        """features (N, T, F), (N,) -> encoder_out (N, T', D), (N,)."""
        ...


class RecognizableSpeechLLM(Recognizable, Protocol):
    """What `SpeechLLMRecognizer` asks of a model; the methods are described at `SpeechLLM`."""

    llm: LanguageModel
    label_template: LabelTemplate
    ctc_tokenizer: Tokenizer
    """Of the CTC head's pieces; mostly `tokenizer` itself."""

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

    def ctc_text(self, token_ids: Sequence[int]) -> str: ...


class StreamableModel(Protocol):
    """What `streaming.StreamingRecognizer` asks of a model: a causal encoder with a CTC head, or what
    `StreamableSpeechLLM` has."""

    encoder: nn.Module
    """A `speechllm.encoder.Zipformer`; any other is refused."""
    llm: LanguageModel | None
    config: PromptHolder
    ctc_head: nn.Module | None
    blank_id: int
    tokenizer: Tokenizer

    @property
    def device(self) -> torch.device: ...

    @property
    def frame_seconds(self) -> float:
        """Of audio, one frame of the encoder's output."""
        ...

    def encoding(self) -> AbstractContextManager[object]:
        """The context that the encoder computes in."""
        ...


class StreamChunk(Protocol):
    """A chunk of audio that a model has learned to write after."""

    seconds: float
    encoder_frames: int
    """Of 20 ms."""
    left_context_frames: int


class PromptHolder(Protocol):
    prompt: PromptConfig


class StreamableSpeechLLM(StreamableModel, Protocol):
    """What `streaming_search.TextDecoder` asks of a model that has learned to write while it listens."""

    llm: LanguageModel
    projector: nn.Module
    """encoder_out (N, T', D), (N,) of one chunk -> audio_embeds (N, T'', D_llm), (N,)."""
    ctc_tokenizer: Tokenizer
    chunks: Mapping[float, StreamChunk]
    """By their seconds."""

    def embed(self, spliced: Spliced, audio_embeds: Tensor, audio_lens: Tensor) -> Tensor:
        """-> inputs_embeds (N, L, D_llm)."""
        ...

    def ctc_label_ids(self, text: str) -> list[int]: ...


def check_length(model: Recognizable, frames: int | None) -> None:
    """
    Raises:
      UserError: features of so many frames are longer than the encoder can hear.
    """
    if frames is not None and frames * FRAME_SECONDS > model.max_seconds:
        raise UserError(
            f"has {frames * FRAME_SECONDS:.2f} s of audio, and the encoder hears at most {model.max_seconds:g} s"
        )
