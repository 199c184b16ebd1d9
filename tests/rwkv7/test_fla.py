"""The kernels of flash-linear-attention: really run, on the CPU by Triton's interpreter, and on a GPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import speechllm.rwkv7.wkv as wkv_module
from tests.rwkv7.recurrence import DECAYS, assert_near, make, run


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="triton has wheels for Linux only")
def test_the_kernels_agree_with_the_reference_by_tritons_interpreter():
    program = Path(__file__).with_name("fla_interpreted.py")
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", str(program)],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=program.parents[2],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "skipped" not in result.stdout


@pytest.mark.cuda
@pytest.mark.parametrize("decay", DECAYS)
def test_the_kernels_agree_with_the_reference_on_a_gpu(decay):
    if why := wkv_module._why_no_fla_package():
        pytest.skip(why)
    inputs = make(3, 100, 2, 64, decay)
    inputs = [x.cuda().bfloat16() for x in inputs[:6]] + [inputs[6].float().cuda()]
    d_out, d_state = torch.randn(3, 100, 2, 64).cuda(), torch.randn(3, 2, 64, 64).cuda()
    tolerance = 2e-2  # bfloat16 has 8 bits
    for options in ({}, {"lens": torch.tensor([100, 0, 37])}):
        expected = run([x.double() for x in inputs], d_out, d_state, **options, backend="reference")
        assert_near(run(inputs, d_out, d_state, **options, backend="fla"), expected, tolerance)
    step = [x[:, :1] for x in inputs[:6]] + [inputs[6]]
    expected = wkv_module.wkv7(*(x.double() for x in step), backend="reference")
    assert_near(wkv_module.wkv7(*step, backend="fla"), expected, tolerance)
