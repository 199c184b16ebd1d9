"""Large blocks of memory are given back when they are freed."""

import os
import platform
import subprocess
import sys

import pytest

from speechllm.train.heap import keep_large_blocks_apart

# After a block of 20 MB was freed, glibc by itself takes one of 10 MB out of its heap.
PROGRAM = """
import ctypes, sys
from speechllm.train.heap import keep_large_blocks_apart

class Info(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in ("arena", "ordblks", "smblks", "hblks", *"abcdef")]

libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
libc.mallinfo2.restype = Info
if sys.argv[1] == "apart":
    assert keep_large_blocks_apart()
libc.free(libc.malloc(20_000_000))
before = libc.mallinfo2().hblks
block = libc.malloc(10_000_000)
print(libc.mallinfo2().hblks - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="it is glibc that learns")
@pytest.mark.parametrize("way, mapped", [("default", "0"), ("apart", "1")])
def test_large_blocks_are_mapped_by_themselves(way, mapped):
    environment = {k: v for k, v in os.environ.items() if k not in ("MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, way], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == mapped


@pytest.mark.parametrize("name, value", [
    ("MALLOC_MMAP_THRESHOLD_", "4294967296"), ("GLIBC_TUNABLES", "glibc.malloc.mmap_threshold=1"),
])  # fmt: skip
def test_what_the_environment_says_stays(name, value, monkeypatch):
    monkeypatch.setenv(name, value)
    assert not keep_large_blocks_apart()
