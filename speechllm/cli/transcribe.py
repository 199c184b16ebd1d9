"""`speechllm transcribe`: files, folders and manifests of any length to text."""

from __future__ import annotations

import argparse
from pathlib import Path

from speechllm.cli.options import add_device_option, add_dtype_option, add_prompt_options, prompt_context
from speechllm.cli.search_options import add_search_options, search_options

_FORMATS = ("txt", "json", "srt", "ctm", "tsv")
_FORMATS_WITH_WORD_TIMES = ("json", "srt", "ctm")


def add_transcribe(commands: argparse._SubParsersAction) -> None:
    transcribe = commands.add_parser(
        "transcribe",
        help="audio files to text",
        description="Transcribe or translate audio of any format, sampling rate and length. Without --output the "
        "results go to standard output, in the order of the inputs. An input that cannot be read is reported and the "
        "others are done; the exit status is 1 then. Where the language model repeats itself or writes more than the "
        "audio can say, the text of the CTC head is taken, if the model has one; json says so.",
    )
    transcribe.add_argument(
        "inputs",
        nargs="+",
        type=Path,
        metavar="FILE|DIR|MANIFEST",
        help="audio files; folders, which are searched for them; manifests: NeMo JSON lines, lhotse cuts, or a "
        "directory in Kaldi's or lhotse's Shar form",
    )
    transcribe.add_argument("--model", required=True, type=Path, help="folder of a trained model")
    transcribe.add_argument("--language", help="language tag for the prompt, e.g. en")
    transcribe.add_argument("--target-language", help="translate into this language, e.g. de")
    add_prompt_options(transcribe)
    transcribe.add_argument(
        "--task",
        choices=("asr", "ast"),
        help="transcribe or translate (default: translate with --target-language; else as a manifest says)",
    )
    transcribe.add_argument(
        "--format",
        choices=_FORMATS,
        default="txt",
        help="txt, or with times: json (an object a line), srt (subtitles), ctm (words), tsv (default: %(default)s)",
    )
    transcribe.add_argument(
        "--output",
        type=Path,
        metavar="DIR",
        help="write a file for each input there; those that exist are not done again",
    )
    transcribe.add_argument("--overwrite", action="store_true", help="do them again")
    transcribe.add_argument(
        "--batch-duration", type=float, default=300.0, help="seconds of audio in a batch (default: %(default)g)"
    )
    transcribe.add_argument(
        "--max-segment",
        type=float,
        default=30.0,
        help="longer audio is cut at pauses into segments of at most so many seconds (default: %(default)g)",
    )
    transcribe.add_argument(
        "--llm-weights",
        choices=("float32", "bfloat16", "int8"),
        default="float32",
        help="on the CPU, how the language model's matrices are kept: float32 is exact, bfloat16 faster on processors "
        "that have its instructions, int8 smaller (default: %(default)s)",
    )
    add_device_option(transcribe)
    add_dtype_option(transcribe)
    add_search_options(transcribe)
    transcribe.set_defaults(run=run_transcribe)


def run_transcribe(args: argparse.Namespace) -> int:
    """Returns 1 when an input could not be transcribed, else 0.

    Raises:
        UserError, FileNotFoundError: the options do not go together, the model does not load, or a result cannot be
            written.
    """
    from dataclasses import replace

    from speechllm.model.build import load_model, prepare_for_inference, usable_device
    from speechllm.transcribe.inputs import Inputs
    from speechllm.transcribe.output import Output, transcribe_all
    from speechllm.transcribe.segments import SegmentOptions

    how = replace(search_options(args), fallback="ctc")
    inputs = Inputs(args.inputs, args.language, args.target_language, args.task, prompt_context(args))
    options = SegmentOptions(args.batch_duration, args.max_segment)
    output = Output(args.format, args.output, args.overwrite)
    output.check(args.inputs)

    device = usable_device(args.device)
    model = load_model(args.model)
    prepare_for_inference(model, device, args.dtype, args.llm_weights)
    timestamps = args.format in _FORMATS_WITH_WORD_TIMES and model.ctc_head is not None
    recognise = model.recogniser(replace(how, timestamps=timestamps))
    return transcribe_all(inputs, recognise, options, output, model.feature_kind)
