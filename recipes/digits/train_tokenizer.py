#!/usr/bin/env python3
"""Train the digits recipe's sentencepiece tokenizer on the training transcripts."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from speechllm.prompt.template import PromptConfig
from speechllm.text.tokenizer import train_sentencepiece


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data-dir", type=Path, required=True, help="folder written by prepare_corpus.py")
    parser.add_argument("--vocab-size", type=int, default=400, help="pieces at most (default: %(default)s)")
    args = parser.parse_args()
    prompt = PromptConfig().written_out()
    texts, languages = [], set()
    for manifest in sorted(args.data_dir.glob("train-??.jsonl")):
        for line in manifest.read_text(encoding="utf-8").splitlines():
            entry = json.loads(line)
            texts.append(prompt.before_label + entry["text"])
            languages.add(entry["lang"])
    if not texts:
        sys.exit(f"error: no train-LANG.jsonl in {args.data_dir}; run prepare_corpus.py first")
    # The prompt's parts are whole tokens, as they are few in the vocabularies of the released models.
    tags = [f"<|{language}|>" for language in sorted(languages)]
    tokenizer = train_sentencepiece(
        texts,
        args.data_dir / "tokenizer",
        args.vocab_size,
        special_tokens=["User: ", "\n\nAssistant:", *tags],
    )
    print(f"{args.data_dir / 'tokenizer'}: {tokenizer.vocab_size} pieces; {texts[0]!r} -> {tokenizer.encode(texts[0])}")


if __name__ == "__main__":
    main()
