"""What holds a server up, and what does not."""

import json
import os
import signal
import socket
import struct
import sys
import time

import httpx
import numpy as np
import pytest
from websockets.sync.client import connect

from speechllm.serve import protocols, realtime
from speechllm.serve.limits import Places, RateLimiter
from speechllm.transcribe.endpoints import Endpointer
from tests.decode.test_streaming import streamed
from tests.programs import Program
from tests.serve.conftest import Live, integers, noise, of, serving, wav


def opened(running, data=b""):
    host, port = running.url.removeprefix("http://").split(":")
    client = socket.create_connection((host, int(port)))
    client.settimeout(30)
    client.sendall(data)
    return client


def is_served(running):
    return running.client.audio.transcriptions.create(file=wav(noise(1.0, seed=3)), model="tiny").text


@pytest.fixture
def hasty(monkeypatch):
    """Limits of time that a test can wait for."""
    monkeypatch.setattr(protocols, "_HEADER_SECONDS", 0.5)
    monkeypatch.setattr(protocols, "_REST_SECONDS", 0.5)
    monkeypatch.setattr(protocols, "_READ_SECONDS", 0.5)
    monkeypatch.setattr(protocols, "_WATCH_SECONDS", 0.1)
    monkeypatch.setattr(protocols, "_ABORT_SECONDS", 0.5)
    monkeypatch.setattr(realtime, "_CLOSE_SECONDS", 0.2)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\nX",
        b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\nGET /hea",
    ],
)
def test_a_client_that_never_ends_its_request_is_let_go(data, speech_llm, hasty):
    with serving(speech_llm) as running, opened(running, data) as client:
        began = time.monotonic()
        while client.recv(4096):
            pass
        assert 0.3 < time.monotonic() - began < 10
        assert is_served(running)


def test_a_body_that_nobody_reads_ends(speech_llm, hasty):
    head = b"POST /v1/audio/transcriptions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 1000000000\r\n"
    head += b"Content-Type: multipart/form-data; boundary=x\r\n\r\n"
    with serving(speech_llm) as running, opened(running, head) as client:
        assert client.recv(4096).startswith(b"HTTP/1.1 413")
        with pytest.raises(OSError):
            for _ in range(200):
                client.sendall(b"x")
                time.sleep(0.05)
        assert is_served(running)


def test_a_thousand_connections(speech_llm, hasty):
    with serving(speech_llm, max_connections=50) as running:
        clients = [opened(running) for _ in range(1000)]
        refused = 0
        for client in clients[50:]:
            try:
                refused += client.recv(4096).startswith(b"HTTP/1.1 503")
            except ConnectionError:
                refused += 1
        assert refused >= 900  # those that came when others had been let go are no more
        running.wait_until(lambda: len(running.server.server_state.connections) < 50)
        assert is_served(running)
        for client in clients:
            client.close()


def test_a_broken_frame_ends_its_connection_alone(words_server):
    with words_server.connect() as live, words_server.connect() as other:
        other.socket.socket.sendall(b"\xff\xff\xff\xff")
        live.update()
        live.append(noise(1.5, seed=2))
        live.send("input_audio_buffer.commit")
        assert live.events()[-1]["transcript"]
    words_server.wait_until(lambda: words_server.service.places.taken == 0)


def test_a_slow_reader_is_let_go_and_holds_up_nobody(speech_llm, streaming, hasty, monkeypatch):
    monkeypatch.setattr(realtime, "_MOST_EVENTS", 20)
    samples = noise(1.5, seed=2)
    streaming.language = "en"
    expected = streamed(streaming, integers(samples))
    with serving(speech_llm, streaming) as running:
        slow = opened(running)
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
        slow.sendall(
            b"GET /v1/realtime HTTP/1.1\r\nHost: 127.0.0.1\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            b"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\nSec-WebSocket-Version: 13\r\n\r\n"
        )
        # refusals without end, none of which is read
        message = json.dumps({"type": "x", "event_id": "x" * 100_000}).encode()
        frame = b"\x81\xff" + struct.pack(">Q", len(message)) + bytes(4) + message
        running.wait_until(lambda: running.service.places.taken == 1)
        with running.connect() as live:
            live.update()
            live.append(samples)
            try:
                for _ in range(300):
                    slow.sendall(frame)
            except OSError:
                pass
            live.send("input_audio_buffer.commit")
            words = [word for event in of(live.events(), ".delta") for word in event["words"]]
            assert [word["word"] for word in words] == [word.text for word in expected]
        running.wait_until(lambda: running.service.places.taken == 0, 20)
        slow.close()


def test_a_live_client_that_goes_away_frees_its_place(speech_llm, streaming):
    with serving(speech_llm, streaming, max_streams=1) as running:
        live = running.connect()
        live.update()
        live.append(noise(9.0, seed=1))
        live.socket.socket.close()
        running.wait_until(lambda: running.service.places.taken == 0 and not running.service.engine.streams, 5)


