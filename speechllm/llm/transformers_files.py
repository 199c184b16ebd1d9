"""What is special about files of language models of transformers, and about how transformers loads them."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch

# Packages with GPU kernels that transformers takes for layers with a recurrence.
_KERNEL_PACKAGES = ("fla", "causal_conv1d", "mamba_ssm")


@contextmanager
def gpu_kernels_only_on_gpus() -> Iterator[None]:
    """Inside, the code of a model may be imported. Then transformers chooses GPU kernels where their package is
    installed, even if there is no GPU; here it does not find them in that case, and chooses PyTorch.
    """
    if torch.cuda.is_available():
        yield
        return
    missing = object()
    found = {name: sys.modules.get(name, missing) for name in _KERNEL_PACKAGES}
    sys.modules.update(dict.fromkeys(_KERNEL_PACKAGES))  # None: an import of it fails
    try:
        yield
    finally:
        for name, module in found.items():
            if module is missing:
                del sys.modules[name]
            else:
                sys.modules[name] = module
