"""A small corpus of tones in noise, written once."""

import json
from pathlib import Path

import av
import numpy as np
import pytest
import soundfile


def write_tone(path: Path, seconds: float, seed: int, rate: int = 16000, channels: int = 1) -> None:
    rng = np.random.default_rng(seed)
    time = np.arange(round(seconds * rate)) / rate
    samples = 0.2 * np.sin(2 * np.pi * rng.uniform(200, 2000) * time) + 0.01 * rng.standard_normal(len(time))
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, np.stack([samples] * channels, axis=1), rate, subtype="PCM_16")


def write_encoded(path: Path, samples: np.ndarray, rate: int, codec: str, options: dict | None = None) -> Path:
    """(num_samples,) or (channels, num_samples) as ffmpeg writes them; `options` are those of the container."""
    add_tracks(path, [(samples, rate)], codec, options)
    return path


def add_tracks(
    path: Path, tracks: list[tuple[np.ndarray, int]], codec: str, options: dict | None = None, default: int = 0
) -> None:
    """A file with several audio tracks, of which one is the default."""
    with av.open(str(path), "w", options=options or {}) as container:
        streams = [
            container.add_stream(codec, rate=rate, layout="mono" if samples.ndim == 1 else "stereo")
            for samples, rate in tracks
        ]
        for number, stream in enumerate(streams):
            stream.disposition = av.stream.Disposition.default.value if number == default else 0
        packets = []
        for stream, (samples, rate) in zip(streams, tracks, strict=True):
            planes = np.atleast_2d(samples).astype(np.float32)
            frame = av.AudioFrame.from_ndarray(planes, format="fltp", layout=stream.layout.name)
            frame.sample_rate = rate
            packets += [*stream.encode(frame), *stream.encode(None)]
        for packet in packets:
            container.mux(packet)


def write_manifest(path: Path, lines: list[dict]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    """Manifests a.jsonl (60 lines) and b.jsonl (20), durations 0.3 s to 1.8 s, and noise.jsonl."""
    folder = tmp_path_factory.mktemp("corpus")
    for name, count in (("a", 60), ("b", 20)):
        lines = []
        for i in range(count):
            seconds = round(0.3 + (i * 37 % count) / count * 1.5, 3)
            write_tone(folder / name / f"{i}.wav", seconds, seed=i)
            line = {"audio_filepath": f"{name}/{i}.wav", "duration": seconds, "text": f"{name} {i}"}
            lines.append(line | ({"lang": "en"} if name == "a" else {}))
        write_manifest(folder / f"{name}.jsonl", lines)
    write_tone(folder / "noise/0.wav", 1.0, seed=99)
    write_manifest(folder / "noise.jsonl", [{"audio_filepath": "noise/0.wav", "duration": 1.0, "text": ""}])
    return folder
