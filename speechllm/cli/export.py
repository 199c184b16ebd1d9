"""`speechllm export`: encoder and CTC head as ONNX."""

from __future__ import annotations

import argparse
from pathlib import Path

from speechllm.cli.options import positive


def add_export(commands: argparse._SubParsersAction) -> None:
    export = commands.add_parser(
        "export",
        help="encoder and CTC head as ONNX, as sherpa-onnx takes a Zipformer's",
        description="Write the encoder with its CTC head as DIR/model.onnx, and DIR/tokens.txt, with the names and "
        "metadata of icefall's exported models: sherpa-onnx recognizes with those of a Zipformer as they are; a "
        "Whisper's reads features that it does not compute. Without a CTC head it is the encoder alone. Language "
        "models: tools/convert_rwkv.py. Needs pip install 'speechllm[onnx]'.",
    )
    export.add_argument("model", type=Path, metavar="MODEL", help="folder of a trained model")
    export.add_argument("output", type=Path, metavar="DIR", help="folder to write into")
    export.add_argument(
        "--streaming", action="store_true", help="chunk by chunk (a causal Zipformer) in place of whole utterances"
    )
    export.add_argument(
        "--chunk-size",
        type=positive,
        metavar="N",
        help="of streams, in frames of 20 ms (default: the smallest that the encoder was trained with)",
    )
    export.add_argument(
        "--left-context-frames",
        type=positive,
        metavar="N",
        help="of streams, what attention sees before a chunk, in frames of 20 ms (default: the least that the encoder "
        "was trained with)",
    )
    export.add_argument("--int8", action="store_true", help="also DIR/model.int8.onnx, matrix products in 8 bits")
    export.add_argument("--overwrite", action="store_true", help="overwrite what is in DIR of an earlier export")
    export.set_defaults(run=run_export)


def run_export(args: argparse.Namespace) -> int:
    """Raises:
    UserError, FileNotFoundError: the options do not go together, the model does not load or cannot be exported so.
    """
    from speechllm.errors import UserError
    from speechllm.model.build import load_model
    from speechllm.model.export import export_model

    if not args.streaming:
        for option in ("chunk_size", "left_context_frames"):
            if getattr(args, option) is not None:
                raise UserError(f"--{option.replace('_', '-')}: is of streams; give --streaming too")
    if (args.output / "model.onnx").exists() and not args.overwrite:
        raise UserError(f"{args.output / 'model.onnx'}: exists; --overwrite overwrites it")
    files = export_model(
        load_model(args.model),
        args.output,
        streaming=args.streaming,
        chunk_size=args.chunk_size,
        left_context_frames=args.left_context_frames,
        int8=args.int8,
    )
    for file in files:
        print(f"wrote {file}: {file.stat().st_size / 1e6:.1f} MB")
    return 0
