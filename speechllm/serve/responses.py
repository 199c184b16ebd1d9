"""The text of a recording in OpenAI's response formats."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Sequence
from typing import Any

from starlette.responses import JSONResponse, PlainTextResponse, Response

from speechllm.decode.result import Word
from speechllm.errors import UserError
from speechllm.text.languages import language_name
from speechllm.transcribe.formats import Recording, Segment, format_srt, format_vtt

RESPONSE_FORMATS = ("json", "text", "srt", "vtt", "verbose_json")
# Whose words need times.
TIMED_FORMATS = ("srt", "vtt", "verbose_json")


def response(
    recording: Recording, kind: str, task: str, language: str | None, granularities: Sequence[str], temperature: float
) -> Response:
    """The response to a request.

    Args:
      kind: one of `RESPONSE_FORMATS`.
      task: `transcribe` or `translate`.
      language: of the speech, as far as it is known.
      granularities: `segment`, `word`: what verbose_json has.
    """
    texts: dict[str, Callable[[], str]] = {
        "text": lambda: f"{recording.text}\n",
        "srt": lambda: format_srt(recording),
        "vtt": lambda: format_vtt(recording),
    }
    if kind in texts:
        return PlainTextResponse(texts[kind]())
    usage = _usage(recording.duration)
    if kind == "json":
        return JSONResponse({"text": recording.text, "usage": usage})
    record: dict[str, Any] = {
        "task": task,
        "language": _name(recording.language or language),
        "duration": round(recording.duration, 3),
        "text": recording.text,
        "usage": usage,
    }
    spoken = [segment for segment in recording.segments if segment.text]
    if "segment" in granularities:
        record["segments"] = [_segment(i, segment, temperature) for i, segment in enumerate(spoken)]
    if "word" in granularities:
        record["words"] = [word_record(word) for segment in spoken for word in segment.words or ()]
    return JSONResponse(record)


def word_record(word: Word) -> dict[str, Any]:
    """A word with its times; the confidence is ours."""
    return {
        "word": word.text,
        "start": round(word.start, 3),
        "end": round(word.end, 3),
        "confidence": round(word.confidence, 4),
    }


def delta(text: str, is_first: bool) -> dict[str, Any]:
    """The event of the text of a segment."""
    return {"type": "transcript.text.delta", "delta": text if is_first else f" {text}"}


def done(text: str, seconds: float) -> dict[str, Any]:
    """The event at the end; seconds of audio."""
    return {"type": "transcript.text.done", "text": text, "usage": _usage(seconds)}


def server_sent(event: dict[str, Any]) -> str:
    """An event as a line of a stream (https://html.spec.whatwg.org/multipage/server-sent-events.html)."""
    return f"data: {json.dumps(event, ensure_ascii=False)}\n\n"


def _usage(seconds: float) -> dict[str, Any]:
    return {"type": "duration", "seconds": round(seconds, 3)}


def _segment(number: int, segment: Segment, temperature: float) -> dict[str, Any]:
    best = segment.recognition.nbest[0]
    encoded = segment.text.encode(errors="replace")
    return {
        "id": number,
        "seek": round(100 * segment.offset),
        "start": round(segment.offset, 3),
        "end": round(segment.offset + segment.duration, 3),
        "text": segment.text,
        "tokens": list(best.tokens),
        "temperature": temperature,
        "avg_logprob": round(sum(best.log_probs) / len(best.log_probs), 4) if best.log_probs else 0.0,
        "compression_ratio": round(len(encoded) / len(zlib.compress(encoded)), 4),
        # silence is left out before anything is recognized
        "no_speech_prob": 0.0,
    }


def _name(language: str | None) -> str:
    """In English, as OpenAI has it; the tag where the table has no name."""
    if language is None:
        return "unknown"
    try:
        return language_name(language).lower()
    except UserError:
        return language
