"""What all routes share: the model and what it can do, the engine, the places, and what a request asks for."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

from speechllm.decode.interface import RecognizeOptions
from speechllm.decode.options import SearchOptions
from speechllm.decode.streaming import StreamingRecognizer
from speechllm.errors import UserError
from speechllm.model.base import SpeechModel
from speechllm.model.request import checked_request
from speechllm.prompt.request import Request
from speechllm.serve.engine import Engine
from speechllm.serve.errors import APIError
from speechllm.serve.limits import Places, RateLimiter
from speechllm.serve.metrics import Metrics
from speechllm.serve.options import ServeOptions
from speechllm.text.languages import language_tag

_LANGUAGE_SLOTS = {"lang", "language"}


class Service:
    """One model, served.

    Args:
      model: in evaluation mode, where it is to compute.
      name: that clients know the model by.
      recognize: how uploads are recognized, and live audio by segments.
      streaming: for live words; None for a model that cannot hear a stream.
      max_segment: seconds; longer audio is cut at pauses.
      language: of requests that name none.
      keys: any of these is asked for; none: nobody is asked.
    """

    def __init__(
        self,
        model: SpeechModel,
        name: str,
        options: ServeOptions,
        recognize: RecognizeOptions,
        streaming: StreamingRecognizer | None = None,
        *,
        max_segment: float = 30.0,
        language: str | None = None,
        keys: Sequence[str] = (),
    ) -> None:
        self.model, self.name, self.options, self.keys = model, name, options, keys
        self.streaming, self.max_segment = streaming, min(max_segment, model.max_seconds)
        self.places = Places(options.max_streams)
        self.rates = RateLimiter(options.requests_per_minute)
        self.metrics = Metrics(self.places)
        self.engine = Engine(model, streaming, self.metrics.computed)
        self.threads = ThreadPoolExecutor(options.max_streams, "speechllm-upload")
        self.draining = asyncio.Event()
        self.created = int(time.time())
        self._recognize = recognize
        config = model.config
        self._sources = sorted({name.partition(">")[0] for name in config.languages or ()} - {"-"})
        self._targets = sorted({name.partition(">")[2] for name in config.languages or ()} - {""})
        self.default_language = language or (self._sources[0] if len(self._sources) == 1 else None)
        if self.default_language is not None:
            self.default_language = self._known(self.default_language)

    def drain(self) -> None:
        """Take nobody new; live sessions finish what they have heard, and end."""
        self.places.is_closed = True
        self.draining.set()

    @property
    def has_word_times(self) -> bool:
        return self.model.ctc_head is not None or self.model.label_template.has_times

    def slots(self, target_language: str | None = None) -> set[str]:
        """What the prompt has a place for."""
        return set() if self.model.llm is None else self.model.config.prompt.slots(target_language)

    def description(self) -> dict[str, Any]:
        """The model as `GET /v1/models` has it."""
        needs_language = bool(self.slots() & _LANGUAGE_SLOTS)
        options = self.options
        return {
            "id": self.name,
            "object": "model",
            "created": self.created,
            "owned_by": "speechllm",
            "speechllm": {
                "languages": self._sources,
                "default_language": self.default_language,
                "needs_language": needs_language and self.default_language is None,
                "target_languages": self._targets,
                "live": "segments" if self.streaming is None else "words",
                "chunk_seconds": None if self.streaming is None else self.streaming.chunk.seconds,
                "word_times": self.has_word_times,
                "takes": sorted(self.slots() & {"previous", "hotwords"}),
                "max_upload_bytes": options.max_upload_bytes,
                "max_audio_seconds": options.max_audio_seconds,
                "max_message_bytes": options.max_message_bytes,
            },
        }

    def check_model(self, name: str | None) -> None:
        """Whether a request means the model that is served, or none in particular.

        Raises:
          APIError: another one.
        """
        if name not in (None, "", self.name):
            raise APIError(404, f"model {name!r} is not served here; {self.name!r} is", "model_not_found", "model")

    def request(
        self,
        language: str | None = None,
        target_language: str | None = None,
        prompt: str | None = None,
        hotwords: Sequence[str] | None = None,
    ) -> Request:
        """What is asked for, checked.

        Args:
          prompt: the text before; where the model has no place for that but one for hotwords, phrases with commas or
            ends of lines between them.

        Raises:
          APIError: the model cannot do it.
        """
        slots = self.slots(target_language)
        try:
            language = self._known(language) if language else self.default_language
            if prompt and "previous" not in slots and "hotwords" in slots and hotwords is None:
                hotwords = [part.strip() for part in re.split(r"[,\n]", prompt) if part.strip()]
                prompt = None
            request = Request(
                language=language if slots & _LANGUAGE_SLOTS else None,
                target_language=target_language,
                previous=prompt or ("" if "previous" in slots else None),
                hotwords=tuple(hotwords) if hotwords is not None else () if "hotwords" in slots else None,
            )
            request = checked_request(self.model.config, request)
            self.engine.check(request, self.recognize_options())
        except UserError as error:
            raise APIError(400, str(error), "invalid_value") from error
        return request

    def _known(self, language: str) -> str:
        """The model's own tag for a language; it may take no notice of it.

        Raises:
          UserError: it is no language, or none that the model was trained with.
        """
        tag = language if language in self._sources else language_tag(language)
        if self._sources and tag not in self._sources:
            raise UserError(f"language {tag}: the model was trained with {', '.join(self._sources)}")
        return tag

    def recognize_options(self, timestamps: bool = False, temperature: float = 0.0) -> RecognizeOptions:
        """How segments are recognized: as the server was told to, or by sampling at a temperature above 0."""
        options = replace(self._recognize, timestamps=timestamps and self.model.ctc_head is not None)
        if temperature > 0 and self.model.llm is not None:
            search = SearchOptions(
                "sample",
                temperature=temperature,
                tokens_per_second=options.search.tokens_per_second,
                max_repeats=options.search.max_repeats,
                max_rows=options.search.max_rows,
            )
            # n-grams, hotwords and CTC have no part in sampling
            return RecognizeOptions(
                search,
                fallback=options.fallback,
                ctc_beam=options.ctc_beam,
                timestamps=options.timestamps,
                initial_state=options.initial_state,
            )
        return options
