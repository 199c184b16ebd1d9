"""`speechllm stream`: what it hears, and what it writes."""

import io
import json
import subprocess
import sys
import wave

import numpy as np
import pytest
import soundfile

from speechllm.cli.main import main
from speechllm.cli.stream import TextWriter, file_blocks, pcm_blocks
from speechllm.decode.result import StreamedWord, streamed_text
from speechllm.decode.streaming import StreamingRecognizer
from speechllm.errors import UserError
from tests.decode.test_streaming import encoder_model, noise, speech_llm, streamed  # noqa: F401 (fixtures)


def pcm(samples):
    return (samples * 32767).astype("<i2").tobytes()


class Dripping(io.BytesIO):
    """Gives 3 bytes at a time: a sample may come in two parts."""

    def read1(self, size=-1):
        return self.read(min(size, 3))


def wav(samples, rate=16000, channels=1):
    file = io.BytesIO()
    with wave.open(file, "wb") as out:
        out.setnchannels(channels)
        out.setsampwidth(2)
        out.setframerate(rate)
        out.writeframes(pcm(samples))
    return file.getvalue()


def test_samples_from_a_pipe():
    samples = noise(0.3, 1)
    for data in (pcm(samples), pcm(samples) + b"\0", wav(samples)):
        for file in (io.BytesIO(data), Dripping(data)):
            assert b"".join(block.tobytes() for block in pcm_blocks(file)) == pcm(samples)
    assert list(pcm_blocks(io.BytesIO())) == []
    with pytest.raises(UserError, match="2 channels, 8000 Hz, 16 bits; give one channel, 16000 Hz"):
        list(pcm_blocks(io.BytesIO(wav(samples, 8000, 2))))
    with pytest.raises(UserError, match="ends before its samples"):
        list(pcm_blocks(io.BytesIO(wav(samples)[:30])))


def test_a_file_in_real_time(tmp_path, monkeypatch):
    now, slept = [100.0], []
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    monkeypatch.setattr("time.sleep", lambda seconds: (slept.append(seconds), now.__setitem__(0, now[0] + seconds)))
    samples = noise(0.45, 1)
    soundfile.write(tmp_path / "a.wav", samples, 16000)
    blocks = list(file_blocks(str(tmp_path / "a.wav"), realtime=True))
    assert sum(map(len, blocks)) == len(samples) and sum(slept) == pytest.approx(0.45)
    assert sum(map(len, file_blocks(str(tmp_path / "a.wav"), realtime=False))) == len(samples) and len(slept) == 5


class Terminal(io.StringIO):
    def isatty(self):
        return True


def shown(text):
    """What a terminal shows of it: lines."""
    lines = [""]
    for part in text.replace("\r", "\0\r").replace("\n", "\0\n").split("\0"):
        if part.startswith("\r"):
            lines[-1] = part[1:].split("\x1b[K")[0]
        elif part.startswith("\n"):
            lines.append(part[1:])
        else:
            lines[-1] += part.split("\x1b[K")[0]
    return lines


def test_a_line_is_rewritten_and_ended_with_its_segment(monkeypatch):
    def word(text, segment):
        return StreamedWord(text, 0.0, 0.1, 1.0, 0.2, segment=segment)

    file = Terminal()
    writer = TextWriter(file)
    for words, unstable, expected in (
        ([], "", [""]),
        ([word("one", 0)], " tw", ["one tw"]),
        ([], " two", ["one two"]),
        ([word("two", 0), word("three", 1)], "", ["one two", "three"]),
        ([], " four", ["one two", "three four"]),
    ):
        writer.write(words, unstable)
        assert shown(file.getvalue()) == expected
    writer.finish()
    assert shown(file.getvalue()) == ["one two", "three", ""]
    monkeypatch.setenv("COLUMNS", "12")
    writer.write([word("thirteen", 2), word("fourteen", 2)], "")
    assert shown(file.getvalue())[2] == "... fourteen"[-11:] or len(shown(file.getvalue())[2]) == 11
    writer.finish()
    assert shown(file.getvalue())[2] == "thirteen fourteen"
    plain = io.StringIO()
    writer = TextWriter(plain)
    writer.write([word("one", 0), word("two", 1)], " un")
    writer.finish()
    assert plain.getvalue() == "one\ntwo\n"


def test_words_of_a_pipe_and_of_a_file(encoder_model, tmp_path):  # noqa: F811
    encoder_model.save_pretrained(tmp_path / "model")
    samples = noise(2.0, 1)
    soundfile.write(tmp_path / "a.wav", samples, 16000, subtype="PCM_16")
    command = [sys.executable, "-m", "speechllm.cli", "stream", "--model", str(tmp_path / "model")]
    command += ["--chunk-seconds", "0.32", "--device", "cpu"]
    result = subprocess.run([*command, "-"], input=(samples * 32768).astype("<i2").tobytes(), capture_output=True)
    assert result.returncode == 0, result.stderr
    words = [json.loads(line) for line in result.stdout.splitlines()]
    integers = (samples * 32768).astype(np.int16)
    expected = streamed(StreamingRecognizer(encoder_model, 0.32), integers)
    assert [word["word"] for word in words] == [word.text for word in expected]
    assert [word["written"] for word in words] == pytest.approx([word.written for word in expected], abs=1e-3)
    result = subprocess.run([*command, str(tmp_path / "a.wav"), "--format", "text"], capture_output=True, text=True)
    assert result.stdout.split() == streamed_text(expected).split()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-", "--realtime"], "--realtime: is for files"),
        (["-", "--beam", "0"], "beam must be at least 1, got 0"),
        (["-", "--ctc", "--hotwords", "x"], "hotwords: is for the language model's search"),
        (["no-such-file"], "no-such-file: no such file"),
        (["-", "--stable-seconds", "1.5"], "stable_seconds: is for a beam"),
    ],
)
def test_options_that_do_not_go_together(arguments, message, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["stream", *arguments, "--model", "no-such-model"])
    assert caught.value.code == 1 and message in capsys.readouterr().err


def test_a_model_that_cannot(model, tmp_path, capsys):
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(SystemExit):
        main(["stream", "-", "--model", str(tmp_path / "model")])
    assert "the model cannot hear a stream" in capsys.readouterr().err
