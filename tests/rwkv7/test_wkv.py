"""The operator: every backend against the plain recurrence in float64."""

import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import speechllm.rwkv7.wkv as wkv_module
from speechllm.rwkv7.wkv import wkv7

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


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("L, D", [(1, 64), (5, 32), (32, 64), (33, 48), (100, 64), (100, 32)])
def test_chunked_equals_float64_reference(decay, L, D):
    inputs = make(2, L, 2, D, decay)
    d_out, d_state = torch.randn(2, L, 2, D).double(), torch.randn(2, 2, D, D).double()
    expected = run(inputs, d_out, d_state, backend="reference")
    got = run([x.float() for x in inputs], d_out, d_state, backend="chunked")
    assert all(x.dtype == torch.float32 for x in got)
    assert_near(got, expected, 3e-6)


def test_reference_is_the_recurrence():
    r, w, k, v, a, b, S = make(1, 4, 1, 8)
    out, state = wkv7(r, w, k, v, a, b, S, backend="reference")
    S = S[0, 0]
    for t in range(4):
        r_, w_, k_, v_, a_, b_ = (x[0, t, 0] for x in (r, w, k, v, a, b))
        S = S @ w_.exp().diag() + torch.outer(S @ a_, b_) + torch.outer(v_, k_)
        torch.testing.assert_close(out[0, t, 0], S @ r_)
    torch.testing.assert_close(state[0, 0], S)


def test_gradcheck():
    inputs = [x.requires_grad_() for x in make(2, 6, 1, 4)]
    lens = torch.tensor([6, 4])
    assert torch.autograd.gradcheck(lambda *x: wkv7(*x, lens=lens, backend="chunked"), inputs)


def test_long_input_in_several_segments(monkeypatch):
    monkeypatch.setattr("speechllm.rwkv7.wkv._SEGMENT_SIZE", 2 * 32 * 2 * 2 * 16)
    inputs, lens = make(2, 150, 2, 16), torch.tensor([150, 31])
    d_out, d_state = torch.randn(2, 150, 2, 16).double(), torch.randn(2, 2, 16, 16).double()
    expected = run(inputs, d_out, d_state, lens=lens, backend="reference")
    assert_near(run(inputs, d_out, d_state, lens=lens, backend="chunked"), expected, 1e-10)


@pytest.mark.parametrize("backend", ["reference", "chunked"])
@pytest.mark.parametrize("garbage", [7.0, float("nan")])
def test_padding_has_no_influence(backend, garbage):
    L, lens = 70, [70, 37, 0, 1]
    inputs = [x.float() for x in make(4, L, 2, 16)]
    for x in inputs[:6]:
        for i, n in enumerate(lens):
            x[i, n:] = garbage
    d_out, d_state = torch.randn(4, L, 2, 16), torch.randn(4, 2, 16, 16)
    out, state, *grads = run(inputs, d_out, d_state, lens=torch.tensor(lens), backend=backend)
    for i, n in enumerate(lens):
        assert (out[i, n:] == 0).all() and all((g[i, n:] == 0).all() for g in grads[:6])
        alone = [x[i : i + 1, :n] for x in inputs[:6]] + [inputs[6][i : i + 1]]
        if n == 0:
            assert torch.equal(state[i], inputs[6][i]) and torch.equal(grads[6][i], d_state[i])
            continue
        alone = run(alone, d_out[i : i + 1, :n], d_state[i : i + 1], backend=backend)
        batched = [x[i : i + 1, :n] for x in (out, *grads[:6])]
        assert_near([batched[0], state[i : i + 1], *batched[1:], grads[6][i : i + 1]], alone, 2e-6)


