"""What a `SpeechLLM` and an encoder alone (`EncoderModel`) have in common: features, labels, recognition."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import wraps
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from speechllm.decode.interface import ContinuousRecognizer, RecognizeOptions, Recognizer, Speech
from speechllm.decode.result import Recognition
from speechllm.errors import UserError
from speechllm.llm.interface import LanguageModel
from speechllm.model.config import EncoderSection, ModelConfig
from speechllm.model.parts import Encoder
from speechllm.model.request import checked_request
from speechllm.prompt.label import LabelTemplate, WordTime
from speechllm.prompt.request import Request, requests_of
from speechllm.text.tokenizer import Tokenizer
from speechllm.transcribe.formats import Recording

Audio = str | os.PathLike | np.ndarray | Tensor  # a file, or samples


Losses = dict[str, Tensor]


def takes_columns_too(forward: Callable[..., Losses]) -> Callable[..., Losses]:
    """Lets `forward` also take what it took in 0.1, (..., languages, target_languages, labels, contexts), for requests:
    a way out for training loops of others, to be taken away in the release after the next one."""
    names = ("languages", "target_languages", "labels", "contexts")

    @wraps(forward)
    def accepting(
        self: SpeechModel, features: Tensor, feature_lens: Tensor, texts: Sequence[str], *given: Any, **named: Any
    ) -> Losses:
        if "requests" in named or (given and all(isinstance(request, Request) for request in given[0])):
            return forward(self, features, feature_lens, texts, *given, **named)
        columns = dict(zip(names[: len(given)], given, strict=True)) | named
        labels = columns.pop("labels", None)
        return forward(self, features, feature_lens, texts, requests_of(**columns), labels)

    return accepting


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
    llm: LanguageModel | None
    ctc_head: nn.Linear | None
    blank_id: int
    label_template: LabelTemplate

    @classmethod
    @abstractmethod
    def from_config(cls, config: ModelConfig) -> SpeechModel:
        """Build the model to train it."""

    @classmethod
    @abstractmethod
    def from_pretrained(cls, folder: str | Path) -> SpeechModel:
        """Load what `save_pretrained` wrote; in evaluation mode, on the CPU."""

    @abstractmethod
    def save_pretrained(self, folder: str | Path, *, push_to_hub: str | None = None) -> None:
        """Write the whole model. Replaces `folder` in one move.

        Args:
          push_to_hub: upload the folder to this repository of the Hugging Face Hub, too (`speechllm.hub.push_folder`).
        """

    @property
    @abstractmethod
    def needs_two_views(self) -> bool:
        """Whether it is trained on two views of each utterance."""

    @property
    @abstractmethod
    def seconds_per_position(self) -> float:
        """How much audio one of the positions that it writes from stands for."""

    @abstractmethod
    def encoders(self) -> list[tuple[str, EncoderSection, Encoder]]:
        """Name as a part of the model, configuration and module of each encoder, the first one first."""

    @abstractmethod
    def encode(self, features: Tensor, feature_lens: Tensor) -> tuple[Tensor, ...]:
        """features (N, T, F), (N,) -> encoder_out (N, T', D_enc), (N,), and what else the model makes of it."""

    @abstractmethod
    def forward(
        self,
        features: Tensor,
        feature_lens: Tensor,
        texts: Sequence[str],
        requests: Sequence[Request],
        labels: Sequence[str] | None = None,
        words: Sequence[Sequence[WordTime] | None] | None = None,
        chunk_seconds: float | None = None,
    ) -> Losses:
        """Losses of a batch, SUMMED over its utterances; `loss` is the one to train with, divided by `tokens`.

        Args:
          features: (N, T, F), right-padded; feature_lens: (N,) frames.
          texts: N transcripts or translations.
          requests: what is asked for each of the N utterances.
          labels: N labels of the texts (`label_template`); None: made of the above, which say no word times.
          words: N times the words of transcripts, with their times; chunk_seconds: of streams, None where the rows are
            none (`speechllm.prompt.interleave`).
        """

    @abstractmethod
    def recognizer(self, options: RecognizeOptions | None = None) -> ContinuousRecognizer:
        """What recognizes any number of batches: called with batches of speech, it gives the results of each.

        Raises:
          UserError: the options ask for what the model does not have.
        """

    @abstractmethod
    def card(self) -> str:
        """The text of its folder's README.md, without results."""

    def recogniser(self, options: RecognizeOptions | None = None) -> Recognizer:
        """`recognizer` by its name in 0.1."""
        return self.recognizer(options)

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
    def max_seconds(self) -> float:
        """The longest utterance that all encoders can hear."""
        return min(encoder.max_seconds for _, _, encoder in self.encoders())

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
        return self.tokenizer.encode(self.config.prompt.label_prefix + label)

    def num_label_tokens(self, labels: Sequence[str], feature_lens: Tensor, chunk_seconds: float | None = None) -> int:
        """How many tokens of the labels of a batch count in its loss, each label's end of text included, and in streams
        (`chunk_seconds`) the end of each chunk."""
        return sum(len(ids) + 1 for ids in map(self.label_ids, labels))

    def label_lengths(self, labels: Sequence[str]) -> list[int]:
        """How many tokens each label has behind the prompt, the end of text not counted."""
        return [len(self.label_ids(label)) for label in labels]

    def label_identity(self) -> str:
        """A string that differs between models that make other tokens of some label; for the names of caches."""
        return f"{self.tokenizer.identity()} {self.config.prompt.label_prefix!r} {self.label_template}"

    def text(self, token_ids: Sequence[int]) -> str:
        """The text of the tokens of a transcript, such as CTC writes."""
        return self.tokenizer.decode(token_ids).removeprefix(self.config.prompt.label_prefix)

    def recognize(
        self,
        features: Tensor,
        feature_lens: Tensor,
        requests: Sequence[Request],
        options: RecognizeOptions | None = None,
    ) -> list[Recognition]:
        """What is said in a batch; for more than one batch, a `recognizer` searches across them.

        Args:
          features: (N, T, F), right-padded; feature_lens: (N,) frames.
          requests: of the N utterances. Those with a target language are translated; CTC cannot, and has no text for
            them.
        """
        return next(self.recognizer(options)([Speech(features, feature_lens, requests)]))

    def recognise(
        self,
        features: Tensor,
        feature_lens: Tensor,
        languages: Sequence[str | None],
        target_languages: Sequence[str | None] | None = None,
        contexts: Sequence[Request] | None = None,
        options: RecognizeOptions | None = None,
    ) -> list[Recognition]:
        """`recognize` by its name in 0.1, with what is asked for in lists of their own."""
        requests = requests_of(languages, target_languages, contexts)
        return self.recognize(features, feature_lens, requests, options)

    def transcribe(
        self,
        audio: Audio | Iterable[Audio],
        language: str | None = None,
        target_language: str | None = None,
        options: RecognizeOptions | None = None,
        context: Request | None = None,
        *,
        sampling_rate: int = 16000,
        on_error: Literal["raise", "return"] = "raise",
    ) -> list[Recording | UserError]:
        """What is said in audio of any length; translations with a target language. `[0].text` is that of the first.

        Long audio is cut at pauses; what is silent, or too short to hear anything in, has no text. Where the language
        model repeats itself, the text of the CTC head is taken if there is one, unless `options` say otherwise.

        Args:
          audio: files of any format and sampling rate; or samples, floating point in [-1, 1], int16, int32 or uint8:
            (num_samples,), or with channels, of which the mean is taken, (channels, num_samples) or (num_samples,
            channels): the shorter side is that of the channels. A file or one-dimensional samples may stand alone.
          language, target_language: tags (`en`), or names in English (`English`).
          context: the `previous` text and the `hotwords` for the slots of the prompt, the same for all.
          sampling_rate: of the samples, in Hz; files say theirs.
          on_error: what becomes of audio that cannot be read: `raise` raises for the first, when all others are done;
            `return` puts the error in the place of its result.

        Returns:
          a list with one entry for each input, also of one that stands alone.

        Raises:
          TranscriptionError: audio cannot be read; the message names it, and `results` has those of the others.
          UserError: the prompt has a slot for a language that is not given, or none for what is given; the model was
            not trained for the languages.
        """
        # here, not above: the model itself needs no lhotse
        from speechllm.transcribe.inputs import audio_input
        from speechllm.transcribe.segments import SegmentOptions, TranscriptionError, transcribe_inputs

        if on_error not in ("raise", "return"):
            raise UserError(f"on_error: unknown {on_error!r}, choose from raise, return")
        request = replace(context or Request(), language=language, target_language=target_language)
        request = checked_request(self.config, request)
        options = self.config.recognize_options(options)
        recognizer = self.recognizer(replace(options, fallback=options.fallback or "ctc"))
        recognizer.check(request)
        inputs = [
            audio_input(item, f"audio[{i}]", request, sampling_rate=sampling_rate)
            for i, item in enumerate(_as_list(audio))
        ]
        segments = SegmentOptions(max_seconds=min(SegmentOptions.max_seconds, self.max_seconds))
        was_training = self.training
        self.eval()
        try:
            found = transcribe_inputs(inputs, recognizer, segments, feature_kind=self.feature_kind)
            results = [result for _, result in found]
        finally:
            self.train(was_training)
        errors = [result for result in results if isinstance(result, UserError)]
        if errors and on_error == "raise":
            raise TranscriptionError(errors, results)
        return results


def _as_list(audio: Audio | Iterable[Audio]) -> list[Audio]:
    if isinstance(audio, str | os.PathLike):
        return [audio]
    if isinstance(audio, np.ndarray | Tensor):
        if audio.ndim == 1:
            return [audio]
        raise UserError(
            f"audio: an array of shape {tuple(audio.shape)} could be one recording with channels, or several "
            "recordings: put it into a list, [audio], for one; list(audio) for several"
        )
    if isinstance(audio, bytes | dict) or not isinstance(audio, Iterable):
        raise UserError(
            f"audio: {type(audio).__name__}: give a path or samples, or a list of them; for the contents of a file, "
            "samples as soundfile.read gives them, with sampling_rate"
        )
    return list(audio)
