"""A model's encoder and CTC head for other engines: a folder of ONNX files, as sherpa-onnx takes it."""

from __future__ import annotations

import re
from pathlib import Path

from speechllm.encoder import Zipformer
from speechllm.encoder.onnx import export_onnx, export_streaming_onnx, quantize_onnx
from speechllm.errors import UserError
from speechllm.files import replaced_file
from speechllm.model.encoder_model import EncoderModel
from speechllm.model.speech_llm import SpeechLLM
from speechllm.text.tokenizer import Tokenizer

_BLANK = "<blk>"


def export_model(
    model: SpeechLLM | EncoderModel,
    folder: str | Path,
    *,
    streaming: bool = False,
    chunk_size: int | None = None,
    left_context_frames: int | None = None,
    int8: bool = False,
) -> list[Path]:
    """Write `model.onnx` and, of a model with a CTC head, `tokens.txt`; the language model and its projector are not
    in it, nor further encoders.

    Args:
        model: on the CPU, in float32.
        folder: to write into; what an earlier export left there is replaced, or removed where it would not fit.
        streaming: chunk by chunk; else whole utterances.
        chunk_size, left_context_frames: of streams, in frames of 20 ms; see `Zipformer.initial_state`.
        int8: also `model.int8.onnx`, with the matrix products in 8 bits.

    Returns:
        the files that were written.

    Raises:
        UserError: the encoder does not hear streams, or not so; packages are missing; the model is too large.
    """
    path = Path(folder) / "model.onnx"
    if not streaming:
        export_onnx(model.encoder, model.ctc_head, path)
    elif isinstance(model.encoder, Zipformer):
        try:
            export_streaming_onnx(model.encoder, model.ctc_head, path, chunk_size, left_context_frames)
        except ValueError as error:
            raise UserError(f"--streaming: {error}") from error
    else:
        raise UserError("--streaming: the encoder is a Whisper, which has to hear all before it says anything")
    files = [path]
    quantized = path.with_name("model.int8.onnx")
    if int8:
        files.append(quantized)
        quantize_onnx(path, quantized)
    else:
        quantized.unlink(missing_ok=True)  # of an earlier export: not of this model and its tokens.txt
    if model.ctc_head is not None:
        files.append(path.with_name("tokens.txt"))
        with replaced_file(files[-1]) as tmp:
            tmp.write_text(tokens_text(model.ctc_tokenizer), encoding="utf-8")
    return files


def tokens_text(tokenizer: Tokenizer) -> str:
    """icefall's tokens.txt: a piece and its class in each line, the blank first, so that all others are one further.

    A space is U+2581 there; other white space, which would end a piece, is spelled in bytes as sentencepiece does. A
    token without a text, such as an end of text, is its id in angle brackets.
    """
    pieces = [tokenizer.piece(i).replace(" ", "\u2581") or f"<{i}>" for i in range(tokenizer.vocab_size)]
    written = [re.sub(r"\s", lambda space: "".join(f"<0x{b:02X}>" for b in space[0].encode()), p) for p in pieces]
    return "".join(f"{piece} {i}\n" for i, piece in enumerate([_BLANK, *written]))
