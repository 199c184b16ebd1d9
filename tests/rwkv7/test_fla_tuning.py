import os
import subprocess
import sys

import pytest

from speechllm.rwkv7 import fla_tuning

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="triton has wheels for Linux only")

# In a process of its own: what it does to the kernels stays.
PROGRAM = """
import fla.ops.rwkv7
from speechllm.rwkv7 import fla_tuning
before = [len(tuner.configs) for tuner in fla_tuning._tuners()]
fla_tuning.prepare_kernels()
print(max(before), len(before), *{len(tuner.configs) for tuner in fla_tuning._tuners()})
"""


def test_without_tuning_each_kernel_has_one_configuration():
    env = {**os.environ, fla_tuning.VARIABLE: "0"}
    result = subprocess.run([sys.executable, "-c", PROGRAM], env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    most, kernels, *left = map(int, result.stdout.split())
    assert most > 10 and kernels > 20 and left == [1]


def test_another_value_is_refused(monkeypatch):
    monkeypatch.setenv(fla_tuning.VARIABLE, "no")
    with pytest.raises(ValueError, match="SPEECHLLM_FLA_TUNING is 0 or 1, not 'no'"):
        fla_tuning.prepare_kernels()
