"""Speech to text while it is heard: streams that are opened, hear samples, and give words.

    recognizer = StreamingRecognizer(model, chunk_seconds=0.64, language="en")
    stream = recognizer.open()
    for samples in microphone:
        for word in stream.accept(samples):
            print(word.text, word.start, word.end, word.confidence)
    words = stream.finish()

What a stream says does not depend on how its samples are cut, nor on what else is recognized at the same time. What it
keeps from chunk to chunk stays small (`Stream.nbytes`), as the language model forgets what lies far back
(`StreamingOptions.memory_seconds`). `Stream.save` writes all of it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from speechllm.data.features import NUM_MEL_BINS, SAMPLE_RATE, FbankStream
from speechllm.decode.interface import StreamableModel, StreamableSpeechLLM, StreamChunk
from speechllm.decode.options import StreamingOptions
from speechllm.decode.result import StreamedWord
from speechllm.decode.streaming_ctc import CTCDecoder
from speechllm.decode.streaming_search import TextDecoder
from speechllm.encoder import Zipformer, subsampling
from speechllm.encoder.zipformer_state import ZipformerState
from speechllm.errors import UserError
from speechllm.files import replaced_file
from speechllm.prompt.request import Request

_FRAME_SECONDS = 0.02  # of a Zipformer's own frames, in which its chunks are counted
# Of the features, a window of 25 ms around the middle of each shift of 10 ms.
_SHIFT_SAMPLES, _LAST_SAMPLE = 160, 280


class DecoderState(Protocol):
    """What a decoder keeps of one stream."""

    @property
    def unstable(self) -> str:
        """Text that may still change."""
        ...

    def tensors(self) -> dict[str, Tensor]: ...

    def counts(self) -> dict[str, Any]:
        """All that are no tensors, as JSON can write it."""
        ...


class ChunkDecoder(Protocol):
    """Writes texts, chunk by chunk: `streaming_search.TextDecoder`, `streaming_ctc.CTCDecoder`."""

    def start(self, language: str | None, context: Request | None) -> Any: ...

    def load(self, tensors: Mapping[str, Tensor], counts: dict[str, Any]) -> Any: ...

    def restart(self, text: Any) -> list[StreamedWord]: ...

    def decode(
        self, texts: Sequence[Any], encoder_out: Tensor, lens: Tensor, is_end: bool
    ) -> list[list[StreamedWord]]: ...


@dataclass(frozen=True)
class EncoderChunk:
    """A chunk of audio for an encoder alone."""

    seconds: float
    encoder_frames: int
    left_context_frames: int


class Stream:
    """One stream; made by `StreamingRecognizer.open` or `load`."""

    def __init__(self, recognizer: StreamingRecognizer, text: DecoderState, encoder: ZipformerState) -> None:
        self.recognizer = recognizer
        self.text, self.encoder = text, encoder
        self.fbank = FbankStream()
        self.features = torch.empty(0, NUM_MEL_BINS)  # that are not encoded; some of the first are, too
        self.steps = 0  # of the encoder
        self.segment = 0
        self.last_written = 0.0  # when a word of this segment was, or its beginning
        self.has_words = False  # this segment
        self.finished = False

    def accept(self, samples: np.ndarray | Tensor) -> list[StreamedWord]:
        """The words that are certain after these samples and were not before.

        Args:
          samples: any number, one after the other, 16 kHz mono: floating point in [-1, 1], or int16.

        Raises:
          UserError: the stream is finished; the samples have another type or shape, or are not finite.
        """
        return self.recognizer.accept([self], [samples])[0]

    def finish(self) -> list[StreamedWord]:
        """The last words. Nothing may come after."""
        return self.recognizer.finish([self])[0]

    @property
    def seconds(self) -> float:
        """How much audio it has heard."""
        return self.fbank.num_samples / SAMPLE_RATE

    @property
    def wanted(self) -> int:
        """How many samples it has to hear until something can be computed from them."""
        recognizer = self.recognizer
        frames = self.steps * recognizer.shift + recognizer.window
        return max(0, (frames - 1) * _SHIFT_SAMPLES + _LAST_SAMPLE - self.fbank.num_samples)

    @property
    def unstable(self) -> str:
        """Text that follows the words so far, for now: a beam may still change its mind. Greedy search has none."""
        return self.text.unstable

    @property
    def nbytes(self) -> int:
        """How much memory it takes: features, caches of the encoder, state of the language model."""
        return sum(x.nbytes for x in self._tensors().values())

    def save(self, path: str | Path) -> None:
        """Write all that it goes on from, as a safetensors file; a file of this name is replaced in one move."""
        tensors = {name: x.detach().cpu().contiguous() for name, x in self._tensors().items()}
        counts = {name: getattr(self, name) for name in _COUNTS} | {"text": self.text.counts()}
        metadata = {"stream": json.dumps(counts), "made_with": self.recognizer.identity()}
        with replaced_file(Path(path)) as tmp:
            save_file(tensors, tmp, metadata)

    def _tensors(self) -> dict[str, Tensor]:
        parts = {"fbank": self.fbank.tensors(), "encoder": self.encoder.tensors(), "text": self.text.tensors()}
        named = {f"{part}.{name}": x for part, tensors in parts.items() for name, x in tensors.items()}
        return named | {"features": self.features}

    # ------------------------------------------------------------------------------------------------------------
    # For the recognizer

    def hear(self, samples: np.ndarray | Tensor) -> None:
        if self.finished:
            raise UserError("the stream is finished: open another one")
        self.features = torch.cat([self.features, self.fbank.accept(_floating_point(samples))])

    def end(self) -> None:
        if not self.finished:
            self.finished = True
            self.features = torch.cat([self.features, self.fbank.finish()])

    def next_window(self, window: int) -> Tensor | None:
        """The features of the next step of the encoder, if all, or all there will be, are there."""
        enough = subsampling.MIN_FRAMES if self.finished else window
        return self.features[:window] if len(self.features) >= enough else None

    def heard_at(self, window: int, shift: int) -> float:
        """How many seconds of audio a step needs, the one before the next: where it did not end with the stream."""
        frames = (self.steps - 1) * shift + window
        return min(((frames - 1) * _SHIFT_SAMPLES + _LAST_SAMPLE) / SAMPLE_RATE, self.seconds)

    def number(self, words: Sequence[StreamedWord], written: float) -> list[StreamedWord]:
        """The words with their segment, and when they were written."""
        numbered = [
            replace(word, written=written, segment=self.segment, joined=word.joined and (i > 0 or self.has_words))
            for i, word in enumerate(words)
        ]
        if words:
            self.has_words, self.last_written = True, written
        return numbered


_COUNTS = ("steps", "segment", "last_written", "has_words", "finished")


class StreamingRecognizer:
    """Recognizes any number of streams, which join and leave at any time.

    A model with a language model has to be trained for it (`model.streaming`, `speechllm.prompt.interleave`); of an
    encoder alone, or with `ctc`, its CTC head writes. The encoder must be a causal Zipformer.

    Args:
      model: in evaluation mode.
      chunk_seconds: how much audio is heard before something is written: one of those that the model was trained with.
      language: of the speech, for the prompt, as a tag; None where it has no such slot.
      context: what the prompt's other slots need.

    Raises:
      UserError: the model cannot do that; the options ask for what it does not have.
    """

    def __init__(
        self,
        model: StreamableModel,
        chunk_seconds: float = 0.64,
        language: str | None = "en",
        *,
        context: Request | None = None,
        options: StreamingOptions | None = None,
    ) -> None:
        self.model, self.language, self.context = model, language, context
        options = options or StreamingOptions()
        # of an encoder alone, what is for a language model is asked in vain
        self.options = options if model.llm is not None else replace(options, ctc=True)
        if not isinstance(model.encoder, Zipformer) or not model.encoder.config.causal:
            raise UserError(
                "the model cannot hear a stream, as its encoder hears whole utterances: streaming needs a causal "
                "Zipformer (model.encoder.zipformer.causal: true in training)"
            )
        self.encoder: Zipformer = model.encoder
        if self.options.ctc:
            self.chunk: StreamChunk | EncoderChunk = self._encoder_chunk(chunk_seconds)
            self.decoder: ChunkDecoder = _ctc_decoder(model)
        else:
            speech_llm = cast(StreamableSpeechLLM, model)
            chunk = self.chunk = _trained_chunk(speech_llm, chunk_seconds)
            self.decoder = TextDecoder(speech_llm, self.encoder.output_dim, chunk, self.options)
        if before_label := model.config.prompt.label_prefix.strip():
            raise UserError(f"prompt.before_label: {before_label!r} is no white space, and in a stream would be a word")
        self.window, self.shift = self.encoder.step_frames(self.chunk.encoder_frames)

    def open(self, language: str | None = None, context: Request | None = None) -> Stream:
        """A new stream; its language and context are the recognizer's if not given.

        Raises:
          UserError: the prompt has a slot for what is not given.
        """
        text = self.decoder.start(language or self.language, context or self.context)
        chunk = self.chunk
        return Stream(self, text, self.encoder.initial_state(1, chunk.encoder_frames, chunk.left_context_frames))

    def load(self, path: str | Path) -> Stream:
        """Go on with a stream that `Stream.save` wrote, perhaps in another process.

        Raises:
          UserError: the file is not one, or was saved with other chunks or options.
        """
        try:
            with safe_open(path, framework="pt", device=str(self.model.device)) as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
            counts, made_with = json.loads(metadata["stream"]), metadata["made_with"]
        except (SafetensorError, KeyError) as e:
            raise UserError(f"{path}: not a stream that was saved ({e})") from e
        if made_with != self.identity():
            raise UserError(f"{path}: the stream was saved with {made_with}, and this is {self.identity()}")

        def part(name: str) -> dict[str, Tensor]:
            prefix = f"{name}."
            return {key.removeprefix(prefix): x for key, x in tensors.items() if key.startswith(prefix)}

        chunk = self.chunk
        fresh = self.encoder.initial_state(1, chunk.encoder_frames, chunk.left_context_frames)
        shapes = {name: x.shape for name, x in fresh.tensors().items()}
        if {name: x.shape for name, x in part("encoder").items()} != shapes:
            raise UserError(f"{path}: the stream was saved with another model")
        encoder = ZipformerState.from_tensors(part("encoder"), fresh.chunk_size, fresh.left_context_frames)
        stream = Stream(self, self.decoder.load(part("text"), counts["text"]), encoder)
        stream.fbank = FbankStream.from_tensors({name: x.cpu() for name, x in part("fbank").items()})
        stream.features = tensors["features"].cpu()
        for name in _COUNTS:
            setattr(stream, name, counts[name])
        return stream

    def identity(self) -> str:
        """What a saved stream can be gone on with."""
        options = {name: value for name, value in asdict(self.options).items() if name != "max_rows"}
        return repr({"chunk_seconds": self.chunk.seconds, **options})

    @torch.no_grad()
    def accept(self, streams: Sequence[Stream], samples: Sequence[np.ndarray | Tensor]) -> list[list[StreamedWord]]:
        """`Stream.accept` of several streams, computed together; each has the words that it would have alone."""
        for stream, heard in zip(streams, samples, strict=True):
            stream.hear(heard)
        return self._advance(streams)

    @torch.no_grad()
    def finish(self, streams: Sequence[Stream]) -> list[list[StreamedWord]]:
        """`Stream.finish` of several streams."""
        ending = [stream for stream in streams if not stream.finished]
        for stream in ending:
            stream.end()
        found = iter(self._advance(ending))
        return [next(found) if stream in ending else [] for stream in streams]

    @torch.no_grad()
    def simulate(self, features: Tensor, feature_lens: Tensor) -> list[list[StreamedWord]]:
        """What streams of whole utterances give, their encoder computed at once: faster, for error rates.

        Args:
          features: (N, T, 80), feature_lens: (N,) frames.
        """
        model, chunk = self.model, self.chunk
        streams = [self.open() for _ in feature_lens]
        for stream, frames in zip(streams, feature_lens.tolist(), strict=True):
            stream.fbank.num_samples = frames * _SHIFT_SAMPLES
        rows = [i for i, frames in enumerate(feature_lens.tolist()) if frames >= subsampling.MIN_FRAMES]
        words: list[list[StreamedWord]] = [[] for _ in streams]
        if not rows:
            return words
        with model.encoding():
            encoder_out, lens = self.encoder(
                features[rows].to(model.device),
                feature_lens[rows].to(model.device),
                chunk_size=chunk.encoder_frames,
                left_context_frames=chunk.left_context_frames,
            )
        encoder_out = encoder_out.float()
        counts = (subsampling.output_lens(feature_lens[rows]) // chunk.encoder_frames).tolist()
        size = chunk.encoder_frames // self.encoder.config.output_downsampling_factor
        for k in range(max(counts)):
            some = [row for row, count in enumerate(counts) if count > k]
            for row in some:
                streams[rows[row]].steps += 1
            found = self._decode(
                [streams[rows[row]] for row in some],
                [encoder_out[row, k * size : (k + 1) * size] for row in some],
                is_end=False,
            )
            for row, new in zip(some, found, strict=True):
                words[rows[row]] += new
        rests = [
            encoder_out[row, count * size : length]
            for row, (count, length) in enumerate(zip(counts, lens.tolist(), strict=True))
        ]
        for i, new in zip(rows, self._decode([streams[i] for i in rows], rests, is_end=True), strict=True):
            words[i] += new
        return words

    def _advance(self, streams: Sequence[Stream]) -> list[list[StreamedWord]]:
        """All that can be computed; the words of each stream."""
        words: dict[int, list[StreamedWord]] = {id(stream): [] for stream in streams}
        rests: dict[int, Tensor] = {}
        while True:
            ready = [(stream, stream.next_window(self.window)) for stream in streams]
            windows = [(stream, features) for stream, features in ready if features is not None]
            if not windows:
                break
            for first in range(0, len(windows), self.options.max_rows):
                some = windows[first : first + self.options.max_rows]
                whole, parts = self._encode(some, rests)
                for stream, found in zip(whole, self._decode(whole, parts, is_end=False), strict=True):
                    words[id(stream)] += found
        ended = [stream for stream in streams if stream.finished and (stream.steps or id(stream) in rests)]
        if ended:
            nothing = torch.empty(0, self.encoder.output_dim, device=self.model.device)
            left = [rests.get(id(stream), nothing) for stream in ended]
            for stream, found in zip(ended, self._decode(ended, left, is_end=True), strict=True):
                words[id(stream)] += found
        return [words[id(stream)] for stream in streams]

    def _encode(
        self, windows: Sequence[tuple[Stream, Tensor]], rests: dict[int, Tensor]
    ) -> tuple[list[Stream], list[Tensor]]:
        """A step of the encoder: the streams that have a whole chunk, and their frames; the others go to `rests`."""
        model, size = self.model, self.chunk.encoder_frames
        lens = torch.tensor([len(features) for _, features in windows])
        features = torch.zeros(len(windows), self.window, NUM_MEL_BINS)
        for row, (_, found) in zip(features, windows, strict=True):
            row[: len(found)] = found
        with model.encoding():
            encoder_out, state = self.encoder.step(
                features.to(model.device), ZipformerState.stack([stream.encoder for stream, _ in windows]), lens
            )
        encoder_out = encoder_out.float()
        whole, parts = [], []
        out_lens = self.encoder.output_lens(lens).tolist()
        frames = subsampling.output_lens(lens).tolist()
        for row, (stream, _) in enumerate(windows):
            stream.encoder = state.select([row])
            stream.features = stream.features[self.shift :]
            stream.steps += 1
            part = encoder_out[row, : out_lens[row]]
            if frames[row] >= size:
                whole.append(stream)
                parts.append(part)
            else:
                rests[id(stream)] = part
        return whole, parts

    def _decode(self, streams: Sequence[Stream], parts: Sequence[Tensor], is_end: bool) -> list[list[StreamedWord]]:
        """The words of streams after a chunk of each, (T, D); segments end."""
        if not streams:
            return []
        lens = torch.tensor([len(part) for part in parts], device=self.model.device)
        texts = [stream.text for stream in streams]
        found = self.decoder.decode(texts, pad_sequence(list(parts), batch_first=True), lens, is_end)
        words = []
        for stream, new in zip(streams, found, strict=True):
            written = stream.seconds if is_end else stream.heard_at(self.window, self.shift)
            numbered = stream.number(new, written)
            silence = self.options.endpoint_seconds
            if silence is not None and stream.has_words and written - stream.last_written >= silence and not is_end:
                if self.options.fresh_segments:
                    numbered += stream.number(self.decoder.restart(stream.text), written)
                stream.segment, stream.has_words, stream.last_written = stream.segment + 1, False, written
            words.append(numbered)
        return words

    def _encoder_chunk(self, seconds: float) -> EncoderChunk:
        """A chunk of the encoder's own."""
        config = self.encoder.config
        sizes = sorted(size for size in config.chunk_size if size > 0)
        size = round(seconds / _FRAME_SECONDS)
        left = [frames for frames in config.left_context_frames if frames > 0]
        if size not in sizes or abs(size * _FRAME_SECONDS - seconds) > 1e-6:
            able = ", ".join(f"{size * _FRAME_SECONDS:g}" for size in sizes) or "none, but the whole utterance"
            raise UserError(f"chunk_seconds: {seconds:g} is none of the encoder's chunks, in seconds {able}")
        if not left:
            raise UserError(
                "the encoder was trained to see all that is before (left_context_frames: -1), and a stream has no end"
            )
        return EncoderChunk(seconds, size, max(left))


