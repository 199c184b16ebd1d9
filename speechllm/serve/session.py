"""What a live session hears and asks for: `session` in its events."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from speechllm.prompt.request import Request
from speechllm.serve.errors import APIError
from speechllm.serve.service import Service

_RATES = (8000, 16000, 24000, 44100, 48000)
_SHORTEST_SILENCE, _LONGEST_SILENCE = 0.1, 10.0


@dataclass(frozen=True)
class SessionConfig:
    """The values of a session.

    Attributes:
      rate: of the samples that come, in Hz.
      silence_seconds: what ends an item where live audio is cut at pauses; None: only a commit does.
      request: for the model, from the texts; None: it needs more than they say, which `lacks` says.
    """

    rate: int = 24000
    language: str | None = None
    target_language: str | None = None
    prompt: str | None = None
    keywords: tuple[str, ...] | None = None
    silence_seconds: float | None = 0.6
    request: Request | None = None
    lacks: APIError | None = None


def first_config(service: Service) -> SessionConfig:
    """The server's defaults."""
    config = SessionConfig(language=service.default_language)
    try:
        return replace(config, request=service.request())
    except APIError as error:  # such as a language, which a session.update can give
        return replace(config, lacks=error)


def changed(config: SessionConfig, session: Any, service: Service) -> SessionConfig:
    """The session after a `session.update`; what it does not name stays as it is.

    Raises:
      APIError: a value is not what the server can do.
    """
    found = _object(session, "session")
    if found.get("type", "transcription") != "transcription":
        raise _wrong("session.type", found["type"], "transcription")
    heard = _object(_object(found.get("audio"), "session.audio").get("input"), "session.audio.input")
    if "format" in heard:
        config = replace(config, rate=_rate(_object(heard["format"], "format")))
    if "turn_detection" in heard:
        config = replace(config, silence_seconds=_silence(heard["turn_detection"], service))
    asked = _object(heard.get("transcription"), "session.audio.input.transcription")
    service.check_model(asked.get("model"))
    given: dict[str, Any] = {}
    for name in ("language", "target_language", "prompt"):
        if name in asked:
            value = asked[name]
            if not isinstance(value, str | None):
                raise _wrong(name, value, "a text or null")
            given[name] = value or None
    if "keywords" in asked:
        words = asked["keywords"]
        if words is not None and not (isinstance(words, list) and all(isinstance(word, str) for word in words)):
            raise _wrong("keywords", words, "a list of texts")
        given["keywords"] = None if words is None else tuple(words)
    config = replace(config, **given)
    request = service.request(config.language, config.target_language, config.prompt, config.keywords)
    return replace(config, request=request, lacks=None)


def described(config: SessionConfig, id: str, service: Service) -> dict[str, Any]:
    """The session as its events have it."""
    detection = None
    if config.silence_seconds is not None:
        detection = {"type": "server_vad", "silence_duration_ms": round(1000 * config.silence_seconds)}
    transcription = {
        "model": service.name,
        "language": config.language,
        "target_language": config.target_language,
        "prompt": config.prompt,
        "keywords": None if config.keywords is None else list(config.keywords),
    }
    return {
        "id": id,
        "object": "realtime.session",
        "type": "transcription",
        "audio": {
            "input": {
                "format": {"type": "audio/pcm", "rate": config.rate},
                "transcription": transcription,
                "noise_reduction": None,
                "turn_detection": detection,
            }
        },
    }


def _object(value: Any, name: str) -> Mapping[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise _wrong(name, value, "an object")
    return value


def _rate(given: Mapping[str, Any]) -> int:
    if given.get("type", "audio/pcm") != "audio/pcm":
        raise _wrong("format.type", given["type"], "audio/pcm")
    rate = given.get("rate", SessionConfig.rate)
    if rate not in _RATES:
        raise _wrong("format.rate", rate, ", ".join(map(str, _RATES)))
    return int(rate)


def _silence(given: Any, service: Service) -> float | None:
    if given is None:
        return None
    detection = _object(given, "turn_detection")
    if detection.get("type", "server_vad") != "server_vad":
        raise _wrong("turn_detection.type", detection["type"], "server_vad")
    milliseconds = detection.get("silence_duration_ms", round(1000 * (SessionConfig.silence_seconds or 0)))
    least, most = round(1000 * _SHORTEST_SILENCE), round(1000 * _LONGEST_SILENCE)
    if not isinstance(milliseconds, int | float) or not least <= milliseconds <= most:
        raise _wrong("silence_duration_ms", milliseconds, f"{least} to {most}")
    return milliseconds / 1000


def _wrong(name: str, value: Any, expected: str) -> APIError:
    shown = repr(value) if len(repr(value)) < 100 else f"{repr(value)[:97]}..."
    return APIError(400, f"{name}: {shown} is not {expected}", "invalid_value", name)
