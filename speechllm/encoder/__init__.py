"""Speech encoders: features to embeddings."""

from speechllm.encoder.pretrained import init_from_data, load_encoder, save_encoder
from speechllm.encoder.zipformer import Zipformer, ZipformerConfig

__all__ = ["Zipformer", "ZipformerConfig", "init_from_data", "load_encoder", "save_encoder"]
