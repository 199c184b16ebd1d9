"""The search options of the command line, the same for `speechllm transcribe` and recipes/decode.py."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

# Importing this takes no time: `speechllm --help` answers at once.
if TYPE_CHECKING:
    from speechllm.decode.recognizer import RecogniseOptions

# Field, default, help: of SearchOptions and of RecogniseOptions.
_SEARCH = (
    ("beam", 4, "hypotheses of an utterance that run side by side in beam search"),
    ("nbest", 1, "results of an utterance"),
    ("length_penalty", 1.0, "scores are divided by length to this power"),
    ("temperature", 1.0, "of sampling"),
    ("top_p", 1.0, "sample from the best tokens that together have this probability"),
    ("top_k", 0, "sample from so many best tokens, 0: from all"),
    ("seed", 0, "of sampling"),
    ("tokens_per_second", 12.5, "longest text for a second of audio"),
    ("max_repeats", 10, "how often the end of a text may repeat itself before it counts as a loop"),
    ("max_rows", 64, "hypotheses in one step of the language model, over all utterances"),
)
_RECOGNISE = (
    ("ctc_weight", 0.0, "of the CTC head's scores, 0: none"),
    ("ctc_beam", 1, "of the CTC head's own search, 1: greedy"),
    ("hotword_weight", 1.0, "of hotwords"),
    ("ngram_weight", 0.3, "of the n-gram language model"),
)


def add_search_options(parser: argparse.ArgumentParser) -> None:
    """Add what `search_options` reads."""
    search = parser.add_argument_group("search")
    search.add_argument(
        "--search",
        choices=("greedy", "beam", "sample"),
        default="greedy",
        help="of the language model (default: %(default)s)",
    )
    others = parser.add_argument_group("what takes part in the search")
    for group, options in ((search, _SEARCH), (others, _RECOGNISE)):
        for name, default, what in options:
            is_whole = isinstance(default, int)
            group.add_argument(
                f"--{name.replace('_', '-')}",
                type=int if is_whole else float,
                default=default,
                metavar="N" if is_whole else "X",
                help=f"{what} (default: %(default)s)",
            )
    others.add_argument(
        "--hotwords", metavar="FILE", help="phrases to prefer, one a line, perhaps with a tab and a boost"
    )
    others.add_argument("--ngram", metavar="FILE", help="n-gram language model, ARPA or binary, read by kenlm")
    others.add_argument(
        "--initial-state",
        metavar="FILE",
        help="state of RWKV-7 that prompts go on from: of `speechllm state`, or tuned here or by RWKV-PEFT (.pth)",
    )


def search_options(args: argparse.Namespace) -> RecogniseOptions:
    """The options that were given.

    Raises:
      UserError: a value is out of range, or has no effect.
    """
    from speechllm.decode.recognizer import RecogniseOptions
    from speechllm.decode.search import SearchOptions

    return RecogniseOptions(
        SearchOptions(args.search, **{name: getattr(args, name) for name, *_ in _SEARCH}),
        **{name: getattr(args, name) for name, *_ in _RECOGNISE},
        hotwords=args.hotwords,
        ngram=args.ngram,
        initial_state=args.initial_state,
    )
