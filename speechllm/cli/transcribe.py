"""`speechllm transcribe`: files, folders and manifests of any length to text."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from speechllm.cli.options import (
    MANIFEST_HELP,
    add_device_option,
    add_dtype_option,
    add_prompt_options,
    add_share_options,
    add_weights_options,
    command_line_request,
    share_of,
)
from speechllm.cli.search_options import (
    add_search_options,
    check_without_language_model,
    search_identity,
    search_options,
)
from speechllm.decode.options import RecognizeOptions

# The rest of the library is imported where it is used: `speechllm --help` answers at once.
if TYPE_CHECKING:
    from speechllm.transcribe.segments import SegmentOptions

_FORMATS = ("txt", "json", "srt", "vtt", "ctm", "tsv", "TextGrid")
_FORMATS_WITH_WORD_TIMES = ("json", "srt", "vtt", "ctm", "TextGrid")
_MAX_SEGMENT = 30.0


def add_transcribe(commands: argparse._SubParsersAction) -> None:
    transcribe = commands.add_parser(
        "transcribe",
        help="audio files to text",
        description="Transcribe or translate audio of any format, sampling rate and length. Without --output the "
        "results go to standard output, in UTF-8, in the order of the inputs. An input that cannot be read is reported "
        "and the others are done; the exit status is 1 then, 130 after Ctrl-C, and 141 when the reader of standard "
        "output has gone. Where the language model repeats itself or writes more than the audio can say, the text of "
        "the CTC head is taken, if the model has one; json says so. An option that has no effect is an error.",
    )
    transcribe.add_argument(
        "inputs",
        nargs="+",
        metavar="FILE|DIR|MANIFEST|-",
        help=f"audio files; folders, which are searched for them, links followed; manifests: {MANIFEST_HELP}; -: audio "
        "from standard input. Of URLs, manifests and the audio that they name are read",
    )
    transcribe.add_argument("--model", required=True, type=Path, help="folder of a trained model")
    transcribe.add_argument("--language", help="language that is spoken, as a tag (en) or in English (English)")
    transcribe.add_argument("--target-language", help="language to translate into, such as de or German")
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
        help="txt, or with times: json (an object a line), srt and vtt (subtitles), ctm (words), tsv, TextGrid "
        "(Praat; default: %(default)s)",
    )
    transcribe.add_argument(
        "--output",
        type=Path,
        metavar="DIR",
        help="write a file for each input there. A result that is there already, of the same audio, model and "
        "options, is kept; one of other audio is never replaced. Files of folders keep their paths",
    )
    transcribe.add_argument("--overwrite", action="store_true", help="overwrite existing results")
    transcribe.add_argument(
        "--channel",
        type=int,
        metavar="N",
        help="take this channel of several, counted from 0 (default: their mean, or those that speak)",
    )
    transcribe.add_argument(
        "--track",
        type=int,
        metavar="N",
        help="take this audio track of several, as in a film, counted from 0 (default: the one that is marked so)",
    )
    transcribe.add_argument(
        "--batch-duration", type=float, default=300.0, help="seconds of audio in a batch (default: %(default)g)"
    )
    transcribe.add_argument(
        "--max-segment",
        type=float,
        help="longer audio is cut at pauses into segments of at most this many seconds (default: "
        f"{_MAX_SEGMENT:g}, or what the encoder can hear)",
    )
    add_share_options(transcribe)
    add_weights_options(transcribe)
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

    from speechllm.errors import UserError
    from speechllm.model.build import load_model, prepare_for_inference, usable_device
    from speechllm.model.config import load_model_config
    from speechllm.model.request import checked_request
    from speechllm.transcribe.inputs import Inputs
    from speechllm.transcribe.output import Output, transcribe_all
    from speechllm.transcribe.segments import SegmentOptions

    # What can be refused before the model is loaded is.
    asked = search_options(args, shows_nbest=args.format == "json")
    request = command_line_request(args)
    share = share_of(args)
    inputs = Inputs(args.inputs, request, args.task, args.channel, args.track, share)
    options = SegmentOptions(args.batch_duration, _MAX_SEGMENT if args.max_segment is None else args.max_segment)
    output = Output(args.format, args.output, args.overwrite, share=share)
    output.check(args.inputs)
    device = usable_device(args.device)
    config = load_model_config(args.model)
    if config.llm is None:
        check_without_language_model(args)
    inputs = replace(inputs, request=checked_request(config, request))

    model = load_model(args.model)
    prepare_for_inference(model, device, args.dtype, args.llm_weights, args.encoder_weights)
    if args.max_segment is not None and args.max_segment > model.max_seconds:
        raise UserError(f"--max-segment {args.max_segment:g}: the encoder hears at most {model.max_seconds:g} s")
    options = replace(options, max_seconds=min(options.max_seconds, model.max_seconds))
    timestamps = args.format in _FORMATS_WITH_WORD_TIMES and model.ctc_head is not None
    how = replace(config.recognize_options(asked), fallback="ctc", timestamps=timestamps)
    if args.output is not None:
        output = replace(output, made_with=made_with(args, how, options))
    return transcribe_all(inputs, model.recognizer(how), options, output, model.feature_kind)


def made_with(args: argparse.Namespace, how: RecognizeOptions, options: SegmentOptions) -> str:
    """A text that differs where the results of two runs may, though their audio and languages are the same."""
    from speechllm.model.build import model_identity

    precision = (args.dtype, args.llm_weights, *([args.encoder_weights] if args.encoder_weights else []))
    asked = (*precision, args.channel, args.track)
    return repr((model_identity(args.model), search_identity(how), options.max_seconds, asked))
