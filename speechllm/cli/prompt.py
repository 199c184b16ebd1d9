"""`speechllm prompt`: what the language model reads."""

from __future__ import annotations

import argparse
from pathlib import Path

from speechllm.cli.options import (
    MANIFEST_HELP,
    add_prompt_options,
    add_source_options,
    command_line_request,
    command_line_sources,
    positive,
)


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
    show.add_argument(
        "--chunk-seconds",
        type=float,
        metavar="S",
        help="as streams of such chunks, for a model with model.streaming; words without times are spread evenly",
    )
    add_prompt_options(show)
    show.set_defaults(run=run_prompt_show)


def run_prompt_show(args: argparse.Namespace) -> int:
    from speechllm.cli.prompt_show import MadeUp, show_prompts
    from speechllm.errors import UserError
    from speechllm.model.speech_llm import SpeechLLM
    from speechllm.train.config import load_experiment, stages_of

    if not (args.config or args.model):
        raise UserError("prompt show: give a configuration with --config, or a trained model with --model")
    if args.stage and not args.config:
        raise UserError("prompt show: --stage is of a configuration: give --config")
    sources, text_steps, seed = command_line_sources(args, args.manifests), [], 42
    if args.config:
        experiment = load_experiment(args.config, args.overrides)
        if args.stage:
            if args.stage not in experiment.stages:
                raise UserError(f"--stage: {args.stage} is none of {', '.join(experiment.stages) or 'those there are'}")
            experiment = stages_of(str(args.config), experiment, args.overrides)[args.stage]
        sources = sources or experiment.data.train
        text_steps, seed = experiment.data.text, experiment.train.seed
    model = SpeechLLM.from_pretrained(args.model) if args.model else SpeechLLM.from_config(experiment.model)
    made_up = MadeUp(args.text, command_line_request(args)) if args.language or not sources else None
    if args.chunk_seconds is not None and args.chunk_seconds not in model.chunks:
        sizes = ", ".join(f"{seconds:g}" for seconds in model.chunks) or "none, as it has no model.streaming"
        raise UserError(f"--chunk-seconds {args.chunk_seconds:g}: the model's chunks are (in seconds): {sizes}")
    options = {"count": args.n, "seed": seed, "text_steps": text_steps, "chunk_seconds": args.chunk_seconds}
    for text in show_prompts(model, made_up or sources, **options):
        print(text)
    return 0
