"""The search options of the command line, the same for `speechllm transcribe` and recipes/decode.py."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

# Importing this takes no time: `speechllm --help` answers at once.
if TYPE_CHECKING:
    from speechllm.decode.recognizer import RecognizeOptions

# Field, type, help: of SearchOptions and of RecognizeOptions, which have the defaults.
_SEARCH = (
    ("beam", int, "hypotheses of an utterance that run side by side in beam search (default: 4)"),
    ("nbest", int, "how many results an utterance has in json, or how many samples the best is taken of (default: 1)"),
    ("length_penalty", float, "scores are divided by length to this power (default: 1)"),
    ("temperature", float, "temperature of sampling (default: 1)"),
    ("top_p", float, "sample from the best tokens that together have this probability (default: 1)"),
    ("top_k", int, "sample from this many of the best tokens; 0: from all (default: 0)"),
    ("seed", int, "seed of sampling; an utterance is given the same text in any batch (default: 0)"),
    ("tokens_per_second", float, "tokens of the longest text for a second of audio (default: 12.5)"),
    ("max_repeats", int, "how often the end of a text may repeat itself before it counts as a loop (default: 10)"),
    ("max_rows", int, "hypotheses in one step of the language model, over all utterances (default: 64)"),
)
_RECOGNISE = (
    ("ctc_weight", float, "weight of the CTC head's scores in the search; 0: none (default: 0)"),
    ("ctc_beam", int, "beam of the CTC head's own search; 1: greedy (default: 1)"),
    ("hotwords", str, "file of phrases to prefer, one a line, perhaps with a tab and a boost"),
    ("hotword_weight", float, "weight of the hotwords (default: 1)"),
    ("ngram", str, "n-gram language model, ARPA or binary, read by kenlm"),
    ("ngram_weight", float, "weight of the n-gram language model (default: 0.3)"),
    (
        "initial_state",
        str,
        "state of RWKV-7 that prompts go on from: of `speechllm state`, or tuned here or by RWKV-PEFT (.pth)",
    ),
)
_METAVARS = {int: "N", float: "X", str: "FILE"}


def add_search_options(parser: argparse.ArgumentParser) -> None:
    """Add what `search_options` reads."""
    search = parser.add_argument_group("search")
    search.add_argument(
        "--search",
        choices=("greedy", "beam", "sample"),
        default="greedy",
        help="search of the language model (default: %(default)s)",
    )
    others = parser.add_argument_group("what takes part in the search")
    for group, options in ((search, _SEARCH), (others, _RECOGNISE)):
        for name, kind, what in options:
            group.add_argument(_option(name), type=kind, metavar=_METAVARS[kind], help=what)


def search_options(args: argparse.Namespace, *, shows_nbest: bool = True) -> RecognizeOptions:
    """The options that were given.

    Args:
      shows_nbest: whether more than the best result of an utterance is written.

    Raises:
      UserError: a value is out of range, or an option that was given has no effect.
    """
    from speechllm.decode.interface import RecognizeOptions
    from speechllm.decode.search import SearchOptions
    from speechllm.errors import UserError

    of_search, of_recognizer = _given(args, _SEARCH), _given(args, _RECOGNISE)
    options = RecognizeOptions(SearchOptions(args.search, **of_search), **of_recognizer)
    # A value that is the default has no effect either, but only here is it known that it was given.
    for name, why in (options.search.without_effect() | options.without_effect()).items():
        if name in of_search or name in of_recognizer:
            raise UserError(f"{_option(name)}: {why}")
    if options.search.nbest > 1 and args.search == "beam" and not shows_nbest:
        raise UserError(
            f"--nbest {options.search.nbest}: only the best result is written here (all are by speechllm transcribe "
            "--format json)"
        )
    return options


def check_without_language_model(args: argparse.Namespace) -> None:
    """
    Raises:
      UserError: an option was given that a model without a language model takes no notice of.
    """
    from speechllm.errors import UserError

    for name in (*_given(args, _SEARCH), *_given(args, _RECOGNISE)):
        if name != "ctc_beam":
            raise UserError(
                f"{_option(name)}: is for a language model, and this model is an encoder alone (it was trained with "
                "model.llm: null): leave it out"
            )


def _given(args: argparse.Namespace, options: tuple[tuple[str, type, str], ...]) -> dict[str, Any]:
    values = ((name, getattr(args, name)) for name, *_ in options)
    return {name: value for name, value in values if value is not None}


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"
