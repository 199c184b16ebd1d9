#!/usr/bin/env python3
"""Train a sentencepiece model on the transcripts of manifests: the tokenizer of a model that is trained from scratch.

    tools/train_tokenizer.py data/train.jsonl --output data/tokenizer --vocab-size 500

Pieces are as in the labels of training: what comes before a label in the prompt's form stands before each text. Pieces
that the prompt is made of can be given by --special. With --lexicon it has the phones of a pronunciation lexicon as
well, for a language model that reads what a CTC head writes with that lexicon (model.ctc_tokenizer).
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from speechllm.data import describe_cut, read_manifest
from speechllm.errors import UserError
from speechllm.prompt.template import PromptConfig
from speechllm.text.tokenizer import LexiconTokenizer, train_sentencepiece


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("manifests", nargs="+", type=Path, metavar="MANIFEST", help="of any form that training reads")
    parser.add_argument("--output", required=True, type=Path, help="folder to write")
    parser.add_argument("--vocab-size", type=int, default=500, help="pieces at most (default: %(default)s)")
    parser.add_argument("--special", nargs="*", default=[], metavar="TEXT", help="texts that are one piece each")
    parser.add_argument("--lexicon", type=Path, metavar="DIR", help="folder of a lexicon.txt, whose phones are pieces")
    args = parser.parse_args()
    before = PromptConfig().written_out().before_label
    try:
        texts = [before + describe_cut(cut).text for path in args.manifests for cut in read_manifest(path)]
        special = [*args.special, *(LexiconTokenizer(args.lexicon).tags if args.lexicon else [])]
        tokenizer = train_sentencepiece(texts, args.output, args.vocab_size, special_tokens=special)
    except (UserError, OSError) as e:
        sys.exit(f"error: {e}")
    print(f"{args.output}: {tokenizer.vocab_size} pieces; {texts[0]!r} -> {tokenizer.encode(texts[0])}")


if __name__ == "__main__":
    main()
