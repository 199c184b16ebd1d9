"""RWKV-7, a recurrent language model (arXiv 2503.14456): parallel in training, one state in decoding."""

from speechllm.llm.adapters import (
    RankAllocation,
    TuneConfig,
    load_adapter,
    merge,
    merged_state_dict,
    save_adapter,
    tune,
    unmerge,
)
from speechllm.rwkv7.checkpoint import load_rwkv7, save_rwkv7
from speechllm.rwkv7.model import RWKV7, RWKV7Config, RWKV7Layers
from speechllm.rwkv7.state import RWKV7State
from speechllm.rwkv7.tuning_table import tuning_table
from speechllm.rwkv7.wkv import wkv7

__all__ = [
    "RWKV7",
    "RWKV7Config",
    "RWKV7Layers",
    "RWKV7State",
    "RankAllocation",
    "TuneConfig",
    "load_adapter",
    "load_rwkv7",
    "merge",
    "merged_state_dict",
    "save_adapter",
    "save_rwkv7",
    "tune",
    "tuning_table",
    "unmerge",
    "wkv7",
]
