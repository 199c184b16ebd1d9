"""What a chunk of audio is to the parts of a model that writes while it listens (`speechllm.prompt.interleave`), what
cannot be such a model, and when words end that no manifest has times for."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from speechllm.config import ConfigError
from speechllm.decode.ctc import forced_align
from speechllm.decode.timestamps import words_from_alignment
from speechllm.encoder import Zipformer, ZipformerConfig, subsampling
from speechllm.projector import ProjectorConfig
from speechllm.prompt.interleave import StreamingConfig
from speechllm.prompt.label import WordTime
from speechllm.text.tokenizer import Tokenizer

_FRAME_SECONDS = 0.02  # of a Zipformer's own frames, in which its chunks are counted
# These look at no frame but those of the chunk that a position is made of.
_LOCAL_PROJECTORS = ("mlp", "qformer")


@dataclass(frozen=True)
class Chunk:
    """One chunk of a stream.

    Attributes:
      seconds: of audio.
      encoder_frames: the `chunk_size` of the encoder, in its own frames of 20 ms.
      left_context_frames: how many frames before its chunk the encoder's attention sees, in training as in recognition:
        the most of its configuration that have an end, so that a stream takes constant memory.
      positions: of the language model.
    """

    seconds: float
    encoder_frames: int
    left_context_frames: int
    positions: int

    def count(self, feature_lens: Tensor) -> Tensor:
        """How many whole chunks audio of these many feature frames has: (N,) -> (N,)."""
        return subsampling.output_lens(feature_lens) // self.encoder_frames

    @property
    def encoder_context(self) -> dict[str, int]:
        """Arguments of the encoder."""
        return {"chunk_size": self.encoder_frames, "left_context_frames": self.left_context_frames}


def chunk_of(seconds: float, encoder: ZipformerConfig, projector: ProjectorConfig) -> Chunk:
    """A chunk of so many seconds.

    Raises:
      ValueError: the encoder or the projector cannot do that; the message names the keys.
    """
    if not encoder.causal:
        raise ValueError(
            "streaming needs an encoder that hears no later chunks, and this Zipformer is not causal: take one that "
            "was trained so, or train one with model.encoder.zipformer.causal: true"
        )
    if projector.kind not in _LOCAL_PROJECTORS or projector.layer_weights:
        what = "layer_weights" if projector.kind in _LOCAL_PROJECTORS else f"kind: {projector.kind}"
        raise ValueError(
            f"streaming needs a projector that looks at one chunk by itself, and projector.{what} does not: take kind: "
            f"{' or '.join(_LOCAL_PROJECTORS)}"
        )
    sizes = sorted(size for size in encoder.chunk_size if size > 0)
    frames = round(seconds / _FRAME_SECONDS)
    if frames not in sizes or not math.isclose(frames * _FRAME_SECONDS, seconds, rel_tol=1e-6):
        able = ", ".join(f"{size * _FRAME_SECONDS:g}" for size in sizes) or "none, but the whole utterance"
        raise ValueError(
            f"streaming.chunk_seconds: {seconds:g} is none of the encoder's chunks, which are ({able} s): take "
            f"one of these, or have {seconds / _FRAME_SECONDS:g} frames of 20 ms in model.encoder.zipformer.chunk_size"
        )
    window = projector.downsample * (projector.num_queries or 1)
    if frames % (encoder.output_downsampling_factor * window):
        step = encoder.output_downsampling_factor * window * _FRAME_SECONDS
        raise ValueError(
            f"streaming.chunk_seconds: {seconds:g} is no multiple of the {step:g} s that the projector makes its "
            "positions from (projector.downsample, num_queries): take one, or downsample less"
        )
    left = [context for context in encoder.left_context_frames if context > 0]
    if not left:
        raise ValueError(
            "streaming needs a left context with an end, for a stream has none: put one beside -1 into "
            "model.encoder.zipformer.left_context_frames"
        )
    positions = frames // (encoder.output_downsampling_factor * projector.downsample)
    return Chunk(seconds, frames, max(left), positions)


def chunks_of(config: StreamingConfig, encoder: object, projector: ProjectorConfig) -> dict[float, Chunk]:
    """All chunks of a configuration, by their seconds.

    Raises:
      ConfigError: the encoder or the projector cannot do one of them.
    """
    if not isinstance(encoder, Zipformer):
        raise ConfigError(
            f"model.streaming: a {type(encoder).__name__} hears whole utterances only; streaming needs a causal "
            "Zipformer"
        )
    try:
        return {seconds: chunk_of(seconds, encoder.config, projector) for seconds in config.chunk_seconds}
    except ValueError as error:
        raise ConfigError(f"model.{error}") from error


def aligned_words(
    log_probs: Tensor,
    lens: Tensor,
    label_ids: Sequence[Sequence[int]],
    blank: int,
    tokenizer: Tokenizer,
    seconds: float,
) -> list[tuple[WordTime, ...] | None]:
    """When the words of transcripts are said, as a CTC head hears them; None where they have more tokens than frames.

    Args:
      log_probs: (N, T, V); lens: (N,) frames of `seconds` each.
      label_ids: the pieces of N transcripts, of `tokenizer`.
    """
    words: list[tuple[WordTime, ...] | None] = []
    for spans, frames in zip(forced_align(log_probs, lens, label_ids, blank), lens.tolist(), strict=True):
        found = None if spans is None else words_from_alignment(spans, tokenizer, seconds, frames)
        words.append(None if found is None else tuple(WordTime(word.text, word.start, word.end) for word in found))
    return words
