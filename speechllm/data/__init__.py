"""Manifests to batches of features: reading, mixing, augmentation, bucketing, resume; built on lhotse."""

from speechllm.data.augment import AugmentConfig, SpecAugmentConfig
from speechllm.data.dataset import Batch, load_features
from speechllm.data.features import NUM_MEL_BINS, SAMPLE_RATE, fbank
from speechllm.data.loader import DataConfig, SpeechLoader, build_eval_loader, build_train_loader
from speechllm.data.manifest import DataError, ManifestError, SourceConfig, read_manifest

__all__ = [
    "NUM_MEL_BINS",
    "SAMPLE_RATE",
    "AugmentConfig",
    "Batch",
    "DataConfig",
    "DataError",
    "ManifestError",
    "SourceConfig",
    "SpecAugmentConfig",
    "SpeechLoader",
    "build_eval_loader",
    "build_train_loader",
    "fbank",
    "load_features",
    "read_manifest",
]
