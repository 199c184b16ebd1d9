"""`speechllm serve`: the model behind OpenAI's interfaces, and captions in a browser."""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from speechllm.cli.options import (
    add_device_option,
    add_dtype_option,
    add_settings,
    add_weights_options,
    given_settings,
)
from speechllm.cli.search_options import add_search_options, check_without_language_model, search_options
from speechllm.decode.options import RecognizeOptions
from speechllm.serve.options import ServeOptions

# The rest of the library is imported where it is used: `speechllm --help` answers at once.
if TYPE_CHECKING:
    from speechllm.decode.streaming import StreamingRecognizer
    from speechllm.model.base import SpeechModel

_ENDPOINT = 1.0
_CHUNK = 0.64
_MAX_SEGMENT = 30.0


def add_serve(commands: argparse._SubParsersAction) -> None:
    serve = commands.add_parser(
        "serve",
        help="a server: OpenAI's audio interfaces, live audio, captions in a browser",
        description="Serve a model: recordings at /v1/audio/transcriptions and /v1/audio/translations, as OpenAI's; "
        "live audio at /v1/realtime, a WebSocket; a page with captions at /; /v1/models, /health, and /metrics for "
        "Prometheus. Uploads and live streams share one loop over the model; each has the text that it would have "
        "alone. It listens to this machine alone unless --host says otherwise. SIGTERM and Ctrl-C let it finish what "
        "is being served, and end it with the status 0; a second one ends it at once. Needs the extra serve: pip "
        "install 'speechllm[serve]'.",
    )
    serve.add_argument("--model", required=True, type=Path, help="folder of a trained model")
    serve.add_argument(
        "--host", default="127.0.0.1", help="address to listen at; 0.0.0.0: for others too (default: %(default)s)"
    )
    serve.add_argument("--port", type=int, default=8000, help="0: any that is free (default: %(default)s)")
    serve.add_argument(
        "--api-key-file",
        type=Path,
        metavar="FILE",
        help="file of keys, one a line; clients must give one of them (default: nobody is asked)",
    )
    serve.add_argument("--name", help="that clients know the model by (default: the name of its folder)")
    serve.add_argument("--language", help="of requests that name none, as a tag (en) or in English (English)")
    add_settings(serve.add_argument_group("limits"), ServeOptions)
    live = serve.add_argument_group("live audio")
    live.add_argument(
        "--chunk-seconds",
        type=float,
        metavar="X",
        help="audio that is heard before words are written, one of those that the model was trained with (default: "
        "0.64, or the nearest that it has)",
    )
    live.add_argument(
        "--endpoint-seconds",
        type=float,
        default=_ENDPOINT,
        metavar="X",
        help="after so much audio without a new word an item ends (default: %(default)g)",
    )
    live.add_argument("--ctc", action="store_true", help="write live words with the CTC head")
    live.add_argument(
        "--fresh-segments", action="store_true", help="the language model begins each segment of live audio anew"
    )
    serve.add_argument(
        "--max-segment",
        type=float,
        default=_MAX_SEGMENT,
        help="longer recordings are cut at pauses into segments of at most this many seconds (default: %(default)g)",
    )
    add_weights_options(serve)
    add_device_option(serve)
    add_dtype_option(serve)
    add_search_options(serve)
    serve.set_defaults(run=run_serve)


