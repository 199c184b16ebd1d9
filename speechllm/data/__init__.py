"""Manifests to batches of features: reading, mixing, augmentation, bucketing, resume; built on lhotse."""

from speechllm.data.audio import load_samples
from speechllm.data.audio_file import UtteranceError
from speechllm.data.augment.augmenter import (
    AugmentConfig,
    Augmenter,
    BabbleConfig,
    CodecConfig,
    NoiseConfig,
    ReverbConfig,
    SpeedConfig,
    TelephoneConfig,
    VolumeConfig,
)
from speechllm.data.augment.specaugment import SpecAugmentConfig
from speechllm.data.dataset import Batch, WaveformBatch
from speechllm.data.features import NUM_MEL_BINS, SAMPLE_RATE, fbank
from speechllm.data.loader import DataConfig, SpeechLoader, build_eval_loader, build_train_loader
from speechllm.data.manifests.manifest import DataError, Entry, ManifestError, SourceConfig, describe_cut, read_manifest

__all__ = [
    "NUM_MEL_BINS",
    "SAMPLE_RATE",
    "AugmentConfig",
    "Augmenter",
    "BabbleConfig",
    "Batch",
    "CodecConfig",
    "DataConfig",
    "DataError",
    "Entry",
    "ManifestError",
    "NoiseConfig",
    "ReverbConfig",
    "SourceConfig",
    "SpecAugmentConfig",
    "SpeechLoader",
    "SpeedConfig",
    "TelephoneConfig",
    "UtteranceError",
    "VolumeConfig",
    "WaveformBatch",
    "build_eval_loader",
    "build_train_loader",
    "describe_cut",
    "fbank",
    "load_samples",
    "read_manifest",
]
