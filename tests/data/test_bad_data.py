"""Broken files of every kind: counted, logged with their ids, left out; a mostly broken set stops."""

import logging
import pickle

import numpy as np
import pytest
import soundfile
from lhotse import AudioSource, Recording
from lhotse.utils import fastcopy

from speechllm.data import (
    AugmentConfig,
    DataConfig,
    DataError,
    SourceConfig,
    build_eval_loader,
    build_train_loader,
    read_manifest,
)
from speechllm.data.audio import UtteranceError, load_samples
from speechllm.data.augment.augmenter import NoiseConfig, SpeedConfig

from .conftest import write_manifest, write_tone


@pytest.fixture
def broken(tmp_path):
    """A manifest of 20 good utterances and one of each kind of bad one; returns it and reasons by id."""
    lines, reasons = [], {}

    def add(name: str, reason: str | None, duration: float = 1.0, text: str = "x", **fields) -> None:
        lines.append({"audio_filepath": f"{name}.wav", "duration": duration, "text": text, **fields})
        if reason:
            reasons[name + (f"@{fields['offset']:g}" if fields.get("offset") else "")] = reason

    for i in range(20):
        write_tone(tmp_path / f"good{i}.wav", 1.0, seed=i)
        add(f"good{i}", None)
    write_tone(tmp_path / "truncated.wav", 1.0, seed=1)
    (tmp_path / "truncated.wav").write_bytes((tmp_path / "truncated.wav").read_bytes()[:9000])
    add("truncated", "wrong duration")
    (tmp_path / "text.wav").write_text("I am not audio\n" * 100)
    add("text", "unreadable audio")
    (tmp_path / "nothing.wav").write_bytes(b"")
    add("nothing", "unreadable audio")
    soundfile.write(tmp_path / "zero_samples.wav", np.zeros(0), 16000)
    add("zero_samples", "wrong duration")
    samples = np.full(16000, 0.1, dtype=np.float32)
    samples[5000] = np.nan
    soundfile.write(tmp_path / "nan.wav", samples, 16000, subtype="FLOAT")
    add("nan", "non-finite samples")
    add("missing", "missing file")
    write_tone(tmp_path / "longer.wav", 2.0, seed=1)
    add("longer", "wrong duration")
    write_tone(tmp_path / "shorter.wav", 0.4, seed=1)
    add("shorter", "wrong duration")
    add("good0", "wrong duration", offset=5.0)
    add("good1", None, duration=1.45)  # what rounding and coders do is forgiven
    write_tone(tmp_path / "empty_text.wav", 1.0, seed=1)
    add("empty_text", "empty text", text=" ")
    return SourceConfig(str(write_manifest(tmp_path / "m.jsonl", lines))), reasons


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_utterances_are_skipped_and_counted(broken, workers, caplog):
    source, reasons = broken
    settings = DataConfig(
        train=[source], max_duration=3.0, num_workers=workers, augment=AugmentConfig(speed=SpeedConfig([0.9, 1.1]))
    )
    loader = build_train_loader(settings, seed=1)
    with caplog.at_level(logging.WARNING):
        good = [id for batch in loader for id in batch.ids]
        assert sorted(good) == sorted([f"good{i}" for i in range(20)] + ["good1"])
        list(loader)
    assert loader.seen == 21 + len(reasons)
    assert loader.skipped == {reason: list(reasons.values()).count(reason) for reason in set(reasons.values())}
    logged = [record.getMessage() for record in caplog.records if "skipped utterance" in record.getMessage()]
    assert len(logged) == len(reasons)  # once each, though there were two epochs
    for id, reason in reasons.items():
        assert any(f"{id}: {reason}" in message for message in logged)


def test_an_empty_reference_is_allowed_in_evaluation(broken):
    source, reasons = broken
    loader = build_eval_loader(DataConfig(num_workers=0), [source])
    assert "empty_text" in [id for batch in loader for id in batch.ids]
    assert sum(loader.skipped.values()) == len(reasons) - 1


def test_mostly_bad_data_stops_with_the_counts(broken):
    source, reasons = broken
    loader = build_train_loader(DataConfig(train=[source], num_workers=0, max_bad_share=0.2), seed=1)
    with pytest.raises(DataError, match=rf"{len(reasons)} of {21 + len(reasons)} .*wrong duration"):
        list(loader)


def test_only_bad_data_stops(tmp_path):
    lines = [{"audio_filepath": f"{i}.wav", "duration": 1.0, "text": "x"} for i in range(3)]
    source = SourceConfig(str(write_manifest(tmp_path / "m.jsonl", lines)))
    with pytest.raises(DataError, match="3 of 3 utterances .*3 missing file"):
        list(build_eval_loader(DataConfig(num_workers=0, max_bad_share=1.0), [source]))


def test_unreadable_noise_is_left_out(broken, tmp_path, caplog):
    source, _ = broken
    write_tone(tmp_path / "hum.wav", 1.0, seed=1)
    lines = [{"audio_filepath": f"{name}.wav", "duration": 1.0, "text": ""} for name in ("missing", "hum")]
    noise = SourceConfig(str(write_manifest(tmp_path / "noise.jsonl", lines)))
    augment = AugmentConfig(noise=NoiseConfig([noise], probability=1.0))
    loader = build_train_loader(DataConfig(train=[source], num_workers=0, augment=augment), seed=1)
    assert sum(len(batch) for batch in loader) == 21
    assert "missing is left out of the augmentation" in caplog.text


