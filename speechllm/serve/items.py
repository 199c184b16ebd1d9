"""The items of a live session, one after the other, and the events about them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any

from speechllm.decode.result import StreamedWord
from speechllm.serve.errors import APIError
from speechllm.serve.responses import word_record

_TRANSCRIPTION = "conversation.item.input_audio_transcription"


@dataclass
class _Item:
    id: str
    text: str = ""
    words: list[dict[str, Any]] | None = field(default_factory=list)  # None without times
    unstable: str = ""


class Items:
    """Says what becomes of items; at most one is going on.

    Args:
      emit: called with each event, without its `event_id`.
    """

    def __init__(self, emit: Callable[[dict[str, Any]], None]) -> None:
        self._emit = emit
        self._numbers = count(1)
        self._item: _Item | None = None
        self._previous: str | None = None
        self._end = 0.0  # of the last item

    @property
    def is_open(self) -> bool:
        """Whether one is going on."""
        return self._item is not None

    def new_id(self) -> str:
        """A name for an item that is yet to begin."""
        return f"item_{next(self._numbers)}"

    def speech(self, what: str, id: str, seconds: float) -> None:
        """Speech has `started` or `stopped`."""
        edge = "start" if what == "started" else "end"
        milliseconds = round(1000 * seconds)
        self._emit({"type": f"input_audio_buffer.speech_{what}", "item_id": id, f"audio_{edge}_ms": milliseconds})

    def committed(self, id: str) -> None:
        """The audio of an item has ended."""
        self._emit({"type": "input_audio_buffer.committed", "item_id": id, "previous_item_id": self._previous})

    def begin(self, id: str | None = None) -> str:
        """The id of the item that is going on, or begins now."""
        if self._item is None:
            self._item = _Item(id or self.new_id())
            item = {
                "id": self._item.id,
                "object": "realtime.item",
                "type": "message",
                "status": "in_progress",
                "role": "user",
                "content": [{"type": "input_audio", "transcript": None}],
            }
            self._emit({"type": "conversation.item.created", "previous_item_id": self._previous, "item": item})
        return self._item.id

    def add(self, text: str, words: Sequence[StreamedWord] | None, unstable: str, audio_end: float) -> None:
        """More text of the item; begins one.

        Args:
          text: as it follows the text so far; a space in front is left out at the beginning.
          words: their times from the first sample of the connection; None where they have none.
        """
        self.begin()
        assert self._item is not None
        item = self._item
        if not item.text:
            text = text.removeprefix(" ")
        if not text and unstable == item.unstable:
            return
        records = None if words is None else [_record(word) for word in words]
        item.text += text
        item.words = None if records is None or item.words is None else item.words + records
        item.unstable = unstable
        self._emit(
            {
                "type": f"{_TRANSCRIPTION}.delta",
                "item_id": item.id,
                "content_index": 0,
                "delta": text,
                "words": records,
                "unstable": unstable,
                "audio_end": round(audio_end, 3),
            }
        )

    def complete(self, end: float, start: float | None = None) -> None:
        """The item has all its words; its audio is that from `start`, or the end of the one before, to `end`."""
        assert self._item is not None
        item, self._item = self._item, None
        start = self._end if start is None else start
        self._emit(
            {
                "type": f"{_TRANSCRIPTION}.completed",
                "item_id": item.id,
                "content_index": 0,
                "transcript": item.text,
                "usage": {"type": "duration", "seconds": round(end - start, 3)},
                "start": round(start, 3),
                "end": round(end, 3),
                "words": item.words,
            }
        )
        self._previous, self._end = item.id, end

    def fail(self, error: APIError, end: float) -> None:
        """The item has no transcript."""
        assert self._item is not None
        item, self._item = self._item, None
        what = {"item_id": item.id, "content_index": 0, "error": error.body(), "end": round(end, 3)}
        self._emit({"type": f"{_TRANSCRIPTION}.failed"} | what)
        self._previous, self._end = item.id, end

    def cleared(self, end: float) -> None:
        """What was heard is thrown away."""
        if self._item is not None:
            self.fail(APIError(400, "the client has cleared the audio", "input_audio_buffer_cleared"), end)
        self._end = end
        self._emit({"type": "input_audio_buffer.cleared"})


def _record(word: StreamedWord) -> dict[str, Any]:
    return word_record(word) | {"joined": word.joined}