def test_draining_finishes_what_is_served(speech_llm, streaming):
    samples = noise(1.5, seed=2)
    with serving(speech_llm, streaming) as running, running.connect() as live:
        live.update(detection=None)
        live.append(samples)
        live.events("conversation.item.input_audio_transcription.delta")
        running.service.drain()
        running.wait_until(lambda: httpx.get(f"{running.url}/health").status_code == 503)
        answer = httpx.get(f"{running.url}/v1/models")
        assert answer.status_code == 503 and answer.headers["retry-after"] == "5"
        events = live.events("error")
    assert events[-1]["error"]["code"] == "server_shutting_down"
    (completed,) = of(events, ".completed")
    assert completed["end"] == pytest.approx(1.5)


def test_a_server_ends_with_sigterm_when_all_is_served(encoder_model, tmp_path):
    encoder_model.save_pretrained(tmp_path / "tiny")
    command = [sys.executable, "-m", "speechllm.cli", "serve", "--model", tmp_path / "tiny", "--port", "0"]
    program = Program([*command, "--device", "cpu", "--chunk-seconds", "0.32"])
    try:
        url = None
        for _ in range(600):
            found = _sockets(program.pid)
            if found:
                url = f"127.0.0.1:{found[0]}"
                break
            time.sleep(0.1)
        assert url is not None
        with Live(connect(f"ws://{url}/v1/realtime", compression=None)) as live:
            live.update()
            live.append(noise(2.0, seed=1))
            live.update()
            live.events("session.updated", count=2)  # the audio has come
            os.kill(program.pid, signal.SIGTERM)
            events = live.events("error")
        assert of(events, ".completed") and events[-1]["error"]["code"] == "server_shutting_down"
        out, err = program.communicate(120)
        assert program.poll() == 0 and "tiny: http://127.0.0.1:" in out and "word by word" in out
        assert "draining: 1 are being served" in err and "Traceback" not in err
    finally:
        if program.poll() is None:
            os.kill(program.pid, signal.SIGKILL)


def _sockets(pid):
    """The ports that a process listens at."""
    inodes = set()
    for fd in os.listdir(f"/proc/{pid}/fd"):
        try:
            target = os.readlink(f"/proc/{pid}/fd/{fd}")
        except OSError:
            continue
        if target.startswith("socket:["):
            inodes.add(target[8:-1])
    with open(f"/proc/{pid}/net/tcp") as table:
        rows = [line.split() for line in list(table)[1:]]
    return [int(row[1].split(":")[1], 16) for row in rows if row[9] in inodes and row[3] == "0A"]


def test_places_and_rates(monkeypatch):
    places = Places(1)
    place = places.take()
    assert places.take() is None
    place.release()
    place.release()
    assert places.taken == 0 and places.take() is not None
    places.is_closed = True
    assert places.take() is None
    now = [0.0]
    monkeypatch.setattr("speechllm.serve.limits.monotonic", lambda: now[0])
    rates = RateLimiter(60)
    assert all(rates.wait("a") == 0 for _ in range(60))
    assert rates.wait("a") == pytest.approx(1.0) and rates.wait("b") == 0
    now[0] = 1.0
    assert rates.wait("a") == 0 and rates.wait("a") > 0


@pytest.mark.parametrize("block", [100, 1600, 4567])
def test_pauses_are_found_however_the_samples_come(block):
    rng = np.random.default_rng(0)
    hiss = 0.001 * rng.standard_normal(16000 * 9)
    for start, end in ((1.0, 2.5), (2.8, 4.0), (6.0, 6.05), (7.0, 9.0)):
        hiss[round(start * 16000) : round(end * 16000)] *= 100
    hiss = hiss.astype(np.float32)
    ends = Endpointer(0.6)
    found = [part for at in range(0, len(hiss), block) for part in ends.accept(hiss[at : at + block])]
    assert ends.started == pytest.approx(6.7, abs=0.02)
    found += ends.finish()
    assert [part.start for part in found] == pytest.approx([0.7, 6.7], abs=0.02)  # a click is no speech
    assert [part.start + len(part.samples) / 16000 for part in found] == pytest.approx([4.3, 9.0], abs=0.02)
    for part in found:
        assert (part.samples == hiss[round(part.start * 16000) :][: len(part.samples)]).all()
    assert ends.seconds == pytest.approx(9.0)


def test_speech_without_pauses_is_cut_where_it_is_quietest():
    rng = np.random.default_rng(0)
    samples = (0.1 * rng.standard_normal(16000 * 13)).astype(np.float32)
    samples *= np.where(np.arange(len(samples)) // 800 % 2, 1.0, 0.2).astype(np.float32)
    samples[:16000] *= 0.001
    samples[16000 * 5 : 16000 * 5 + 4800] *= 0.05  # shorter than a pause
    ends = Endpointer(0.6, max_seconds=6.0)
    found = [*ends.accept(samples), *ends.finish()]
    assert found[0].start == pytest.approx(0.7, abs=0.02)
    assert found[1].start == pytest.approx(5.15, abs=0.2) and found[1].overlap == 0
    assert all(len(part.samples) <= 6.0 * 16000 for part in found) and any(part.overlap for part in found)
    assert Endpointer(None).accept(samples) == []
