"""The `speechllm` command."""

from __future__ import annotations

import argparse
import itertools
import sys

from speechllm.cli.align import add_align
from speechllm.cli.data import add_data
from speechllm.cli.exits import run_to_exit
from speechllm.cli.explore import add_explore
from speechllm.cli.export import add_export
from speechllm.cli.plot import add_plot
from speechllm.cli.prompt import add_prompt
from speechllm.cli.push import add_push
from speechllm.cli.score import add_score
from speechllm.cli.serve import add_serve
from speechllm.cli.state import add_state
from speechllm.cli.stream import add_stream
from speechllm.cli.transcribe import add_transcribe
from speechllm.cli.tune import add_tune


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="speechllm", description="Speech to text with a language model.")
    commands = parser.add_subparsers(dest="command", required=True)
    add_transcribe(commands)
    add_stream(commands)
    add_serve(commands)
    add_align(commands)
    add_tune(commands)
    add_state(commands)
    add_data(commands)
    add_prompt(commands)
    add_plot(commands)
    add_score(commands)
    add_explore(commands)
    add_export(commands)
    add_push(commands)
    argv, overrides = split_overrides(sys.argv[1:] if argv is None else argv)
    args = parser.parse_args(argv, argparse.Namespace(overrides=overrides))
    if overrides and not getattr(args, "config", None):
        parser.error(f"unknown option {overrides[0]}; settings of the form --section.key need --config")

    run_to_exit(lambda: args.run(args))


def split_overrides(argv: list[str]) -> tuple[list[str], list[str]]:
    """Take `--section.key value` and `--section.key=value` out of the arguments: no other option has a dot.

    argparse would take the values for positional arguments.
    """
    rest, overrides = [], []
    arguments = iter(argv)
    for argument in arguments:
        name, equals, _ = argument.partition("=")
        if name.startswith("--") and "." in name:
            overrides += [argument] if equals else [argument, *itertools.islice(arguments, 1)]
        else:
            rest.append(argument)
    return rest, overrides
