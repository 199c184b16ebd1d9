"""Training on stored outputs of a Whisper's frozen part is training on its features."""

import json
import os

import numpy as np
import pytest
import soundfile
import torch

from speechllm.config import ConfigError
from speechllm.data import AugmentConfig, DataConfig, SourceConfig, SpeedConfig, build_eval_loader, read_manifest
from speechllm.encoder import WhisperEncoderConfig
from speechllm.model.config import EncoderSection, ModelConfig
from speechllm.model.encoder_model import EncoderModel
from speechllm.train.encoder_cache import use_encoder_cache


@pytest.fixture
def released(tokenizer_dir, tmp_path):
    torch.manual_seed(0)
    section = EncoderSection(whisper=WhisperEncoderConfig(80, 16, 3, 2, 32, 1500))
    config = ModelConfig(tokenizer=str(tokenizer_dir), encoder=section, llm=None, ctc_weight=1.0)
    EncoderModel.from_config(config).save_pretrained(tmp_path / "released")
    return tmp_path / "released"


def model_of(tokenizer_dir, released, **section):
    torch.manual_seed(1)
    config = ModelConfig(
        tokenizer=str(tokenizer_dir), encoder=EncoderSection(path=str(released), **section), llm=None, ctc_weight=1.0
    )
    return EncoderModel.from_config(config)


@pytest.fixture
def data(tmp_path):
    rng = np.random.default_rng(0)
    lines = []
    for i, seconds in enumerate([1.0, 0.735, 0.502]):  # 50.2 frames: neither even nor whole
        soundfile.write(tmp_path / f"{i}.wav", 0.1 * rng.standard_normal(int(16000 * seconds)), 16000)
        lines.append({"audio_filepath": f"{i}.wav", "duration": seconds, "text": "one two"})
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    source = SourceConfig(str(tmp_path / "train.jsonl"))
    return DataConfig(train=[source], valid=[source], num_workers=0, cache_encoder=str(tmp_path / "cache"))


def only_batch(config, kind):
    (batch,) = build_eval_loader(config, config.valid, feature_kind=kind)
    return batch


@pytest.mark.parametrize(
    ("section", "stored"),
    [
        ({"freeze": True}, 3),
        ({"freeze_stacks": 1}, 1),
        ({"freeze_stacks": 2}, 2),
        ({"freeze": True, "pad_to_30s": True}, 3),
    ],
)
def test_the_same_losses_and_gradients(tokenizer_dir, released, data, section, stored):
    direct, cached = (model_of(tokenizer_dir, released, **section) for _ in range(2))
    batch = only_batch(data, direct.feature_kind)
    config = use_encoder_cache(data, cached)
    assert cached.encoder.stored_stacks == stored and cached.training
    stored_batch = only_batch(config, cached.feature_kind)
    assert stored_batch.features.shape[2] == 8 and stored_batch.ids == batch.ids
    losses = []
    for model, b in ((direct, batch), (cached, stored_batch)):
        out = model(b.features, b.feature_lens, b.texts, b.languages)
        out["loss"].backward()
        losses.append(out["loss"])
    torch.testing.assert_close(*losses, rtol=2e-3, atol=0)  # kept in half precision
    for (name, p), q in zip(direct.named_parameters(), cached.parameters(), strict=True):
        if p.requires_grad:
            torch.testing.assert_close(q.grad, p.grad, rtol=0, atol=0.02 * float(p.grad.abs().max()), msg=name)
        else:
            assert q.grad is None


def test_what_is_saved_hears_audio(tokenizer_dir, released, data, tmp_path):
    model = model_of(tokenizer_dir, released, freeze_stacks=2)
    use_encoder_cache(data, model)
    model.save_pretrained(tmp_path / "model")
    loaded = EncoderModel.from_pretrained(tmp_path / "model")
    assert loaded.feature_kind == "whisper80"
    loaded.transcribe([np.zeros(16000, np.float32) + 0.01])


def test_outputs_are_computed_once_for_the_same_weights_and_data(tokenizer_dir, released, data, tmp_path, monkeypatch):
    first = use_encoder_cache(data, model_of(tokenizer_dir, released, freeze_stacks=2))
    times = {path: os.stat(path).st_mtime_ns for path in (tmp_path / "cache").rglob("*.npy")}
    assert len(times) == 3
    assert use_encoder_cache(data, model_of(tokenizer_dir, released, freeze_stacks=2)) == first
    assert {path: os.stat(path).st_mtime_ns for path in (tmp_path / "cache").rglob("*.npy")} == times
    # another part, other weights, other data
    use_encoder_cache(data, model_of(tokenizer_dir, released, freeze_stacks=1))
    other = model_of(tokenizer_dir, released, freeze_stacks=2)
    other.encoder.conv1.bias.data += 1
    use_encoder_cache(data, other)
    with open(tmp_path / "train.jsonl", "a") as file:
        file.write("\n")
    use_encoder_cache(data, model_of(tokenizer_dir, released, freeze_stacks=2))
    assert len(list((tmp_path / "cache").rglob("*.npy"))) == 4 * 3


def test_what_the_encoder_cannot_hear_is_left_out(tokenizer_dir, released, data, tmp_path, caplog):
    model = model_of(tokenizer_dir, released, freeze=True)
    model.encoder.max_seconds = 0.9
    (source,) = use_encoder_cache(data, model).train
    assert len(list(read_manifest(source))) == 2
    assert "1.00 s, and the encoder hears 0.9 s" in caplog.text


def test_what_cannot_be_cached(tokenizer_dir, released, data, model):
    with pytest.raises(ConfigError, match="nothing of the encoder is frozen"):
        use_encoder_cache(data, model_of(tokenizer_dir, released))
    with pytest.raises(ConfigError, match="attend to the silence too"):
        use_encoder_cache(data, model_of(tokenizer_dir, released, freeze_stacks=1, pad_to_30s=True))
    with pytest.raises(ConfigError, match="one encoder, a Whisper"):
        use_encoder_cache(data, model)
    with pytest.raises(ValueError, match="cache_encoder: precomputed features can only have augment.spec_augment"):
        DataConfig(cache_encoder="x", augment=AugmentConfig(speed=SpeedConfig()))
