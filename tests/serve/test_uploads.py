"""Recordings: what OpenAI's own client is told."""

import json
import os

import httpx
import numpy as np
import openai
import pytest

from speechllm.decode.interface import RecognizeOptions
from speechllm.transcribe.formats import format_srt, format_vtt
from tests.serve.conftest import RATE, integers, noise, serving, wav


def transcribed(model, samples, options=None, **request):
    options = options or RecognizeOptions(timestamps=True)
    return model.transcribe([integers(samples)], **{"language": "en"} | request, options=options)[0]


def test_formats_of_a_transcript(words_server, speech_llm):
    client, samples = words_server.client, noise(3.3, seed=3)
    expected = transcribed(speech_llm, samples)
    assert len(expected.text.split()) > 3

    def create(**options):
        return client.audio.transcriptions.create(file=wav(samples), model="tiny", language="en", **options)

    assert create().text == expected.text
    assert create(response_format="text") == f"{expected.text}\n"
    assert create(response_format="srt") == format_srt(expected)
    assert create(response_format="vtt") == format_vtt(expected)
    verbose = create(response_format="verbose_json", timestamp_granularities=["word", "segment"])
    assert (verbose.text, verbose.language) == (expected.text, "english")
    assert verbose.duration == pytest.approx(3.3)
    words = expected.segments[0].words
    assert [word.word for word in verbose.words] == [word.text for word in words]
    assert [word.start for word in verbose.words] == pytest.approx([word.start for word in words], abs=1e-3)
    (segment,) = verbose.segments
    assert (segment.text, segment.id, segment.start) == (expected.text, 0, 0.0) and segment.avg_logprob < 0
    assert segment.tokens == list(expected.segments[0].recognition.tokens)
    assert create(response_format="verbose_json").words is None


@pytest.mark.parametrize("format", ["FLAC", "OGG", "MP3"])
def test_compressed_audio(format, words_server, speech_llm, tmp_path):
    file = wav(noise(2.0, seed=3), format=format)
    (tmp_path / file.name).write_bytes(file.getvalue())
    (expected,) = speech_llm.transcribe(tmp_path / file.name, "en")
    found = words_server.client.audio.transcriptions.create(file=file, model="tiny", language="en")
    assert found.text == expected.text


def test_a_long_recording_as_events(speech_llm):
    """Its texts come segment by segment, and are together that of `transcribe`; memory does not grow with segments."""
    samples = np.concatenate([noise(6.0, seed=seed) for seed in (0, 2, 3)] * 4)
    with serving(speech_llm, max_segment=5.0) as running:
        stream = running.client.audio.transcriptions.create(file=wav(samples), model="tiny", language="en", stream=True)
        events = list(stream)
        whole = running.client.audio.transcriptions.create(file=wav(samples), model="tiny", language="en").text
        running.wait_until(lambda: running.service.places.taken == 0)
    *deltas, done = events
    assert {event.type for event in deltas} == {"transcript.text.delta"} and len(deltas) > 10
    assert done.type == "transcript.text.done"
    assert "".join(event.delta for event in deltas) == done.text == whole


def test_sampling_has_a_text_of_its_own_that_is_always_the_same(words_server):
    def create(temperature):
        options = {"model": "tiny", "language": "en", "temperature": temperature}
        return words_server.client.audio.transcriptions.create(file=wav(noise(3.3, seed=3)), **options).text

    assert create(1.0) == create(1.0) != create(0.0)


