"""Inputs of the recurrence, its gradients and how far two results are apart, for the tests of its backends."""

import torch
import torch.nn.functional as F

from speechllm.rwkv7.wkv import wkv7

# Mean and deviation of what goes through the sigmoid of the decay.
DECAYS = {"typical": (-2.0, 2.0), "fast": (20.0, 0.0), "slow": (-9.0, 0.0), "repeated keys": (-6.0, 0.0)}


def make(N, L, H, D, decay="typical", seed=0):
    """r, w, k, v, a, b, state as RWKV-7 makes them, float64."""
    g = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    mean, std = DECAYS[decay]
    r, k, v = randn(3, N, L, H, D)
    w = -0.6065 * torch.sigmoid(mean + std * randn(N, L, H, D))
    kk, rate = F.normalize(randn(N, L, H, D), dim=-1), randn(N, L, H, D).sigmoid()
    if decay == "repeated keys":
        kk, rate = kk[:, :1].expand_as(kk).clone(), torch.ones_like(rate)
    return [r, w, k, v, -kk, kk * rate, randn(N, H, D, D)]


def run(inputs, d_out, d_state, **options):
    """Outputs, final state and the gradients of all inputs."""
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    out, state = wkv7(*inputs, **options)
    loss = (out * d_out.to(out.dtype)).sum() + (state * d_state.to(state.dtype)).sum()
    return [out.detach(), state.detach(), *torch.autograd.grad(loss, inputs)]


def assert_near(got, expected, tolerance):
    """Relative to the size of what is expected."""
    for x, y in zip(got, expected, strict=True):
        assert (x.double() - y.double()).norm() <= tolerance * y.double().norm().clamp_min(1e-12)
