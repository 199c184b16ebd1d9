"""A small model in which every parameter matters, and comparisons, for the tests of this folder."""

import torch

from speechllm.rwkv7 import RWKV7, RWKV7Config, RWKV7State


def small_model(vocab_size: int = 40) -> RWKV7:
    torch.manual_seed(0)
    model = RWKV7(RWKV7Config(2, 32, vocab_size, head_size=16))
    with torch.no_grad():
        for p in model.parameters():  # officially, many matrices begin as zero
            p.add_(torch.randn_like(p) * 0.1)
    return model


def random_state(model: RWKV7, n: int) -> RWKV7State:
    return RWKV7State(*(torch.randn_like(x) for x in vars(model.initial_state(n)).values()))


def assert_same(a: RWKV7State, b: RWKV7State, **tolerance) -> None:
    for x, y in zip(vars(a).values(), vars(b).values(), strict=True):
        torch.testing.assert_close(x, y, **tolerance)
