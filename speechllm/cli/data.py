"""`speechllm data`: check, convert and preview manifests."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from speechllm.cli.options import MANIFEST_HELP, add_source_options, command_line_sources, positive

if TYPE_CHECKING:
    from speechllm.data import SourceConfig


def add_data(commands: argparse._SubParsersAction) -> None:
    data = commands.add_parser("data", help="check, convert and preview manifests")
    actions = data.add_subparsers(dest="action", required=True)

    check = actions.add_parser(
        "check",
        help="what manifests hold, and what is wrong with them",
        description="Report lines, hours, durations, languages, characters and tokens per second of audio, and all "
        "problems with file and line number. The exit status is 1 when something is wrong.",
    )
    check.add_argument("manifests", nargs="*", metavar="MANIFEST", help=MANIFEST_HELP)
    check.add_argument("--config", type=Path, help="check all that this configuration trains, validates and tests on")
    add_source_options(check)
    check.add_argument(
        "--tokenizer",
        help="count its tokens: rwkv, a sentencepiece model, or the folder of one or of a Hugging Face model "
        "(default: of --config)",
    )
    check.add_argument(
        "--audio",
        choices=("none", "header", "full"),
        default="header",
        help="how much is read of each audio file: full finds what is cut short or not a number (default: %(default)s)",
    )
    check.add_argument(
        "--min-seconds", type=float, help="shorter utterances are a problem (default: of --config, or 0)"
    )
    check.add_argument(
        "--max-seconds", type=float, help="longer utterances are a problem (default: of --config, or none)"
    )
    check.add_argument("--sounds", action="store_true", help="noise or impulse responses: no text is no problem")
    check.add_argument(
        "--jobs", type=positive, default=os.cpu_count() or 1, help="threads that read audio (default: cores)"
    )
    check.add_argument("--json", type=Path, metavar="FILE", help="write the report with all problems to FILE as well")
    check.set_defaults(run=run_data_check)

    convert = actions.add_parser(
        "convert",
        help="a manifest of any kind to lhotse cuts or Shar",
        description="Write a manifest of any kind as lhotse cuts (a file; the audio stays where it is) or as a lhotse "
        "Shar directory (with the audio, in shards to be read in order). Utterances that cannot be used are reported "
        "and left out; the exit status is 1 then.",
    )
    convert.add_argument("manifest", metavar="MANIFEST", help=MANIFEST_HELP)
    convert.add_argument("output", type=Path, metavar="OUTPUT", help="a new .jsonl or .jsonl.gz file, or directory")
    add_source_options(convert)
    convert.add_argument("--to", choices=("cuts", "shar"), default="cuts", help="(default: %(default)s)")
    convert.add_argument(
        "--shard-size", type=positive, default=1000, help="utterances in a shard (default: %(default)s)"
    )
    convert.add_argument(
        "--audio-format",
        choices=("wav", "flac", "original"),
        default="flac",
        help="of a Shar directory, in 16 bits; original keeps each file's, encoded again (default: %(default)s)",
    )
    convert.add_argument(
        "--features",
        choices=("fbank", "whisper80", "whisper128"),
        help="store features too, for features_on: precomputed: fbank for Zipformer, the others for Whisper encoders",
    )
    convert.set_defaults(run=run_data_convert)

    preview = actions.add_parser(
        "preview",
        help="hear and see what augmentation does",
        description="Write some utterances as wav files before and after augmentation, and pictures of their features. "
        "The augmentation is that of --config, changed by --data.augment.KEY VALUE; without one it is speed "
        "(0.9, 1, 1.1), volume and SpecAugment.",
    )
    preview.add_argument("manifests", nargs="*", metavar="MANIFEST", help=f"{MANIFEST_HELP} (default: of --config)")
    preview.add_argument("--config", type=Path, help="the configuration of an experiment")
    add_source_options(preview)
    preview.add_argument("--n", type=positive, default=8, help="utterances, drawn at random (default: %(default)s)")
    preview.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder for the files")
    preview.add_argument("--seed", type=int, help="of choice and augmentation (default: train.seed of --config, or 42)")
    preview.set_defaults(run=run_data_preview)


def run_data_check(args: argparse.Namespace) -> int:
    from dataclasses import replace

    from speechllm.data.check import CheckOptions, check_manifests, sets_of, sounds_of
    from speechllm.errors import UserError
    from speechllm.text.tokenizer import load_tokenizer

    if bool(args.manifests) == bool(args.config):
        raise UserError("data check: give manifests, or a configuration with --config")
    sources: list[SourceConfig] | dict[str, list[SourceConfig]] = command_line_sources(args, args.manifests)
    sounds: list[SourceConfig] = []
    tokenizer = args.tokenizer
    options = CheckOptions(audio=args.audio, sounds=args.sounds, jobs=args.jobs)
    if args.config:
        from speechllm.data.loader import require_sources
        from speechllm.train.config import load_experiment

        experiment = load_experiment(args.config, args.overrides)
        data = experiment.data
        require_sources(data.train, "train")
        require_sources(data.valid, "evaluation")
        sources, sounds = sets_of(data), sounds_of(data)
        options = replace(
            options,
            text_steps=data.text,
            min_seconds=data.min_seconds,
            max_seconds=data.max_seconds,
            duration_tolerance=data.duration_tolerance,
            min_frames=experiment.model.min_frames,
        )
        tokenizer = tokenizer or experiment.model.tokenizer
    if tokenizer:
        options = replace(options, tokenizer=load_tokenizer(tokenizer))
    given = {name: getattr(args, name) for name in ("min_seconds", "max_seconds") if getattr(args, name) is not None}
    report = check_manifests(sources, replace(options, **given), keep_all=args.json is not None, sounds=sounds)
    print(report)
    if args.json:
        report.save(args.json)
    return 1 if report.problem_counts else 0


def run_data_convert(args: argparse.Namespace) -> int:
    from speechllm.data.convert import convert_to_cuts, convert_to_shar
    from speechllm.log import setup_logging

    setup_logging()
    (source,) = command_line_sources(args, [args.manifest])
    if args.to == "cuts":
        result = convert_to_cuts(source, args.output, features=args.features)
    else:
        result = convert_to_shar(
            source,
            args.output,
            shard_size=args.shard_size,
            audio_format=args.audio_format,
            features=args.features,
        )
    print(f"{args.output}: {result.utterances} utterances, {result.seconds / 3600:.3f} hours")
    for reason, count in result.left_out.most_common():
        print(f"left out: {count} {reason}", file=sys.stderr)
    return 1 if result.left_out else 0


def run_data_preview(args: argparse.Namespace) -> int:
    from speechllm.config import load_config
    from speechllm.data.preview import DEFAULT_AUGMENT, PreviewConfig, write_previews
    from speechllm.errors import UserError
    from speechllm.log import setup_logging

    setup_logging()
    sources, augment, text_steps, seed = command_line_sources(args, args.manifests), DEFAULT_AUGMENT, [], 42
    if args.config:
        experiment = load_config(PreviewConfig, args.config, args.overrides)
        sources = sources or experiment.data.train
        augment, text_steps, seed = experiment.data.augment, experiment.data.text, experiment.train.get("seed", seed)
    if not sources:
        raise UserError("data preview: give manifests, or a configuration with train sources with --config")
    written = 0
    for preview in write_previews(
        sources,
        args.output,
        count=args.n,
        seed=seed if args.seed is None else args.seed,
        augment=augment,
        text_steps=text_steps,
    ):
        print(preview)
        written += 1
    if not written:
        raise UserError("data preview: none of the utterances that were drawn can be used")
    return 0
