"""Other libraries' progress bars and deprecations, which nobody who loads a model can do anything about."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

# torch says through it what torchao, which transformers and peft import where it is installed, ought to do otherwise.
_TORCHAO_SPEAKS_BY = logging.getLogger("torch.utils._pytree")


@contextmanager
def quiet() -> Iterator[None]:
    """Inside, transformers shows no progress bars and peft's use of what transformers deprecates is not warned of.

    Errors are raised as ever. Also a decorator.
    """
    from transformers.utils import logging as transformers_logging

    had_bars, verbosity = transformers_logging.is_progress_bar_enabled(), transformers_logging.get_verbosity()
    level = _TORCHAO_SPEAKS_BY.level
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    _TORCHAO_SPEAKS_BY.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        if had_bars:
            transformers_logging.enable_progress_bar()
        transformers_logging.set_verbosity(verbosity)
        _TORCHAO_SPEAKS_BY.setLevel(level)
