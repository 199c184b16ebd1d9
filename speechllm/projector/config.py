"""Which projector, and its sizes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from speechllm.config import check_limits, setting

# What of ProjectorConfig has an effect, besides `downsample` and `layer_weights`.
_OPTIONS = {
    "mlp": ("hidden_dim",),
    "conv": ("hidden_dim",),
    "qformer": ("hidden_dim", "num_layers", "num_heads", "num_queries"),
    "transformer": ("hidden_dim", "num_layers", "num_heads"),
    "conformer": ("hidden_dim", "num_layers", "num_heads"),
    "rwkv": ("hidden_dim", "num_layers", "num_heads", "bidirectional"),
    "ctc": (),
}


@dataclass
class ProjectorConfig:
    """The projector between an encoder and the language model; each kind's module says where it is from.

    Attributes:
      kind: `mlp`, on k frames side by side; `conv`, strided convolutions; `qformer`, learned queries that look at a
        window of frames; `transformer` and `conformer`, such an encoder on k frames side by side; `rwkv`, RWKV-7 blocks
        on them; `ctc`, the pieces that the model's CTC head hears, as the language model's embeddings.
      downsample: k, encoder frames per audio position: T frames make ceil(T / k) positions. Only with `ctc` their
        number depends on what is said; a frame makes at most one, and k is 1.
      hidden_dim: width between; null for the language model's.
      num_layers: of `qformer`, `transformer`, `conformer` and `rwkv`; null for 2.
      num_heads: of the same, a divisor of the width; null for heads of 64 channels, or of a few more where 64 does not
        divide the width.
      num_queries: of `qformer`, per window of num_queries * k frames; null for 1.
      bidirectional: of `rwkv`: a second stack of blocks reads the audio from its end.
      layer_weights: the input is not the encoder's output but a weighted sum of its stacks' outputs, the weights
        learned (SUPERB, arXiv 2105.01051).

    Raises:
      ValueError: a value out of range; a setting that the kind does not have.
    """

    kind: Literal["mlp", "conv", "qformer", "transformer", "conformer", "rwkv", "ctc"] = "mlp"
    downsample: int = setting(2, at_least=1)
    hidden_dim: int | None = setting(None, at_least=1)
    num_layers: int | None = setting(None, at_least=1)
    num_heads: int | None = setting(None, at_least=1)
    num_queries: int | None = setting(None, at_least=1)
    bidirectional: bool = False
    layer_weights: bool = False

    def __post_init__(self) -> None:
        if self.kind not in _OPTIONS:
            raise ValueError(f"kind: unknown {self.kind!r}, choose from {', '.join(_OPTIONS)}")
        for name in ("hidden_dim", "num_layers", "num_heads", "num_queries", "bidirectional"):
            if getattr(self, name) not in (None, False) and name not in _OPTIONS[self.kind]:
                kinds = ", ".join(kind for kind, options in _OPTIONS.items() if name in options)
                raise ValueError(f"{name} has no effect with kind: {self.kind}; it is for kind: {kinds}")
        check_limits(self)
        if self.kind == "ctc" and self.downsample != 1:
            raise ValueError(
                f"downsample: {self.downsample} with kind: ctc, which makes as many positions as it hears pieces, at "
                "most one for each frame: set downsample: 1"
            )
        if self.kind == "ctc" and self.layer_weights:
            raise ValueError("layer_weights has no effect with kind: ctc, which reads the CTC head: leave it out")
        if self.hidden_dim and self.num_heads and self.hidden_dim % self.num_heads:
            raise ValueError(f"num_heads: {self.num_heads} does not divide hidden_dim: {self.hidden_dim}")
