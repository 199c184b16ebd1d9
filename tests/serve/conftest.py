"""Servers of small models, in a thread of the tests."""

import base64
import contextlib
import io
import json
import threading
import time

import numpy as np
import openai
import pytest
import soundfile
from websockets.sync.client import connect

from speechllm.decode.interface import RecognizeOptions
from speechllm.decode.options import StreamingOptions
from speechllm.decode.streaming import StreamingRecognizer
from speechllm.serve.options import ServeOptions
from speechllm.serve.server import Server, listen
from speechllm.serve.service import Service
from tests.decode.test_streaming import encoder_model, noise, speech_llm  # noqa: F401 (fixtures)

RATE = 16000


class Running:
    """A server that runs, and clients of it."""

    def __init__(self, server, service, key):
        self.server, self.service, self.key = server, service, key
        self.url = server.url

    @property
    def client(self):
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=self.key or "none", max_retries=0)

    def connect(self, query="intent=transcription", **options):
        if self.key:
            options.setdefault("additional_headers", {"Authorization": f"Bearer {self.key}"})
        return Live(connect(f"ws{self.url[4:]}/v1/realtime?{query}", compression=None, **options))

    def wait_until(self, what, seconds=10):
        end = time.monotonic() + seconds
        while not what():
            assert time.monotonic() < end
            time.sleep(0.01)


class Live:
    """A connection of live audio."""

    def __init__(self, connecting):
        self.socket = connecting.__enter__()

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.socket.close()

    def send(self, kind, **fields):
        self.socket.send(json.dumps({"type": kind} | fields))

    def update(self, rate=RATE, detection="server_vad", **transcription):
        heard = {"format": {"type": "audio/pcm", "rate": rate}, "transcription": transcription}
        heard["turn_detection"] = None if detection is None else {"type": detection}
        self.send("session.update", session={"type": "transcription", "audio": {"input": heard}})

    def append(self, samples):
        data = (samples * 32767).astype("<i2").tobytes()
        self.send("input_audio_buffer.append", audio=base64.b64encode(data).decode())

    def events(self, last="conversation.item.input_audio_transcription.completed", count=1, timeout=60):
        """All events up to the `count`-th of this type."""
        found = []
        while count:
            found.append(json.loads(self.socket.recv(timeout=timeout)))
            count -= found[-1]["type"] == last
        return found


def of(events, kind):
    return [event for event in events if event["type"].endswith(kind)]


@contextlib.contextmanager
def serving(model, streaming=None, key=None, language="en", recognize=None, max_segment=30.0, **options):
    recognize = recognize or RecognizeOptions(fallback="ctc")
    keys = [key] if key else []
    service = Service(
        model,
        "tiny",
        ServeOptions(**options),
        recognize,
        streaming,
        max_segment=max_segment,
        language=language,
        keys=keys,
    )
    listening = listen("127.0.0.1", 0)
    server = Server(service, listening)
    thread = threading.Thread(target=server.run, args=([listening],))
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        yield Running(server, service, key)
    finally:
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive()


def wav(samples, rate=RATE, format="WAV"):
    """The contents of a file."""
    file = io.BytesIO()
    file.name = f"a.{format.lower()}"
    soundfile.write(file, integers(samples), rate, format=format)
    file.seek(0)
    return file


def integers(samples):
    """The samples as they are after their way through 16 bits."""
    return (samples * 32767).astype("<i2")


@pytest.fixture
def streaming(speech_llm):  # noqa: F811
    return StreamingRecognizer(speech_llm, 0.32, None, options=StreamingOptions(endpoint_seconds=0.6))


@pytest.fixture
def words_server(speech_llm, streaming):  # noqa: F811
    with serving(speech_llm, streaming) as running:
        yield running


def speech(seconds, seed):
    """Noise that is loud and soft in turns, with a pause of a second in the middle."""
    samples = noise(seconds, seed)
    samples[len(samples) // 2 : len(samples) // 2 + RATE] = np.float32(0)
    return samples