@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_packed_rows_equal_separate_rows(backend):
    lens = [3, 70, 0, 64, 1, 33]
    inputs = [x.float() for x in make(1, sum(lens), 2, 16)]
    inputs[6] = torch.randn(len(lens), 2, 16, 16)
    borders = torch.tensor([0, *lens]).cumsum(0)
    d_out, d_state = torch.randn(1, sum(lens), 2, 16), torch.randn(len(lens), 2, 16, 16)
    out, state, *grads = run(inputs, d_out, d_state, backend=backend, cu_seqlens=borders)
    for i, n in enumerate(lens):
        at = slice(borders[i], borders[i + 1])
        if n == 0:
            assert torch.equal(state[i], inputs[6][i])
            continue
        alone = [x[:, at] for x in inputs[:6]] + [inputs[6][i : i + 1]]
        alone = run(alone, d_out[:, at], d_state[i : i + 1], backend=backend)
        got = [out[:, at], state[i : i + 1], *(g[:, at] for g in grads[:6]), grads[6][i : i + 1]]
        assert_near(got, alone, 2e-6)


def test_rows_without_any_position():
    inputs = [x.float() for x in make(2, 5, 1, 8)]
    out, state = wkv7(*inputs, lens=torch.tensor([0, 0]))
    assert (out == 0).all() and torch.equal(state, inputs[6])


@pytest.fixture
def emulated_fla(monkeypatch):
    """fla's kernels, as its documentation describes them, by the reference; and a CPU that passes for CUDA."""
    calls = []

    def kernel(name):
        def run(r, w, k, v, a, b, scale, initial_state, output_final_state, cu_seqlens):
            assert scale == 1.0 and output_final_state and w.dtype == torch.float32
            assert all(x.is_contiguous() and x.dtype == r.dtype for x in (k, v, a, b))
            calls.append((name, cu_seqlens))
            inputs = [x.float() for x in (r, w, k, v, a, b, initial_state.transpose(-1, -2))]  # (N, H, K, V) there
            out, state = wkv7(*inputs, backend="reference", cu_seqlens=cu_seqlens)
            return out.to(v.dtype), state.transpose(-1, -2)

        return run

    module = SimpleNamespace(chunk_rwkv7=kernel("chunk"), fused_recurrent_rwkv7=kernel("recurrent"))
    for name, x in (("fla", SimpleNamespace()), ("fla.ops", SimpleNamespace()), ("fla.ops.rwkv7", module)):
        monkeypatch.setitem(sys.modules, name, x)
    why_not = wkv_module._why_not_fla
    monkeypatch.setattr(wkv_module, "_why_not_fla", lambda device, dtype: why_not("cuda", dtype))
    monkeypatch.setattr(wkv_module, "_why_no_fla_package", lambda: None)
    return calls


def test_fla_is_called_as_documented(emulated_fla):
    inputs = [x.bfloat16() if i < 6 else x.float() for i, x in enumerate(make(3, 40, 2, 16))]
    lens = torch.tensor([40, 0, 7])
    d_out, d_state = torch.randn(3, 40, 2, 16), torch.randn(3, 2, 16, 16)
    for options in ({}, {"lens": lens}):
        got = run(inputs, d_out, d_state, **options)  # auto
        expected = run(inputs, d_out, d_state, **options, backend="reference")
        assert_near(got, expected, 2e-2)  # gradients of bfloat16 inputs are rounded to bfloat16
    packed = [x.flatten(0, 1).unsqueeze(0) for x in inputs[:6]]
    borders = torch.tensor([0, 50, 50, 120])
    out, state = wkv7(*packed, inputs[6], cu_seqlens=borders)
    out_2, state_2 = wkv7(*packed, inputs[6], cu_seqlens=borders, backend="reference")
    assert_near([out, state], [out_2, state_2], 1e-2)
    assert [name for name, _ in emulated_fla] == ["chunk"] * 3
    assert [x if x is None else x.tolist() for _, x in emulated_fla] == [None, [0, 40, 47], [0, 50, 120]]
    wkv7(*(x[:, :1] for x in inputs[:6]), inputs[6])
    assert emulated_fla[-1] == ("recurrent", None)  # one step without gradients
    with pytest.raises(ValueError, match="cannot serve this call: it computes in bfloat16 or float16.*float32"):
        wkv7(*(x.float() for x in inputs), backend="fla")


