"""The options of recognizing streams, the same for `speechllm stream` and recipes/streaming_decode.py."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

# Importing this takes no time: `speechllm --help` answers at once.
if TYPE_CHECKING:
    from speechllm.decode.options import StreamingOptions

# Field, type, help: of StreamingOptions, which has the defaults.
_OPTIONS = (
    ("beam", int, "hypotheses that run side by side; a word is written when all have it (default: 1, greedy search)"),
    ("stable_seconds", float, "with a beam, a word is written after so long even if not all have it (default: 1)"),
    ("hotwords", str, "file of phrases to prefer, one a line, perhaps with a tab and a boost"),
    ("hotword_weight", float, "weight of the hotwords (default: 1)"),
    ("tokens_per_second", float, "tokens of the longest text for a second of audio (default: 12.5)"),
    ("endpoint_seconds", float, "after so much audio without a new word a new segment begins (default: {endpoint})"),
)
_METAVARS = {int: "N", float: "X", str: "FILE"}


def add_streaming_options(parser: argparse.ArgumentParser, endpoint: str = "there are none") -> None:
    """Add what `streaming_options` reads; `endpoint`: what help says of the default of --endpoint-seconds."""
    search = parser.add_argument_group("search")
    for name, kind, what in _OPTIONS:
        option = "--" + name.replace("_", "-")
        search.add_argument(option, type=kind, metavar=_METAVARS[kind], help=what.format(endpoint=endpoint))
    search.add_argument(
        "--ctc", action="store_true", default=None, help="write with the CTC head, not with the language model"
    )
    search.add_argument(
        "--fresh-segments",
        action="store_true",
        default=None,
        help="the language model begins each segment anew, and knows nothing of those before",
    )


def streaming_options(args: argparse.Namespace, **defaults: Any) -> StreamingOptions:
    """The options that were given.

    Raises:
      UserError: a value is out of range, or has no effect with the others; it names the option.
    """
    from speechllm.decode.options import StreamingOptions
    from speechllm.errors import UserError

    names = [*(name for name, _, _ in _OPTIONS), "ctc", "fresh_segments"]
    given = {name: value for name in names if (value := getattr(args, name)) is not None}
    try:
        return StreamingOptions(**defaults | given)
    except UserError as error:
        name, _, rest = str(error).partition(":")
        raise UserError(f"--{name.replace('_', '-')}:{rest}") from error