def _trained_chunk(model: StreamableSpeechLLM, seconds: float) -> StreamChunk:
    """A chunk that the language model writes after."""
    if not model.chunks:
        way_out = "" if model.ctc_head is None else "; the CTC head can write what a stream says: ctc"
        raise UserError(
            "the language model writes when all is heard, as it was trained without model.streaming" + way_out
        )
    if seconds not in model.chunks:
        raise UserError(
            f"chunk_seconds: {seconds:g} is none of those that the model was trained with: "
            f"{', '.join(f'{chunk:g}' for chunk in sorted(model.chunks))}"
        )
    return model.chunks[seconds]


def _ctc_decoder(model: StreamableModel) -> CTCDecoder:
    if model.ctc_head is None:
        raise UserError("the model has no CTC head (it was trained with model.ctc_weight: 0) that could write")
    tokenizer = model.tokenizer if model.llm is None else cast(StreamableSpeechLLM, model).ctc_tokenizer
    return CTCDecoder(model, model.ctc_head, tokenizer)


def _floating_point(samples: np.ndarray | Tensor) -> Tensor:
    """(n,) float32 in [-1, 1].

    Raises:
      UserError: they have another type or shape, or are not finite.
    """
    if isinstance(samples, np.ndarray):
        samples = torch.from_numpy(np.array(samples))  # a copy: what comes from a pipe cannot be written to
    if samples.dim() != 1 or not (samples.is_floating_point() or samples.dtype == torch.int16):
        raise UserError(
            f"samples of shape {tuple(samples.shape)}, type {samples.dtype}: give one channel, (num_samples,), of 16 "
            "kHz, floating point in [-1, 1] or int16"
        )
    if samples.dtype == torch.int16:
        return samples.float() / 32768
    if not samples.isfinite().all():
        raise UserError("samples are not finite numbers")
    return samples.float().cpu()
