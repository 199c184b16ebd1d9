"""`speechllm score`: error rates of transcripts."""

from __future__ import annotations

import argparse
from pathlib import Path

from speechllm.cli.options import MANIFEST_HELP


def add_score(commands: argparse._SubParsersAction) -> None:
    score = commands.add_parser(
        "score",
        help="error rates of transcripts",
        description="Compare what was recognized with what was said: WER, CER or mixed error rate with confidence "
        "intervals and the share of exact matches, by group; two systems; BLEU and chrF of translations. Files are "
        "recogs-*.txt (which hold both sides); JSON with text and pred_text (NeMo manifests), lhotse cuts; Kaldi's "
        "text (an id and words); trn, ctm and stm of NIST; srt, vtt and TextGrid; csv and tsv with a header; plain "
        "texts, compared line by line; or a folder that speechllm transcribe has written. They are matched by id.",
    )
    score.add_argument("ref", type=Path, metavar="REF", help="references, or references and hypotheses")
    score.add_argument("hyp", nargs="?", type=Path, metavar="HYP", help="hypotheses (default: those in REF)")
    score.add_argument(
        "--unit",
        choices=("word", "char", "mixed"),
        default="word",
        help="of errors; mixed: Chinese characters and other words (default: %(default)s)",
    )
    score.add_argument(
        "--normalize",
        "--normalise",
        nargs="+",
        default=[],
        metavar="STEP",
        help="text steps for both sides, in this order: leaderboard (the Open ASR Leaderboard's for English), "
        "leaderboard_multilingual, or those of data.text, such as lowercase remove_punctuation",
    )
    score.add_argument("--by", choices=("language", "speaker", "duration"), help="groups of the table")
    score.add_argument(
        "--manifest",
        type=Path,
        help=f"says languages, speakers and durations where REF does not: {MANIFEST_HELP}",
    )
    score.add_argument(
        "--compare",
        type=Path,
        metavar="HYP2",
        help="another system on the same utterances: matched pairs test, bootstrap of the difference",
    )
    score.add_argument("--bleu", action="store_true", help="BLEU and chrF as well (needs sacrebleu)")
    score.add_argument(
        "--hotwords",
        type=Path,
        metavar="FILE",
        help="error rates on these phrases, one a line, and on the rest (B-WER, U-WER), and how often one is written "
        "that is not said (default: those of each utterance, where REF or --manifest have hotwords)",
    )
    score.add_argument(
        "--missing-as-empty", action="store_true", help="utterances without a hypothesis count as all deleted"
    )
    score.add_argument("--output", type=Path, metavar="DIR", help="write recogs, errs, wer-summary and the table there")
    score.set_defaults(run=run_score)


def run_score(args: argparse.Namespace) -> int:
    from speechllm.scoring.command import score_files

    text = score_files(
        args.ref,
        args.hyp,
        unit=args.unit,
        text_steps=args.normalize,
        by=args.by,
        manifest=args.manifest,
        compare_with=args.compare,
        bleu=args.bleu,
        missing_as_empty=args.missing_as_empty,
        output=args.output,
        hotwords=args.hotwords,
    )
    print(text, end="")
    return 0
