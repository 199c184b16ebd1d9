"""What a `SpeechLLM` and an encoder alone (`EncoderModel`) have in common: features, labels, recognition."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from speechllm.decode.interface import RecogniseOptions, Speech
from speechllm.decode.result import Recognition
from speechllm.encoder import WhisperEncoder, Zipformer
from speechllm.prompt.label import LabelTemplate
from speechllm.prompt.template import PromptContext
from speechllm.text.tokenizer import Tokenizer
from speechllm.transcribe.formats import Recording

if TYPE_CHECKING:
    from speechllm.model.speech_llm import EncoderSection, ModelConfig

Encoder = Zipformer | WhisperEncoder


class SpeechModel(nn.Module, ABC):
    """Has an encoder with features of its own, writes labels, and recognizes speech.

    Attributes:
      autocast_dtype: half precision in which encoder and projector compute when speech is recognized
        (`speechllm.model.build.prepare_for_inference`); None leaves it to the caller.
    """

    autocast_dtype: torch.dtype | None = None
    config: ModelConfig  # its prompt written out
    tokenizer: Tokenizer
    encoder: Encoder
    label_template: LabelTemplate

    @abstractmethod
    def encoders(self) -> list[tuple[str, EncoderSection, Encoder]]:
        """Name as a part of the model, configuration and module of each encoder, the first one first."""

    @abstractmethod
    def recogniser(
        self, options: RecogniseOptions | None = None
    ) -> Callable[[Iterable[Speech]], Iterator[list[Recognition]]]:
        """What recognizes any number of batches: called with batches of speech, it gives the results of each.

        Raises:
          UserError: the options ask for what the model does not have.
        """

    def train(self, mode: bool = True) -> SpeechModel:
        """Frozen parts stay in evaluation mode."""
        super().train(mode)
        if mode:
            for module in self.modules():
                parameters = list(module.parameters())
                if parameters and not any(p.requires_grad for p in parameters):
                    module.eval()
        return self

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def frame_seconds(self) -> float:
        """How much audio one frame of the first encoder's output stands for."""
        return self.encoder.frame_seconds

    @property
    def min_frames(self) -> int:
        """The shortest utterance that all encoders can hear, in frames of features."""
        return max(encoder.min_frames for _, _, encoder in self.encoders())

    @property
    def feature_kind(self) -> str:
        """The features that the encoders read (see `speechllm.data.features`): of several kinds side by side."""
        return "+".join(dict.fromkeys(encoder.feature_kind for _, _, encoder in self.encoders()))

    def features_of(self, encoder: Encoder, features: Tensor) -> Tensor:
        """What one of the encoders reads of features (N, T, F) of all kinds."""
        # in the order of `feature_kind`
        bins = {other.feature_kind: other.feature_dim for _, _, other in self.encoders()}
        return dict(zip(bins, features.split(list(bins.values()), dim=2), strict=True))[encoder.feature_kind]

    def encoding(self) -> AbstractContextManager[object]:
        """The context that `encode` computes in: `autocast_dtype`."""
        if self.autocast_dtype is None:
            return nullcontext()
        return torch.autocast(self.device.type, self.autocast_dtype)

    def label_ids(self, label: str) -> list[int]:
        """The tokens of a label as it stands behind the prompt, without the end of text."""
        return self.tokenizer.encode(self.config.prompt.before_label + label)

    def label_lengths(self, labels: Sequence[str]) -> list[int]:
        """How many tokens each label has behind the prompt, the end of text not counted."""
        return [len(self.label_ids(label)) for label in labels]

    def label_identity(self) -> str:
        """A string that differs between models that make other tokens of some label; for the names of caches."""
        return f"{self.tokenizer.identity()} {self.config.prompt.before_label!r} {self.label_template}"

    def text(self, token_ids: Sequence[int]) -> str:
        """The text of the tokens of a transcript, such as CTC writes."""
        return self.tokenizer.decode(token_ids).removeprefix(self.config.prompt.before_label)

    def recognise(
        self,
        features: Tensor,
        feature_lens: Tensor,
        languages: Sequence[str | None],
        target_languages: Sequence[str | None] | None = None,
        contexts: Sequence[PromptContext] | None = None,
        options: RecogniseOptions | None = None,
    ) -> list[Recognition]:
        """What is said in a batch; for more than one batch, a `recogniser` searches across them.

        Rows with a target language are translated; CTC cannot, and has no text for them.
        """
        speech = Speech(features, feature_lens, languages, target_languages or [None] * len(languages), contexts)
        return next(self.recogniser(options)([speech]))

    def transcribe(
        self,
        audio: Sequence[str | Path | np.ndarray | Tensor],
        language: str | None = None,
        target_language: str | None = None,
        options: RecogniseOptions | None = None,
        context: PromptContext | None = None,
    ) -> list[Recording]:
        """What is said in audio of any length; translations with a target language. `[0].text` is that of the first.

        Long audio is cut at pauses; what is silent has no text.

        Args:
          audio: files of any format and sampling rate, or (num_samples,) floating-point samples in [-1, 1], 16 kHz.
          context: for the prompt's slots of that kind, the same for all.

        Raises:
          DataError: a file cannot be read; the message names it.
          UserError: the prompt has a slot for a language that is not given; samples of another shape; an encoder alone
            is to translate.
        """
        # here, not above: the model itself needs no lhotse
        from speechllm.transcribe.inputs import audio_input
        from speechllm.transcribe.segments import transcribe_inputs

        inputs = [audio_input(a, f"audio[{i}]", language, target_language, context) for i, a in enumerate(audio)]
        was_training = self.training
        self.eval()
        try:
            results = transcribe_inputs(inputs, self.recogniser(options), feature_kind=self.feature_kind)
            found = [result for _, result in results]
        finally:
            self.train(was_training)
        if errors := [result for result in found if isinstance(result, Exception)]:
            raise errors[0]
        return found
