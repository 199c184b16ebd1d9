"""torchaudio is built for one torch, and may not import beside another: importing it waits until it is needed."""

from __future__ import annotations

from types import ModuleType

import torch

from speechllm.errors import UserError


def import_torchaudio() -> ModuleType:
    """The module torchaudio.

    Raises:
        UserError: it is not installed, or does not import with the torch that is.
    """
    try:
        import torchaudio
    except (ImportError, OSError, RuntimeError, AttributeError) as error:  # a library of another torch or CUDA
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(
            f"torchaudio does not import with torch {torch.__version__} ({reason[:200]}); install a pair that goes "
            "together, such as: pip install torch==2.14.1 torchaudio==2.11.0"
        ) from error
    return torchaudio