def test_a_translation(model_config):
    import dataclasses

    import torch

    from speechllm.model.speech_llm import SpeechLLM
    from tests.decode.test_streaming import causal, talkative

    torch.manual_seed(0)
    config = dataclasses.replace(causal(model_config), languages=["es", "es>en"])
    model = talkative(SpeechLLM.from_config(config), end=6.0)
    samples = noise(2.0, seed=3)
    expected = transcribed(model, samples, RecognizeOptions(), language="es", target_language="en").text
    with serving(model, language=None) as running:
        assert running.client.audio.translations.create(file=wav(samples), model="tiny").text == expected
        (described,) = running.client.models.list().data
        assert described.speechllm["languages"] == ["es"] and described.speechllm["target_languages"] == ["en"]
        assert described.speechllm["default_language"] == "es" and not described.speechllm["needs_language"]
        assert described.speechllm["live"] == "segments"
        form = {"files": {"file": wav(samples)}, "data": {"target_language": "de"}}
        refused = httpx.post(f"{running.url}/v1/audio/translations", **form)
        assert refused.status_code == 400 and "trained to translate into en" in refused.json()["error"]["message"]


@pytest.mark.parametrize(
    ("fields", "status", "code", "message"),
    [
        ({"model": "whisper-1"}, 404, "model_not_found", "'whisper-1' is not served here; 'tiny' is"),
        ({"response_format": "xml"}, 400, "invalid_value", "none of json, text, srt, vtt, verbose_json"),
        ({"temperature": "2"}, 400, "invalid_value", "temperature: '2' is no number from 0 to 1"),
        ({"temperature": "nan"}, 400, "invalid_value", "temperature"),
        ({"timestamp_granularities[]": "word"}, 400, "invalid_value", "only verbose_json has them"),
        ({"stream": "true", "response_format": "srt"}, 400, "invalid_value", "needs the whole text"),
        ({"path": "/etc/passwd"}, 400, "unknown_parameter", "unknown field 'path'"),
        ({"prompt": "before"}, 400, "invalid_value", "no {previous} slot"),
        ({"target_language": "de"}, 400, "unknown_parameter", "is for /v1/audio/translations"),
    ],
)
def test_fields_that_are_refused(fields, status, code, message, words_server):
    url = f"{words_server.url}/v1/audio/transcriptions"
    answer = httpx.post(url, files={"file": wav(noise(0.5, seed=1))}, data={"language": "en"} | fields)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (status, code) and message in error["message"]
    assert words_server.service.places.taken == 0


def test_forms_and_audio_that_cannot_be_read(words_server, tmp_path):
    url = f"{words_server.url}/v1/audio/transcriptions"

    def code(**request):
        answer = httpx.post(url, **request)
        return answer.status_code, answer.json()["error"]["code"]

    assert code(json={"file": "http://localhost/a.wav"}) == (400, "invalid_content_type")
    assert code(data={"file": "/etc/passwd"}, files={"other": b""}) == (400, "unknown_parameter")
    assert code(data={"file": "/etc/passwd"}, files={"x": ("", b"")}) == (400, "unknown_parameter")
    for contents in (b"", b"\x80\x04cos\nsystem\n.", b"RIFF", os.urandom(4096)):
        assert code(files={"file": ("../../etc/passwd", contents)}) == (400, "invalid_audio")
    broken = b"--x\r\nContent-Disposition: form-data\r\n\r\n"
    assert code(content=broken, headers={"Content-Type": "multipart/form-data; boundary=x"}) == (400, "invalid_form")
    # a playlist of this machine's files is no audio
    wav_file = tmp_path / "secret.wav"
    wav_file.write_bytes(wav(noise(2.0, seed=3)).getvalue())
    playlists = (
        f"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:2,\n{wav_file}\n#EXT-X-ENDLIST\n",
        f"ffconcat version 1.0\nfile '{wav_file}'\n",
        f"v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=audio 5004 RTP/AVP 0\na=file:{wav_file}\n",
    )
    for playlist in playlists:
        assert code(files={"file": ("a.m3u8", playlist.encode())}) == (400, "invalid_audio")
    assert code(files={"file": wav(np.zeros((800, 9)))}) == (400, "invalid_audio")
    assert code(files={"file": wav(np.zeros(100), rate=1)}) == (400, "invalid_audio")
    assert httpx.get(f"{words_server.url}/v1/audio/transcriptions").json()["error"]["code"] == "method_not_allowed"
    assert httpx.get(f"{words_server.url}/v1/files").json()["error"]["code"] == "not_found"
    words_server.wait_until(lambda: words_server.service.places.taken == 0)


