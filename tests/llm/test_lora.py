"""LoRA as one operation with its matrix, against what `peft` computes."""

import copy

import pytest
import torch
from peft.tuners import lora
from torch import nn

from speechllm.llm.adapters import TuneConfig, merge, tune
from speechllm.llm.lora import LoRALinear, _LoRAProduct
from tests.llm.tiny_llms import tiny_llm


def tuned(kind: str, **options):
    model = tune(tiny_llm(kind), TuneConfig(**{"method": "lora", "rank": 4, **options})).train()
    torch.manual_seed(1)
    for name, p in model.named_parameters():
        if p.requires_grad and "lora_B" in name:
            nn.init.normal_(p, std=0.1)  # it starts at zero
    return model


def as_peft_has_it(model):
    model = copy.deepcopy(model)
    for module in model.modules():
        if type(module) is LoRALinear:
            module.__class__ = lora.Linear
    return model


def gradients(model, dtype=None):
    """Of the input and of what trains, and the loss, by name."""
    torch.manual_seed(2)
    embeds = torch.randn(3, 6, 32, requires_grad=True)
    labels = torch.randint(0, 40, (3, 6))
    labels[:, :3] = -100
    model.zero_grad()
    with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
        loss = model.loss(labels, inputs_embeds=embeds, lens=torch.tensor([6, 4, 5]).clamp(min=6))[0][0]
    loss.backward()
    return {"loss": loss.detach(), "embeds": embeds.grad} | {
        name: p.grad for name, p in model.named_parameters() if p.requires_grad
    }


@pytest.fixture
def fused(monkeypatch):
    """How many products were one operation."""
    calls, apply = [], _LoRAProduct.apply
    monkeypatch.setattr(_LoRAProduct, "apply", lambda *args: calls.append(1) or apply(*args))
    return calls


@pytest.mark.parametrize("kind", ["llama", "qwen2", "rwkv7"])  # of Qwen 2, some have a bias
def test_gradients_are_those_of_peft(kind, fused):
    model = tuned(kind)
    assert any(type(module) is LoRALinear for module in model.modules())
    got = gradients(model)
    count = len(fused)
    wanted = gradients(as_peft_has_it(model))
    assert len(fused) == count > 0 and got.keys() == wanted.keys()
    for name, expected in wanted.items():
        torch.testing.assert_close(
            got[name], expected, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("kind", ["llama", "rwkv7"])
def test_half_precision_is_as_near_to_float32_as_that_of_peft(kind):
    model = tuned(kind)
    exact = gradients(model)
    errors = []
    for one in (model, as_peft_has_it(model)):
        got = gradients(one, torch.bfloat16)
        assert all(got[name].dtype == torch.float32 for name in got)
        norms = [(got[name] - exact[name]).norm() / exact[name].norm() for name in exact]
        errors.append(torch.stack(norms).mean().item())
    assert 0 < errors[0] < 2 * errors[1]  # a tiny model: what rounding does varies


@pytest.mark.parametrize("options", [{"dropout": 0.5}, {"method": "dora"}, {"method": "pissa"}])
def test_what_is_no_plain_sum_is_computed_by_peft(options, fused):
    model = tuned("llama", **options)
    torch.manual_seed(3)
    assert gradients(model)["embeds"].isfinite().all() and not fused


def test_who_listens_to_a_part_of_a_layer_hears_it(fused):
    model = tuned("llama", targets=["q_proj"])
    heard = []
    for module in model.modules():
        if isinstance(module, LoRALinear):
            module.lora_A["default"].register_forward_hook(lambda *_: heard.append(1))
    gradients(model)
    assert len(heard) == 2 and not fused


def test_without_gradients_and_when_merged_it_is_pefts(fused):
    model = tuned("llama")
    ids = torch.randint(0, 40, (2, 5))
    with torch.no_grad():
        expected = model(ids)[0]
    assert not fused
    torch.testing.assert_close(model(ids)[0].detach(), expected)
    assert fused
    fused.clear()
    merge(model)
    torch.testing.assert_close(model(ids)[0].detach(), expected, rtol=1e-4, atol=1e-5)
    assert not fused


def test_what_no_gradient_needs_is_not_kept():
    """Of a frozen input with a trained adapter no gradient is computed; of a frozen adapter's input nothing is kept."""
    x, weight, a, b = torch.randn(5, 6), torch.randn(4, 6), torch.randn(2, 6), torch.randn(4, 2)
    for x_learns, adapter_learns in ((True, False), (False, True)):
        inputs = [x.clone().requires_grad_(x_learns), *(z.clone().requires_grad_(adapter_learns) for z in (a, b))]
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda z, kept=kept: kept.append(z.data_ptr()) or z, lambda z: z):
            out = _LoRAProduct.apply(inputs[0], weight, None, *inputs[1:], 2.0, torch.float32)
        assert (weight.data_ptr() in kept) == x_learns and (inputs[0].data_ptr() in kept) == adapter_learns
        torch.testing.assert_close(out, x @ weight.T + 2 * x @ a.T @ b.T)
        out.sum().backward()
        assert [z.grad is not None for z in inputs] == [x_learns, adapter_learns, adapter_learns]
