"""The `speechllm` command."""

from __future__ import annotations

import argparse
import itertools
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from speechllm.transcribe.recordings import add_transcribe

if TYPE_CHECKING:
    from speechllm.data import SourceConfig

MANIFEST_HELP = "NeMo JSON lines, lhotse cuts, or a directory in Kaldi's or lhotse's Shar form"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="speechllm", description="Speech to text with a language model.")
    commands = parser.add_subparsers(dest="command", required=True)
    add_transcribe(commands)
    add_tune(commands)
    add_state(commands)
    add_data(commands)
    add_prompt(commands)
    add_plot(commands)
    add_score(commands)
    argv, overrides = split_overrides(sys.argv[1:] if argv is None else argv)
    args = parser.parse_args(argv, argparse.Namespace(overrides=overrides))
    if overrides and not getattr(args, "config", None):
        parser.error(f"unknown option {overrides[0]}; settings of the form --section.key need --config")

    # Here, not above, as all other imports of the library: `speechllm --help` answers at once.
    from speechllm.errors import UserError

    try:
        sys.exit(args.run(args))
    except (UserError, FileNotFoundError) as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(1)


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


def add_tune(commands: argparse._SubParsersAction) -> None:
    tune = commands.add_parser(
        "tune",
        help="adapt an RWKV-7 language model to text",
        description="Adapt an RWKV-7 language model to the texts of a domain: LoRA, MiSS, state tuning and others. "
        "--dry-run shows what each method would train and store, and trains nothing.",
    )
    tune.add_argument("--llm", required=True, type=Path, help="official .pth file or Hugging Face folder")
    tune.add_argument(
        "--text", nargs="+", type=Path, metavar="FILE", help='a document a line, or .jsonl with {"text": ...} lines'
    )
    tune.add_argument("--valid", nargs="+", type=Path, metavar="FILE", help="text to measure the loss on")
    tune.add_argument("--output", type=Path, help="folder for the adapter (PEFT), the state, or the model (full)")
    tune.add_argument("--tokenizer", default="rwkv", help="rwkv, or a sentencepiece model (default: %(default)s)")
    tune.add_argument("--method", default="miss", help="full, lora, rslora, dora, pissa, miss, adalora or state")
    tune.add_argument("--rank", type=int, help="of the adapter (default: 8)")
    tune.add_argument("--targets", nargs="+", help="matrices to adapt (default: receptance key value output)")
    tune.add_argument("--quantize", default="none", help="of the frozen base: none, int8 or nf4 (default: none)")
    tune.add_argument("--steps", type=int, default=1000, help="optimiser steps (default: %(default)s)")
    tune.add_argument("--tokens-per-step", type=int, default=4096, help="(default: %(default)s)")
    tune.add_argument(
        "--segment",
        type=int,
        default=1024,
        help="longer documents are read in segments, the state carried on (default: %(default)s)",
    )
    tune.add_argument("--lr", type=float, default=1e-4, help="peak learning rate (default: %(default)s)")
    tune.add_argument("--valid-every-n", type=int, default=200, help="steps between validations, each of which saves")
    tune.add_argument("--seed", type=int, default=42)
    tune.add_argument("--bf16", action="store_true", help="bfloat16 autocast")
    tune.add_argument(
        "--checkpoint-blocks", action="store_true", help="compute activations again in the backward pass: less memory"
    )
    tune.add_argument("--dry-run", action="store_true", help="print what each method trains and stores, and stop")
    tune.set_defaults(run=run_tune)


