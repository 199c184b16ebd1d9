"""The operator: every backend against the plain recurrence in float64."""

import pytest
import torch

import speechllm.rwkv7.wkv as wkv_module
from speechllm.rwkv7.wkv import wkv7
from tests.rwkv7.recurrence import DECAYS, assert_near, make, run


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


def test_fla_says_why_it_cannot_serve_a_call():
    assert "computes in bfloat16 or float16, the inputs are torch.float32" in wkv_module._why_not_fla(
        "cuda", torch.float32
    )
    inputs = [x.bfloat16() for x in make(1, 5, 1, 8)]
    with pytest.raises(
        ValueError, match="'fla' cannot serve this call: its kernels run on CUDA, the inputs are on cpu"
    ):
        wkv7(*inputs, backend="fla")


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
    with pytest.raises(ValueError, match="backend='reference'"):
        wkv7(r, w - 5, k, v, a, b)
