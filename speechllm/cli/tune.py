"""`speechllm tune`: an RWKV-7 language model adapted to text."""

from __future__ import annotations

import argparse
from pathlib import Path

from speechllm.cli.options import add_device_option, add_settings, given_settings
from speechllm.train.text_options import TextTuning


def add_tune(commands: argparse._SubParsersAction) -> None:
    tune = commands.add_parser(
        "tune",
        help="adapt an RWKV-7 language model to text, or train a new one",
        description="Adapt an RWKV-7 language model to the texts of a domain (LoRA, MiSS, state tuning and others), or "
        "train a new one. A run that was stopped goes on from its last validation when it is started again. "
        "--dry-run shows what each method would train and store, and trains nothing.",
    )
    base = tune.add_mutually_exclusive_group(required=True)
    base.add_argument("--llm", type=Path, help="official .pth file or Hugging Face folder")
    base.add_argument(
        "--new", metavar="LxD", help="a new model of L layers and width D, such as 8x384, is trained in full"
    )
    tune.add_argument(
        "--text", nargs="+", type=Path, metavar="FILE",
        help='a document a line, or .jsonl with {"text": ...} lines; with "prompt" beside "text", what comes before it '
        "and is not learned",
    )  # fmt: skip
    tune.add_argument("--valid", nargs="+", type=Path, metavar="FILE", help="text to measure the loss on")
    tune.add_argument("--output", type=Path, help="folder for the adapter (PEFT), the state, or the model (full)")
    tune.add_argument("--tokenizer", default="rwkv", help="rwkv, or a sentencepiece model (default: %(default)s)")
    tune.add_argument(
        "--method", help="full, lora, rslora, dora, pissa, miss, adalora or state (default: miss; full with --new)"
    )
    tune.add_argument("--rank", type=int, help="of the adapter (default: 8)")
    tune.add_argument("--targets", nargs="+", help="matrices to adapt (default: receptance key value output)")
    tune.add_argument("--quantize", default="none", help="of the frozen base: none, int8 or nf4 (default: none)")
    add_settings(tune, TextTuning)
    add_device_option(tune)
    tune.add_argument(
        "--checkpoint-blocks", action="store_true", help="compute activations again in the backward pass: less memory"
    )
    tune.add_argument("--dry-run", action="store_true", help="print what each method trains and stores, and stop")
    tune.set_defaults(run=run_tune)


def run_tune(args: argparse.Namespace) -> int:
    import torch

    from speechllm.errors import UserError
    from speechllm.llm.adapters import TuneConfig, save_adapter, tune
    from speechllm.llm.precision import base_dtype
    from speechllm.log import setup_logging
    from speechllm.model.build import usable_device
    from speechllm.rwkv7 import RWKV7, RWKV7Config, load_rwkv7, save_rwkv7, tuning_table
    from speechllm.text.tokenizer import load_tokenizer
    from speechllm.train.text_tuning import read_documents, tune_on_text

    method = args.method or ("miss" if args.new is None else "full")
    if args.new is not None and method != "full":
        raise UserError(f"tune: --method {method} is for a model that is trained already; a new one is trained in full")
    if args.dry_run:
        if args.new is not None:
            raise UserError("tune: --dry-run shows what the methods train of a model; give --llm")
        print(tuning_table(load_rwkv7(args.llm, dtype=None).config, args.rank, args.targets))
        return 0
    if missing := [f"--{name}" for name in ("text", "valid", "output") if not getattr(args, name)]:
        raise UserError(f"tune: {', '.join(missing)} missing (or --dry-run, to see what each method trains)")
    try:
        config = TuneConfig(method, rank=args.rank, targets=args.targets, quantize=args.quantize)
    except ValueError as e:
        raise UserError(f"tune: {e}") from e
    options = TextTuning(**given_settings(args, TextTuning))
    setup_logging()
    torch.manual_seed(options.seed)
    tokenizer = load_tokenizer(args.tokenizer)
    documents, valid_documents = (read_documents(paths, tokenizer) for paths in (args.text, args.valid))
    device = usable_device(args.device)
    if config.quantize != "none" and torch.cuda.is_available() and device.type != "cuda":
        raise UserError(f"--quantize {config.quantize} is done by the GPU where there is one: leave out --device")
    if args.new is None:
        model = load_rwkv7(args.llm, base_dtype(None, not config.freezes_base, device.type == "cuda"))
    else:
        try:
            num_layers, width = map(int, args.new.split("x"))
            model = RWKV7(RWKV7Config(num_layers, width, tokenizer.vocab_size))
        except ValueError as e:
            raise UserError(f"tune: --new {args.new}: layers and width as in 8x384, in heads of 64 ({e})") from e
    tune(model, config)
    model.to(device).train()
    model.checkpoint_blocks = args.checkpoint_blocks
    if tokenizer.vocab_size > model.vocab_size:
        raise UserError(
            f"the tokenizer {args.tokenizer} has {tokenizer.vocab_size} ids, the model {model.vocab_size}: they must "
            "belong together"
        )

    def save() -> None:
        if method == "full":
            save_rwkv7(model, args.output)
        else:
            save_adapter(model, args.output, base=args.llm)

    unfinished = args.output.with_name(f"{args.output.name}.unfinished.pt")
    before, after = tune_on_text(model, documents, valid_documents, options, tokenizer.eos_id, save, unfinished)
    print(f"loss of a token: {before:.4f} -> {after:.4f}; written to {args.output}")
    return 0