def run_tune(args: argparse.Namespace) -> int:
    import torch

    from speechllm.errors import UserError
    from speechllm.llm.adapters import TuneConfig, save_adapter, tune, tuning_table
    from speechllm.log import setup_logging
    from speechllm.rwkv7 import load_rwkv7, save_rwkv7
    from speechllm.text.tokenizer import load_tokenizer
    from speechllm.train.text_tuning import TextTuning, read_documents, tune_on_text

    if args.dry_run:
        print(tuning_table(load_rwkv7(args.llm, dtype=None).config, args.rank, args.targets))
        return 0
    if missing := [f"--{name}" for name in ("text", "valid", "output") if not getattr(args, name)]:
        raise UserError(f"tune: {', '.join(missing)} missing (or --dry-run, to see what each method trains)")
    try:
        config = TuneConfig(args.method, rank=args.rank, targets=args.targets, quantize=args.quantize)
    except ValueError as e:
        raise UserError(f"tune: {e}") from e
    options = TextTuning(
        args.steps,
        args.tokens_per_step,
        args.segment,
        args.lr,
        valid_every_n=args.valid_every_n,
        bf16=args.bf16,
        seed=args.seed,
    )
    setup_logging()
    torch.manual_seed(args.seed)
    tokenizer = load_tokenizer(args.tokenizer)
    documents, valid_documents = (read_documents(paths, tokenizer) for paths in (args.text, args.valid))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = tune(load_rwkv7(args.llm), config).to(device).train()
    model.checkpoint_blocks = args.checkpoint_blocks
    if tokenizer.vocab_size > model.vocab_size:
        raise UserError(
            f"the tokenizer {args.tokenizer} has {tokenizer.vocab_size} ids, the model {model.vocab_size}: they must "
            "belong together"
        )

    def save() -> None:
        if args.method == "full":
            save_rwkv7(model, args.output)
        else:
            save_adapter(model, args.output, base=args.llm)

    before, after = tune_on_text(model, documents, valid_documents, options, tokenizer.eos_id, save)
    print(f"loss of a token: {before:.4f} -> {after:.4f}; written to {args.output}")
    return 0


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


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not at least 1")
    return value


def add_source_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--kind",
        choices=("auto", "nemo", "lhotse", "shar", "kaldi"),
        default="auto",
        help="of the manifests on the command line (default: looked up)",
    )
    parser.add_argument("--tar-path", help="the tar shards of a NeMo manifest, such as audio_{0..127}.tar")
    parser.add_argument("--lang", help="language of lines that do not say theirs")
    parser.add_argument("--target-lang", help="language that they are translated into")
    parser.add_argument("--task", choices=("asr", "ast"), help="their task: transcription or translation")
    parser.add_argument("--channel", type=int, help="the one to take of several (default: their mean)")


def command_line_sources(args: argparse.Namespace, manifests: list[str]) -> list[SourceConfig]:
    from speechllm.data import SourceConfig
    from speechllm.errors import UserError

    try:
        names = ("kind", "tar_path", "lang", "target_lang", "task", "channel")
        return [SourceConfig(path, **{name: getattr(args, name) for name in names}) for path in manifests]
    except ValueError as e:
        raise UserError(str(e)) from e


def run_data_check(args: argparse.Namespace) -> int:
    from dataclasses import replace

    from speechllm.data.check import CheckOptions, ExperimentData, check_manifests
    from speechllm.errors import UserError
    from speechllm.text.tokenizer import load_tokenizer

    if bool(args.manifests) == bool(args.config):
        raise UserError("data check: give manifests, or a configuration with --config")
    sources, sounds, tokenizer = command_line_sources(args, args.manifests), [], args.tokenizer
    options = CheckOptions(audio=args.audio, sounds=args.sounds, jobs=args.jobs)
    if args.config:
        experiment = ExperimentData.load(args.config, args.overrides)
        data = experiment.data
        sources, sounds = experiment.sources(), experiment.sounds()
        options = replace(options, text_steps=data.text, min_seconds=data.min_seconds, max_seconds=data.max_seconds)
        tokenizer = tokenizer or experiment.model.get("tokenizer")
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
    from speechllm.data.check import ExperimentData
    from speechllm.data.preview import DEFAULT_AUGMENT, write_previews
    from speechllm.errors import UserError
    from speechllm.log import setup_logging

    setup_logging()
    sources, augment, text_steps, seed = command_line_sources(args, args.manifests), DEFAULT_AUGMENT, [], 42
    if args.config:
        experiment = ExperimentData.load(args.config, args.overrides)
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


