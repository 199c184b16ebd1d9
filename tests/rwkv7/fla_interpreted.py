"""The kernels of fla-core by Triton's interpreter, held against the reference; ``test_fla.py`` runs this file.

It takes a process of its own: Triton looks at TRITON_INTERPRET once, when it is imported. What has to be arranged is
about the machine, not about what the kernels compute: no GPU to tune on, to gather with or to check for.
"""

import builtins
import os
import sys

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime.interpreter import _implicit_cvt

import speechllm.rwkv7.wkv as wkv_module
from speechllm.rwkv7 import RWKV7, RWKV7Config
from speechllm.rwkv7.wkv import wkv7
from tests.rwkv7.recurrence import DECAYS, assert_near, make, run

# float16 rounds to 11 bits; the errors measured are 1e-7 to 5e-7 and 2e-4 to 6e-4.
TOLERANCE = {torch.float32: 3e-6, torch.float16: 2e-3}


def compiled_range(*bounds):
    """As in a compiled kernel, the variable of a loop up to a tensor is a tensor; the interpreter makes it an int."""
    counts_tensors = any(isinstance(bound, tl.tensor) for bound in bounds)
    return (_implicit_cvt(i) if counts_tensors else i for i in builtins.range(*bounds))


def import_kernels():
    """fla.ops.rwkv7 with one configuration of each kernel: tuning would run them on a GPU."""
    assert os.environ.get("TRITON_INTERPRET") == "1", "test_fla.py runs this file, with TRITON_INTERPRET=1"
    tuned = triton.autotune
    triton.autotune = lambda configs, *args, **kwargs: tuned(configs[:1], *args, **kwargs)
    try:
        import fla.utils

        fla.utils.IS_GATHER_SUPPORTED = False  # the interpreter has no tl.gather
        import fla.ops.rwkv7
    finally:
        triton.autotune = tuned
    for name, module in list(sys.modules.items()):
        if name.startswith("fla.ops."):
            module.range = compiled_range
    return fla.ops.rwkv7


@pytest.fixture(scope="session")
def kernels():
    return import_kernels()


@pytest.fixture(autouse=True)
def calls(kernels, monkeypatch):
    """The kernels that were called; float32 and the CPU are let pass."""
    called = []

    def counted(name):
        kernel = getattr(kernels, name)

        def call(*args, **kwargs):
            called.append(name)
            return kernel(*args, **kwargs)

        return call

    for name in ("chunk_rwkv7", "fused_recurrent_rwkv7"):
        monkeypatch.setattr(kernels, name, counted(name))
    monkeypatch.setattr(wkv_module, "_why_not_fla", lambda device, dtype: None)
    return called


def assert_agrees(inputs, dtype, **options):
    """Outputs, state and all gradients."""
    inputs = [x.to(dtype) for x in inputs[:6]] + [inputs[6].float()]
    generator = torch.Generator().manual_seed(1)
    d_out = torch.randn(inputs[3].shape, generator=generator)
    d_state = torch.randn(inputs[6].shape, generator=generator)
    expected = run([x.double() for x in inputs], d_out, d_state, backend="reference", **options)
    got = run(inputs, d_out, d_state, backend="fla", **options)
    assert got[0].dtype == dtype and got[1].dtype == torch.float32
    assert_near(got, expected, TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("decay", DECAYS)
def test_forward_and_backward(calls, decay, dtype):
    assert_agrees(make(1, 37, 1, 64, decay), dtype)
    assert calls == ["chunk_rwkv7"]


def test_heads_of_32(calls):
    """As in configs/digits.yaml."""
    assert_agrees(make(1, 20, 2, 32), torch.float32)
    assert calls == ["chunk_rwkv7"]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_padded_rows_of_two_heads_one_of_them_empty(dtype):
    assert_agrees(make(3, 20, 2, 64), dtype, lens=torch.tensor([20, 0, 3]))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_packed_rows(dtype):
    inputs = make(1, 40, 1, 64)
    inputs[6] = torch.randn(4, 1, 64, 64, generator=torch.Generator().manual_seed(2))
    assert_agrees(inputs, dtype, cu_seqlens=torch.tensor([0, 17, 17, 18, 40]))


def test_without_a_state_it_starts_from_zeros():
    *inputs, _ = (x.float() for x in make(1, 18, 1, 64))
    assert_near(wkv7(*inputs, backend="fla"), wkv7(*inputs, backend="reference"), TOLERANCE[torch.float32])


def test_going_on_from_the_state():
    *inputs, state = (x.float() for x in make(1, 25, 1, 64))
    _, middle = wkv7(*(x[:, :20] for x in inputs), state, backend="fla")
    _, last = wkv7(*(x[:, 20:] for x in inputs), middle, backend="fla")
    _, expected = wkv7(*inputs, state, backend="reference")
    assert_near([last], [expected], TOLERANCE[torch.float32])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_one_step(calls, dtype):
    *inputs, state = make(3, 1, 2, 64)
    inputs = [*(x.to(dtype) for x in inputs), state.float()]
    got = wkv7(*inputs)
    assert calls == ["fused_recurrent_rwkv7"]
    assert_near(got, wkv7(*(x.double() for x in inputs), backend="reference"), TOLERANCE[dtype])
    assert_agrees(make(1, 1, 1, 64), dtype)  # the kernel of single steps has no backward pass
    assert calls[1:] == ["chunk_rwkv7"]


def test_auto_takes_it(calls):
    inputs = [x.float() for x in make(1, 5, 1, 64)]
    assert torch.equal(wkv7(*inputs)[0], wkv7(*inputs, backend="fla")[0])
    assert calls == ["chunk_rwkv7", "chunk_rwkv7"]


def test_a_model_learns_the_same():
    torch.manual_seed(0)
    model = RWKV7(RWKV7Config(2, 64, 20))
    with torch.no_grad():
        for p in model.parameters():  # officially, many matrices begin as zero
            p.add_(torch.randn_like(p) * 0.1)
    ids, lens = torch.randint(20, (2, 12)), torch.tensor([12, 5])
    labels = ids.roll(-1, 1).masked_fill(torch.arange(12) >= lens[:, None], -100)
    results = []
    for backend in ("fla", "reference"):
        model.wkv_backend = backend
        loss = model.loss(labels, input_ids=ids, lens=lens)[0].loss
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        results.append([loss.detach(), torch.cat([g.flatten() for g in gradients])])
    assert_near(*results, 1e-5)
