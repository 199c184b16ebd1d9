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

NO_HEAD_DIM = {k: v for k, v in SIZES.items() if k != "head_dim"}

_HYBRID = ["linear_attention", "full_attention"]
_DELTA = {  # the sizes of gated delta rules
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
}  # fmt: skip
_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1}
_NO_DROPOUT = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}

# Of Mistral all layers see a window of 5 positions, of the second Qwen 3 the last layer alone, of Gemma the first one.
TRANSFORMERS = {
    "qwen2": {"model_type": "qwen2", **NO_HEAD_DIM},
    "qwen3": {"model_type": "qwen3", "tie_word_embeddings": True, **SIZES},
    "qwen3-window": {
        "model_type": "qwen3", "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1, **SIZES,
    },
    "llama": {"model_type": "llama", **SIZES},
    "mistral": {"model_type": "mistral", "sliding_window": 5, **SIZES},
    "gemma2": {"model_type": "gemma2", "sliding_window": 5, "final_logit_softcapping": 3.0, **SIZES},
    "gemma3": {
        "model_type": "gemma3_text", "sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"],
        **SIZES,
    },
    "granite": {"model_type": "granite", "logits_scaling": 4.0, **NO_HEAD_DIM},
    "cohere": {"model_type": "cohere", "logit_scale": 0.3, **NO_HEAD_DIM},
    "minicpm3": {"model_type": "minicpm3", "dim_model_base": 8, **NO_HEAD_DIM, "num_key_value_heads": 4, **_LATENT},
    "gpt2": {
        "model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "vocab_size": 40,
        **_NO_DROPOUT,
    },
    "qwen2_moe": {"model_type": "qwen2_moe", "shared_expert_intermediate_size": 16, **NO_HEAD_DIM, **_EXPERTS},
    "deepseek_v3": {
        "model_type": "deepseek_v3", "n_routed_experts": 4, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1,
        "moe_intermediate_size": 16, "num_experts_per_tok": 2, **NO_HEAD_DIM, "num_key_value_heads": 4, **_LATENT,
    },
    "ernie4_5_moe": {
        "model_type": "ernie4_5_moe", "moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 16,
        "moe_layer_start_index": 1, **NO_HEAD_DIM,
    },
    "qwen3_next": {"model_type": "qwen3_next", "layer_types": _HYBRID, **SIZES, **_DELTA, **_EXPERTS},
    "qwen3_5": {"model_type": "qwen3_5_text", "layer_types": _HYBRID, **SIZES, **_DELTA},
    "falcon_h1": {"model_type": "falcon_h1", "lm_head_multiplier": 0.3, "mamba_d_ssm": 64, **NO_HEAD_DIM, **_MAMBA},
    "bamba": {"model_type": "bamba", "attn_layer_indices": [1], **NO_HEAD_DIM, **_MAMBA},
    "lfm2": {"model_type": "lfm2", "layer_types": ["conv", "full_attention"], **NO_HEAD_DIM},
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
