"""The configuration of a model: its encoders, projectors, language model and prompt, and what does not go together."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from speechllm.config import check_limits, load_config, setting
from speechllm.decode.options import FILE_OPTIONS, RecognizeOptions
from speechllm.encoder import WhisperEncoder, WhisperEncoderConfig, Zipformer, ZipformerConfig
from speechllm.encoder.ctc import CRCTCConfig
from speechllm.encoder.pretrained import is_whisper
from speechllm.encoder.transducer import TransducerConfig
from speechllm.errors import UserError
from speechllm.hub import local_path
from speechllm.llm.adapters import TuneConfig
from speechllm.llm.precision import DTYPES
from speechllm.llm.transformers import ATTENTION, transformers_config
from speechllm.model.streaming import chunk_of
from speechllm.projector import ProjectorConfig
from speechllm.prompt.interleave import StreamingConfig
from speechllm.prompt.label import LabelTemplate
from speechllm.prompt.template import PromptConfig
from speechllm.rwkv7 import RWKV7Config
from speechllm.rwkv7.wkv import BACKENDS


@dataclass
class EncoderSection:
    """`path`: a released encoder's folder or file (see `load_encoder`): a Zipformer of icefall or Auden, or a Whisper.
    Without it, one of the sizes in `zipformer` or in `whisper` is trained from scratch. `path` and `zipformer` together
    are for weights without a config.json beside them.

    `freeze`: nothing of it is trained; `freeze_stacks: n`: its front end and the lowest n stacks (of Whisper: layers)
    are not.
    `pad_to_30s`: Whisper hears utterances with silence up to 30 s, as in its own training; otherwise as they are.
    `schedule_speed`: the schedules of a Zipformer's training from scratch (dropout, layer skip, balancers) span 4,000
    to 20,000 steps of a large run; a short run passes through them so many times faster.
    `checkpoint_layers`: activations are computed again in the backward pass: less memory, a third more work.
    """

    path: str | None = None
    freeze: bool = False
    freeze_stacks: int = setting(0, at_least=0)
    pad_to_30s: bool = False
    schedule_speed: float = 1.0
    checkpoint_layers: bool = False
    zipformer: ZipformerConfig | None = None
    whisper: WhisperEncoderConfig | None = None

    def __post_init__(self) -> None:
        if self.zipformer is not None and self.whisper is not None:
            raise ValueError("zipformer and whisper: give the sizes of one of them")
        if not self.path and self.zipformer is None and self.whisper is None:
            raise ValueError("give path (a released encoder), or zipformer or whisper (sizes to train from scratch)")
        if self.path and self.whisper is not None:
            raise ValueError("path and whisper: a released Whisper has its sizes in its config.json; leave out one")
        if (self.freeze or self.freeze_stacks) and not self.path:
            raise ValueError(f"{'freeze' if self.freeze else 'freeze_stacks'} without path would freeze random weights")
        check_limits(self)
        if self.freeze and self.freeze_stacks:
            raise ValueError(f"freeze (all of it) and freeze_stacks: {self.freeze_stacks}: give one of them")
        if self.pad_to_30s and self.zipformer is not None:
            raise ValueError("pad_to_30s is for Whisper, but zipformer is given")
        if self.schedule_speed != 1.0 and not self.is_new_zipformer:
            why = "Whisper has no schedules" if self.whisper else f"the schedules of {self.path} are past their end"
            raise ValueError(f"schedule_speed: {self.schedule_speed:g} is for a Zipformer from scratch: {why}")

    @property
    def is_new_zipformer(self) -> bool:
        """Whether it is a Zipformer that begins with random weights."""
        return self.zipformer is not None and not self.path

    @property
    def min_frames(self) -> int:
        """The shortest utterance that it can hear, in frames of features; without loading it."""
        whisper = self.whisper is not None or (self.path is not None and is_whisper(self.path))
        return (WhisperEncoder if whisper else Zipformer).min_frames


@dataclass
class LLMSection:
    """`path`: an RWKV-7 checkpoint, a folder of any causal language model of Hugging Face transformers (of one that
    also sees or hears, the text part is taken), or a GGUF file of a Llama or Qwen, whose weights are dequantized;
    without it, one of the sizes in `rwkv7`, or of the `model_type` and settings in `transformers`, is trained from
    scratch.

    `adapter`: what was tuned before, put on the checkpoint and not trained: the folder of a PEFT adapter or of a state,
    or a .pth file of RWKV-PEFT (`speechllm.llm.rwkv_peft`), for a LoRA with its `adapter_alpha`.
    `tune`: what of the checkpoint trains, and how; without it everything does, or with `freeze` nothing.
    `dtype`: `bfloat16`, `float16` or `float32`, the type of the checkpoint's weights, in which they compute too. What
    trains in place is float32, and so are adapters. Without it, weights that do not train have the checkpoint's own
    type on a machine with a GPU, and float32 on one without.
    `attention`: of models of transformers, `sdpa`, `flash_attention_2` or `eager`; without it, what transformers
    chooses (sdpa, PyTorch's own, where the model has it).
    `checkpoint_blocks`: activations are computed again in the backward pass: less memory, a third more work.
    `wkv_backend`: of RWKV-7, see `rwkv7.wkv.wkv7`.
    """

    path: str | None = None
    freeze: bool = False
    adapter: str | None = None
    adapter_alpha: float | None = None
    tune: TuneConfig | None = None
    dtype: str | None = None
    attention: str | None = None
    checkpoint_blocks: bool = False
    wkv_backend: str = "auto"
    rwkv7: RWKV7Config | None = None
    transformers: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        _check_source(self, ("rwkv7", "transformers"))
        if self.transformers is not None:
            try:
                transformers_config(self.transformers)
            except UserError as e:
                raise ValueError(f"transformers: {e}") from e
        if self.wkv_backend not in BACKENDS:
            raise ValueError(f"wkv_backend: unknown {self.wkv_backend!r}, choose from {', '.join(BACKENDS)}")
        if self.dtype not in (None, *DTYPES):
            raise ValueError(f"dtype: unknown {self.dtype!r}, choose from {', '.join(DTYPES)}")
        if self.attention not in (None, *ATTENTION):
            raise ValueError(f"attention: unknown {self.attention!r}, choose from {', '.join(ATTENTION)}")
        if self.dtype not in (None, "float32") and not self.freezes_base:
            raise ValueError(
                f"dtype: {self.dtype} is for weights that do not train, and all of these do: leave it out, and compute "
                "in half precision with train.mixed_precision; or freeze them, or tune an adapter"
            )
        if self.tune is not None and not self.path:
            raise ValueError("tune without path would tune random weights")
        if self.adapter is not None and (self.tune is not None or not (self.path and self.freeze)):
            raise ValueError(
                "adapter goes on the checkpoint at path, and with freeze: true; to train on, merge it first"
            )
        if self.adapter_alpha is not None and self.adapter is None:
            raise ValueError("adapter_alpha is the alpha of a LoRA in a file of RWKV-PEFT: give that file as adapter")
        if self.tune is not None and self.freeze:
            raise ValueError("give either freeze (nothing is trained) or tune (which freezes what it does not train)")

    @property
    def freezes_base(self) -> bool:
        """Whether the weights at `path` stay as they are in training."""
        return self.freeze or (self.tune is not None and self.tune.freezes_base)


@dataclass
class MoreEncoder:
    """One more encoder, and its own projector."""

    encoder: EncoderSection
    projector: ProjectorConfig = field(default_factory=ProjectorConfig)


@dataclass
class ModelConfig:
    """Everything that defines a model. `tokenizer` is `rwkv`, or the folder of a sentencepiece or Hugging Face model.

    `label`: what the language model writes, behind `prompt.before_label`: the text, perhaps with the language and the
    times of words (`speechllm.prompt.label`).
    `ctc_weight` scales the CTC loss of a linear head on the encoder; 0 builds no head. `ctc_tokenizer`: the head writes
    the pieces of this tokenizer, not the language model's tokens, most of which a small corpus does not have. The head
    of `encoder.path` is where it starts, if that is a model of this library whose head writes the same pieces.
    `more_encoders`: their embeddings stand behind the encoder's, in this order. `encoder_dropout`: in training each
    encoder is left out of an utterance with this probability, but never all (as ModDrop, arXiv 1501.00102, drops whole
    modalities); in decoding all are there.
    `streaming`: the model learns to write while it listens, chunk by chunk (`speechllm.prompt.interleave`).
    `decoding`: how the model is recognized best, found on its validation set: what `transcribe` and `recipes/decode.py`
    do where nobody asks for another search. Validation in training is greedy. The files that it names are copied into
    the model's folder.
    `languages`: what the model was trained on, `en` for transcripts of English, `en>de` for translations into German.
    It is put into a trained model's folder; where it is null, nothing is checked against it.

    Without a language model (`llm: null`) the encoder is trained by itself (`encoder_model.EncoderModel`), by CTC, with
    consistency regularization (`cr_ctc`) or not, by a `transducer`, or by several of these.
    """

    tokenizer: str
    encoder: EncoderSection
    llm: LLMSection | None = None
    projector: ProjectorConfig = field(default_factory=ProjectorConfig)
    prompt: PromptConfig = field(default_factory=PromptConfig)
    label: str = "{text}"
    ctc_weight: float = setting(0.0, at_least=0)
    ctc_tokenizer: str | None = None
    more_encoders: list[MoreEncoder] = field(default_factory=list)
    encoder_dropout: float = setting(0.0, at_least=0, below=1)
    cr_ctc: CRCTCConfig | None = None
    transducer: TransducerConfig | None = None
    streaming: StreamingConfig | None = None
    decoding: RecognizeOptions | None = None
    languages: list[str] | None = None

    def __post_init__(self) -> None:
        tells = self.prompt.tells_language()
        if LabelTemplate(self.label).has_language and tells is not None:
            raise ValueError(
                f"label {self.label!r} asks for the language that the prompt {tells!r} tells: take it out of one of "
                "them"
            )
        check_limits(self)
        if self.ctc_tokenizer is not None and not self.ctc_weight:
            raise ValueError("ctc_tokenizer is for the CTC head, and ctc_weight is 0: set it above 0")
        self._check_ctc_projectors()
        if self.encoder_dropout and not self.more_encoders:
            raise ValueError("encoder_dropout leaves out one of several encoders, but there are no more_encoders")
        if self.streaming is not None:
            self._check_streaming(self.streaming)
        if self.llm is None:
            self._check_encoder_alone()
        else:
            for name in ("cr_ctc", "transducer"):
                if getattr(self, name) is not None:
                    raise ValueError(
                        f"{name} trains an encoder without a language model, and llm is given: leave out one of them"
                    )

    def _check_ctc_projectors(self) -> None:
        if self.projector.kind == "ctc" and not self.ctc_weight:
            raise ValueError("projector.kind: ctc reads the CTC head, and ctc_weight is 0: set it above 0")
        for i, more in enumerate(self.more_encoders):
            if more.projector.kind == "ctc":
                raise ValueError(
                    f"more_encoders[{i}].projector.kind: ctc reads the CTC head, which is on the first encoder only"
                )

    def _check_streaming(self, streaming: StreamingConfig) -> None:
        if self.label != "{text}":
            raise ValueError(
                f"streaming writes the words of a chunk when they have been said, but label {self.label!r} has more "
                'than those: set label: "{text}"'
            )
        if self.more_encoders:
            raise ValueError("streaming takes one encoder, and there are more_encoders: leave out one of them")
        if self.encoder.whisper is not None:
            raise ValueError("streaming: Whisper hears whole utterances only; take a Zipformer with causal: true")
        if streaming.delay_seconds and not self.prompt.tells_end_of_stream():
            raise ValueError(
                f"streaming.delay_seconds: {streaming.delay_seconds:g} leaves words to write when the audio has "
                "ended, which the prompt does not tell: have text after {audio} in prompt.streaming, or prompt.boundary"
            )
        if self.encoder.zipformer is not None and not self.encoder.path:
            for seconds in streaming.chunk_seconds:
                chunk_of(seconds, self.encoder.zipformer, self.projector)

    def _check_encoder_alone(self) -> None:
        if not self.ctc_weight and self.transducer is None:
            raise ValueError(
                "llm is null, and neither ctc_weight is above 0 nor transducer given: there is nothing to train the "
                "encoder with"
            )
        if self.cr_ctc is not None and not self.ctc_weight:
            raise ValueError("cr_ctc makes what CTC says of two views agree, but ctc_weight is 0: set it above 0")
        for name, given, default in (
            ("projector", self.projector, ProjectorConfig()),
            ("prompt", self.prompt.written_out(), PromptConfig().written_out()),
            ("label", self.label, "{text}"),
            ("ctc_tokenizer", self.ctc_tokenizer, None),
            ("more_encoders", self.more_encoders, []),
            ("streaming", self.streaming, None),
            ("decoding", self.decoding, None),
        ):
            if given != default:
                raise ValueError(f"{name} leads to the language model, and llm is null: leave out {name}")

    def recognize_options(self, asked: RecognizeOptions | None) -> RecognizeOptions:
        """`asked`, or, where nothing is asked for, how the model is recognized best."""
        return asked or self.decoding or RecognizeOptions()

    @property
    def min_frames(self) -> int:
        """The shortest utterance that all encoders can hear, in frames of features."""
        return max(section.min_frames for section in [self.encoder, *(more.encoder for more in self.more_encoders)])

    @property
    def projectors(self) -> dict[str, ProjectorConfig]:
        """Those of all encoders, by their keys."""
        more = {f"more_encoders[{i}].projector": more.projector for i, more in enumerate(self.more_encoders)}
        return {"projector": self.projector, **more}


def _check_source(section: LLMSection, sizes: Sequence[str]) -> None:
    if sum(bool(getattr(section, name)) for name in ("path", *sizes)) != 1:
        raise ValueError(f"give either path (a checkpoint) or {' or '.join(sizes)} (sizes to train from scratch)")
    if section.freeze and not section.path:
        raise ValueError("freeze without path would freeze random weights")


def load_model_config(folder: str | Path) -> ModelConfig:
    """The configuration in a folder that `save_pretrained` wrote; its tokenizer and the files of its search are in it.

    Raises:
      FileNotFoundError, ConfigError: the folder is not one.
    """
    given, folder = folder, local_path(folder)
    path = folder / "config.yaml"
    if not path.is_file():
        raise FileNotFoundError(f"{given}: no config.yaml: not a folder written by save_pretrained")
    config = load_config(ModelConfig, path)
    ctc_tokenizer = None if config.ctc_tokenizer is None else str(folder / config.ctc_tokenizer)
    decoding = config.decoding
    if decoding is not None:
        files: dict[str, Any] = {name: str(folder / file) for name in FILE_OPTIONS if (file := getattr(decoding, name))}
        decoding = dataclasses.replace(decoding, **files)
    return dataclasses.replace(
        config, tokenizer=str(folder / config.tokenizer), ctc_tokenizer=ctc_tokenizer, decoding=decoding
    )


def save_decoding(decoding: RecognizeOptions | None, folder: Path) -> RecognizeOptions | None:
    """Copy the files that it names into a model's folder, and name these.

    Raises:
      UserError: one of them is not there.
    """
    if decoding is None:
        return None
    for name in FILE_OPTIONS:
        if file := getattr(decoding, name):
            own = f"{name}{Path(file).suffix}"
            try:
                shutil.copyfile(file, folder / own)
            except OSError as e:
                raise UserError(f"model.decoding.{name}: {file} cannot be copied into the model's folder: {e}") from e
            changed: dict[str, Any] = {name: own}
            decoding = dataclasses.replace(decoding, **changed)
    return decoding
