"""SpeechLLM: encoder + projector + prompt + language model.

    features (N, T, F) -> encoder -> (N, T/4, D_enc), 25 Hz -> projector -> (N, T/8, D_llm), 12.5 Hz
      -> [prompt with the audio in it | label] embeddings -> language model -> loss on label and end of text

An auxiliary CTC head on the encoder (arXiv 1609.06773) helps a model trained from scratch to align. It is trained on
transcripts only: the encoder sees no prompt, so it cannot know that a translation is wanted.

In a batch the rows with a target language are to be translated, the others to be transcribed.

With `more_encoders` the audio is what each encoder's projector gives, one after another, as MoWE-Audio (arXiv
2409.06635) puts weak encoders beside a strong one. The CTC head stays on the first.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from speechllm.config import ConfigError, load_config, save_config
from speechllm.decode.recognizer import RecogniseOptions, Recogniser
from speechllm.encoder import WhisperEncoder, WhisperEncoderConfig, Zipformer, ZipformerConfig, load_encoder
from speechllm.encoder.ctc import CRCTCConfig, ctc_losses
from speechllm.encoder.pretrained import is_whisper
from speechllm.encoder.transducer import TransducerConfig
from speechllm.errors import UserError
from speechllm.files import replaced_folder
from speechllm.llm.adapters import TuneConfig, load_adapter, merged_state_dict, save_adapter, tune
from speechllm.llm.interface import IGNORE, LanguageModel
from speechllm.llm.precision import DTYPES, base_dtype, convert, half_precision
from speechllm.llm.transformers import (
    ATTENTION,
    TransformersLM,
    is_transformers_model,
    load_transformers_lm,
    new_transformers_lm,
    transformers_config,
)
from speechllm.model.base import Encoder, SpeechModel
from speechllm.model.card import model_card
from speechllm.model.ctc_head import load_ctc_head, mean_embeddings
from speechllm.model.streaming import Chunk, aligned_words, chunk_of, chunks_of
from speechllm.projector import (
    CTCProjector,
    Projector,
    ProjectorConfig,
    WeightedStacks,
    build_projector,
    one_after_another,
)
from speechllm.prompt.interleave import StreamingConfig, deal_out, interleave
from speechllm.prompt.label import LabelTemplate, ReadLabel, WordTime
from speechllm.prompt.template import PromptConfig, PromptContext, PromptEmbedder, Spliced, splice
from speechllm.rwkv7 import RWKV7, RWKV7Config, load_rwkv7
from speechllm.rwkv7.wkv import BACKENDS
from speechllm.text.tokenizer import Tokenizer, load_tokenizer
from speechllm.weights import load_state_dict_strict

# What stands before a transcript in a CTC head's own pieces: what an encoder alone has learnt to write.
_CTC_PREFIX = PromptConfig().written_out().before_label


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
    freeze_stacks: int = 0
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
        if self.freeze_stacks < 0:
            raise ValueError(f"freeze_stacks must be at least 0, got {self.freeze_stacks}")
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
    also sees or hears, the text part is taken), or a GGUF file of a Llama or Qwen, whose weights are dequantised;
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
    `languages`: what the model was trained on, `en` for transcripts of English, `en>de` for translations into German.
    It is put into a trained model's folder; where it is null, nothing is checked against it.

    Without a language model (`llm: null`) the encoder is trained by itself (`encoder_model.EncoderModel`), by CTC, with
    consistency regularisation (`cr_ctc`) or not, by a `transducer`, or by several of these.
    """

    tokenizer: str
    encoder: EncoderSection
    llm: LLMSection | None = None
    projector: ProjectorConfig = field(default_factory=ProjectorConfig)
    prompt: PromptConfig = field(default_factory=PromptConfig)
    label: str = "{text}"
    ctc_weight: float = 0.0
    ctc_tokenizer: str | None = None
    more_encoders: list[MoreEncoder] = field(default_factory=list)
    encoder_dropout: float = 0.0
    cr_ctc: CRCTCConfig | None = None
    transducer: TransducerConfig | None = None
    streaming: StreamingConfig | None = None
    languages: list[str] | None = None

    def __post_init__(self) -> None:
        tells = self.prompt.tells_language()
        if LabelTemplate(self.label).has_language and tells is not None:
            raise ValueError(
                f"label {self.label!r} asks for the language that the prompt {tells!r} tells: take it out of one of "
                "them"
            )
        if self.ctc_weight < 0:
            raise ValueError(f"ctc_weight must be at least 0, got {self.ctc_weight}")
        if self.ctc_tokenizer is not None and not self.ctc_weight:
            raise ValueError("ctc_tokenizer is for the CTC head, and ctc_weight is 0: set it above 0")
        self._check_ctc_projectors()
        if not 0 <= self.encoder_dropout < 1:
            raise ValueError(f"encoder_dropout must be in [0, 1), got {self.encoder_dropout}")
        if self.encoder_dropout and not self.more_encoders:
            raise ValueError("encoder_dropout leaves out one of several encoders, but there are no more_encoders")
        if self.streaming is not None:
            self._check_streaming()
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

    def _check_streaming(self) -> None:
        if self.label != "{text}":
            raise ValueError(
                f"streaming writes the words of a chunk when they have been said, but label {self.label!r} has more "
                'than those: set label: "{text}"'
            )
        if self.more_encoders:
            raise ValueError("streaming takes one encoder, and there are more_encoders: leave out one of them")
        if self.encoder.whisper is not None:
            raise ValueError("streaming: Whisper hears whole utterances only; take a Zipformer with causal: true")
        if self.streaming.delay_seconds and not self.prompt.tells_end_of_stream():
            raise ValueError(
                f"streaming.delay_seconds: {self.streaming.delay_seconds:g} leaves words to write when the audio has "
                "ended, which the prompt does not tell: have text after {audio} in prompt.streaming, or prompt.boundary"
            )
        if self.encoder.zipformer is not None and not self.encoder.path:
            for seconds in self.streaming.chunk_seconds:
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
        ):
            if given != default:
                raise ValueError(f"{name} leads to the language model, and llm is null: leave out {name}")

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
    """The configuration in a folder that `save_pretrained` wrote; its tokenizer is in that folder.

    Raises:
      FileNotFoundError, ConfigError: the folder is not one.
    """
    path = Path(folder) / "config.yaml"
    if not path.is_file():
        raise FileNotFoundError(f"{folder}: no config.yaml: not a folder written by save_pretrained")
    config = load_config(ModelConfig, path)
    ctc_tokenizer = None if config.ctc_tokenizer is None else str(Path(folder) / config.ctc_tokenizer)
    return dataclasses.replace(config, tokenizer=str(Path(folder) / config.tokenizer), ctc_tokenizer=ctc_tokenizer)


