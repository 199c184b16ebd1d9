"""`speechllm state`: a long instruction, read once."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_state(commands: argparse._SubParsersAction) -> None:
    state = commands.add_parser(
        "state",
        help="read a long instruction once, for all that is transcribed after it",
        description="Let the language model of a trained model read a text, and write its state to a file: with "
        "--initial-state FILE, `speechllm transcribe` and recipes/decode.py go on from there, at no cost.",
    )
    state.add_argument("text", type=Path, metavar="FILE", help="the text, UTF-8, all of which is read as it is")
    state.add_argument("--model", required=True, type=Path, help="folder of a trained model")
    state.add_argument("--output", required=True, type=Path, metavar="FILE", help="the state, a safetensors file")
    state.set_defaults(run=run_state)


def run_state(args: argparse.Namespace) -> int:
    from speechllm.errors import UserError
    from speechllm.model.speech_llm import SpeechLLM
    from speechllm.rwkv7.initial_state import state_of_text

    try:
        text = args.text.read_text(encoding="utf-8")
    except UnicodeDecodeError as e:
        raise UserError(f"{args.text}: not UTF-8: {e}") from e
    model = SpeechLLM.from_pretrained(args.model)
    tokens = model.tokenizer.encode(text)
    if not tokens:
        raise UserError(f"{args.text}: there is no text in it")
    state_of_text(model.llm, tokens).save(args.output)
    print(f"{args.output}: {len(tokens)} tokens read")
    return 0