def cuts_of(path, duration=1.0, **fields):
    """The cuts of one file in a NeMo and in a lhotse manifest."""
    line = {"audio_filepath": path.name, "duration": duration, "text": "x", **fields}
    (nemo,) = read_manifest(write_manifest(path.with_suffix(".jsonl"), [line]))
    recording = Recording.from_file(path)
    end = fields.get("offset", 0.0) + duration
    if "offset" not in fields or end > recording.duration:
        recording = fastcopy(recording, duration=end, num_samples=round(end * recording.sampling_rate))
    return [nemo, recording.to_cut().truncate(offset=fields.get("offset", 0.0), duration=duration)]


def cut_short(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 3])


def write_value(path, value):
    samples = np.full(16000, 0.1, dtype=np.float32)
    samples[5000] = value
    soundfile.write(path, samples, 16000, subtype="FLOAT")


def make_directory(path):
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize(
    ("name", "damage", "reason"),
    [
        ("a.wav", cut_short, "wrong duration: .*0.3.. s"),
        ("a.mp3", cut_short, "wrong duration: .*the file has 0"),
        ("a.ogg", cut_short, "(wrong duration|unreadable audio): "),
        ("a.flac", cut_short, "(wrong duration|unreadable audio): "),
        ("a.wav", lambda path: soundfile.write(path, np.zeros(0), 16000), "wrong duration: .*no samples"),
        ("a.wav", lambda path: soundfile.write(path, np.zeros(300), 16000), "wrong duration: .*the file has 0.019 s"),
        ("a.wav", lambda path: path.write_bytes(b""), "unreadable audio: .*no data"),
        ("a.wav", lambda path: path.write_text("no audio\n" * 99), "unreadable audio: .*no audio that"),
        ("a.mp3", lambda path: path.write_text("no audio\n" * 99), "unreadable audio: .*no audio that"),
        ("a.wav", lambda path: path.write_bytes(path.read_bytes()[:20]), "unreadable audio: "),
        ("a.wav", lambda path: write_value(path, np.nan), "non-finite samples: .*1 of 16000"),
        ("a.wav", lambda path: write_value(path, -np.inf), "non-finite samples: .*1 of 16000"),
        ("a.wav", lambda path: write_value(path, 1e20), "implausible samples: .*up to 1e\\+20"),
        ("a.wav", lambda path: path.unlink(), "missing file: .*a.wav"),
        ("a.wav", make_directory, "unreadable audio: .*a directory"),
    ],
)
def test_each_broken_file_has_its_reason(tmp_path, name, damage, reason):
    path = tmp_path / name
    noise = 0.1 * np.random.default_rng(0).standard_normal(16000)
    soundfile.write(path, noise, 16000)
    cuts = cuts_of(path)
    assert [len(load_samples(cut)) for cut in cuts] == [16000, 16000]
    damage(path)
    for cut in cuts:
        for speed in (1.0, 1.1):
            with pytest.raises(UtteranceError, match=f"^{reason}") as error:
                load_samples(cut, speed)
            assert str(path) in str(error.value)


@pytest.mark.parametrize(
    "said",
    [
        {"duration": 1.6},
        {"duration": 0.4},
        {"duration": 0.5, "offset": 5.0},
        {"duration": 0.5, "offset": 1.0},
        {"duration": 0.9, "offset": 0.7},
    ],
)
def test_a_manifest_that_does_not_fit_the_file(tmp_path, said):
    path = tmp_path / "a.wav"
    write_tone(path, 1.0, seed=1)
    for cut in cuts_of(path, **said):
        with pytest.raises(UtteranceError, match=r"^wrong duration: .*a\.wav: the manifest says .* has 1\.000 s"):
            load_samples(cut)


@pytest.mark.parametrize("said", [{"duration": 1.4}, {"duration": 0.6}, {"duration": 0.9, "offset": 0.5}])
def test_rounding_in_a_manifest_is_forgiven(tmp_path, said):
    path = tmp_path / "a.wav"
    write_tone(path, 1.0, seed=1)
    for cut in cuts_of(path, **said):
        seconds = min(said["duration"], 0.5) if "offset" in said else 1.0
        assert len(load_samples(cut)) == seconds * 16000
        with pytest.raises(UtteranceError, match="^wrong duration"):
            load_samples(cut, tolerance=0.3)


def test_a_segment_asks_nothing_of_the_rest_of_the_file(tmp_path):
    path = tmp_path / "a.wav"
    write_tone(path, 2.0, seed=1)
    part = Recording.from_file(path).to_cut().truncate(offset=0.25, duration=0.5)
    expected = load_samples(part)
    for seconds in (1.0, 3.0):
        recording = fastcopy(part.recording, duration=seconds, num_samples=round(seconds * 16000))
        assert np.array_equal(load_samples(fastcopy(part, recording=recording)), expected)


def test_too_short_for_a_frame(tmp_path):
    path = tmp_path / "a.wav"
    write_tone(path, 0.02, seed=1)
    for cut in cuts_of(path, duration=0.02):
        with pytest.raises(UtteranceError, match=r"^wrong duration: .*a\.wav: 320 samples .* less than one frame"):
            load_samples(cut)


def test_a_command_that_fails(tmp_path):
    path = tmp_path / "a.wav"
    write_tone(path, 1.0, seed=1)
    for cut in cuts_of(path):
        for command, reason in (("exit 3", "exit 3: .*non-zero exit status 3"), ("true", "true: no data")):
            recording = fastcopy(cut.recording, sources=[AudioSource("command", [0], command)])
            with pytest.raises(UtteranceError, match=f"^unreadable audio: {reason}"):
                load_samples(fastcopy(cut, recording=recording))


def test_errors_travel_between_processes():
    error = UtteranceError("wrong duration", "a.wav: no samples")
    same = pickle.loads(pickle.dumps(error))
    assert (same.reason, str(same)) == (error.reason, "wrong duration: a.wav: no samples")
