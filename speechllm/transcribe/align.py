"""When the words of a known text are said: forced alignment by the CTC head, in recordings of any length.

The encoder hears the recording in segments, as for transcription (`pauses.py`). Their scores are laid out on one grid
of frames, on which what lies between them is silence, and the whole text is aligned with that at once: it need not be
known which words are in which segment. Of the scores only those of the text's own pieces are kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from speechllm.data.audio_file import AudioNote, UtteranceError
from speechllm.data.features import SAMPLE_RATE, extract_features
from speechllm.data.manifests.source import DataError
from speechllm.decode.ctc import TokenSpan, forced_align
from speechllm.decode.result import Hypothesis, Recognition, Word
from speechllm.decode.timestamps import words_from_alignment
from speechllm.errors import UserError
from speechllm.text.normalize import normalize_text
from speechllm.text.tokenizer import Tokenizer
from speechllm.text.words import word_spans
from speechllm.transcribe.formats import Recording, Segment
from speechllm.transcribe.inputs import AudioInput
from speechllm.transcribe.pauses import AudioSegment, split_at_pauses
from speechllm.transcribe.segments import SegmentOptions, input_blocks

# Log probability of a piece in a frame of silence between segments: nothing is said there unless there is no other way.
_SILENT = -30.0
# Frames times pieces, which torchaudio keeps a byte or two of: 3 GB, about 75 minutes of speech.
_MOST_CELLS = 2_000_000_000


class Alignable(Protocol):
    """What alignment asks of a model: an encoder with a CTC head."""

    blank_id: int

    @property
    def ctc_head(self) -> nn.Module | None: ...

    @property
    def ctc_tokenizer(self) -> Tokenizer: ...

    @property
    def device(self) -> torch.device: ...

    @property
    def frame_seconds(self) -> float: ...

    @property
    def feature_kind(self) -> str: ...

    @property
    def min_frames(self) -> int: ...

    def encode(self, features: Tensor, feature_lens: Tensor) -> tuple[Tensor, ...]: ...

    def ctc_label_ids(self, text: str) -> list[int]: ...


@dataclass
class Aligner:
    """Finds the words of texts in recordings.

    Attributes:
        model: in evaluation mode.
        text_steps: bring a word into the form that the model writes; of the data that it was trained on (`data.text`).
            Results have the words as they were given.
        options: how recordings are cut for the encoder.

    Raises:
        UserError: the model has no CTC head.
    """

    model: Alignable
    text_steps: Sequence[str] = ()
    options: SegmentOptions = field(default_factory=SegmentOptions)

    def __post_init__(self) -> None:
        if self.model.ctc_head is None:
            raise UserError("the model has no CTC head (it was trained with model.ctc_weight: 0), and so cannot align")

    def align_inputs(
        self, inputs: Iterable[AudioInput], on_progress: Callable[[float], None] = lambda seconds: None
    ) -> Iterator[tuple[AudioInput, Recording | UserError]]:
        """Each input, the text of which is known (`AudioInput.text`), with the times of its words, or why it has none.

        Args:
            on_progress: called with the seconds of audio of each input that is done.
        """
        for input in inputs:
            try:
                found: Recording | UserError = self.align(input)
            except UserError as error:
                found = error
            except UtteranceError as error:
                found = DataError(str(error))
            if isinstance(found, Recording):
                on_progress(found.duration)
            yield input, found

    @torch.no_grad()
    def align(self, input: AudioInput) -> Recording:
        """The words of an input's text in one segment, with times from its start.

        Raises:
            UserError: there is no text; the model has no pieces for a word of it; it is too long for its audio, or both
                are too long to be aligned in one piece; nothing is said in the audio.
            UtteranceError: the audio cannot be read.
        """
        if input.error is not None:
            raise input.error
        said = self._written(input)
        ids = self.model.ctc_label_ids(said.text)
        self._check(input, said, ids)
        notes: list[AudioNote] = []
        pieces = sorted({*ids, self.model.blank_id})
        log_probs, seconds = self._scores(input, pieces, notes)
        if len(log_probs) * len(ids) > _MOST_CELLS:
            raise UserError(
                f"{input.name}: {seconds / 60:.0f} minutes and {len(ids)} pieces of text are too much to align in one "
                "piece; cut it into parts of at most an hour, as lines of a manifest with offset and duration"
            )
        place = {piece: column for column, piece in enumerate(pieces)}
        lens = torch.tensor([len(log_probs)])
        (spans,) = forced_align(log_probs[None], lens, [[place[id] for id in ids]], place[self.model.blank_id])
        if spans is None:
            raise UserError(
                f"{input.name}: a text of {len(ids)} pieces does not go into {seconds:.2f} s of audio: is it that of "
                "another recording?"
            )
        spans = tuple(span._replace(token=pieces[span.token]) for span in spans)
        words = said.with_times(self._timed(spans, len(log_probs)))
        text = " ".join((input.text or "").split())
        scores = tuple(span.score for span in spans)
        found = Recognition(text, (Hypothesis(tuple(ids), scores, sum(scores), "end"),), (text,), words=words)
        warnings = tuple(dict.fromkeys(f"{note.reason}: {note.details}" for note in notes))
        return Recording(input.id, input.audio, seconds, [Segment(0.0, seconds, found)], warnings)

    def _written(self, input: AudioInput) -> _Written:
        if not (input.text or "").strip():
            raise UserError(f"{input.name}: has no text to align")
        text = input.text or ""
        written, words, parts, before = "", [], [], 0
        for start, end in word_spans(text):
            normalized = normalize_text(text[start:end], self.text_steps, input.request.language)
            if normalized:
                written += " " if written and text[before:start].strip() != text[before:start] else ""
                written += normalized
                before = end
            words.append(text[start:end])
            parts.append(normalized)
        if not written:
            raise UserError(f"{input.name}: the text steps {', '.join(self.text_steps)} leave nothing of its text")
        return _Written(written, words, [len(word_spans(part)) for part in parts])

    def _check(self, input: AudioInput, said: _Written, ids: Sequence[int]) -> None:
        """Whether the CTC head can write the text: its pieces spell as many words."""
        spans = tuple(TokenSpan(id, i, i + 1, 0.0) for i, id in enumerate(ids))
        found = words_from_alignment(spans, self.model.ctc_tokenizer, 1.0)
        if len(found) != sum(said.counts):
            pairs = zip(said.words, said.counts, strict=True)
            lost = [word for word, count in pairs if len(self._spelled(word)) < min(count, 1)]
            named = ", ".join(map(repr, lost[:5])) or f"{sum(said.counts)} words, as they are {len(found)} then"
            raise UserError(
                f"{input.name}: the model's CTC head cannot write {named}; bring the text into the form that it was "
                "trained on, with --normalize"
            )

    def _spelled(self, word: str) -> tuple[Word, ...]:
        ids = self.model.ctc_label_ids(normalize_text(word, self.text_steps))
        spans = tuple(TokenSpan(id, i, i + 1, 0.0) for i, id in enumerate(ids))
        return words_from_alignment(spans, self.model.ctc_tokenizer, 1.0)

    def _scores(self, input: AudioInput, pieces: Sequence[int], notes: list[AudioNote]) -> tuple[Tensor, float]:
        """(T, len(pieces)) log probabilities, float32, on the CPU, and the duration in seconds."""
        seconds = 0.0

        def counted() -> Iterator:
            nonlocal seconds
            for block in input_blocks(input, notes):
                seconds += len(block) / SAMPLE_RATE
                yield block

        parts: list[tuple[AudioSegment, Tensor]] = []
        batch: list[AudioSegment] = []
        for segment in split_at_pauses(counted(), self.options.max_seconds):
            if (len(batch) + 1) * self.options.max_seconds > self.options.batch_seconds and batch:
                parts += self._heard(batch, pieces)
                batch = []
            batch.append(segment)
        parts += self._heard(batch, pieces)
        if not parts:
            raise UserError(f"{input.name}: nothing is said in it")
        frame = self.model.frame_seconds
        frames = max(round(segment.start / frame) + len(scores) for segment, scores in parts)
        grid = torch.full((max(frames, round(seconds / frame)), len(pieces)), _SILENT)
        grid[:, pieces.index(self.model.blank_id)] = 0.0
        for segment, scores in parts:
            # of two that overlap, each has the half in which the other is about to end
            skipped = round(segment.overlap / 2 / frame)
            start = round(segment.start / frame) + skipped
            grid[start : start + len(scores) - skipped] = scores[skipped:]
        return grid, seconds

    def _heard(self, segments: Sequence[AudioSegment], pieces: Sequence[int]) -> Iterator[tuple[AudioSegment, Tensor]]:
        model = self.model
        features = [extract_features(segment.samples, model.feature_kind) for segment in segments]
        kept = [i for i, rows in enumerate(features) if len(rows) >= model.min_frames]
        if not kept or model.ctc_head is None:
            return
        lens = torch.tensor([len(features[i]) for i in kept], device=model.device)
        padded = pad_sequence([features[i] for i in kept], batch_first=True).to(model.device)
        encoder_out, out_lens, *_ = model.encode(padded, lens)
        log_probs = model.ctc_head(encoder_out).float().log_softmax(-1)[..., list(pieces)].cpu()
        for i, row, length in zip(kept, log_probs, out_lens.tolist(), strict=True):
            yield segments[i], row[:length]

    def _timed(self, spans: Sequence[TokenSpan], frames: int) -> tuple[Word, ...]:
        return words_from_alignment(spans, self.model.ctc_tokenizer, self.model.frame_seconds, frames)


@dataclass(frozen=True)
class _Written:
    """A text as the model writes it, its words as they were given, and how many words of the model each of them is."""

    text: str
    words: Sequence[str]
    counts: Sequence[int]

    def with_times(self, found: Sequence[Word]) -> tuple[Word, ...]:
        """The words as they were given. One of which nothing is left, such as a dash, is where the one before ends."""
        words: list[Word] = []
        rest = iter(found)
        for text, count in zip(self.words, self.counts, strict=True):
            said = [next(rest) for _ in range(count)]
            if said:
                confidence = min(word.confidence for word in said)
                words.append(Word(text, said[0].start, said[-1].end, confidence))
            elif words:
                words[-1] = replace(words[-1], text=f"{words[-1].text} {text}")
            else:
                words.append(Word(text, found[0].start, found[0].start, 1.0))
        return tuple(words)
