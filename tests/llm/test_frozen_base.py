"""Training beside a frozen language model of transformers: nothing is computed, kept or converted that no gradient
needs."""

import pytest
import torch
from torch import nn

from speechllm import linear
from speechllm.linear import converted
from speechllm.llm import transformers, transformers_cpu
from speechllm.llm.adapters import TuneConfig, tune
from tests.llm.tiny_llms import tiny_llm


def frozen_llama():
    return tiny_llm("llama").train().requires_grad_(False)


def batch(learns: bool = True):
    torch.manual_seed(1)
    embeds, labels = torch.randn(2, 7, 32, requires_grad=learns), torch.full((2, 7), -100)
    labels[0, 4:] = torch.arange(3)
    labels[1, 6] = 5
    return embeds, labels


def test_logits_are_computed_at_labels_only(monkeypatch):
    seen, real = [], transformers.linear_cross_entropy

    def watched(hidden, *args):
        seen.append(tuple(hidden.shape))
        return real(hidden, *args)

    monkeypatch.setattr(transformers, "linear_cross_entropy", watched)
    embeds, labels = batch()
    frozen_llama().loss(labels, inputs_embeds=embeds)[0][0].backward()
    assert seen == [(4, 32)] and embeds.grad.any()


def test_below_the_first_adapter_there_is_no_graph():
    """The input is frozen, as with a frozen projector, and the upper layer alone has an adapter."""
    model = tune(tiny_llm("llama"), TuneConfig("lora", rank=4, targets=["1.self_attn.q_proj", "1.mlp.down_proj"]))
    learns = {}
    for i, layer in enumerate(model.layers()):
        layer.register_forward_hook(lambda _, __, out, i=i: learns.update({i: out.requires_grad}))
    embeds, labels = batch(learns=False)
    kept = []
    first = model.layers()[0]
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.data_ptr()) or x, lambda x: x):
        loss = model.train().loss(labels, inputs_embeds=embeds)[0][0]
    assert learns == {0: False, 1: True}
    assert not {p.data_ptr() for p in first.parameters()} & set(kept)
    loss.backward()
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())


def test_inputs_of_frozen_matrices_are_not_kept():
    """The gradient reaches the input of the model through them, for which their weights alone are needed."""
    model = frozen_llama()
    inputs, kept = {}, []  # both live on, so that no tensor takes the memory of another
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and not name.endswith(
            "o_proj"
        ):  # its input is attention's output, which that keeps
            module.register_forward_pre_hook(lambda _, args, name=name: inputs.update({name: args[0]}))
    embeds, labels = batch()
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        loss = model.loss(labels, inputs_embeds=embeds)[0][0]
    assert len(inputs) >= 12
    assert not {x.data_ptr() for x in inputs.values()} & {x.data_ptr() for x in kept}
    loss.backward()
    assert embeds.grad.any() and all(p.grad is None for p in model.parameters())


def gradient_in_half(model, embeds, labels):
    embeds.grad = None
    with torch.autocast("cpu", torch.bfloat16):
        loss = model.loss(labels, inputs_embeds=embeds)[0][0]
    loss.backward()
    return embeds.grad


def test_frozen_matrices_are_converted_once():
    model, (embeds, labels) = frozen_llama(), batch()
    linear._CONVERTED.clear()
    first = gradient_in_half(model, embeds, labels)
    kept = {
        id(w): converted(w, torch.bfloat16).data_ptr()
        for w in model.parameters()
        if w.dim() == 2 and w in linear._CONVERTED
    }
    assert len(kept) == 2 * 7 + 1  # the matrices of two layers, and the output layer
    assert torch.equal(gradient_in_half(model, embeds, labels), first)
    assert all(converted(w, torch.bfloat16).data_ptr() == kept[id(w)] for w in model.parameters() if id(w) in kept)
    with torch.no_grad():
        for w in model.parameters():
            w.mul_(1.5)
    assert not torch.equal(gradient_in_half(model, embeds, labels), first)


@pytest.mark.parametrize("short", [True, False])
def test_half_precision_is_near_to_float32(short, monkeypatch):
    """Also where attention is computed in half precision, over many positions."""
    if not short:
        monkeypatch.setattr(transformers_cpu, "_SHORT", 1)
    model, (embeds, labels) = frozen_llama(), batch()
    model.loss(labels, inputs_embeds=embeds)[0][0].backward()
    exact = embeds.grad.clone()
    got = gradient_in_half(model, embeds, labels)
    assert 0 < (got - exact).norm() < 0.05 * exact.norm()
