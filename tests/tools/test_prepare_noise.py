"""A folder of audio becomes a source of noise."""

import gzip
import json
import os
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

from speechllm.data.augment.augmenter import AugmentConfig, Augmenter, NoiseConfig
from speechllm.data.manifests.manifest import SourceConfig

PROGRAM = Path(__file__).parents[2] / "tools" / "prepare_noise.py"


@pytest.fixture
def prepare(monkeypatch, capsys):
    """Runs the program; what it printed."""

    def run(*args):
        monkeypatch.setattr(sys, "argv", [PROGRAM.name, *map(str, args)])
        runpy.run_path(str(PROGRAM), run_name="__main__")
        return capsys.readouterr()

    return run


@pytest.fixture
def audio_dir(tmp_path):
    folder = tmp_path / "audio"
    files = {
        "b.wav": (8000, 1.0, 1),
        "A.FLAC": (16000, 2.5, 2),
        "deep/er/c.ogg": (16000, 1.0, 1),
        "d.Mp3": (44100, 1.0, 1),
    }
    for name, (rate, seconds, channels) in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        samples = 0.1 * np.random.default_rng(0).standard_normal((round(rate * seconds), channels))
        soundfile.write(path, samples, rate, format=path.suffix[1:].upper())
    (folder / "notes.txt").write_text("not audio")
    return folder


def read(path: Path) -> list[dict]:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def test_every_format_becomes_noise(prepare, audio_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (audio_dir / "broken.wav").write_text("this is not audio")
    for name, num_samples in (("click.wav", 100), ("nothing.wav", 0)):
        soundfile.write(audio_dir / name, np.zeros(num_samples), 16000)
    options = ("--output-dir", "out", "--prefix", "my", "--window", 1, "--min-seconds", 0.4)
    printed = prepare("--audio-dir", "audio", *options)
    assert "7 files, 1 unreadable, 2 shorter than 0.4 s" in printed.out
    assert "unreadable: audio/broken.wav: Format not recognised" in printed.err
    recordings, cuts = read(tmp_path / "out/my_recordings.jsonl.gz"), read(tmp_path / "out/my_cuts.jsonl.gz")
    assert [r["id"] for r in recordings] == ["my/A.FLAC", "my/b.wav", "my/d.Mp3", "my/deep/er/c.ogg"]
    assert all(os.path.isabs(r["sources"][0]["source"]) for r in recordings)
    assert [round(c["duration"], 2) for c in cuts] == [1.0, 1.0, 0.5, 1.0, 1.0, 1.0]
    assert len({c["id"] for c in cuts}) == len(cuts)
    before = [(tmp_path / f"out/my_{kind}.jsonl.gz").read_bytes() for kind in ("recordings", "cuts")]
    prepare("--audio-dir", audio_dir, *options)
    assert before == [(tmp_path / f"out/my_{kind}.jsonl.gz").read_bytes() for kind in ("recordings", "cuts")]

    monkeypatch.chdir("/")
    noise = NoiseConfig(
        [SourceConfig(str(tmp_path / "out/my_cuts.jsonl.gz"))], probability=1.0, snr_low=10, snr_high=10
    )
    augmenter, clean = Augmenter(AugmentConfig(noise=noise)), np.ones(20000, np.float32)
    for seed in range(20):
        added = augmenter.samples(clean, np.random.default_rng(seed)) - clean
        assert 10 * np.log10(1 / np.mean(added**2)) == pytest.approx(10, abs=0.01)


def test_nothing_left_is_an_error_and_writes_nothing(prepare, tmp_path):
    folder = tmp_path / "audio"
    arguments = ("--audio-dir", folder, "--output-dir", tmp_path / "out", "--prefix", "my")
    with pytest.raises(SystemExit, match="no such folder"):
        prepare(*arguments)
    folder.mkdir()
    with pytest.raises(SystemExit, match=r"no \.wav, \.flac, \.ogg, \.mp3 files"):
        prepare(*arguments)
    (folder / "broken.wav").write_text("")
    with pytest.raises(SystemExit, match="no noise: 1 files, 1 unreadable") as error:
        prepare(*arguments)
    assert isinstance(error.value.code, str)  # exit status 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("wrong", [("--window", 0), ("--min-seconds", 20), ("--prefix", "a/b")])
def test_wrong_options_are_refused(prepare, audio_dir, tmp_path, wrong):
    with pytest.raises(SystemExit) as error:
        prepare("--audio-dir", audio_dir, "--output-dir", tmp_path, "--prefix", "my", *wrong)
    assert error.value.code == 2
