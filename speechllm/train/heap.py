"""The C library's heap while a model trains on the CPU."""

from __future__ import annotations

import ctypes
import os
import sys

# From which size on a block is mapped by itself, and goes back to the system when it is freed.
_APART = 4_000_000
_M_MMAP_THRESHOLD = -3  # glibc's malloc.h


def keep_large_blocks_apart() -> bool:
    """Has glibc map each block of 4 MB or more by itself, for the rest of the process.

    By itself glibc learns from what is freed to take ever larger blocks, up to 32 MB, out of one heap. A training step
    has tensors of many sizes that live for very different times, between which that heap is full of holes.

    Returns:
      whether it was done: not where the system has another C library, nor where the environment says something of
      `malloc`'s threshold itself, as `tools/venv.sh` does.
    """
    if "MALLOC_MMAP_THRESHOLD_" in os.environ or "mmap_threshold" in os.environ.get("GLIBC_TUNABLES", ""):
        return False
    if not sys.platform.startswith("linux") or not hasattr(libc := ctypes.CDLL(None), "mallopt"):
        return False
    return bool(libc.mallopt(_M_MMAP_THRESHOLD, _APART))
