"""Live audio: what clients of the WebSocket are told."""

import base64
import json
import threading

import httpx
import numpy as np
import pytest
from websockets.exceptions import ConnectionClosed, InvalidStatus

from speechllm.decode.interface import RecognizeOptions
from speechllm.decode.result import streamed_text
from speechllm.decode.streaming import StreamingRecognizer
from speechllm.transcribe.endpoints import Endpointer
from tests.decode.test_streaming import streamed
from tests.serve.conftest import RATE, integers, noise, of, serving, speech, wav


def test_words_come_as_a_stream_writes_them(words_server, streaming):
    samples = noise(5.0, seed=1)
    streaming.language = "en"
    expected = streamed(streaming, integers(samples))
    assert len({word.segment for word in expected}) > 1
    with words_server.connect() as live:
        assert live.events("session.created")[0]["session"]["audio"]["input"]["format"]["rate"] == 24000
        live.update(language="en")
        session = live.events("session.updated")[-1]["session"]
        assert session["audio"]["input"]["format"] == {"type": "audio/pcm", "rate": RATE}
        for at in range(0, len(samples), 3001):
            live.append(samples[at : at + 3001])
        live.send("input_audio_buffer.commit")
        items = len({word.segment for word in expected})
        events = live.events(count=items)
    completed = of(events, ".completed")
    texts = [streamed_text(w for w in expected if w.segment == segment) for segment in range(items)]
    assert [event["transcript"] for event in completed] == texts
    words = [word for event in completed for word in event["words"]]
    assert [word["word"] for word in words] == [word.text for word in expected]
    assert [word["start"] for word in words] == pytest.approx([word.start for word in expected], abs=2e-3)
    assert [word["confidence"] for word in words] == pytest.approx([w.confidence for w in expected], abs=1e-3)
    # an item begins, grows by deltas, and ends: in this order, one after the other
    order = [event["type"].rpartition(".")[2] for event in events]
    at = 0
    for event in completed:
        end = events.index(event)
        assert order[at] == "created" and order[end - 1 : end + 1] == ["committed", "completed"]
        assert set(order[at + 1 : end - 1]) <= {"delta"}
        assert "".join(delta["delta"] for delta in of(events[at:end], ".delta")) == event["transcript"]
        assert {e.get("item_id", event["item_id"]) for e in events[at:end]} == {event["item_id"]}
        at = end + 1
    assert completed[-1]["end"] == pytest.approx(5.0, abs=1e-3)
    assert [event["start"] for event in completed[1:]] == [event["end"] for event in completed[:-1]]


def test_a_commit_ends_an_item_and_the_next_begins_anew(words_server, streaming):
    first, second = noise(1.5, seed=2), noise(1.5, seed=3)
    streaming.language = "en"
    with words_server.connect() as live:
        live.update(detection=None)
        for samples in (first, second, np.zeros(1600)):
            live.append(samples)
            live.send("input_audio_buffer.commit")
        live.send("input_audio_buffer.commit")
        events = live.events(count=3)
    completed, (error,) = of(events, ".completed"), of(events, "error")
    assert error["error"]["code"] == "input_audio_buffer_commit_empty"
    for event, samples in zip(completed[:2], (first, second), strict=True):
        assert event["transcript"] == streamed_text(streamed(streaming, integers(samples)))
    assert [event["end"] for event in completed] == pytest.approx([1.5, 3.0, 3.1])
    assert completed[1]["words"][0]["start"] >= 1.5


def test_audio_of_another_rate(words_server):
    samples = noise(2.0, seed=1)
    doubled = np.repeat(samples, 3)  # of 48 kHz
    with words_server.connect() as live:
        live.update(rate=48000)
        live.append(doubled)
        live.send("input_audio_buffer.commit")
        (*_, completed) = live.events()
    assert completed["transcript"] and completed["end"] == pytest.approx(2.0, abs=1e-3)


def test_clear_forgets_what_was_heard(words_server, streaming):
    streaming.language = "en"
    with words_server.connect() as live:
        live.update()
        live.append(noise(1.0, seed=1))
        live.send("input_audio_buffer.clear")
        live.events("input_audio_buffer.cleared")
        samples = noise(1.5, seed=2)
        live.append(samples)
        live.send("input_audio_buffer.commit")
        (*_, completed) = live.events()
    assert completed["transcript"] == streamed_text(streamed(streaming, integers(samples)))


