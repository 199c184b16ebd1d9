"""What is made again in the backward pass: the same gradients, and less to keep."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from speechllm import linear
from speechllm.rwkv7 import RWKV7, RWKV7Config
from speechllm.rwkv7.model import Block, _Rows, _TokenShift
from speechllm.rwkv7.remade import Remade

from .small import small_model


@pytest.fixture
def keep_all(monkeypatch) -> Callable[[], None]:
    """Makes every block keep all, as under ``checkpoint_blocks``."""
    monkeypatch.setattr(linear, "_WORTH_TRAINING", 1)  # the products are those of a large model
    forward = Block.forward

    def switch() -> None:
        monkeypatch.setattr(Block, "forward", lambda self, *inputs: forward(self, *inputs, keep_all=True))

    return switch


def gradients(model: RWKV7, lens: list[int], autocast: bool = False) -> dict[str, Tensor]:
    torch.manual_seed(1)
    ids, labels = torch.randint(model.vocab_size, (2, 2, 40))
    labels[torch.arange(40) >= torch.tensor(lens)[:, None]] = -100
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = model.loss(labels, ids, lens=torch.tensor(lens))[0].loss
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("lens", [[40, 40], [40, 7]])
def test_gradients_are_those_of_tensors_that_were_kept(keep_all, lens, autocast):
    model = small_model()
    model.add_initial_state()
    again = gradients(model, lens, autocast)
    keep_all()
    kept = gradients(model, lens, autocast)
    assert again.keys() == kept.keys() == dict(model.named_parameters()).keys()
    for name, grad in kept.items():
        torch.testing.assert_close(again[name], grad, rtol=0, atol=0, msg=name)


def test_gradients_of_adapters_over_a_frozen_model(keep_all):
    from peft import LoraConfig, inject_adapter_in_model

    model = inject_adapter_in_model(
        LoraConfig(r=4, target_modules=["receptance", "key", "value", "output"], init_lora_weights=False), small_model()
    )
    again = gradients(model, [40, 30])
    keep_all()
    kept = gradients(model, [40, 30])
    assert again.keys() == kept.keys() and all("lora" in name for name in kept)
    for name, grad in kept.items():
        torch.testing.assert_close(again[name], grad, rtol=0, atol=0, msg=name)


def kept_tensors(model: RWKV7, monkeypatch) -> float:
    """How many tensors of the size of a layer's input each layer keeps for the backward pass."""
    kept: dict[int, int] = {}

    def count(x: Tensor) -> Tensor:
        if not isinstance(x, nn.Parameter) and x.data_ptr() not in parameters:
            kept[x.data_ptr()] = max(x.nbytes, kept.get(x.data_ptr(), 0))
            alive.append(x)
        return x

    def count_what_is_left(self: Remade, x: Tensor):
        packed = pack(self, x)
        return count(packed) if isinstance(packed, Tensor) else packed

    pack, alive = Remade._pack, []
    parameters = {p.data_ptr() for p in model.parameters()}
    monkeypatch.setattr(Remade, "_pack", count_what_is_left)
    ids = torch.zeros(2, 256, dtype=torch.long)
    with saved_tensors_hooks(count, lambda x: x):
        model.loss(ids, ids)
    c = model.config
    return sum(kept.values()) / (c.n_layer * ids.numel() * c.n_embd * 4)


def test_a_layer_keeps_little(keep_all, monkeypatch):
    model = RWKV7(RWKV7Config(2, 128, 16))
    remade = kept_tensors(model, monkeypatch)
    keep_all()
    assert remade <= 26  # among them the channel mix's activations, 4, and the recurrence's states and matrices, 2.6
    assert kept_tensors(model, monkeypatch) >= remade + 11


@pytest.mark.parametrize("order", [(0, 1, 2), (1, 0, 2), (2, 0, 1)])
def test_a_tensor_that_is_read_in_another_order(order):
    a, b, w = (torch.randn(3, 3, 3).permute(order).requires_grad_() for _ in range(3))
    with Remade() as remade:
        x = remade(torch.mul, a, b).transpose(1, 2)
        y = (x * w).sum()
    y.backward()
    assert torch.equal(w.grad, x)


@pytest.mark.parametrize("mixes_learn", [True, False])
def test_token_shift_keeps_its_input_for_mixes_that_learn(mixes_learn):
    x, prev = torch.randn(5, 4, requires_grad=True), torch.randn(1, 4)
    mixes, kept = torch.rand(2, 4, requires_grad=mixes_learn), []
    with saved_tensors_hooks(lambda z: kept.append(z.data_ptr()) or z, lambda z: z):
        first, second = _TokenShift.apply(x, prev, mixes, _Rows(torch.tensor([5]), x.device))
    assert (x.data_ptr() in kept) == mixes_learn
    (first + 2 * second).sum().backward()
    before = torch.cat((prev, x.detach()[:-1]))
    total = mixes.detach()[0] + 2 * mixes.detach()[1]
    expected = (3 - total) + torch.cat((total.expand(4, -1), torch.zeros(1, 4)))
    torch.testing.assert_close(x.grad, expected)
    if mixes_learn:
        torch.testing.assert_close(mixes.grad[1], 2 * (before - x.detach()).sum(0))
