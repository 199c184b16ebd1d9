"""Memory that is kept is not asked for, and cleared, again."""

import os
import subprocess
import sys

import pytest

PROGRAM = """
import ctypes, resource, sys
from speechllm.allocator import keep_freed_memory
if "keep" in sys.argv:
    keep_freed_memory()
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
for i in range(11):
    block = libc.malloc(64 << 20)
    ctypes.memset(block, 1, 64 << 20)
    libc.free(block)
    if i == 0:
        first = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - first)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="elsewhere nothing is changed")
def test_pages_are_cleared_once():
    plain = {key: value for key, value in os.environ.items() if not key.startswith(("MALLOC_", "GLIBC_"))}

    def faults(*args, **env):
        command = [sys.executable, "-c", PROGRAM, *args]
        return int(subprocess.run(command, env=plain | env, check=True, stdout=subprocess.PIPE, text=True).stdout)

    assert faults("keep") < 1000 < 100_000 < faults()
    assert faults("keep", MALLOC_MMAP_THRESHOLD_="1000000") > 100_000  # what the environment says stays
