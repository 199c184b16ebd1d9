"""The parts of a model as its configuration says: encoders and the language model, loaded or new."""

from __future__ import annotations

import torch

from speechllm.config import ConfigError
from speechllm.encoder import WhisperEncoder, Zipformer, load_encoder
from speechllm.llm.precision import base_dtype, convert, half_precision
from speechllm.llm.transformers import (
    TransformersLM,
    is_transformers_model,
    load_transformers_lm,
    new_transformers_lm,
)
from speechllm.model.config import EncoderSection, LLMSection
from speechllm.rwkv7 import RWKV7, load_rwkv7

Encoder = Zipformer | WhisperEncoder


def build_encoder(section: EncoderSection) -> Encoder:
    """The encoder, as the configuration says: loaded or new, its lowest stacks frozen.

    Raises:
      UserError, FileNotFoundError: it does not load, or is none that the settings are for.
    """
    encoder: Encoder
    if section.path:
        encoder = load_encoder(section.path, section.zipformer)
    elif section.whisper is not None:
        encoder = WhisperEncoder(section.whisper)
    else:
        assert section.zipformer is not None  # `EncoderSection` sees to it that one of the three is given
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


def build_language_model(section: LLMSection) -> RWKV7 | TransformersLM:
    """The language model, as the configuration says, without what is tuned of it.

    Raises:
      UserError, FileNotFoundError: it does not load, or is none that the settings are for.
    """
    llm: RWKV7 | TransformersLM
    if section.rwkv7 is not None:
        llm = RWKV7(section.rwkv7, section.wkv_backend)
    elif section.transformers is not None:
        llm = new_transformers_lm(section.transformers, section.attention)
    else:
        assert section.path is not None  # `LLMSection` sees to it that one of the three is given
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
