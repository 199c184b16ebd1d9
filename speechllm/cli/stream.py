"""`speechllm stream`: speech to text while it is heard."""

from __future__ import annotations

import argparse
import json
import shutil
import struct
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, TextIO

from speechllm.cli.options import (
    add_device_option,
    add_dtype_option,
    add_prompt_options,
    add_weights_options,
    command_line_request,
)
from speechllm.cli.streaming_options import add_streaming_options, streaming_options

# The rest of the library is imported where it is used: `speechllm --help` answers at once.
if TYPE_CHECKING:
    import numpy as np

    from speechllm.decode.result import StreamedWord
    from speechllm.decode.streaming import Stream

_RATE = 16000
_BLOCK = 1600  # samples: 0.1 s
_ENDPOINT = 1.0


def add_stream(commands: argparse._SubParsersAction) -> None:
    stream = commands.add_parser(
        "stream",
        help="speech to text while it is heard",
        description="Write what is said while it is heard. On a terminal the line of the segment that is being spoken "
        "is rewritten as it grows; elsewhere, or with --format json, each word is a JSON object on a line of its own: "
        "word, start, end, confidence, written (seconds of audio that had been heard then), segment, joined (no white "
        "space before it). The encoder must be a causal Zipformer; the model one that was trained with "
        "model.streaming, or an encoder with a CTC head. From a microphone: arecord -f S16_LE -r 16000 | speechllm "
        "stream - --model DIR. A new segment begins after --endpoint-seconds, here 1 by default, without a new word. "
        "Ctrl-C writes the last words and ends with the status 130.",
    )
    stream.add_argument(
        "input",
        metavar="FILE|-",
        help="audio file of any format; -: samples from standard input, 16 bits, little endian, 16 kHz, one channel, "
        "raw or after the header of a WAV file",
    )
    stream.add_argument("--model", required=True, type=Path, help="folder of a trained model")
    stream.add_argument(
        "--chunk-seconds",
        type=float,
        default=0.64,
        metavar="X",
        help="audio that is heard before something is written, one of those that the model was trained with (default: "
        "%(default)s)",
    )
    stream.add_argument("--language", help="language that is spoken, as a tag (en) or in English (English)")
    add_prompt_options(stream)
    stream.add_argument(
        "--realtime", action="store_true", help="hear a file as fast as it is spoken, not as fast as can be"
    )
    stream.add_argument(
        "--format",
        choices=("text", "json"),
        help="lines of text, or a JSON object for each word (default: text on a terminal, else json)",
    )
    add_weights_options(stream)
    add_device_option(stream)
    add_dtype_option(stream)
    add_streaming_options(stream)
    stream.set_defaults(run=run_stream, target_language=None)


def run_stream(args: argparse.Namespace) -> int:
    """Raises:
    UserError, FileNotFoundError: the options do not go together, the model does not load or cannot hear a stream,
        or the audio cannot be read.
    """
    from speechllm.decode.streaming import StreamingRecognizer
    from speechllm.errors import UserError
    from speechllm.model.build import load_model, prepare_for_inference, usable_device
    from speechllm.model.config import load_model_config
    from speechllm.model.request import checked_request

    # What can be refused before the model is loaded is.
    options = streaming_options(args, endpoint_seconds=_ENDPOINT)
    if args.realtime and args.input == "-":
        raise UserError("--realtime: is for files; standard input comes as fast as it does")
    if args.input != "-" and not Path(args.input).is_file():
        raise FileNotFoundError(f"{args.input}: no such file")
    request = command_line_request(args)
    device = usable_device(args.device)
    config = load_model_config(args.model)
    request = checked_request(config, request)
    model = load_model(args.model)
    prepare_for_inference(model, device, args.dtype, args.llm_weights, args.encoder_weights)
    recognizer = StreamingRecognizer(model, args.chunk_seconds, request.language, context=request, options=options)
    as_text = sys.stdout.isatty() if args.format is None else args.format == "text"
    writer = TextWriter(sys.stdout) if as_text else JSONWriter(sys.stdout)
    blocks = pcm_blocks(sys.stdin.buffer) if args.input == "-" else file_blocks(args.input, args.realtime)
    listen(recognizer.open(), blocks, writer)
    return 0


