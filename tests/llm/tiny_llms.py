"""Tiny language models of every kind that can stand behind the seam; what they write depends on what they read."""

import torch
from torch import nn

from speechllm.llm.transformers import new_transformers_lm
from speechllm.rwkv7 import RWKV7, RWKV7Config

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 40,
}

# Of Mistral all layers see a window of 5 positions, of the second Qwen 3 the last layer alone.
TRANSFORMERS = {
    "qwen2": {"model_type": "qwen2", **{k: v for k, v in SIZES.items() if k != "head_dim"}},
    "qwen3": {"model_type": "qwen3", "tie_word_embeddings": True, **SIZES},
    "qwen3-window": {
        "model_type": "qwen3", "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1, **SIZES,
    },
    "llama": {"model_type": "llama", **SIZES},
    "mistral": {"model_type": "mistral", "sliding_window": 5, **SIZES},
}  # fmt: skip


def tiny_llm(kind: str, **settings) -> nn.Module:
    torch.manual_seed(0)
    if kind == "rwkv7":
        model = RWKV7(RWKV7Config(2, 32, 40, head_size=16))
    else:
        model = new_transformers_lm(TRANSFORMERS[kind] | settings)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.2)
    return model.eval()


KINDS = ["rwkv7", *TRANSFORMERS]
