"""Zipformer's convolutional front end: features at 100 frames a second to embeddings at 50.

After arXiv 2310.11230 (section 3.1, "Conv-Embed") and icefall; the ConvNeXt block is that of arXiv
2201.03545.
"""

import math
from collections.abc import Sequence
from typing import cast, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from speechllm.encoder.scaling import (
    Balancer,
    BiasNorm,
    ScheduledFloat,
    Whiten,
    constant,
    dropout_mask,
    scale_grad,
    swoosh_l,
    swoosh_r,
)
from speechllm.linear import product

# Three convolutions that see 7 frames and step by 2; (T - 7) // 2 outputs are counted, as in icefall.
MIN_FRAMES = 9
# Of 20 ms, those that the ConvNeXt block sees to either side.
FRAMES_AHEAD = 3


@overload
def output_lens(feature_lens: Tensor) -> Tensor: ...


@overload
def output_lens(feature_lens: int) -> int: ...


def output_lens(feature_lens: Tensor | int) -> Tensor | int:
    """Frames after the front end for this many features."""
    return (feature_lens - 7) // 2


def conv2d(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """A convolution over (N, T, F, C), which is channels last for PyTorch too: fast, and free of copies."""
    return conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


def pointwise(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """A convolution of 1 x 1 over (N, T, F, C). Without a gradient it is a matrix product, which adds the bias at once;
    with one the convolution is faster."""
    if torch.is_grad_enabled() or x.device.type != "cpu" or conv._forward_hooks:  # who listens to the layer hears it
        return conv2d(conv, x)
    return product(x, conv.weight.flatten(1), conv.bias)


class ConvNeXt(nn.Module):
    """A 7 x 7 depthwise convolution and two pointwise layers around SwooshL, added to the input."""

    def __init__(self, channels: int):
        super().__init__()
        hidden = 3 * channels
        self.layer_skip_rate = ScheduledFloat((0.0, 0.2), (20000.0, 0.015))
        self.depthwise_conv = nn.Conv2d(channels, channels, 2 * FRAMES_AHEAD + 1, padding=FRAMES_AHEAD, groups=channels)
        self.pointwise_conv1 = nn.Conv2d(channels, hidden, 1)
        self.hidden_balancer = Balancer(0.3, 1.0, 0.75, 5.0)
        self.pointwise_conv2 = nn.Conv2d(hidden, channels, 1)
        nn.init.uniform_(cast(Tensor, self.pointwise_conv2.bias), -0.001, 0.001)
        with torch.no_grad():
            self.pointwise_conv2.weight.mul_(0.01)
        self.out_balancer = Balancer(0.4, 0.6, 1.0, 6.0)
        self.out_whiten = Whiten(constant(5.0))

    def forward(self, x: Tensor, has_neighbors: bool = False) -> Tensor:
        """(N, T, F, C) -> (N, T, F, C); what lies beyond an utterance must be 0.

        With `has_neighbors` the first and the last 3 frames are those around a chunk: (N, T + 6, F, C) -> (N, T, F, C).
        """
        depthwise = self.depthwise_conv
        if has_neighbors:
            around = F.conv2d(
                x.permute(0, 3, 1, 2), depthwise.weight, depthwise.bias, padding=(0, FRAMES_AHEAD), groups=x.shape[-1]
            ).permute(0, 2, 3, 1)
            x = x[:, FRAMES_AHEAD:-FRAMES_AHEAD]
        else:
            around = conv2d(depthwise, x)
        hidden = pointwise(self.pointwise_conv1, around)
        out = pointwise(self.pointwise_conv2, swoosh_l(self.hidden_balancer(hidden), fresh=True))
        if self.training:
            keep = torch.rand(len(x), 1, 1, 1, device=x.device) >= self.layer_skip_rate.value
            out = out * keep
        return self.out_whiten(self.out_balancer(x + out))


class Conv2dSubsampling(nn.Module):
    """Features (N, T, F) to embeddings (N, (T - 7) // 2, out_dim).

    Args:
        feature_dim: mel bins, F; at least 7.
        out_dim: width of the output.
        channels: output channels of the three convolutions; (8, 32, 128) in released models.
    """

    def __init__(self, feature_dim: int, out_dim: int, channels: Sequence[int], dropout: ScheduledFloat):
        super().__init__()
        c1, c2, c3 = channels
        convs = {
            0: nn.Conv2d(1, c1, 3, padding=(0, 1)),
            4: nn.Conv2d(c1, c2, 3, stride=2),
            7: nn.Conv2d(c2, c3, 3, stride=(1, 2)),
        }
        # The numbers are the names that released models have.
        self.conv = nn.ModuleDict({str(i): conv.to(memory_format=torch.channels_last) for i, conv in convs.items()})
        self.balancers = nn.ModuleList([Balancer(0.05, 0.95, 0.2, max_abs) for max_abs in (1.0, 4.0, 4.0)])
        self.convnext = ConvNeXt(c3)
        self.convolved_shape = (((feature_dim - 1) // 2) - 1) // 2, c3  # F', C
        self.out = nn.Linear(math.prod(self.convolved_shape), out_dim)
        self.out_whiten = Whiten(ScheduledFloat((0.0, 4.0), (20000.0, 8.0)), grad_scale=0.02)
        self.out_norm = BiasNorm(out_dim)
        self.dropout = dropout

    def convolve(self, features: Tensor, valid: Tensor | None) -> Tensor:
        """(N, T, F) -> (N, T', F', C), what `out` projects; `valid` as in `forward`."""
        return self.convnext(self.first_convolutions(features, valid))

    def first_convolutions(self, features: Tensor, valid: Tensor | None) -> Tensor:
        """(N, T, F) -> (N, T', F', C), what the ConvNeXt block reads; `valid` as in `forward`."""
        x = features.unsqueeze(-1)
        for i, (conv, balancer) in enumerate(zip(self.conv.values(), self.balancers, strict=True)):
            x = conv2d(cast(nn.Conv2d, conv), x)
            if i == 0 and self.training:
                # Raw log-mel features are large: so scaled, the gradients of this layer stay in float16's range.
                x = scale_grad(x, 0.2)
            x = swoosh_r(balancer(x), fresh=True)
        return x if valid is None else x * valid[:, :, None, None]

    def project(self, x: Tensor) -> Tensor:
        """(N, T', F', C) -> (N, T', out_dim)"""
        # The weight counts (C, F'), the memory (F', C): the weight is smaller.
        n, t, f, c = x.shape
        weight = self.out.weight.view(-1, c, f).transpose(1, 2).reshape(-1, f * c)
        return product(x.reshape(n, t, f * c), weight, self.out.bias)

    def forward(self, features: Tensor, valid: Tensor | None) -> Tensor:
        """(N, T, F) -> (N, T', out_dim); `valid` (N, T') is False on padding, None if there is none."""
        x = self.out_norm(self.out_whiten(self.project(self.convolve(features, valid))))
        mask = dropout_mask(x, self.dropout.value) if self.training else None
        return x if mask is None else x * mask

    def step(self, features: Tensor, lens: Tensor, front: Tensor) -> tuple[Tensor, Tensor]:
        """A chunk of T' frames of a stream: features (N, 2 T' + 13, F) -> (N, T', out_dim), and the next `front`.

        Args:
            lens: (N,), how many of the T' + 3 frames that the features make are there; the others count as padding.
            front: (N, 3, F', C), what `first_convolutions` made of the frames before.
        """
        valid = torch.arange(output_lens(features.shape[1]), device=features.device) < lens[:, None]
        x = torch.cat([front, self.first_convolutions(features, valid).to(front.dtype)], dim=1)
        embeds = self.out_norm(self.project(self.convnext(x, has_neighbors=True)))
        # of what is after the chunk, the last 3 frames, the next chunk makes its own
        return embeds, x[:, -2 * FRAMES_AHEAD : -FRAMES_AHEAD]