def build_encoder(section: EncoderSection) -> Encoder:
    """The encoder, as the configuration says: loaded or new, its lowest stacks frozen.

    Raises:
      UserError, FileNotFoundError: it does not load, or is none that the settings are for.
    """
    if section.path:
        encoder = load_encoder(section.path, section.zipformer)
    elif section.whisper is not None:
        encoder = WhisperEncoder(section.whisper)
    else:
        encoder = Zipformer(section.zipformer)
    encoder.checkpoint_layers = section.checkpoint_layers
    if section.pad_to_30s:
        if not isinstance(encoder, WhisperEncoder):
            raise ConfigError(f"model.encoder.pad_to_30s is for Whisper, but {section.path} is a Zipformer")
        encoder.pad_to_max_seconds = True
    if section.freeze_stacks:
        if section.freeze_stacks >= encoder.num_stacks:
            raise ConfigError(
                f"model.encoder.freeze_stacks: {section.freeze_stacks}, but {section.path} has {encoder.num_stacks}: "
                f"give at most {encoder.num_stacks - 1}, or freeze: true for all of it"
            )
        for module in encoder.bottom(section.freeze_stacks):
            module.requires_grad_(False)
    return encoder


def saved_section(encoder: Encoder) -> EncoderSection:
    """What `save_pretrained` writes: all weights are in the folder."""
    if isinstance(encoder, WhisperEncoder):
        return EncoderSection(whisper=encoder.config, pad_to_30s=encoder.pad_to_max_seconds)
    return EncoderSection(zipformer=encoder.config)


