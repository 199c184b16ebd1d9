"""The `speechllm` command."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="speechllm", description="Speech to text with a language model.")
    commands = parser.add_subparsers(dest="command", required=True)
    transcribe = commands.add_parser("transcribe", help="audio files to text")
    transcribe.add_argument("files", nargs="+", type=Path, metavar="FILE", help="audio, any format and sampling rate")
    transcribe.add_argument("--model", required=True, type=Path, help="folder of a trained model")
    transcribe.add_argument("--language", help="language tag for the prompt, e.g. en")
    args = parser.parse_args(argv)
    sys.exit(run_transcribe(args))


def run_transcribe(args: argparse.Namespace) -> int:
    """Print `FILE<tab>TEXT` for each file; a broken file is reported and the others are done. Returns 1 then."""
    # Here, not above: `speechllm --help` answers at once.
    from speechllm.errors import UserError
    from speechllm.model import SpeechLLM

    try:
        model = SpeechLLM.from_pretrained(args.model)
    except (UserError, FileNotFoundError) as e:
        print(f"error: {e}", file=sys.stderr)
        return 1
    status = 0
    for file in args.files:
        try:
            print(f"{file}\t{model.transcribe([file], language=args.language)[0]}", flush=True)
        except UserError as e:
            print(f"error: {e}", file=sys.stderr)
            status = 1
    return status


if __name__ == "__main__":
    main()
