"""The search options of the command line, the same for `speechllm transcribe` and recipes/decode.py."""

from __future__ import annotations

import argparse
from dataclasses import asdict, replace
from typing import Any, get_args

from speechllm.cli.options import add_settings, given_settings, option_of
from speechllm.decode.options import FILE_OPTIONS, Method, RecognizeOptions, SearchOptions
from speechllm.errors import UserError


def add_search_options(parser: argparse.ArgumentParser) -> None:
    """Add what `search_options` reads."""
    search = parser.add_argument_group("search")
    search.add_argument(
        "--search",
        choices=get_args(Method),
        help="search of the language model (default: greedy, or, where no option of the search is given, what the "
        "model's config.yaml says: decoding)",
    )
    add_settings(search, SearchOptions)
    add_settings(parser.add_argument_group("what takes part in the search"), RecognizeOptions)


def search_options(args: argparse.Namespace, *, shows_nbest: bool = True) -> RecognizeOptions | None:
    """The options that were given; None if none were: then the model's own hold (`ModelConfig.decoding`).

    Args:
      shows_nbest: whether more than the best result of an utterance is written.

    Raises:
      UserError: a value is out of range, or an option that was given has no effect.
    """
    of_search, of_recognizer = given_settings(args, SearchOptions), given_settings(args, RecognizeOptions)
    if args.search is None and not of_search and not of_recognizer:
        return None
    method = args.search or SearchOptions.method
    options = RecognizeOptions(SearchOptions(method, **of_search), **of_recognizer)
    # A value that is the default has no effect either, but only here is it known that it was given.
    for name, why in (options.search.without_effect() | options.without_effect()).items():
        if name in of_search or name in of_recognizer:
            raise UserError(f"{option_of(name)}: {why}")
    if options.search.nbest > 1 and method == "beam" and not shows_nbest:
        raise UserError(
            f"--nbest {options.search.nbest}: only the best result is written here (all are by speechllm transcribe "
            "--format json)"
        )
    return options


def search_identity(how: RecognizeOptions) -> dict[str, Any]:
    """What differs where the results of two searches may. Files count as what is in them."""
    from speechllm.weights import file_hash

    # how many are searched together has no influence
    how = replace(how, search=replace(how.search, max_rows=how.search.width))
    files = {name: file_hash(file) for name in FILE_OPTIONS if (file := getattr(how, name))}
    return asdict(how) | files


def check_without_language_model(args: argparse.Namespace) -> None:
    """Whether a model without a language model takes notice of all that is given.

    Raises:
      UserError: an option was given that a model without a language model takes no notice of.
    """
    for name in (*given_settings(args, SearchOptions), *given_settings(args, RecognizeOptions)):
        if name != "ctc_beam":
            raise UserError(
                f"{option_of(name)}: is for a language model, and this model is an encoder alone (it was trained with "
                "model.llm: null): leave it out"
            )
