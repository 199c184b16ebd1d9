"""What recognizing is asked for, and what it asks of a model: options, a batch of speech, and two protocols.

`speechllm.model.SpeechLLM` and `speechllm.model.encoder_model.EncoderModel` satisfy the protocols; nothing here or in
the recognizers knows how they are built.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from speechllm.decode.search import SearchOptions
from speechllm.encoder.transducer import Transducer
from speechllm.errors import UserError
from speechllm.llm.interface import LanguageModel
from speechllm.prompt.label import LabelTemplate, ReadLabel
from speechllm.prompt.template import PromptContext, Spliced
from speechllm.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class RecogniseOptions:
    """How speech is recognised.

    Attributes:
      search: of the language model.
      fallback: what becomes of a text that a guard has stopped, because it repeats itself or is longer than the audio
        can say: `cut`, it ends there; `ctc`, the text of the CTC head is taken instead, where there is one.
      ctc_weight: of the CTC head's scores in the search (arXiv 1609.06773); 0: they have no part in it.
      ctc_beam: of the CTC head's own search; 1 is greedy search.
      timestamps: find the words' times with the CTC head, where the model does not write them itself.
      hotwords: a file of phrases that the search prefers (see `context.Hotwords.from_file`), and their weight.
      ngram: a kenlm model that takes part in the search, and its weight.
      initial_state: a state file of RWKV-7 (`RWKV7State.save`), tuned or of a text read before, that prompts go on
        from.

    Raises:
      UserError: a value is out of range.
    """

    search: SearchOptions = field(default_factory=SearchOptions)
    fallback: Literal["cut", "ctc"] = "cut"
    ctc_weight: float = 0.0
    ctc_beam: int = 1
    timestamps: bool = False
    hotwords: str | None = None
    hotword_weight: float = 1.0
    ngram: str | None = None
    ngram_weight: float = 0.3
    initial_state: str | None = None

    def __post_init__(self) -> None:
        if self.fallback not in ("cut", "ctc"):
            raise UserError(f"fallback: unknown {self.fallback!r}, choose from cut, ctc")
        if self.ctc_weight < 0:
            raise UserError(f"ctc_weight: must be at least 0, got {self.ctc_weight}")
        if self.ctc_beam < 1:
            raise UserError(f"ctc_beam: must be at least 1, got {self.ctc_beam}")


class Speech(NamedTuple):
    """A batch: features (N, T, F), feature_lens (N,), N languages and target languages (None where there is none), N
    contexts of the prompt (None where it needs none)."""

    features: Tensor
    feature_lens: Tensor
    languages: Sequence[str | None]
    target_languages: Sequence[str | None]
    contexts: Sequence[PromptContext] | None = None


class RecognizableEncoder(Protocol):
    """What `EncoderRecogniser` asks of a model: an encoder with a CTC head, a transducer, or both."""

    tokenizer: Tokenizer
    blank_id: int
    ctc_head: nn.Module | None
    transducer: Transducer | None

    @property
    def device(self) -> torch.device: ...

    @property
    def seconds_per_position(self) -> float:
        """Of audio, one frame of the encoder's output."""
        ...

    def encode(self, features: Tensor, feature_lens: Tensor) -> tuple[Tensor, Tensor]:
        """features (N, T, F), (N,) -> encoder_out (N, T', D), (N,)."""
        ...

    def text(self, token_ids: Sequence[int]) -> str: ...


class RecognizableSpeechLLM(Protocol):
    """What `Recogniser` asks of a model; the methods are described at `SpeechLLM`."""

    llm: LanguageModel
    tokenizer: Tokenizer
    label_template: LabelTemplate
    blank_id: int
    ctc_head: nn.Module | None
    ctc_tokenizer: Tokenizer
    """Of the CTC head's pieces; mostly `tokenizer` itself."""

    @property
    def device(self) -> torch.device: ...

    @property
    def frame_seconds(self) -> float:
        """Of audio, one frame of the encoder's output."""
        ...

    @property
    def seconds_per_position(self) -> float:
        """Of audio, one position of the language model."""
        ...

    def encode(self, features: Tensor, feature_lens: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """features (N, T, F), (N,) -> encoder_out (N, T', D), (N,), audio_embeds (N, T'', D_llm), (N,)."""
        ...

    def spliced(
        self,
        audio_lens: Tensor,
        languages: Sequence[str | None],
        *,
        target_languages: Sequence[str | None] | None = None,
        contexts: Sequence[PromptContext] | None = None,
    ) -> Spliced: ...

    def embed(self, spliced: Spliced, audio_embeds: Tensor, audio_lens: Tensor) -> Tensor:
        """-> inputs_embeds (N, L, D_llm)."""
        ...

    def read_label(self, token_ids: Sequence[int]) -> ReadLabel: ...

    def label_ids(self, label: str) -> list[int]: ...

    def text(self, token_ids: Sequence[int]) -> str: ...
