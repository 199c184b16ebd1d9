"""RWKV-7, a recurrent language model (arXiv 2503.14456): parallel in training, one state in decoding."""

from speechllm.rwkv7.checkpoint import load_rwkv7, save_rwkv7
from speechllm.rwkv7.model import RWKV7, RWKV7Config, RWKV7Layers
from speechllm.rwkv7.state import RWKV7State
from speechllm.rwkv7.wkv import wkv7

__all__ = [
    "RWKV7",
    "RWKV7Config",
    "RWKV7Layers",
    "RWKV7State",
    "load_rwkv7",
    "save_rwkv7",
    "wkv7",
]
