"""A recognizer that hears tones, each of which is a word, and files of them."""

import numpy as np
import pytest
import soundfile
import torch

from speechllm.data.features import fbank
from speechllm.decode.result import Hypothesis, Recognition, Word
from speechllm.errors import UserError
from speechllm.prompt.request import Request

RATE = 16000
TONES = {"do": 300, "re": 500, "mi": 800, "fa": 1200, "sol": 1800, "la": 2600, "ti": 3600}


def melody(words: list[str], pause: float, rate: int = RATE) -> np.ndarray:
    """(num_samples,): 0.4 s of tone for each word, and a pause after each."""
    time = np.arange(int(0.4 * rate)) / rate
    silence = np.zeros(int(pause * rate))
    parts = [part for word in words for part in (0.2 * np.sin(2 * np.pi * TONES[word] * time), silence)]
    return np.concatenate([*parts, np.zeros(0)]).astype(np.float32)


def random_words(count: int, seed: int) -> list[str]:
    """No word twice in a row."""
    names, rng = list(TONES), np.random.default_rng(seed)
    places = np.cumsum(rng.integers(1, len(names), count))
    return [names[place % len(names)] for place in places]


class Listener:
    """Hears a word where one tone is the loudest for 0.1 s; keeps the batches that it was given."""

    def __init__(self, timestamps: bool = False, needs_language: bool = False) -> None:
        self.timestamps, self.needs_language = timestamps, needs_language
        self.batches = []
        bins = torch.tensor([self._bin(TONES[name]) for name in TONES])
        self.names = {int(bin): name for bin, name in zip(bins, TONES, strict=True)}

    @staticmethod
    def _bin(frequency: float) -> int:
        return int(fbank(np.sin(2 * np.pi * frequency * np.arange(RATE) / RATE).astype(np.float32)).mean(0).argmax())

    def __call__(self, batches):
        for batch in batches:
            self.batches.append(batch)
            yield [
                self._recognition(rows[:frames])
                for rows, frames in zip(batch.features, batch.feature_lens.tolist(), strict=True)
            ]

    def check(self, request: Request, frames: int | None = None) -> None:
        if self.needs_language and request.language is None:
            raise UserError(f"{request.id} has no language")

    def _recognition(self, features: torch.Tensor) -> Recognition:
        heard = [int(row.argmax()) if row.max() > -3 else None for row in features]
        words, start = [], 0
        for i in range(1, len(heard) + 1):
            if i == len(heard) or heard[i] != heard[start]:
                if heard[start] is not None and i - start >= 10:
                    words.append(Word(self.names[heard[start]], start / 100, i / 100, 1.0))
                start = i
        text = " ".join(word.text for word in words)
        best = Hypothesis(tuple(range(len(words))), (-0.1,) * len(words), 0.0, "end")
        return Recognition(text, (best,), (text,), words=tuple(words) if self.timestamps else None)


@pytest.fixture(name="audio")
def audio_folder(tmp_path):
    """A folder with four files of several formats and rates, a broken one, and no audio."""
    folder = tmp_path / "audio"
    (folder / "deep/er").mkdir(parents=True)
    for name, words, rate, channels in (
        ("a.wav", ["do", "re"], 8000, 1),
        ("b.flac", ["mi"], 44100, 2),
        ("deep/c.MP3", ["ti", "la"], 16000, 1),
        ("deep/er/d.ogg", ["fa", "do", "fa"], 22050, 2),
    ):
        samples = melody(words, 0.2, rate)
        soundfile.write(folder / name, np.stack([samples] * channels, axis=1), rate)
    (folder / "bad.wav").write_bytes(b"RIFF, and no more")
    (folder / "notes.txt").write_text("no audio")
    return folder


EXPECTED = {"a": "do re", "b": "mi", "deep/c": "ti la", "deep/er/d": "fa do fa"}