def test_limits_of_an_upload(speech_llm):
    with serving(speech_llm, max_upload_bytes=100_000, max_audio_seconds=5.0, upload_seconds=0.5) as running:
        url = f"{running.url}/v1/audio/transcriptions"

        def refused(content):
            answer = httpx.post(url, content=content, headers={"Content-Type": "multipart/form-data; boundary=x"})
            return answer.status_code, answer.json()["error"]["code"]

        def slowly():
            import time

            yield b"--x\r\n"
            time.sleep(2)

        head = b'--x\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
        assert refused(head + bytes(200_000)) == (413, "upload_too_large")
        assert refused(iter([head, *[bytes(20_000)] * 10])) == (413, "upload_too_large")  # of no stated length
        assert refused(slowly()) == (408, "upload_timeout")
        # an hour of silence in a few kilobytes
        bomb = wav(np.zeros(600 * RATE), format="FLAC")
        assert len(bomb.getvalue()) < 100_000
        answer = httpx.post(url, files={"file": bomb})
        assert (answer.status_code, answer.json()["error"]["code"]) == (413, "audio_too_long")
        running.wait_until(lambda: running.service.places.taken == 0)


def test_a_client_that_goes_away_frees_its_place(speech_llm):
    samples = np.concatenate([noise(6.0, seed=3)] * 40)
    with serving(speech_llm, max_streams=1, max_segment=5.0) as running:
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{running.url}/v1/audio/transcriptions", files={"file": wav(samples)}, timeout=0.3)
        running.wait_until(lambda: running.service.places.taken == 0, 5)
        running.wait_until(lambda: running.service.engine.waiting == 0, 5)
        assert running.client.audio.transcriptions.create(file=wav(noise(1.0, seed=3)), model="tiny").text


def test_a_failure_of_the_model_is_told_and_the_next_request_is_served(speech_llm, monkeypatch):
    with serving(speech_llm) as running:
        with monkeypatch.context() as patch:
            patch.setattr(speech_llm.llm, "step", lambda *args, **named: 1 / 0)
            with pytest.raises(openai.InternalServerError) as caught:
                running.client.audio.transcriptions.create(file=wav(noise(2.0, seed=3)), model="tiny")
        assert caught.value.body["code"] == "server_error" and "division" not in str(caught.value)
        assert running.client.audio.transcriptions.create(file=wav(noise(2.0, seed=3)), model="tiny").text


def test_health_and_metrics(words_server):
    words_server.client.audio.transcriptions.create(file=wav(noise(2.0, seed=3)), model="tiny")
    assert httpx.get(f"{words_server.url}/health").json() == {"status": "ok", "streams": 0, "max_streams": 32}
    text = httpx.get(f"{words_server.url}/metrics").text
    assert 'speechllm_requests_total{path="/v1/audio/transcriptions",status="200"} 1.0' in text
    assert "speechllm_audio_seconds_total 2.0" in text and "speechllm_upload_seconds_count 1.0" in text
    assert "speechllm_real_time_factor" in text and "speechllm_streams 0.0" in text
    answer = httpx.get(f"{words_server.url}/v1/models")
    assert json.loads(answer.text)["data"][0]["id"] == "tiny"
    assert answer.headers["content-security-policy"].startswith("default-src 'none'; script-src 'self'")


def test_as_many_clients_as_there_are_places_never_wait(speech_llm):
    """A place is free again when the client is told the text, not a moment later."""
    with serving(speech_llm, max_streams=1) as running, httpx.Client() as client:
        for _ in range(20):
            answer = client.post(f"{running.url}/v1/audio/transcriptions", files={"file": wav(noise(0.3, seed=1))})
            assert answer.status_code == 200
