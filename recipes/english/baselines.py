#!/usr/bin/env python3
"""Recognize the test sets with Whisper's own decoder and with pocketsphinx, and score them, and other results, alike.

    recipes/english/baselines.py --output-dir recipes/english/exp-baselines [RECOGS ...]

RECOGS are recogs-SET-MODEL.txt as recipes/decode.py writes them. Of every recognizer, references and hypotheses are
normalized as the corpus is (english_text.py), so that 1947 and nineteen forty seven, gonna and going to are the same.
OUTPUT/SYSTEM receives recogs-SET-SYSTEM.txt and the other files of recipes/decode.py; what is there is not done again.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import soundfile
from english_text import EnglishText, installed_dictionary
from tqdm import tqdm

from speechllm.errors import UserError
from speechllm.scoring import Transcript, score, write_reports
from speechllm.scoring.reading import read_lines

SAMPLE_RATE = 16000
SETS = ("test", "other")

# Utterances of float32 samples at 16 kHz in, their texts out, in order.
Recognizer = Callable[[Iterable[np.ndarray]], Iterator[str]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recogs", nargs="*", type=Path, metavar="RECOGS", help="results of other recognizers")
    parser.add_argument("--data-dir", type=Path, default=Path("recipes/english/data"), help="where prepare.sh put it")
    parser.add_argument("--output-dir", type=Path, default=Path("recipes/english/exp-baselines"), help="for results")
    parser.add_argument("--systems", nargs="*", default=["whisper", "pocketsphinx"], help="(default: %(default)s)")
    parser.add_argument("--dictionary", type=Path, help="as of prepare_corpus.py")
    args = parser.parse_args()
    try:
        text = EnglishText.load(args.dictionary or installed_dictionary())
        makers: dict[str, Callable[[], Recognizer]] = {
            "whisper": lambda: whisper(args.data_dir / "encoder"),
            "pocketsphinx": lambda: pocketsphinx,
        }
        found = []
        for system in args.systems:
            if system not in makers:
                raise UserError(f"--systems: there is no {system}; there are {', '.join(makers)}")
            for name in SETS:
                recogs = args.output_dir / system / f"recogs-{name}-{system}.txt"
                if not recogs.is_file():
                    recognize(makers[system](), args.data_dir / "corpus" / f"{name}.jsonl", recogs, text)
                found.append(recogs)
        print(table([*found, *args.recogs], text), end="")
    except (UserError, OSError) as e:
        sys.exit(f"error: {e}")


def recognize(recognizer: Recognizer, manifest: Path, recogs: Path, text: EnglishText) -> None:
    """Write `recogs`, and what `write_reports` writes beside it.

    Raises:
        UserError: the manifest is damaged. OSError: it, or audio, is missing.
    """
    entries = [json.loads(line) for line in manifest.read_text(encoding="utf-8").splitlines()]
    ids = list(read_lines(manifest))
    samples = (soundfile.read(manifest.parent / entry["audio_filepath"], dtype="float32")[0] for entry in entries)
    texts = tqdm(recognizer(samples), desc=f"{recogs.stem}", total=len(entries), unit="utterance", disable=None)
    results = [
        Transcript(id, text.for_scoring(entry["text"]), text.for_scoring(said), "en")
        for id, entry, said in zip(ids, entries, texts, strict=True)
    ]
    name, system = re.fullmatch(r"recogs-(\w+)-(\w+)", recogs.stem).groups()
    write_reports(recogs.parent, name, system, results, setting="greedy_search")


def whisper(folder: Path, batch_size: int = 8) -> Recognizer:
    """Whisper with its own decoder, greedy, as transformers has it; audio is padded to 30 s.

    Raises:
        UserError: the folder has no such model.
    """
    import torch
    from transformers import WhisperForConditionalGeneration, WhisperProcessor

    try:
        model = WhisperForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
        processor = WhisperProcessor.from_pretrained(folder)
    except (OSError, ValueError) as e:
        raise UserError(f"{folder}: no Whisper with decoder and tokenizer: {e}") from e

    def run(utterances: Iterable[np.ndarray]) -> Iterator[str]:
        utterances = iter(utterances)
        while batch := list(islice(utterances, batch_size)):
            inputs = processor(batch, sampling_rate=SAMPLE_RATE, return_tensors="pt")
            with torch.inference_mode():
                ids = model.generate(inputs.input_features, num_beams=1, do_sample=False)
            yield from processor.batch_decode(ids, skip_special_tokens=True)

    return run


def pocketsphinx(utterances: Iterable[np.ndarray]) -> Iterator[str]:
    """pocketsphinx with the American English models that it comes with."""
    from pocketsphinx import Decoder

    decoder = Decoder(samprate=SAMPLE_RATE, loglevel="FATAL")
    for samples in utterances:
        decoder.start_utt()
        decoder.process_raw((samples * 32767).astype(np.int16).tobytes(), full_utt=True)
        decoder.end_utt()
        yield decoder.hyp().hypstr if decoder.hyp() is not None else ""


def table(paths: Iterable[Path], text: EnglishText) -> str:
    """Word errors of each file of results, as for `write_reports`, normalized here.

    Raises:
        UserError: a file cannot be read, or has no hypotheses.
    """
    rows = [("results", "utterances", "words", "ins", "del", "sub", "WER %")]
    for path in paths:
        lines = read_lines(path).values()
        if any(line.predicted is None or line.text is None for line in lines):
            raise UserError(f"{path}: does not have reference and hypothesis of each utterance")
        results = [Transcript(line.id, text.for_scoring(line.text), text.for_scoring(line.predicted)) for line in lines]
        report = score(results)
        errors = (report.insertions, report.deletions, report.substitutions)
        rows.append((str(path), len(results), report.ref_len, *errors, f"{100 * report.rate:.2f}"))
    width = max(len(row[0]) for row in rows)
    return "".join(f"{row[0]:<{width}}" + "".join(f"{cell:>12}" for cell in row[1:]) + "\n" for row in rows)


if __name__ == "__main__":
    main()
