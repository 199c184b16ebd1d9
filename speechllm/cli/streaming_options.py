"""The options of recognizing streams, the same for `speechllm stream` and recipes/streaming_decode.py."""

from __future__ import annotations

import argparse
from typing import Any

from speechllm.cli.options import add_settings, given_settings, option_of
from speechllm.decode.options import StreamingOptions
from speechllm.errors import UserError


def add_streaming_options(parser: argparse.ArgumentParser) -> None:
    """Add what `streaming_options` reads."""
    add_settings(parser.add_argument_group("search"), StreamingOptions)


def streaming_options(args: argparse.Namespace, **defaults: Any) -> StreamingOptions:
    """The options that were given.

    Args:
      defaults: in place of those of `StreamingOptions`.

    Raises:
      UserError: a value is out of range, or an option that was given has no effect.
    """
    given = given_settings(args, StreamingOptions)
    options = StreamingOptions(**defaults | given)
    # A value that is the default has no effect either, but only here is it known that it was given.
    for name, why in options.without_effect().items():
        if name in given:
            raise UserError(f"{option_of(name)}: {why}")
    return options
