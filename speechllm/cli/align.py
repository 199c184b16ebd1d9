"""`speechllm align`: when the words of known texts are said."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING

from speechllm.cli.options import MANIFEST_HELP, add_device_option, add_dtype_option

if TYPE_CHECKING:
    from speechllm.transcribe.output import Counted

_FORMATS = ("json", "ctm", "TextGrid", "srt", "vtt")


def add_align(commands: argparse._SubParsersAction) -> None:
    align = commands.add_parser(
        "align",
        help="when the words of a known text are said",
        description="Find each word of a transcript in its audio (forced alignment by the CTC head). The words stand "
        "in the result as they are given. An input that cannot be aligned is reported and the others are done; the "
        "exit status is 1 then.",
    )
    align.add_argument("audio", metavar="AUDIO|MANIFEST", help=f"an audio file; or {MANIFEST_HELP}, with texts")
    align.add_argument("text", nargs="?", type=Path, metavar="TEXT", help="what is said in AUDIO: a text file, UTF-8")
    align.add_argument("--model", required=True, type=Path, help="folder of a trained model that has a CTC head")
    align.add_argument(
        "--format",
        choices=_FORMATS,
        default="ctm",
        help="json (an object a line, with confidences), ctm, TextGrid (Praat), srt and vtt (subtitles) (default: "
        "%(default)s)",
    )
    align.add_argument("--output", type=Path, metavar="DIR", help="write a file for each input there")
    align.add_argument("--overwrite", action="store_true", help="overwrite existing results")
    align.add_argument(
        "--normalize",
        nargs="+",
        default=[],
        metavar="STEP",
        help="text steps that bring the words into the form that the model writes: its data.text, such as lowercase "
        "remove_punctuation",
    )
    align.add_argument("--language", help="of the text, for the steps of --normalize")
    align.add_argument("--channel", type=int, metavar="N", help="take this channel of several, counted from 0")
    align.add_argument("--track", type=int, metavar="N", help="take this audio track of several, counted from 0")
    add_device_option(align)
    add_dtype_option(align)
    align.set_defaults(run=run_align)


def run_align(args: argparse.Namespace) -> int:
    """Returns 1 when an input could not be aligned, else 0.

    Raises:
        UserError, FileNotFoundError: the options do not go together, the model does not load, or a result cannot be
            written.
    """
    from dataclasses import replace

    from speechllm.errors import UserError
    from speechllm.model.build import load_model, model_identity, prepare_for_inference, usable_device
    from speechllm.prompt.request import Request
    from speechllm.scoring.reading import all_lines
    from speechllm.text.languages import language_tag
    from speechllm.text.normalize import check_steps
    from speechllm.transcribe.align import Aligner
    from speechllm.transcribe.inputs import Inputs, is_manifest
    from speechllm.transcribe.output import Output, run_all
    from speechllm.transcribe.segments import SegmentOptions

    try:
        check_steps(args.normalize)
    except ValueError as error:
        raise UserError(f"--normalize: {error}") from error
    if (args.text is None) != is_manifest(args.audio):
        raise UserError(
            f"{args.audio}: its lines have the texts; leave {args.text} out"
            if args.text is not None
            else f"{args.audio}: name the text file after it; or give a manifest with audio and texts"
        )
    request = Request(language=None if args.language is None else language_tag(args.language))
    inputs: Counted = Inputs([args.audio], request, None, args.channel, args.track)
    if args.text is not None:
        if os.path.isdir(args.audio):
            raise UserError(f"{args.audio}: a folder, and {args.text} is of one recording; make a manifest of both")
        text = " ".join(line for _, line in all_lines(args.text))
        inputs = [replace(input, text=text) for input in inputs]
    output = Output(args.format, args.output, args.overwrite, of_text=True)
    output.check([args.audio])
    device = usable_device(args.device)
    model = load_model(args.model)
    prepare_for_inference(model, device, args.dtype)
    options = SegmentOptions()
    aligner = Aligner(model, args.normalize, replace(options, max_seconds=min(options.max_seconds, model.max_seconds)))
    if args.output is not None:
        made_with = repr((model_identity(args.model), args.normalize, args.dtype, args.channel, args.track))
        output = replace(output, made_with=made_with)
    return run_all(inputs, aligner.align_inputs, output, "aligned")