def listen(stream: Stream, blocks: Iterator[np.ndarray], writer: TextWriter | JSONWriter) -> None:
    """Write what a stream hears; the last words also after Ctrl-C."""
    try:
        for samples in blocks:
            writer.write(stream.accept(samples), stream.unstable)
    except KeyboardInterrupt:
        writer.write(stream.finish(), "")
        writer.finish()
        raise
    writer.write(stream.finish(), "")
    writer.finish()


def pcm_blocks(file: BinaryIO) -> Iterator[np.ndarray]:
    """Samples (n,) int16 as they come, after the header of a WAV file if there is one.

    Raises:
        UserError: they are of another kind, by that header.
    """
    import numpy as np

    rest = file.read(4)
    if rest == b"RIFF":
        _read_wav_header(file)
        rest = b""
    read = getattr(file, "read1", file.read)  # what is there, without waiting for more
    while data := read(2 * _BLOCK):
        data = rest + data
        even = len(data) // 2 * 2
        rest = data[even:]
        yield np.frombuffer(data[:even], dtype="<i2")


def _read_wav_header(file: BinaryIO) -> None:
    """Read up to the samples of a WAV file, from after its first four bytes."""
    from speechllm.errors import UserError

    file.read(8)
    name, size, kind = b"", 0, (0,) * 6
    while name != b"data":
        content = file.read(size + size % 2)
        if name == b"fmt " and len(content) >= 16:
            kind = struct.unpack("<HHIIHH", content[:16])
        header = file.read(8)
        if len(header) < 8:
            raise UserError("standard input: a WAV file that ends before its samples")
        name, size = header[:4], int.from_bytes(header[4:], "little")
    _, channels, rate, _, _, bits = kind
    if (channels, rate, bits) != (1, _RATE, 16):
        raise UserError(
            f"standard input: a WAV file of {channels} channels, {rate} Hz, {bits} bits; give one channel, {_RATE} Hz, "
            "16 bits, such as from arecord -f S16_LE -r 16000, or give the name of a file, which may be of any kind"
        )


def file_blocks(path: str, realtime: bool) -> Iterator[np.ndarray]:
    """Samples (n,) float32 of a file; if `realtime`, each block when it would have been spoken.

    Raises:
        UtteranceError: the file cannot be read.
    """
    from speechllm.data.blocks import read_blocks

    start, heard = time.monotonic(), 0
    for block in read_blocks(path):
        for at in range(0, len(block), _BLOCK):
            samples = block[at : at + _BLOCK]
            heard += len(samples)
            if realtime:
                time.sleep(max(0.0, start + heard / _RATE - time.monotonic()))
            yield samples


class JSONWriter:
    """A JSON object for each word, as soon as it is certain."""

    def __init__(self, file: TextIO) -> None:
        self.file = file

    def write(self, words: list[StreamedWord], unstable: str) -> None:
        for word in words:
            entry = {
                "word": word.text,
                "start": round(word.start, 3),
                "end": round(word.end, 3),
                "confidence": round(word.confidence, 4),
                "written": round(word.written, 3),
                "segment": word.segment,
                "joined": word.joined,
            }
            self.file.write(json.dumps(entry, ensure_ascii=False) + "\n")
        if words:
            self.file.flush()

    def finish(self) -> None:
        pass


class TextWriter:
    """A line for each segment; on a terminal the last one is rewritten as it grows."""

    def __init__(self, file: TextIO) -> None:
        self.file = file
        self.is_terminal = file.isatty()
        self.words: list[StreamedWord] = []  # of the segment
        self.shown = ""

    def write(self, words: list[StreamedWord], unstable: str) -> None:
        for word in words:
            if self.words and word.segment != self.words[0].segment:
                self.finish()
            self.words.append(word)
        if self.is_terminal:
            self._show(unstable)

    def finish(self) -> None:
        """End the line."""
        from speechllm.decode.result import streamed_text

        if self.words:
            self.file.write("\r" * bool(self.shown) + streamed_text(self.words) + "\x1b[K" * self.is_terminal + "\n")
        elif self.shown:
            self.file.write("\r\x1b[K")
        self.file.flush()
        self.words, self.shown = [], ""

    def _show(self, unstable: str) -> None:
        from speechllm.decode.result import streamed_text

        text = streamed_text(self.words) + unstable.rstrip()
        width = shutil.get_terminal_size().columns - 1
        # a line that is longer than the terminal could not be rewritten: its end is shown
        text = text if len(text) <= width else "..." + text[len(text) - width + 3 :]
        if text != self.shown:
            self.file.write(f"\r{text}\x1b[K")
            self.file.flush()
            self.shown = text
