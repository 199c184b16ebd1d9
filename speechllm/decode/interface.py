"""What recognizing is asked for, and what it asks of a model: options, a batch of speech, and two protocols.

`speechllm.model.SpeechLLM` and `speechllm.model.encoder_model.EncoderModel` satisfy the protocols; nothing here or in
the recognizers knows how they are built.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
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


def check_length(model: Recognizable, frames: int | None) -> None:
    """
    Raises:
      UserError: features of so many frames are longer than the encoder can hear.
    """
    if frames is not None and frames * FRAME_SECONDS > model.max_seconds:
        raise UserError(
            f"has {frames * FRAME_SECONDS:.2f} s of audio, and the encoder hears at most {model.max_seconds:g} s"
        )