def add_prompt(commands: argparse._SubParsersAction) -> None:
    prompt = commands.add_parser("prompt", help="what the language model reads")
    actions = prompt.add_subparsers(dest="action", required=True)
    show = actions.add_parser(
        "show",
        help="utterances as the language model reads them, token by token",
        description="Print what the language model reads of the first utterances of the training data, position by "
        "position, and the tokens that count in the loss behind an arrow. The instruction is the one that the first "
        "epoch of training draws. With --language, or where there is no data, one made-up utterance of 5 seconds.",
    )
    show.add_argument("manifests", nargs="*", metavar="MANIFEST", help=f"{MANIFEST_HELP} (default: of --config)")
    show.add_argument("--config", type=Path, help="the configuration of an experiment")
    show.add_argument("--stage", help="of the configuration's stages")
    show.add_argument("--model", type=Path, metavar="DIR", help="folder of a trained model (default: that of --config)")
    add_source_options(show)
    show.add_argument("--n", type=positive, default=1, help="utterances (default: %(default)s)")
    show.add_argument("--language", help="of a made-up utterance")
    show.add_argument("--target-language", help="that it is translated into")
    show.add_argument("--text", default="", help="its label")
    show.add_argument("--previous", metavar="TEXT", help="the text before it, for the prompt's {previous}")
    show.add_argument(
        "--prompt-hotwords", type=Path, metavar="FILE", help="phrases for the prompt's {hotwords}, one a line"
    )
    show.set_defaults(run=run_prompt_show)


def run_prompt_show(args: argparse.Namespace) -> int:
    from speechllm.cli.prompt_show import MadeUp, show_prompts
    from speechllm.config import from_dict, override
    from speechllm.data.check import ExperimentData
    from speechllm.errors import UserError
    from speechllm.model.speech_llm import ModelConfig, SpeechLLM
    from speechllm.transcribe.recordings import prompt_context

    if not (args.config or args.model):
        raise UserError("prompt show: give a configuration with --config, or a trained model with --model")
    if args.stage and not args.config:
        raise UserError("prompt show: --stage is of a configuration: give --config")
    sources, text_steps, seed = command_line_sources(args, args.manifests), [], 42
    if args.config:
        experiment = ExperimentData.load(args.config, args.overrides)
        if args.stage:
            if args.stage not in experiment.stages:
                raise UserError(f"--stage: {args.stage} is none of {', '.join(experiment.stages) or 'those there are'}")
            changes = experiment.stages[args.stage]
            experiment = override(experiment, changes, source=f"{args.config}: stages.{args.stage}")
        sources = sources or experiment.data.train
        text_steps, seed = experiment.data.text, experiment.train.get("seed", seed)
    if args.model:
        model = SpeechLLM.from_pretrained(args.model)
    else:
        model = SpeechLLM.from_config(from_dict(ModelConfig, experiment.model, source=f"{args.config}: model"))
    if args.language or not sources:
        sources = MadeUp(args.text, args.language, args.target_language, prompt_context(args))
    for text in show_prompts(model, sources, count=args.n, seed=seed, text_steps=text_steps):
        print(text)
    return 0


def add_plot(commands: argparse._SubParsersAction) -> None:
    plot = commands.add_parser(
        "plot",
        help="curves of training runs",
        description="Draw loss, WER and CER of training runs over steps into one picture, and print the best of each.",
    )
    plot.add_argument("exp_dirs", nargs="+", type=Path, metavar="EXP", help="the --exp-dir of a run")
    plot.add_argument(
        "--output", type=Path, metavar="FILE", help="PNG (default: EXP/plot.png for one run, plot.png for several)"
    )
    plot.set_defaults(run=run_plot)


def run_plot(args: argparse.Namespace) -> int:
    from speechllm.train.plot import plot_runs, read_run, table

    output = args.output or (args.exp_dirs[0] / "plot.png" if len(args.exp_dirs) == 1 else Path("plot.png"))
    runs = [read_run(exp_dir) for exp_dir in args.exp_dirs]
    plot_runs(runs, output)
    print(table(runs))
    print(f"written to {output}")
    return 0


def add_score(commands: argparse._SubParsersAction) -> None:
    score = commands.add_parser(
        "score",
        help="error rates of transcripts",
        description="Compare what was recognised with what was said: WER, CER or mixed error rate with confidence "
        "intervals and the share of exact matches, by group; two systems; BLEU and chrF of translations. Files are "
        "recogs-*.txt (which hold both sides); JSON with text and pred_text (NeMo manifests), lhotse cuts; Kaldi's "
        "text (an id and words); trn, ctm and stm of NIST; srt and vtt; csv and tsv with a header; plain texts, "
        "compared line by line; or the folder that speechllm transcribe has written. Utterances are matched by id.",
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
    )
    print(text, end="")
    return 0