def _language_model(section: LLMSection) -> RWKV7 | TransformersLM:
    if section.rwkv7 is not None:
        llm = RWKV7(section.rwkv7, section.wkv_backend)
    elif section.transformers is not None:
        llm = new_transformers_lm(section.transformers, section.attention)
    else:
        dtype = base_dtype(section.dtype, not section.freezes_base, torch.cuda.is_available())
        if is_transformers_model(section.path):
            llm = load_transformers_lm(section.path, dtype, section.attention)
        else:
            llm = load_rwkv7(section.path, dtype, section.wkv_backend)
        if dtype is None and llm.dtype == torch.bfloat16:
            convert(llm, getattr(torch, half_precision()))
    if isinstance(llm, RWKV7):
        if section.attention is not None:
            raise ConfigError(f"llm.attention: {section.attention} is for models of transformers; RWKV-7 has none")
        return llm
    if section.wkv_backend != "auto":
        raise ConfigError(f"llm.wkv_backend: {section.wkv_backend} is for RWKV-7; the language model is {llm.name}")
    return llm


class SpeechLLM(SpeechModel):
    """See the module's docstring. Build one with `from_config` (training) or `from_pretrained` (use)."""

    needs_two_views = False

    def __init__(
        self,
        config: ModelConfig,
        encoder: Encoder,
        projector: Projector,
        llm: LanguageModel,
        tokenizer: Tokenizer,
        more_encoders: Sequence[tuple[Encoder, Projector]] = (),
        ctc_tokenizer: Tokenizer | None = None,
    ) -> None:
        super().__init__()
        # The texts, not the names of presets: what is saved stays what it was trained with.
        self.config = dataclasses.replace(config, prompt=config.prompt.written_out())
        self.tokenizer = tokenizer
        self.encoder = encoder
        self.projector = projector
        self.llm = llm
        self.prompt = PromptEmbedder(config.prompt, llm)
        self.more_encoders = nn.ModuleList(nn.ModuleDict({"encoder": e, "projector": p}) for e, p in more_encoders)
        self.ctc_tokenizer = ctc_tokenizer or tokenizer
        # Blank is the last class, so the others keep the tokenizer's ids.
        self.blank_id = self.ctc_tokenizer.vocab_size
        self.ctc_head = nn.Linear(encoder.output_dim, self.blank_id + 1) if config.ctc_weight else None
        self.label_template = LabelTemplate(config.label, self.seconds_per_position)
        self.chunks = chunks_of(config.streaming, encoder, config.projector) if config.streaming is not None else {}
        for part, section in [(llm, config.llm), *((e, section) for _, section, e in self.encoders())]:
            if section.freeze:
                part.requires_grad_(False)
        self.train()

    @classmethod
    def from_config(cls, config: ModelConfig) -> SpeechLLM:
        """Build the model; parts with a `path` are loaded, the others initialised for training from scratch.

        Raises:
          UserError, FileNotFoundError: a part does not load, or two parts do not fit together.
        """
        if config.llm is None:
            raise ConfigError("model.llm: null: without a language model it is an EncoderModel, not a SpeechLLM")
        tokenizer = load_tokenizer(config.tokenizer)
        config.prompt.check_tags(tokenizer, config.tokenizer)
        encoder = build_encoder(config.encoder)
        llm = _language_model(config.llm)
        if config.llm.adapter is not None:
            load_adapter(llm, config.llm.adapter, alpha=config.llm.adapter_alpha)
        if config.llm.tune is not None:
            tune(llm, config.llm.tune)
        llm.checkpoint_blocks = config.llm.checkpoint_blocks
        if llm.vocab_size < tokenizer.vocab_size:
            raise ConfigError(
                f"the language model ({config.llm.path or llm.name}) has a vocabulary of {llm.vocab_size}, "
                f"the tokenizer {config.tokenizer} of {tokenizer.vocab_size}: they must belong together"
            )
        ctc_tokenizer = None if config.ctc_tokenizer is None else load_tokenizer(config.ctc_tokenizer)
        table = None
        if config.projector.kind == "ctc" and ctc_tokenizer is not None:
            table = mean_embeddings(llm, tokenizer, ctc_tokenizer)
        projector = build_projector(config.projector, encoder.output_dim, llm.hidden_size, encoder.num_stacks, table)
        more_encoders = []
        for i, more in enumerate(config.more_encoders):
            other = build_encoder(more.encoder)
            if other.feature_kind == encoder.feature_kind and other.feature_dim != encoder.feature_dim:
                raise ConfigError(
                    f"model.more_encoders[{i}].encoder reads features of {other.feature_dim} bins, model.encoder of "
                    f"{encoder.feature_dim}: encoders read the same {encoder.feature_kind} features"
                )
            sizes = other.output_dim, llm.hidden_size, other.num_stacks
            more_encoders.append((other, build_projector(more.projector, *sizes)))
        model = cls(config, encoder, projector, llm, tokenizer, more_encoders, ctc_tokenizer)
        if model.ctc_head is not None and config.encoder.path is not None:
            load_ctc_head(model.ctc_head, config.encoder.path, model.ctc_tokenizer)
        return model

    @property
    def streaming(self) -> StreamingConfig | None:
        """How it writes while it listens; None if it does not."""
        return self.config.streaming

    @property
    def seconds_per_position(self) -> float:
        """How much audio one position of the language model stands for, the positions of all encoders counted."""
        return 1 / sum(1 / (encoder.frame_seconds * projector.downsample) for encoder, projector in self._branches())

    def audio_lens(self, feature_lens: Tensor) -> Tensor:
        """How many positions of audio the language model reads for feature_lens (N,) frames: (N,)."""
        return sum(projector.output_lens(encoder.output_lens(feature_lens)) for encoder, projector in self._branches())

    def encoders(self) -> list[tuple[str, EncoderSection, Encoder]]:
        """Name as a part of the model, configuration and module of each encoder, the first one first."""
        more = zip(self.config.more_encoders, self.more_encoders, strict=True)
        return [
            ("encoder", self.config.encoder, self.encoder),
            *((f"more_encoders.{i}.encoder", c.encoder, part["encoder"]) for i, (c, part) in enumerate(more)),
        ]

    def _branches(self) -> list[tuple[Encoder, Projector]]:
        more = [(part["encoder"], part["projector"]) for part in self.more_encoders]
        return [(self.encoder, self.projector), *more]

    def encode(
        self, features: Tensor, feature_lens: Tensor, chunk: Chunk | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """features (N, T, F), (N,) -> encoder_out (N, T', D_enc), (N,), audio_embeds (N, T'', D_llm), (N,).

        encoder_out is the first encoder's; the audio is that of all. With a `chunk` it is what a stream of such chunks
        hears.
        """
        with self.encoding():
            encoder_out, *others = self._encode_all(features, feature_lens, chunk)
        return encoder_out if self.autocast_dtype is None else encoder_out.float(), *others

    def _encode_all(self, features: Tensor, feature_lens: Tensor, chunk: Chunk | None) -> tuple[Tensor, ...]:
        """See `encode`."""
        if not self.more_encoders:
            return self._encode(self.encoder, self.projector, features, feature_lens, self._encoder_context(chunk))
        (encoder_out, encoder_out_lens, *first), *parts = (
            self._encode(encoder, projector, self.features_of(encoder, features), feature_lens)
            for encoder, projector in self._branches()
        )
        embeds, lens = zip(first, *(part[2:] for part in parts), strict=True)
        if self.training and self.config.encoder_dropout:
            lens = self._with_encoder_dropout(torch.stack(lens))
        return encoder_out, encoder_out_lens, *one_after_another(embeds, lens)

    def _encoder_context(self, chunk: Chunk | None) -> dict[str, int]:
        """What an encoder is told about the context that it hears in."""
        if chunk is not None:
            return chunk.encoder_context
        if self.config.streaming is None:
            return {}
        # By itself it would draw one in training: but for streams there are batches of their own.
        sizes, left = self.encoder.config.chunk_size, self.encoder.config.left_context_frames
        return {
            "chunk_size": -1 if -1 in sizes else max(sizes),
            "left_context_frames": -1 if -1 in left else max(left),
        }

    def _encode(
        self,
        encoder: Encoder,
        projector: Projector,
        features: Tensor,
        feature_lens: Tensor,
        context: dict[str, int] | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """encoder_out (N, T', D_enc), (N,), audio_embeds (N, T'', D_llm), (N,) of one encoder and its projector."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and any(p.requires_grad for p in encoder.parameters())):
            if isinstance(projector, WeightedStacks):
                encoder_out, lens, projected = encoder(features, feature_lens, return_stacks=True)
            else:
                encoder_out, lens = encoder(features, feature_lens, **(context or {}))
                projected = encoder_out
        if isinstance(projector, CTCProjector):
            tokens = torch.arange(self.blank_id, device=encoder_out.device)
            llm_embeds = self.llm.embed(tokens) if projector.table is None else None
            return encoder_out, lens, *projector(self.ctc_head(encoder_out), lens, llm_embeds)
        return encoder_out, lens, *projector(projected, lens)

    def _with_encoder_dropout(self, lens: Tensor) -> Tensor:
        """lens (E, N) of E encoders' audio, 0 for those that are left out of an utterance."""
        kept = torch.rand(lens.shape, device=lens.device) >= self.config.encoder_dropout
        one = torch.randint(len(lens), lens.shape[1:], device=lens.device)  # is there if no other is
        kept |= ~kept.any(0) & (torch.arange(len(lens), device=lens.device)[:, None] == one)
        return lens * kept

    def spliced(
        self,
        audio_lens: Tensor,
        languages: Sequence[str | None],
        label_ids: Sequence[Sequence[int]] | None = None,
        target_languages: Sequence[str | None] | None = None,
        contexts: Sequence[PromptContext] | None = None,
    ) -> Spliced:
        """What the language model reads of each row (see `prompt.splice`), on the device of `audio_lens`."""
        rows = splice(
            self.config.prompt, self.tokenizer, audio_lens.tolist(), languages, label_ids, target_languages, contexts
        )
        return rows.to(audio_lens.device)

    def embed(self, spliced: Spliced, audio_embeds: Tensor, audio_lens: Tensor) -> Tensor:
        """The embeddings (N, L, D) of what is spliced; audio_embeds (N, T'', D), audio_lens (N,)."""
        valid = torch.arange(audio_embeds.shape[1], device=audio_embeds.device)[None, :] < audio_lens[:, None]
        return self.prompt(spliced, self.llm.embed(spliced.token_ids), audio_embeds[valid])

    def prompted(
        self,
        audio_embeds: Tensor,
        audio_lens: Tensor,
        languages: Sequence[str | None],
        label_ids: Sequence[Sequence[int]] | None = None,
        target_languages: Sequence[str | None] | None = None,
        contexts: Sequence[PromptContext] | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The audio in its prompt, and the label: inputs_embeds (N, L, D), lens (N,), labels (N, L)."""
        spliced = self.spliced(audio_lens, languages, label_ids, target_languages, contexts)
        return self.embed(spliced, audio_embeds, audio_lens), spliced.lens, spliced.labels

    def streamed(
        self,
        chunk: Chunk,
        feature_lens: Tensor,
        audio_lens: Tensor,
        languages: Sequence[str | None],
        label_ids: Sequence[Sequence[int]],
        words: Sequence[Sequence[WordTime] | None],
        target_languages: Sequence[str | None] | None = None,
        contexts: Sequence[PromptContext] | None = None,
    ) -> Spliced:
        """What the language model reads of each row of a batch of streams (see `prompt.interleave`), on the device of
        `audio_lens`.

        Args:
          label_ids: the tokens of N labels; words: those of N transcripts, with their times. Where these are None,
            there is no loss; translations need none.
        """
        target_languages = target_languages or [None] * len(words)
        is_stream = [target is None for target in target_languages]
        dealt = [
            deal_out(
                ids,
                said or (),
                self.tokenizer,
                before_label=self.config.prompt.before_label,
                num_chunks=count if streams else 0,
                chunk_seconds=chunk.seconds,
                delay_seconds=self.config.streaming.delay_seconds,
            )
            for ids, said, count, streams in zip(
                label_ids, words, chunk.count(feature_lens).tolist(), is_stream, strict=True
            )
        ]
        spliced = interleave(
            self.config.prompt,
            self.tokenizer,
            audio_lens.tolist(),
            languages,
            dealt,
            chunk.seconds,
            chunk.positions,
            target_languages,
            contexts,
        )
        for i, (said, streams) in enumerate(zip(words, is_stream, strict=True)):
            if said is None and streams:
                spliced.labels[i] = IGNORE
        return spliced.to(audio_lens.device)

    def _aligned(
        self, ctc_logits: Tensor | None, lens: Tensor, transcripts: Sequence[Sequence[int]], rows: Sequence[int]
    ) -> list[tuple[WordTime, ...] | None]:
        """When the words of the transcripts of some rows are said, as the CTC head hears them now."""
        if ctc_logits is None:
            raise UserError(
                "streaming: there are transcripts without word times, and no CTC head that could align them: give "
                "`alignment` in the manifests, or set model.ctc_weight above 0"
            )
        log_probs = ctc_logits.detach()[list(rows)].float().log_softmax(-1)
        said = [transcripts[i] for i in rows]
        return aligned_words(log_probs, lens[list(rows)], said, self.blank_id, self.ctc_tokenizer, self.frame_seconds)

    def num_label_tokens(self, labels: Sequence[str], feature_lens: Tensor, chunk_seconds: float | None = None) -> int:
        """See `SpeechModel`."""
        count = super().num_label_tokens(labels, feature_lens, chunk_seconds)
        return count if chunk_seconds is None else count + int(self.chunks[chunk_seconds].count(feature_lens).sum())

    def ctc_label_ids(self, text: str) -> list[int]:
        """The pieces of a transcript that the CTC head is to write."""
        if self.ctc_tokenizer is self.tokenizer:
            return self.label_ids(text)
        return self.ctc_tokenizer.encode(_CTC_PREFIX + text)

    def ctc_text(self, token_ids: Sequence[int]) -> str:
        """The text of pieces that the CTC head wrote."""
        if self.ctc_tokenizer is self.tokenizer:
            return self.text(token_ids)
        return self.ctc_tokenizer.decode(token_ids).removeprefix(_CTC_PREFIX)

    def read_label(self, token_ids: Sequence[int]) -> ReadLabel:
        """What the language model says with the tokens of a label; the inverse of `label_ids` of `label_template`."""
        if self.label_template.is_plain:
            return ReadLabel(self.text(token_ids))
        written, prefix = self.tokenizer.decode(token_ids, keep_tags=True), self.config.prompt.before_label
        read = self.label_template.read(written, len(prefix) if written.startswith(prefix) else 0)
        if self.label_template.has_language and read.language is None:
            return ReadLabel(self.label_template.read(self.text(token_ids)).text)  # what tags there are is no text
        return read

    def forward(
        self,
        features: Tensor,
        feature_lens: Tensor,
        texts: Sequence[str],
        languages: Sequence[str | None],
        target_languages: Sequence[str | None] | None = None,
        labels: Sequence[str] | None = None,
        contexts: Sequence[PromptContext] | None = None,
        words: Sequence[Sequence[WordTime] | None] | None = None,
        chunk_seconds: float | None = None,
    ) -> dict[str, Tensor]:
        """Losses of a batch, SUMMED over its label tokens (each label's end of text included).

        Args:
          features: (N, T, F) log-mel, right-padded; feature_lens: (N,) frames.
          texts: N transcripts or translations; languages: N tags for the prompt's `{lang}` slot, or None.
          target_languages: N tags for `{target_lang}`, None in rows whose text is a transcript; None if all are.
          labels: N labels of the texts (`label_template`); None: made of the above, which say no word times.
          contexts: N times what the prompt's other slots need; None where it has no such slots.
          words: N times those of the transcripts, with their times, for streams; those that are None are aligned by the
            CTC head.
          chunk_seconds: the rows are streams of such chunks, one of `model.streaming` (`speechllm.prompt.interleave`);
            None for all audio before the text, as always in rows with a target language.

        Returns:
          scalars: `loss` = `llm_loss` + ctc_weight * `ctc_loss`, to be divided by `tokens`; `llm_loss`;
          `ctc_loss` of the transcripts (0 without a head); `tokens` and `correct` (tokens predicted right) of the
          language model. A transcript that is too long to be aligned with its audio has no `llm_loss` in a stream.
        """
        target_languages = target_languages or [None] * len(texts)
        if labels is None:
            rows = zip(texts, languages, target_languages, strict=True)
            labels = [self.label_template.fill(*row) for row in rows]
        label_ids = [self.label_ids(label) for label in labels]
        chunk = None if chunk_seconds is None else self.chunks[chunk_seconds]
        encoder_out, encoder_out_lens, audio_embeds, audio_lens = self.encode(features, feature_lens, chunk)
        transcripts, ctc_logits = [], None
        if self.ctc_head is not None:
            transcripts, ctc_logits = [self.ctc_label_ids(text) for text in texts], self.ctc_head(encoder_out)
        if chunk is None:
            spliced = self.spliced(audio_lens, languages, label_ids, target_languages, contexts)
        else:
            words = list(words or [None] * len(texts))
            unknown = [i for i, said in enumerate(words) if said is None and target_languages[i] is None]
            if unknown:
                aligned = self._aligned(ctc_logits, encoder_out_lens, transcripts, unknown)
                for i, said in zip(unknown, aligned, strict=True):
                    words[i] = said
            spliced = self.streamed(
                chunk, feature_lens, audio_lens, languages, label_ids, words, target_languages, contexts
            )
        inputs_embeds = self.embed(spliced, audio_embeds, audio_lens)
        (llm_loss, tokens, correct), _ = self.llm.loss(spliced.labels, inputs_embeds=inputs_embeds, lens=spliced.lens)
        ctc_loss = llm_loss.new_zeros(())
        if ctc_logits is not None:
            losses = ctc_losses(ctc_logits, encoder_out_lens, transcripts, self.blank_id)
            # Of translations it counts nothing, but it is computed: every parameter gets a gradient in every batch.
            is_transcript = torch.tensor([target is None for target in target_languages], device=losses.device)
            ctc_loss = (losses * is_transcript).sum()
        return {
            "loss": llm_loss + self.config.ctc_weight * ctc_loss,
            "llm_loss": llm_loss,
            "ctc_loss": ctc_loss,
            "tokens": tokens,
            "correct": correct,
        }

    def recogniser(self, options: RecogniseOptions | None = None) -> Recogniser:
        """Recognises any number of batches, which it searches together.

        Raises:
          UserError: the options ask for what the model does not have.
        """
        return Recogniser(self, options)

    def save_pretrained(self, folder: str | Path, merged: bool = True) -> None:
        """Write the whole model: config.yaml, model.safetensors, tokenizer, README.md. Replaces `folder` in one move.

        What was tuned of the language model is in `adapter` by itself (see `rwkv7.save_adapter`).

        Args:
          merged: the adapter is merged into the language model, all of which is in model.safetensors (a quantised base
            in floating point, as it is after quantisation). Otherwise nothing of the base is in the folder: config.yaml
            names its path.

        Raises:
          UserError: there is no adapter to be kept apart from its base.
        """
        has_adapter = self.config.llm.tune is not None and self.config.llm.tune.freezes_base
        if not merged and not has_adapter:
            raise UserError("merged=False: the language model has no adapter (model.llm.tune) beside a frozen base")
        sizes = "rwkv7" if isinstance(self.llm, RWKV7) else "transformers"
        llm = LLMSection(**{sizes: self.llm.config})
        if not merged:
            path, dtype = str(Path(self.config.llm.path).absolute()), str(self.llm.dtype).removeprefix("torch.")
            llm = LLMSection(path=path, freeze=True, adapter="adapter", dtype=None if dtype == "float32" else dtype)
        with replaced_folder(folder) as tmp:
            self.tokenizer.save(tmp)
            has_own_pieces = self.ctc_tokenizer is not self.tokenizer
            if has_own_pieces:
                self.ctc_tokenizer.save(tmp / "ctc_tokenizer")
            config = dataclasses.replace(
                self.config,
                tokenizer=".",
                ctc_tokenizer="ctc_tokenizer" if has_own_pieces else None,
                encoder=saved_section(self.encoder),
                llm=llm,
                more_encoders=[
                    MoreEncoder(saved_section(part["encoder"]), more.projector)
                    for more, part in zip(self.config.more_encoders, self.more_encoders, strict=True)
                ],
            )
            save_config(config, tmp / "config.yaml")
            weights = {k: v for k, v in self.state_dict().items() if not k.startswith("llm.")}
            if merged:
                tied = self.llm.tied_weights()
                weights |= {f"llm.{k}": v for k, v in merged_state_dict(self.llm).items() if k not in tied}
            save_file({k: v.contiguous() for k, v in weights.items()}, tmp / "model.safetensors")
            if has_adapter:
                save_adapter(self.llm, tmp / "adapter", base=self.config.llm.path)
            (tmp / "README.md").write_text(model_card(self), encoding="utf-8")

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> SpeechLLM:
        """Load what `save_pretrained` wrote; in evaluation mode, on the CPU.

        Raises:
          FileNotFoundError, UserError: the folder is not one, or its parts do not fit together.
        """
        folder, config = Path(folder), load_model_config(folder)
        if config.llm is None:
            raise UserError(
                f"{folder}: holds an encoder without a language model: load it as an EncoderModel, or train a language "
                "model on it (model.encoder.path)"
            )
        path = folder / "model.safetensors"
        weights = load_file(path)
        if config.llm.path is not None:
            if not Path(config.llm.path).exists():
                raise FileNotFoundError(
                    f"{folder}: holds an adapter without its base, and {config.llm.path} is not there: set llm.path in "
                    f"{folder / 'config.yaml'} to where the checkpoint is"
                )
            config.llm = dataclasses.replace(config.llm, adapter=str(folder / config.llm.adapter))
            model = cls.from_config(config)
            weights |= {name: t for name, t in model.state_dict().items() if name.startswith("llm.")}
        else:
            with torch.device("meta"):  # no time for initial values that are about to be replaced
                model = cls.from_config(config)
                if "llm.initial_wkv" in weights:
                    model.llm.add_initial_state()
            tied = model.llm.tied_weights()
            weights |= {f"llm.{name}": weights[f"llm.{first}"] for name, first in tied.items()}
        load_state_dict_strict(model, weights, path, assign=True)
        model.llm.tie_weights()
        return model.eval()
