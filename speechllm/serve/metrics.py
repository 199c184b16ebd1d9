"""What `/metrics` tells Prometheus."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from speechllm.serve.limits import Places

_UPLOAD_SECONDS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)
_WORD_SECONDS = (0.1, 0.2, 0.3, 0.5, 0.75, 1, 1.5, 2, 3, 5, 10)


class Metrics:
    """The counters of one server.

    Args:
      places, engine_queue: what is being served, and gives how many segments wait.
    """

    def __init__(self, places: Places) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "speechllm_requests", "HTTP requests and connections", ["path", "status"], registry=self.registry
        )
        self.upload_seconds = Histogram(
            "speechllm_upload_seconds",
            "From the last byte of an upload to its whole text",
            buckets=_UPLOAD_SECONDS,
            registry=self.registry,
        )
        self.word_seconds = Histogram(
            "speechllm_live_seconds",
            "From the sample after which live words can be computed to their event",
            buckets=_WORD_SECONDS,
            registry=self.registry,
        )
        self.audio = Counter("speechllm_audio_seconds", "Audio that was recognized", registry=self.registry)
        self.busy = Counter("speechllm_busy_seconds", "Time that the model has computed", registry=self.registry)
        self.queue = Gauge("speechllm_waiting_segments", "Segments that wait for a place", registry=self.registry)
        streams = Gauge("speechllm_streams", "Uploads and live streams that are served", registry=self.registry)
        streams.set_function(lambda: places.taken)
        factor = Gauge(
            "speechllm_real_time_factor",
            "Time that the model has computed for a second of audio, since the start",
            registry=self.registry,
        )
        self._busy = self._audio = 0.0
        factor.set_function(lambda: self._busy / self._audio if self._audio else 0.0)

    def computed(self, seconds: float, audio: float) -> None:
        """Count a turn of the engine: how long it took, and how much audio it finished."""
        self._busy += seconds
        self._audio += audio
        self.busy.inc(seconds)
        self.audio.inc(audio)

    def text(self) -> bytes:
        """In Prometheus' text format."""
        return generate_latest(self.registry)
