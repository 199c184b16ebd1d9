"""Broken files of every kind: counted, logged with their ids, left out; a mostly broken set stops."""

import json
import logging

import numpy as np
import pytest
import soundfile

from speechllm.data import (
    AugmentConfig,
    DataConfig,
    DataError,
    ManifestError,
    SourceConfig,
    build_eval_loader,
    build_train_loader,
    load_features,
)

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
    add("missing", "unreadable audio")
    write_tone(tmp_path / "longer.wav", 2.0, seed=1)
    add("longer", "wrong duration")
    write_tone(tmp_path / "shorter.wav", 0.5, seed=1)
    add("shorter", "wrong duration")
    add("good0", "wrong duration", offset=5.0)
    add("good1", None, duration=1.05)  # rounding is forgiven
    write_tone(tmp_path / "empty_text.wav", 1.0, seed=1)
    add("empty_text", "empty text", text=" ")
    return SourceConfig(str(write_manifest(tmp_path / "m.jsonl", lines))), reasons


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_utterances_are_skipped_and_counted(broken, workers, caplog):
    source, reasons = broken
    settings = DataConfig(
        train=[source], max_duration=3.0, num_workers=workers, augment=AugmentConfig(speed=[0.9, 1.1])
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
    with pytest.raises(DataError, match="3 of 3 utterances .*3 unreadable audio"):
        list(build_eval_loader(DataConfig(num_workers=0, max_bad_share=1.0), [source]))


@pytest.mark.parametrize("workers", [0, 2])
def test_invalid_json_in_line_3_is_an_error(broken, tmp_path, workers):
    source, _ = broken
    lines = (tmp_path / "m.jsonl").read_text().splitlines()
    lines[2] = lines[2][:-5]
    (tmp_path / "m.jsonl").write_text("\n".join(lines))
    with pytest.raises(ManifestError, match=r"m\.jsonl:3: invalid JSON"):
        list(build_train_loader(DataConfig(train=[source], num_workers=workers), seed=1))


def test_unreadable_noise_leaves_the_utterance_clean(broken, tmp_path, caplog):
    source, _ = broken
    noise = tmp_path / "noise.jsonl"
    noise.write_text(json.dumps({"audio_filepath": "missing.wav", "duration": 1.0, "text": ""}) + "\n")
    augment = AugmentConfig(noise=[SourceConfig(str(noise))], noise_probability=1.0)
    loader = build_train_loader(DataConfig(train=[source], num_workers=0, augment=augment), seed=1)
    assert sum(len(batch) for batch in loader) == 21
    assert "noise missing is left out" in caplog.text


def test_load_features_names_the_file(tmp_path):
    text = tmp_path / "text.wav"
    text.write_text("this is no audio")
    with pytest.raises(DataError, match="text.wav: cannot be read as audio"):
        load_features([text])
    with pytest.raises(DataError, match="none.wav: no such file"):
        load_features([tmp_path / "none.wav"])
    silence = tmp_path / "silence.wav"
    soundfile.write(silence, np.zeros((8000, 2)), 8000)  # another rate, two channels
    features, lens = load_features([silence, silence])
    assert features.shape == (2, 100, 80) and lens.tolist() == [100, 100]
