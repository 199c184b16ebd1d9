"""Modules that are about to be loaded."""

import torch
from torch import nn

from speechllm.weights import meta_device


def test_modules_on_the_meta_device_have_shapes_only():
    with meta_device():
        module = nn.ModuleDict({"embedding": nn.Embedding(3, 4), "linear": nn.Linear(4, 5)})
        module.scale = nn.Parameter(torch.empty(7).normal_(std=0.1))
    assert all(p.is_meta for p in module.parameters())
    assert {name: tuple(p.shape) for name, p in module.named_parameters()} == {
        "scale": (7,),
        "embedding.weight": (3, 4),
        "linear.weight": (5, 4),
        "linear.bias": (5,),
    }
    assert nn.Embedding(3, 4).weight.std() > 0.1
