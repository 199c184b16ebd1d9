"""Speech encoders: features to embeddings."""

from speechllm.encoder.pretrained import init_from_data, load_encoder, save_encoder
from speechllm.encoder.whisper import WhisperEncoder, WhisperEncoderConfig
from speechllm.encoder.zipformer import Zipformer
from speechllm.encoder.zipformer_config import ZipformerConfig

__all__ = [
    "WhisperEncoder",
    "WhisperEncoderConfig",
    "Zipformer",
    "ZipformerConfig",
    "init_from_data",
    "load_encoder",
    "save_encoder",
]
