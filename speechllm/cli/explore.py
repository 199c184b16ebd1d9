"""`speechllm explore`: a page that shows where a model errs, and what a manifest holds."""

from __future__ import annotations

import argparse
from pathlib import Path

from speechllm.cli.options import MANIFEST_HELP


def add_explore(commands: argparse._SubParsersAction) -> None:
    explore = commands.add_parser(
        "explore",
        help="a page that shows where a model errs",
        description="Write a page to open in a browser, without a server: error rates by set, language, speaker and "
        "duration; all utterances, sorted by errors, to hear, with reference and hypothesis aligned word by word, "
        "alternatives and confidences where the results have them; two systems side by side; the most frequent errors; "
        "and of a manifest its durations, rates of speech and outliers.",
    )
    explore.add_argument(
        "results",
        nargs="+",
        type=Path,
        metavar="RESULTS",
        help="of one system, a file for each test set: recogs-*.txt, or a folder with them; what speechllm transcribe "
        "--format json has written, and all that speechllm score reads; or manifests alone, to see the data",
    )
    explore.add_argument("--output", required=True, type=Path, metavar="DIR", help="folder of the page: DIR/index.html")
    explore.add_argument(
        "--manifest",
        nargs="+",
        default=[],
        type=Path,
        metavar="MANIFEST",
        help="audio, languages, speakers, durations, and references where RESULTS hold none: then of one test set, or "
        f"a manifest for each: {MANIFEST_HELP}",
    )
    explore.add_argument(
        "--compare",
        nargs="+",
        default=[],
        type=Path,
        metavar="RESULTS2",
        help="results of another system on the same test sets, in the same order",
    )
    explore.add_argument(
        "--audio",
        choices=("link", "copy", "none"),
        default="link",
        help="link: play the files from where they are, copies of those that browsers cannot play; copy: put all audio "
        "into DIR/audio, so that DIR can be moved; none (default: %(default)s)",
    )
    explore.add_argument(
        "--unit",
        choices=("word", "char", "mixed"),
        default="word",
        help="of errors; mixed: Chinese characters and other words (default: %(default)s)",
    )
    explore.add_argument(
        "--normalize", nargs="+", default=[], metavar="STEP", help="text steps for both sides, as of speechllm score"
    )
    explore.add_argument(
        "--missing-as-empty", action="store_true", help="utterances without a hypothesis count as all deleted"
    )
    explore.set_defaults(run=run_explore)


def run_explore(args: argparse.Namespace) -> int:
    from speechllm.explore.report import ExploreOptions, write_report

    options = ExploreOptions(args.manifest, args.compare, args.unit, args.normalize, args.audio, args.missing_as_empty)
    print(write_report(args.results, args.output, options))
    print(f"written to {args.output / 'index.html'}")
    return 0
