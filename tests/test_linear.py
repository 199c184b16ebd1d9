"""Matrix products, the chunked cross entropy, packed weights: against PyTorch's own."""

import copy
import gc

import pytest
import torch
import torch.nn.functional as F

from speechllm import linear
from speechllm.linear import Linear, PackedLinear, linear_cross_entropy, pack_for_inference, product

from .rwkv7.small import small_model


@pytest.fixture(params=[True, False], ids=["onednn", "fallback"])
def onednn(request, monkeypatch):
    if not request.param:
        monkeypatch.setattr(linear, "has_onednn", lambda: False)
    return request.param


@pytest.mark.parametrize("shape", [(5,), (1, 5), (7, 5), (2, 0, 5), (2, 3, 5)])
def test_product_and_its_gradients(shape, onednn, monkeypatch):
    for name in ("_WORTH_A_CALL", "_WORTH_TRAINING"):
        monkeypatch.setattr(linear, name, 1)
    x, weight, bias = (torch.randn(s, requires_grad=True) for s in (shape, (4, 5), 4))
    for w in (weight, weight[:, :5].T.contiguous().T):
        torch.testing.assert_close(product(x, w), F.linear(x, w))
        out, expected = product(x, w, bias), F.linear(x, w, bias)
        torch.testing.assert_close(out, expected)
        grad = torch.randn_like(expected)
        for got, wanted in zip(
            torch.autograd.grad(out, (x, weight, bias), grad),
            torch.autograd.grad(expected, (x, weight, bias), grad),
            strict=True,
        ):
            torch.testing.assert_close(got, wanted)
    with torch.autocast("cpu", torch.bfloat16):
        assert product(x, weight).dtype == torch.bfloat16


def test_a_product_keeps_what_a_gradient_needs(onednn, monkeypatch):
    monkeypatch.setattr(linear, "_WORTH_TRAINING", 1)
    for x_learns, weight_learns in ((True, False), (False, True)):
        x, weight = torch.randn(7, 5, requires_grad=x_learns), torch.randn(4, 5, requires_grad=weight_learns)
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda z, kept=kept: kept.append(z.data_ptr()) or z, lambda z: z):
            out = product(x, weight)
        assert set(kept) == {(weight if x_learns else x).data_ptr()}
        out.sum().backward()


def test_onednn_is_there():
    # should this fail with a new release of PyTorch, training on the CPU is slower, but still right
    linear.has_onednn.cache_clear()
    with torch.autocast("cpu", torch.bfloat16), torch.device("meta"):  # wherever it is first asked
        assert linear.has_onednn()


def test_a_build_without_onednn_is_no_error(monkeypatch):
    def refuse(*_):
        raise RuntimeError("")

    linear.has_onednn.cache_clear()
    monkeypatch.setattr(linear, "_onednn", refuse)
    assert not linear.has_onednn()
    monkeypatch.setattr(linear, "_onednn", lambda x, w: torch.zeros(len(x), 5))
    linear.has_onednn.cache_clear()
    assert not linear.has_onednn()
    linear.has_onednn.cache_clear()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("at_once", [50, 10**6])
@pytest.mark.parametrize("cap", [None, 1.5])
def test_cross_entropy_in_chunks(dtype, at_once, cap, monkeypatch, onednn):
    monkeypatch.setattr(linear, "_LOGITS_AT_ONCE", at_once)
    monkeypatch.setattr(linear, "_ROWS_AT_ONCE", 4)
    hidden, weight = torch.randn(23, 8).to(dtype).requires_grad_(), torch.randn(11, 8).to(dtype).requires_grad_()
    targets = torch.randint(0, 11, (23,))
    loss, correct = linear_cross_entropy(hidden, weight, targets, cap)
    logits = F.linear(hidden, weight).float()
    logits = logits if cap is None else cap * torch.tanh(logits / cap)
    expected = F.cross_entropy(logits, targets, reduction="sum")
    torch.testing.assert_close(loss, expected)
    assert correct == (logits.argmax(-1) == targets).sum()
    near = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 1e-1}
    for got, wanted in zip(
        torch.autograd.grad(loss * 2, (hidden, weight)),
        torch.autograd.grad(expected * 2, (hidden, weight)),
        strict=True,
    ):
        torch.testing.assert_close(got, wanted, **near)


def test_cross_entropy_of_a_frozen_weight_and_under_no_grad():
    hidden, weight, targets = torch.randn(5, 8, requires_grad=True), torch.randn(11, 8), torch.randint(0, 11, (5,))
    loss, _ = linear_cross_entropy(hidden, weight, targets)
    loss.backward()
    assert hidden.grad is not None and weight.grad is None
    with torch.no_grad():
        assert torch.equal(linear_cross_entropy(hidden, weight, targets)[0], loss)


def test_large_logits_do_not_overflow():
    hidden, weight = torch.full((2, 1), 1e4, requires_grad=True), torch.tensor([[1.0], [-1.0], [0.5]])
    loss, correct = linear_cross_entropy(hidden, weight, torch.tensor([0, 1]))
    loss.backward()
    assert loss == 2e4 and correct == 1 and hidden.grad.isfinite().all()