@pytest.mark.skipif(
    not torch.cuda.is_available() or wkv_module._why_no_fla_package() is not None, reason="needs a GPU and fla-core"
)
@pytest.mark.parametrize("decay", DECAYS)
def test_fla_agrees_with_the_reference(decay):
    inputs = [x.cuda().bfloat16() if i < 6 else x.cuda().float() for i, x in enumerate(make(3, 100, 2, 64, decay))]
    lens = torch.tensor([100, 0, 37])
    d_out, d_state = torch.randn(3, 100, 2, 64).cuda(), torch.randn(3, 2, 64, 64).cuda()
    for options in ({}, {"lens": lens}):
        expected = run([x.double() for x in inputs], d_out, d_state, **options, backend="reference")
        assert_near(run(inputs, d_out, d_state, **options, backend="fla"), expected, 2e-2)


@pytest.mark.parametrize("backend", ["reference", "chunked", "auto"])
def test_split_at_any_position(backend):
    *inputs, state = (x.float() for x in make(2, 50, 2, 16))
    out, last = wkv7(*inputs, state, backend=backend)
    for split in (1, 32, 49):
        first, middle = wkv7(*(x[:, :split] for x in inputs), state, backend=backend)
        second, end = wkv7(*(x[:, split:] for x in inputs), middle, backend=backend)
        assert_near([torch.cat((first, second), 1), end], [out, last], 1e-6)


def test_gradient_of_the_state_alone_and_of_the_output_alone():
    inputs = [x.requires_grad_() for x in make(1, 40, 1, 8)]
    for i in range(2):
        grads = [torch.autograd.grad(wkv7(*inputs, backend=x)[i].sum(), inputs, allow_unused=True)
                 for x in ("reference", "chunked")]  # fmt: skip
        for expected, got in zip(*grads, strict=True):
            torch.testing.assert_close(got, torch.zeros_like(got) if expected is None else expected)


@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_float32_inside_bfloat16_autocast(backend):
    inputs = [x.bfloat16() for x in make(2, 40, 2, 16)]
    expected, state = wkv7(*(x.float() for x in inputs), backend=backend)
    with torch.autocast("cpu", torch.bfloat16):
        out, got = wkv7(*inputs, backend=backend)
    assert out.dtype == torch.bfloat16 and got.dtype == torch.float32
    torch.testing.assert_close(got, state)
    torch.testing.assert_close(out, expected.bfloat16())


def test_errors_name_the_problem():
    r, w, k, v, a, b, state = make(1, 40, 1, 8)
    with pytest.raises(ValueError, match="unknown backend 'fast'.*reference, chunked"):
        wkv7(r, w, k, v, a, b, backend="fast")
    with pytest.raises(ValueError, match="k has shape"):
        wkv7(r, w, k[:, 1:], v, a, b)
    with pytest.raises(ValueError, match="state has shape"):
        wkv7(r, w, k, v, a, b, state[:, :, 1:])
    with pytest.raises(ValueError, match="lens has shape"):
        wkv7(r, w, k, v, a, b, lens=torch.tensor([1, 2]))
    with pytest.raises(ValueError, match="lens go from 41 to 41, the input has L = 40"):
        wkv7(r, w, k, v, a, b, lens=torch.tensor([41]))
    with pytest.raises(ValueError, match=r"cu_seqlens must go from 0 up to L = 40.*got \[0, 39\] for an input of 1"):
        wkv7(r, w, k, v, a, b, cu_seqlens=torch.tensor([0, 39]))
    with pytest.raises(ValueError, match="'fla' cannot serve this call: its kernels run on CUDA, the inputs are on"):
        wkv7(r, w, k, v, a, b, backend="fla")
    with pytest.raises(ValueError, match="backend='reference'"):
        wkv7(r, w - 5, k, v, a, b)
