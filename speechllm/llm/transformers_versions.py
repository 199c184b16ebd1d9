"""What transformers 4.57 to 5.24 name differently, under one name each; the newest comes first.

A part of transformers is looked up where it is used: its import takes seconds.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from speechllm.errors import UserError

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedConfig, PreTrainedModel

# The argument of a model's forward that takes the keys and values read so far: since 5.24, and before.
CACHE_ARGUMENTS = ("cache", "past_key_values")


def cache_argument(model: type[nn.Module]) -> str | None:
    """The name of the argument of a class's `forward` that takes its cache; None where it takes none."""
    taken = inspect.signature(model.forward).parameters
    return next((name for name in CACHE_ARGUMENTS if name in taken), None)


def pretrained_config() -> type[PreTrainedConfig]:
    """The class of all configurations."""
    import transformers

    return getattr(transformers, "PreTrainedConfig", None) or transformers.PretrainedConfig


def update_needed(config: PreTrainedConfig, is_part: bool) -> str | None:
    """Why a model needs a newer transformers than the installed one; None where it does not.

    Args:
        is_part: of the text part of a model that also sees or hears.
    """
    import transformers
    from transformers import cache_utils

    layers = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if (layers or hasattr(config, "mamba_d_state")) and not hasattr(
        cache_utils, "LinearAttentionAndFullAttentionLayer"
    ):
        need = "its layers with a recurrence need the caches of a newer transformers than"
    elif is_part and not hasattr(transformers, "PreTrainedConfig"):
        need = "its text part needs a newer transformers than"
    else:
        return None
    return f"{need} {transformers.__version__}: pip install 'transformers>=5.17'"


def is_encoder(config: PreTrainedConfig) -> bool:
    """Whether a model reads in both directions: its `is_decoder` is False, which in 4.57 decoders have too."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES as MASKED

    says_it_of_all = hasattr(pretrained_config()(), "is_decoder")
    return getattr(config, "is_decoder", True) is False and (config.model_type in MASKED or not says_it_of_all)


def readable_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings of a model as the installed version reads them.

    transformers 5 has what rotary embeddings are made from in `rope_parameters`, 4.57 in `rope_theta` and
    `rope_scaling`; it would pass over the new name and take the default.

    Raises:
        UserError: each kind of layer has its own, which 4.57 cannot read.
    """
    import transformers

    if "rope_parameters" not in settings or hasattr(transformers, "PreTrainedConfig"):
        return settings
    settings = dict(settings)
    rope = dict(settings.pop("rope_parameters") or {})
    if any(isinstance(value, dict) for value in rope.values()):
        raise UserError(
            f"rope_parameters: transformers {transformers.__version__} cannot read those of each kind of layer; "
            "update it: pip install 'transformers>=5'"
        )
    for name in ("rope_theta", "partial_rotary_factor"):
        if name in rope:
            settings[name] = rope.pop(name)
    if rope.get("rope_type", "default") != "default":
        settings["rope_scaling"] = rope
    return settings


def no_init_weights() -> AbstractContextManager[None]:
    """Inside, new models do not initialize their weights."""
    try:
        from transformers.initialization import no_init_weights
    except ImportError:  # 4.57
        from transformers.modeling_utils import no_init_weights
    return no_init_weights()


def tied_weights(model: PreTrainedModel) -> dict[str, str]:
    """Names of weights that are another one under a second name, and the first name (tied embeddings)."""
    if hasattr(model, "all_tied_weights_keys"):
        return model.all_tied_weights_keys
    if not model.config.tie_word_embeddings:  # 4.57; of a decoder alone this is all that it ties
        return {}
    names = {module: name for name, module in model.named_modules()}
    first, second = (f"{names[part]}.weight" for part in (model.get_input_embeddings(), model.get_output_embeddings()))
    return {second: first}


def activation_checkpointing(model: PreTrainedModel) -> tuple[Callable[[], None], Callable[[], None]]:
    """What turns activation checkpointing of a model on, without reentrance, and off."""
    options = {"use_reentrant": False}
    if hasattr(model, "activation_checkpointing_enable"):
        return lambda: model.activation_checkpointing_enable(options), model.activation_checkpointing_disable
    return lambda: model.gradient_checkpointing_enable(options), model.gradient_checkpointing_disable