@pytest.mark.parametrize("weights, tolerance", [("float32", 1e-5), ("bfloat16", 3e-2), ("int8", 5e-2)])
@torch.no_grad()
def test_packed_model(weights, tolerance, onednn):
    model = small_model()
    packed = pack_for_inference(copy.deepcopy(model), weights)
    assert sum(type(m) is PackedLinear for m in packed.modules()) == 6 * 2 + 1
    assert not any(type(m) is Linear for m in packed.modules())
    ids = torch.randint(0, 40, (3, 20))
    logits, state = model(ids)
    got, got_state = packed(ids)
    assert (got - logits).norm() <= tolerance * logits.norm()
    stepped, _ = packed.step(ids[:, 0], got_state)
    expected, _ = model.step(ids[:, 0], state)
    assert stepped.dtype == torch.float32 and (stepped - expected).norm() <= tolerance * expected.norm()
    nowhere = torch.zeros(3, 20, dtype=torch.bool)
    assert packed(ids, logits_mask=nowhere)[0].shape == model(ids, logits_mask=nowhere)[0].shape == (0, 40)
    loss, _ = packed.loss(ids, ids)
    assert abs(loss.loss - model.loss(ids, ids)[0].loss) <= tolerance * loss.loss


@pytest.mark.parametrize("rows", [3, 20])
@pytest.mark.parametrize("weights, tolerance", [("float32", 1e-5), ("bfloat16", 3e-2), ("int8", 5e-2)])
@torch.no_grad()
def test_packed_layers_keep_their_bias(rows, weights, tolerance, onednn):
    plain = torch.nn.Sequential(Linear(64, 32))
    plain[0].bias.mul_(100)
    x = torch.randn(2, rows, 64)
    got = pack_for_inference(copy.deepcopy(plain), weights)(x)
    assert type(got) is torch.Tensor and (got - plain(x)).norm() <= tolerance * plain(x).norm()


@pytest.mark.parametrize("width", [7, 18, 40, 80])
@torch.no_grad()
def test_packed_layers_of_any_width(width):
    plain, x = torch.nn.Sequential(Linear(width, 12)), torch.randn(4, width)
    for weights in ("float32", "bfloat16", "int8"):
        got = pack_for_inference(copy.deepcopy(plain), weights)(x)
        assert (got - plain(x)).norm() <= 5e-2 * plain(x).norm()


@torch.no_grad()
def test_under_autocast_a_packed_layer_gives_what_others_do():
    plain, x = torch.nn.Sequential(Linear(64, 32)), torch.randn(5, 64)
    for weights in ("float32", "bfloat16", "int8"):
        packed = pack_for_inference(copy.deepcopy(plain), weights)
        with torch.autocast("cpu", torch.bfloat16):
            out, expected = packed(x), plain(x)
        assert out.dtype == expected.dtype == torch.bfloat16
        assert (out - expected).norm() <= 5e-2 * expected.norm()


def test_layers_that_others_wrote_become_ours():
    module = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Sequential(torch.nn.Linear(3, 2, bias=False)))
    state, x = module.state_dict(), torch.randn(5, 4)
    expected = module(x)
    linear.use_own_products(module)
    assert type(module[0]) is type(module[1][0]) is Linear and torch.equal(module(x), expected)
    assert all(torch.equal(value, state[name]) for name, value in module.state_dict().items())


def test_unknown_weights():
    with pytest.raises(ValueError, match="unknown weights 'int4', choose from float32, bfloat16, int8"):
        pack_for_inference(small_model(), "int4")


def test_a_frozen_matrix_is_converted_once():
    weight = torch.nn.Parameter(torch.randn(3, 4), requires_grad=False)
    first = linear.converted(weight, torch.bfloat16)
    assert torch.equal(first, weight.bfloat16()) and linear.converted(weight, torch.bfloat16) is first
    assert linear.converted(weight, torch.float16).dtype == torch.float16
    assert linear.converted(weight, torch.float32) is weight
    with torch.no_grad():
        weight.add_(1)
    assert torch.equal(linear.converted(weight, torch.bfloat16), weight.bfloat16())
    original = weight.data
    weight.data = original + 1  # as merging an adapter does, and taking it off again
    assert torch.equal(linear.converted(weight, torch.bfloat16), weight.bfloat16())
    weight.data = original
    assert torch.equal(linear.converted(weight, torch.bfloat16), weight.bfloat16())
    weight.requires_grad_(True)
    out = linear.converted(weight, torch.bfloat16)
    assert out.requires_grad and out is not linear.converted(weight, torch.bfloat16)


def test_converted_matrices_go_with_theirs():
    weight = torch.nn.Parameter(torch.randn(3, 4), requires_grad=False)
    before = len(linear._CONVERTED)
    linear.converted(weight, torch.bfloat16)
    assert len(linear._CONVERTED) == before + 1
    del weight
    gc.collect()
    assert len(linear._CONVERTED) == before


def test_a_frozen_matrix_under_autocast():
    x, weight = torch.randn(5, 4, requires_grad=True), torch.nn.Parameter(torch.randn(3, 4), requires_grad=False)
    with torch.autocast("cpu", torch.bfloat16):
        out = product(x, weight)
        expected = F.linear(x, weight)
    assert torch.equal(out, expected) and weight in linear._CONVERTED
    (grad,) = torch.autograd.grad(out.float().sum(), x)
    torch.testing.assert_close(grad, torch.autograd.grad(expected.float().sum(), x)[0])
