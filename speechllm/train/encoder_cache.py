"""`data.cache_encoder`: what the frozen part of an encoder makes of each utterance, kept on disk.

A frozen encoder hears the same in every epoch. Its outputs (all of it with `model.encoder.freeze`, the lowest layers
with `freeze_stacks`) are computed once, before training, and are read like any stored features: lhotse cuts with numpy
files, in half precision. Stopped in between, the computation goes on where it was. Training then runs what is above
them. The model that is saved is whole.
"""

from __future__ import annotations

import hashlib
import logging
from dataclasses import replace
from pathlib import Path
from typing import cast

import numpy as np
import torch

from speechllm.config import ConfigError
from speechllm.data import SAMPLE_RATE, DataConfig, SourceConfig, UtteranceError
from speechllm.data.convert import convert_to_cuts_in_parts
from speechllm.data.features import extract_features
from speechllm.encoder import WhisperEncoder
from speechllm.model.base import SpeechModel
from speechllm.model.config import EncoderSection
from speechllm.weights import file_hash

logger = logging.getLogger(__name__)


def use_encoder_cache(config: DataConfig, model: SpeechModel) -> DataConfig:
    """Compute what `config.cache_encoder` lacks, and make the encoder read what is stored.

    Returns:
        the configuration with the sources of training and validation replaced by those with stored outputs.

    Raises:
        ConfigError: the encoder has no frozen part whose outputs could be kept.
    """
    section, encoder = _only_encoder(model)
    num_stacks = encoder.frozen_stacks
    if num_stacks == 0:
        raise ConfigError(
            "data.cache_encoder: nothing of the encoder is frozen, so that it hears anew in every step: set "
            "model.encoder.freeze: true or model.encoder.freeze_stacks, or leave cache_encoder out"
        )
    if encoder.pad_to_max_seconds and num_stacks < encoder.num_stacks:
        raise ConfigError(
            "data.cache_encoder: with model.encoder.pad_to_30s, the layers that are trained attend to the silence too, "
            "which is not kept: freeze all of the encoder, or leave one of the settings out"
        )
    if model.llm is not None and model.config.projector.layer_weights:
        raise ConfigError("data.cache_encoder: model.projector.layer_weights needs all layers, and one is kept")
    kind = f"encoder-{_identity(encoder, num_stacks)}-{encoder.output_dim // 2}"
    folder = Path(cast(str, config.cache_encoder)) / kind
    logger.info("outputs of %d layers of %s are kept in %s", num_stacks, section.path, folder)
    was_training = encoder.training
    encoder.eval()

    @torch.inference_mode()
    def extract(samples: np.ndarray) -> np.ndarray:
        if len(samples) > encoder.max_seconds * SAMPLE_RATE:
            seconds = len(samples) / SAMPLE_RATE
            raise UtteranceError("too long", f"{seconds:.2f} s, and the encoder hears {encoder.max_seconds:g} s")
        features = extract_features(samples, encoder.feature_kind)
        return encoder.lower(features, num_stacks).half().numpy()

    def stored(source: SourceConfig) -> SourceConfig:
        # Named by all that says which utterances there are, but not how often they come; only by what is set, so that a
        # field that a later version adds does not make another name.
        content = file_hash(source.path) if Path(source.path).is_file() else ""
        default = SourceConfig(source.path)
        given = {k: v for k, v in vars(source).items() if k != "weight" and v != getattr(default, k)}
        identity = hashlib.sha256(f"{source.path} {given} {content}".encode()).hexdigest()[:8]
        cuts = folder / f"{Path(source.path).name.partition('.')[0]}-{identity}.jsonl"
        if not cuts.is_file():
            convert_to_cuts_in_parts(source, cuts, kind, extract)
        return SourceConfig(str(cuts), weight=source.weight)

    train, valid = ([stored(source) for source in sources] for sources in (config.train, config.valid))
    encoder.train(was_training)
    encoder.read_stored(num_stacks, kind)
    return replace(config, train=train, valid=valid, features_on="precomputed", cache_encoder=None)


def _only_encoder(model: SpeechModel) -> tuple[EncoderSection, WhisperEncoder]:
    (_, section, encoder), *others = model.encoders()
    if others or not isinstance(encoder, WhisperEncoder):
        raise ConfigError(
            "data.cache_encoder is for models with one encoder, a Whisper: leave it out for Zipformer and more_encoders"
        )
    return section, encoder


def _identity(encoder: WhisperEncoder, num_stacks: int) -> str:
    """Another string for other weights of the frozen part, or another way to hear."""
    digest = hashlib.sha256(f"{num_stacks} {encoder.config} {encoder.pad_to_max_seconds}".encode())
    modules = [*encoder.bottom(num_stacks), *([encoder.layer_norm] if num_stacks == encoder.num_stacks else [])]
    for module in modules:
        for parameter in module.parameters():
            digest.update(parameter.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:8]
