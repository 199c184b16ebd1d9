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


@pytest.mark.parametrize("transposes", [True, False])
@pytest.mark.parametrize("shape", [(5,), (1, 5), (7, 5), (2, 0, 5), (2, 3, 5)])
def test_product_and_its_gradients(shape, transposes, onednn, monkeypatch):
    monkeypatch.setattr(linear, "onednn_transposes", lambda: transposes)
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


def test_who_transposes_is_measured_once(monkeypatch, caplog):
    slow, threads = linear._onednn, torch.get_num_threads()
    monkeypatch.setattr(linear, "_time", lambda multiply, *_: 2.0 if multiply is slow else 1.0)
    linear.onednn_transposes.cache_clear()
    with caplog.at_level("INFO", logger=linear.log.name), torch.autocast("cpu", torch.bfloat16):
        assert not linear.onednn_transposes() and not linear.onednn_transposes()
    assert [r.getMessage() for r in caplog.records] == ["transposed products: oneDNN 4000.0 ms, MKL 2000.0 ms"]
    monkeypatch.undo()
    linear.onednn_transposes.cache_clear()
    assert linear.onednn_transposes() in (True, False) and torch.get_num_threads() == threads


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


@pytest.mark.parametrize("layouts", [("plain", "packed"), ("packed", "plain"), ("half", "half"), ("small", "small")])
@torch.no_grad()
def test_each_layout_gives_the_same_and_follows_the_use(layouts):
    plain = Linear(96, 80)
    plain.weight.copy_(plain.weight.bfloat16())  # so that half precision holds it
    packed = PackedLinear(plain, "float32", layouts)
    for rows in (1, 8, 1, 100, 0):
        x = torch.randn(rows, 96)
        for _ in range(linear._IN_A_ROW):
            out = packed(x)
            torch.testing.assert_close(out, F.linear(x, plain.weight, plain.bias))
        if 0 < rows <= linear._MANY:
            assert packed.kept[0] == layouts[rows > 1]


def test_a_layout_changes_after_many_products_that_want_another():
    packed, several = PackedLinear(Linear(8, 4), "float32", ("plain", "packed")), torch.ones(2, 8)
    for _ in range(linear._IN_A_ROW - 1):
        packed(several)
    packed(torch.ones(linear._MANY + 1, 8))  # which is as fast in either
    packed(torch.ones(1, 8))
    packed(several)
    assert packed.kept[0] == "plain"


def test_the_fastest_layout_is_measured_once_for_a_size(monkeypatch, caplog):
    monkeypatch.setattr(linear, "_FASTEST", {})
    monkeypatch.setattr(linear, "_WORTH_A_LAYOUT", 40)
    measured = []

    def times(kept, x):
        measured.append((sorted(kept), len(x)))
        return {"plain": 1.0, "packed": 2.0} if len(x) == 1 else {"plain": 2.0, "packed": 1.0}

    monkeypatch.setattr(linear, "_times", times)
    with caplog.at_level("INFO", logger=linear.log.name):
        for _ in range(3):
            assert linear.fastest_layouts([torch.randn(10, 4)]) == ("plain", "packed")
            assert linear.fastest_layouts([torch.randn(4, 12)]) == ("plain", "packed")  # about as large
            assert linear.fastest_layouts([torch.randn(3, 4)]) == ("small", "small")
    assert measured == [(["packed", "plain"], 1), (["packed", "plain"], linear._SEVERAL)]
    assert [r.getMessage() for r in caplog.records if "products with" in r.getMessage()] == [
        "products with about 10 x 4: plain for one row (us: plain 1000000, packed 2000000), packed for several "
        "(of 8: plain 2000000, packed 1000000)"
    ]


def test_layouts_are_measured_by_one_thread():
    threads, plain = torch.get_num_threads(), [torch.ones(4, 5), torch.ones(4, 5)]
    with torch.autocast("cpu", torch.bfloat16):
        times = linear._times({"plain": plain, "packed": [linear._pack(x) for x in plain]}, torch.ones(2, 5))
    assert set(times) == {"plain", "packed"} and min(times.values()) > 0
    assert torch.get_num_threads() == threads


def test_the_choice_of_layouts():
    assert linear._choice({"plain": 1.0, "packed": 2.0}, {"plain": 2.0, "packed": 1.0}) == ("plain", "packed")
    assert linear._choice({"plain": 1.0, "packed": 1.05}, {"plain": 2.0, "packed": 1.0}) == ("packed", "packed")
    one, several = {"plain": 1.0, "packed": 2.0, "half": 1.1}, {"plain": 2.0, "packed": 1.0, "half": 0.5}
    assert linear._choice(one, several) == ("half", "half")
    assert linear._choice(one, several | {"half": 5.0}) == ("plain", "packed")


def test_weights_that_half_precision_holds():
    weight = torch.randn(40, 30)
    assert not linear._is_half(weight) and not linear._is_half((1e5 * weight).bfloat16())
    assert linear._is_half(weight.half()) and linear._is_half((0.02 * weight).bfloat16().float())
    weight[:1] = 1
    assert not linear._is_half(weight)


def test_a_model_of_released_precision_takes_half_the_memory(monkeypatch):
    monkeypatch.setattr(linear, "_FASTEST", {})
    monkeypatch.setattr(linear, "_WORTH_A_LAYOUT", 1)
    seconds = {"plain": 3.0, "packed": 2.0, "half": 1.0}
    monkeypatch.setattr(linear, "_times", lambda kept, x: {name: seconds[name] for name in kept})
    model = torch.nn.Sequential(Linear(64, 48), Linear(48, 64))
    with torch.no_grad():
        model[0].weight.copy_(model[0].weight.half())
    x = torch.randn(5, 64)
    expected = model(x)
    torch.testing.assert_close(pack_for_inference(model)(x), expected)
    assert [layer.kept[0] for layer in model] == ["half", "packed"]


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