def run_serve(args: argparse.Namespace) -> int:
    """Raises:
    UserError, FileNotFoundError: the options do not go together, the model does not load, the address is taken.
    """
    from speechllm.errors import UserError
    from speechllm.model.build import load_model, prepare_for_inference, usable_device
    from speechllm.model.config import load_model_config
    from speechllm.transcribe.pauses import SHORTEST_MAX_SECONDS

    try:
        import prometheus_client  # noqa: F401
        import python_multipart  # noqa: F401
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
        import websockets  # noqa: F401
    except ImportError as error:
        raise UserError(f"speechllm serve needs {error.name}: pip install 'speechllm[serve]'") from error
    from speechllm.serve.server import Server, listen
    from speechllm.serve.service import Service

    # What can be refused before the model is loaded is.
    options = ServeOptions(**given_settings(args, ServeOptions))
    asked = search_options(args, shows_nbest=False)
    keys = read_keys(args.api_key_file)
    if not args.max_segment >= SHORTEST_MAX_SECONDS:
        raise UserError(f"--max-segment: must be at least {SHORTEST_MAX_SECONDS:g} seconds, got {args.max_segment:g}")
    device = usable_device(args.device)
    config = load_model_config(args.model)
    recognize = replace(config.recognize_options(asked), fallback="ctc")
    if config.llm is None:
        check_without_language_model(args)
    listening = listen(args.host, args.port)
    model = load_model(args.model)
    prepare_for_inference(model, device, args.dtype, args.llm_weights, args.encoder_weights)
    service = Service(
        model,
        args.name or args.model.resolve().name,
        options,
        recognize,
        live_recognizer(args, model, recognize),
        max_segment=args.max_segment,
        language=args.language,
        keys=keys,
    )
    server = Server(service, listening)
    if not keys and not server.is_loopback:
        print(f"warning: anybody who reaches {args.host} may use this server: give --api-key-file", file=sys.stderr)
    live = "by segments" if service.streaming is None else "word by word"
    print(f"{service.name}: {server.url}, live audio {live}", flush=True)
    server.run([listening])
    return 0


def read_keys(file: Path | None) -> list[str]:
    """The keys of a file, one a line.

    Raises:
        UserError, FileNotFoundError: it cannot be read, or has none.
    """
    from speechllm.errors import UserError

    if file is None:
        return []
    try:
        keys = [line.strip() for line in file.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except FileNotFoundError:
        raise FileNotFoundError(f"--api-key-file: {file}: no such file") from None
    except UnicodeDecodeError:
        raise UserError(f"--api-key-file: {file}: not UTF-8; save the file as UTF-8") from None
    if not keys:
        raise UserError(f"--api-key-file: {file}: there is no key in it, and nobody could use the server")
    return keys


def live_recognizer(
    args: argparse.Namespace, model: SpeechModel, recognize: RecognizeOptions
) -> StreamingRecognizer | None:
    """What recognizes live audio word by word; None where the model cannot, and does it by segments.

    A language model that was not trained to write while it listens writes better by segments than its CTC head does
    word by word: that is asked for with --ctc.

    Raises:
        UserError: options for live words were given, and the model cannot write them.
    """
    from speechllm.decode.options import StreamingOptions
    from speechllm.decode.streaming import StreamingRecognizer
    from speechllm.encoder import Zipformer
    from speechllm.errors import UserError

    is_asked = args.ctc or args.chunk_seconds is not None or args.fresh_segments
    chunks = list(getattr(model, "chunks", {}))
    with_ctc = model.llm is None or args.ctc
    if with_ctc and isinstance(model.encoder, Zipformer):
        chunks = [frames * 0.02 for frames in model.encoder.config.chunk_size if frames > 0]
    if not chunks and not is_asked:
        return None
    given: dict[str, Any] = {"fresh_segments": True} if args.fresh_segments else {}
    if not with_ctc:
        given |= {"hotwords": recognize.hotwords, "hotword_weight": recognize.hotword_weight}
        given |= {"beam": recognize.search.width, "tokens_per_second": recognize.search.tokens_per_second}
    options = StreamingOptions(
        ctc=args.ctc and model.llm is not None,
        endpoint_seconds=args.endpoint_seconds,
        max_rows=recognize.search.max_rows,
        **given,
    )
    seconds = args.chunk_seconds or min(chunks, key=lambda chunk: abs(chunk - _CHUNK), default=_CHUNK)
    try:
        return StreamingRecognizer(model, seconds, None, options=options)
    except UserError:
        if is_asked:
            raise
        return None
