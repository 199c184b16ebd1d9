"""From a configuration to a projector."""

from __future__ import annotations

from torch import Tensor

from speechllm.config import ConfigError
from speechllm.projector.base import Projector
from speechllm.projector.config import ProjectorConfig
from speechllm.projector.conformer import ConformerProjector
from speechllm.projector.conv import ConvProjector
from speechllm.projector.ctc import CTCProjector
from speechllm.projector.mlp import MLPProjector
from speechllm.projector.qformer import QFormerProjector
from speechllm.projector.rwkv import RWKVProjector
from speechllm.projector.stacks import WeightedStacks
from speechllm.projector.transformer import TransformerProjector

_CHANNELS = 64  # of a head


def build_projector(
    config: ProjectorConfig, input_dim: int, output_dim: int, num_stacks: int = 1, table: Tensor | None = None
) -> Projector:
    """The projector from an encoder's width to a language model's; its weights are random.

    Args:
      num_stacks: how many outputs the encoder gives for `layer_weights`.
      table: of kind `ctc`, see `CTCProjector`, which reads a CTC head's logits, not the encoder's output.

    Raises:
      ConfigError: the number of heads does not divide the width; there is one stack only to be weighted.
    """
    if config.layer_weights and num_stacks == 1:
        raise ConfigError("projector.layer_weights: the encoder has one stack only, so there is nothing to weight")
    if config.kind == "ctc":
        return CTCProjector(output_dim, table)
    projector = _projector(config, input_dim, output_dim)
    return WeightedStacks(num_stacks, projector) if config.layer_weights else projector


def _projector(config: ProjectorConfig, input_dim: int, output_dim: int) -> Projector:
    width = config.hidden_dim or output_dim
    sizes = (input_dim, output_dim, config.downsample, width)
    if config.kind == "mlp":
        return MLPProjector(*sizes)
    if config.kind == "conv":
        return ConvProjector(*sizes)
    num_heads = config.num_heads or _heads(width)
    if width % num_heads:
        raise ConfigError(
            f"projector.num_heads: {num_heads} does not divide the language model's width, {width}, which is the "
            "projector's too without hidden_dim; set one of the two"
        )
    layers = (config.num_layers or 2, num_heads)
    if config.kind == "qformer":
        return QFormerProjector(*sizes, *layers, config.num_queries or 1)
    if config.kind == "transformer":
        return TransformerProjector(*sizes, *layers)
    if config.kind == "conformer":
        return ConformerProjector(*sizes, *layers)
    return RWKVProjector(*sizes, *layers, config.bidirectional)


def _heads(width: int) -> int:
    """As many heads of 64 channels as there is room for, or the next fewer that divide the width."""
    return next(n for n in range(max(1, width // _CHANNELS), 0, -1) if width % n == 0)