def test_segments_of_a_model_that_hears_whole_utterances(speech_llm):
    samples = np.concatenate([np.zeros(RATE, dtype=np.float32), speech(6.0, seed=3), np.zeros(RATE, dtype=np.float32)])
    ends = Endpointer(0.6)
    parts = [*ends.accept(integers(samples) / np.float32(32768)), *ends.finish()]
    assert len(parts) > 1
    options = RecognizeOptions(timestamps=True, fallback="ctc")
    with serving(speech_llm) as running, running.connect() as live:
        live.update()
        for at in range(0, len(samples), 1600):
            live.append(samples[at : at + 1600])
        events = live.events(count=len(parts))
        live.send("input_audio_buffer.commit")
        (*_, last) = live.events()
    completed = of(events, ".completed")
    for event, part in zip(completed, parts, strict=True):
        (expected,) = speech_llm.transcribe([part.samples], "en", options=options)
        assert event["transcript"] == expected.text
        assert event["start"] == pytest.approx(part.start)
        words = [word for segment in expected.segments for word in segment.words]
        starts = [part.start + word.start for word in words]
        assert [word["start"] for word in event["words"]] == pytest.approx(starts, abs=2e-3)
    assert [e["item_id"] for e in of(events, "speech_started")] == [e["item_id"] for e in completed]
    assert [e["item_id"] for e in of(events, "speech_stopped")] == [e["item_id"] for e in completed]
    assert last["transcript"] == ""


