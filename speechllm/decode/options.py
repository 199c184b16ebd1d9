"""The search options of the command line, the same for `speechllm transcribe` and recipes/decode.py."""

from __future__ import annotations

import argparse
from typing import get_args

from speechllm.decode.recognise import RecogniseOptions
from speechllm.decode.search import Method, SearchOptions


def add_search_options(parser: argparse.ArgumentParser) -> None:
    """Add what `search_options` reads; defaults are those of `SearchOptions` and `RecogniseOptions`."""
    default, default_search = RecogniseOptions(), SearchOptions()
    group = parser.add_argument_group("search")
    group.add_argument("--search", choices=get_args(Method), default=default_search.method,
                       help="of the language model (default: %(default)s)")  # fmt: skip
    for name, type, what in (
        ("beam", int, "hypotheses of an utterance that run side by side in beam search"),
        ("nbest", int, "results of an utterance"),
        ("length_penalty", float, "scores are divided by length to this power"),
        ("temperature", float, "of sampling"),
        ("top_p", float, "sample from the best tokens that together have this probability"),
        ("top_k", int, "sample from so many best tokens, 0: from all"),
        ("seed", int, "of sampling"),
        ("tokens_per_second", float, "longest text for a second of audio"),
        ("max_repeats", int, "how often the end of a text may repeat itself before it counts as a loop"),
        ("max_rows", int, "hypotheses in one step of the language model, over all utterances"),
    ):
        group.add_argument(f"--{name.replace('_', '-')}", type=type, default=getattr(default_search, name),
                           metavar="X" if type is float else "N", help=f"{what} (default: %(default)s)")  # fmt: skip
    group = parser.add_argument_group("what takes part in the search")
    for name, type, what in (
        ("ctc_weight", float, "of the CTC head's scores, 0: none"),
        ("ctc_beam", int, "of the CTC head's own search, 1: greedy"),
        ("hotword_weight", float, "of hotwords"),
        ("ngram_weight", float, "of the n-gram language model"),
    ):
        group.add_argument(f"--{name.replace('_', '-')}", type=type, default=getattr(default, name),
                           metavar="X" if type is float else "N", help=f"{what} (default: %(default)s)")  # fmt: skip
    group.add_argument(
        "--hotwords", metavar="FILE", help="phrases to prefer, one a line, each perhaps with a tab and a boost"
    )
    group.add_argument("--ngram", metavar="FILE", help="n-gram language model, ARPA or binary, read by kenlm")
    group.add_argument("--initial-state", metavar="FILE", help="state of the language model that prompts go on from")


def search_options(args: argparse.Namespace, **others: object) -> RecogniseOptions:
    """The options that were given; `others` are fields of `RecogniseOptions` that have no option here.

    Raises:
      UserError: a value is out of range, or has no effect.
    """
    search = SearchOptions(
        args.search, args.beam, args.nbest, args.length_penalty, args.temperature, args.top_p, args.top_k, args.seed,
        args.tokens_per_second, args.max_repeats, args.max_rows,
    )  # fmt: skip
    return RecogniseOptions(
        search,
        ctc_weight=args.ctc_weight,
        ctc_beam=args.ctc_beam,
        hotwords=args.hotwords,
        hotword_weight=args.hotword_weight,
        ngram=args.ngram,
        ngram_weight=args.ngram_weight,
        initial_state=args.initial_state,
        **others,
    )