def test_sixteen_mixed_clients_have_the_texts_that_they_have_alone(speech_llm, streaming):
    streaming.language = "en"
    samples = [noise(1.0 + 0.45 * i, seed=i) for i in range(16)]
    expected = {
        i: speech_llm.transcribe([integers(x)], "en")[0].text
        if i % 2
        else streamed_text(streamed(streaming, integers(x)))
        for i, x in enumerate(samples)
    }
    found = {}

    def upload(running, i):
        found[i] = running.client.audio.transcriptions.create(file=wav(samples[i]), model="tiny", language="en").text

    def listen(running, i):
        with running.connect() as live:
            live.update(language="en", detection=None)
            step = 777 * (1 + i)
            for at in range(0, len(samples[i]), step):
                live.append(samples[i][at : at + step])
            live.send("input_audio_buffer.commit")
            found[i] = live.events()[-1]["transcript"]

    with serving(speech_llm, streaming) as running:
        threads = [threading.Thread(target=upload if i % 2 else listen, args=(running, i)) for i in range(len(samples))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
        running.wait_until(lambda: running.service.places.taken == 0)
    assert found == expected and sum(map(bool, found.values())) > 12


@pytest.mark.parametrize(
    ("message", "code"),
    [
        ("{", "invalid_json"),
        ("[" * 5000, "invalid_json"),
        ("[]", "invalid_json"),
        (b"\x80\x04", "invalid_json"),
        ({"type": "response.create"}, "unknown_type"),
        ({"type": ["x"]}, "unknown_type"),
        ({"type": "input_audio_buffer.append"}, "invalid_audio"),
        ({"type": "input_audio_buffer.append", "audio": "file:///etc/passwd"}, "invalid_audio"),
        ({"type": "session.update", "session": []}, "invalid_value"),
        ({"type": "session.update", "session": {"type": "realtime"}}, "invalid_value"),
    ],
)
def test_a_message_that_is_refused_changes_nothing(message, code, words_server):
    with words_server.connect() as live:
        live.socket.send(json.dumps(message) if isinstance(message, dict) else message)
        (error,) = of(live.events("error"), "error")
        assert error["error"]["code"] == code
        live.update()
        live.append(noise(1.5, seed=2))
        live.send("input_audio_buffer.commit")
        assert live.events()[-1]["transcript"]


def test_values_of_a_session_that_are_refused(words_server):
    with words_server.connect() as live:
        live.events("session.created")
        for heard in (
            {"format": {"type": "audio/pcmu"}},
            {"format": {"type": "audio/pcm", "rate": 0}},
            {"transcription": {"model": "whisper-1"}},
            {"transcription": {"language": 7}},
            {"transcription": {"keywords": "x"}},
            {"turn_detection": {"type": "semantic_vad"}},
            {"turn_detection": {"type": "server_vad", "silence_duration_ms": 0}},
        ):
            live.send("session.update", event_id="mine", session={"audio": {"input": heard}})
            (error,) = live.events("error")
            assert error["error"]["event_id"] == "mine" and error["error"]["type"] == "invalid_request_error"


def test_keys_are_asked_for(speech_llm, streaming):
    with serving(speech_llm, streaming, key="s3cret") as running:
        answer = httpx.get(f"{running.url}/v1/models")
        assert answer.status_code == 401 and answer.json()["error"]["code"] == "invalid_api_key"
        assert httpx.get(f"{running.url}/metrics").status_code == 401
        assert httpx.get(f"{running.url}/health").status_code == 200
        assert running.client.models.list().data[0].id == "tiny"
        for given in ({"additional_headers": {"Authorization": "Bearer wrong"}}, {"additional_headers": {}}):
            with pytest.raises(InvalidStatus) as caught:
                running.connect(**given)
            assert caught.value.response.status_code == 401
        protocols = ["realtime", "openai-insecure-api-key.s3cret"]
        with running.connect(additional_headers={}, subprotocols=protocols) as live:
            assert live.socket.subprotocol == "realtime" and live.events("session.created")


def test_pages_of_other_sites_are_refused(words_server):
    def status(**headers):
        return httpx.get(f"{words_server.url}/v1/models", headers=headers).status_code

    own = words_server.url
    assert status(Origin=own) == 200
    assert status(Origin="http://evil.example") == status(Host="evil.example") == status(Origin="null") == 403
    assert status(Origin="http://localhost:1") == 403
    with pytest.raises(InvalidStatus) as caught:
        words_server.connect(origin="http://evil.example")
    assert caught.value.response.status_code == 403
    with words_server.connect(origin=own) as live:
        assert live.events("session.created")


def test_no_place_is_free(speech_llm, streaming):
    with serving(speech_llm, streaming, max_streams=1) as running:
        with running.connect() as live:
            live.events("session.created")
            with pytest.raises(InvalidStatus) as caught:
                running.connect()
            assert caught.value.response.status_code == 429 and caught.value.response.headers["Retry-After"] == "1"
            answer = httpx.post(f"{running.url}/v1/audio/transcriptions", files={"file": wav(noise(1.0, 1))})
            assert answer.status_code == 429 and answer.headers["retry-after"] == "1"
            assert answer.json()["error"]["code"] == "too_many_streams"
        running.wait_until(lambda: running.service.places.taken == 0, 2)
        with running.connect() as live:
            assert live.events("session.created")


def test_a_client_that_says_nothing_or_too_much(speech_llm, streaming):
    with serving(speech_llm, streaming, idle_seconds=0.3, max_message_bytes=2000) as running:
        with running.connect() as live:
            live.update()
            live.append(noise(0.03, seed=1))
            events = live.events("error")
            assert events[-1]["error"]["code"] == "idle_timeout" and of(events, ".completed")
            with pytest.raises(ConnectionClosed) as caught:
                live.events()
            assert caught.value.rcvd.code == 1000
        with running.connect() as live:
            live.socket.send("x" * 3000)
            with pytest.raises(ConnectionClosed) as caught:
                live.events()
            assert caught.value.rcvd.code == 1009
        running.wait_until(lambda: running.service.places.taken == 0)
    with serving(speech_llm, streaming, requests_per_minute=2) as running:
        assert [httpx.get(f"{running.url}/v1/models").status_code for _ in range(4)] == [200, 200, 429, 429]
        assert httpx.get(f"{running.url}/health").status_code == 200


def test_openais_own_client_of_live_audio(words_server, streaming):
    samples = noise(2.0, seed=2)
    streaming.language = "en"
    url = f"ws{words_server.url[4:]}/v1"
    client = words_server.client.copy()
    client.websocket_base_url = url
    data = integers(samples).tobytes()
    with client.realtime.connect(extra_query={"intent": "transcription"}) as connection:
        heard = {"format": {"type": "audio/pcm", "rate": RATE}, "turn_detection": None}
        connection.session.update(session={"type": "transcription", "audio": {"input": heard}})
        connection.input_audio_buffer.append(audio=base64.b64encode(data).decode())
        connection.input_audio_buffer.commit()
        deltas = []
        for event in connection:
            if event.type == "conversation.item.input_audio_transcription.delta":
                deltas.append(event.delta)
            if event.type == "conversation.item.input_audio_transcription.completed":
                break
    assert event.transcript == "".join(deltas) == streamed_text(streamed(streaming, integers(samples)))
    assert event.usage.seconds == pytest.approx(2.0)


def test_a_failing_stream_is_told_and_the_connection_goes_on(speech_llm, streaming, monkeypatch):
    with serving(speech_llm, streaming) as running, running.connect() as live:
        live.update()
        with monkeypatch.context() as patch:
            patch.setattr(StreamingRecognizer, "accept", lambda *arguments: 1 / 0)
            live.append(noise(1.0, seed=1))
            live.send("input_audio_buffer.commit")
            (*_, failed) = live.events("conversation.item.input_audio_transcription.failed")
        assert failed["error"]["code"] == "server_error"
        live.append(noise(1.5, seed=2))
        live.send("input_audio_buffer.commit")
        assert live.events()[-1]["transcript"]
