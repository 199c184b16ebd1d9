"""Whisper's encoder: the same numbers as transformers', lengths, batch invariance, gradients."""

import dataclasses
import json

import pytest
import torch
import torch.nn.functional as F
from transformers import WhisperConfig, WhisperForConditionalGeneration, WhisperModel

from speechllm.encoder import WhisperEncoder, WhisperEncoderConfig, load_encoder
from speechllm.errors import UserError
from speechllm.linear import Linear, PackedLinear, pack_for_inference
from speechllm.model.config import EncoderSection

TINY = WhisperEncoderConfig(
    d_model=16, encoder_layers=3, encoder_attention_heads=2, encoder_ffn_dim=32, max_source_positions=100
)


@pytest.fixture(scope="module", params=[WhisperForConditionalGeneration, WhisperModel])
def released(request, tmp_path_factory):
    """A model of transformers, the folder that it is in, and the encoder that is loaded from there."""
    torch.manual_seed(0)
    config = WhisperConfig(
        **dataclasses.asdict(TINY), decoder_layers=1, decoder_attention_heads=2, decoder_ffn_dim=16, vocab_size=60,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=3,
    )  # fmt: skip
    theirs = request.param(config).eval()
    folder = tmp_path_factory.mktemp("whisper")
    theirs.half().save_pretrained(folder)
    return theirs.float(), folder, load_encoder(folder)


def whisper_features(n, t, bins=80):
    """With the range that Whisper's have: the loudest at most 2 above the rest."""
    return torch.rand(n, t, bins) * 2 - 1


@pytest.fixture
def encoder():
    torch.manual_seed(0)
    return WhisperEncoder(TINY).eval()


@pytest.mark.parametrize("pad", [False, True])
def test_a_full_length_is_what_transformers_gives(released, pad):
    theirs, _, encoder = released
    encoder.pad_to_max_seconds = pad
    features = whisper_features(2, 200)
    with torch.no_grad():
        out, lens = encoder(features, torch.tensor([200, 200]))
        expected = theirs.get_encoder()(features.transpose(1, 2)).last_hidden_state
    assert not encoder.training and lens.tolist() == [100, 100]
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-5)


def test_padding_to_30_s_is_the_silence_that_whisper_was_trained_with(released):
    """Silence beyond the utterance as the features of silent samples have it."""
    theirs, _, encoder = released
    encoder.pad_to_max_seconds = True
    features = whisper_features(2, 90)
    features[1] -= 5  # so quiet that silence is at the floor
    lens = torch.tensor([90, 51])
    padded = torch.stack([
        F.pad(f[:n], (0, 0, 0, 200 - n), value=max(f[:n].max().item() - 2, -1.5))
        for f, n in zip(features, lens.tolist(), strict=True)
    ])  # fmt: skip
    with torch.no_grad():
        out, out_lens = encoder(features, lens)
        expected = theirs.get_encoder()(padded.transpose(1, 2)).last_hidden_state
    assert out.shape[1] == 45 and out_lens.tolist() == [45, 26]
    for row, right, n in zip(out, expected, out_lens.tolist(), strict=True):
        torch.testing.assert_close(row[:n], right[:n], rtol=0, atol=1e-5)


@pytest.mark.parametrize("pad", [False, True])
@pytest.mark.parametrize("garbage", [float("nan"), 1e30])
def test_batch_invariance(encoder, pad, garbage):
    encoder.pad_to_max_seconds = pad
    lens = torch.tensor([1, 2, 33, 64, 77, 200])
    features = whisper_features(len(lens), 210)
    for row, n in zip(features, lens.tolist(), strict=True):
        row[n:] = garbage
    with torch.no_grad():
        out, out_lens = encoder(features, lens)
        assert out.shape == (len(lens), 100, 16) and torch.equal(out_lens, encoder.output_lens(lens))
        for row, own, n in zip(out, features, lens.tolist(), strict=True):
            alone, alone_lens = encoder(own[None, :n], torch.tensor([n]))
            assert alone.shape[1] == alone_lens == (n + 1) // 2
            torch.testing.assert_close(row[: alone.shape[1]], alone[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("checkpointed", [False, True])
def test_gradients(encoder, checkpointed):
    """Every parameter has one, checkpointed or not the same; padding gets none."""
    features, lens = whisper_features(2, 60).requires_grad_(), torch.tensor([60, 31])
    config = dataclasses.replace(TINY, dropout=0.1)
    dropping = WhisperEncoder(config).train()
    dropping.load_state_dict(encoder.state_dict())
    grads = []
    for dropping.checkpoint_layers in (False, checkpointed):
        torch.manual_seed(1)
        out, out_lens = dropping(features, lens)
        valid = torch.arange(out.shape[1]) < out_lens[:, None]
        weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(0))
        grads.append(torch.autograd.grad((out * weight)[valid].sum(), [features, *dropping.parameters()]))
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
    assert all(g.any() for g in grads[0]) and not grads[0][0][1, 31:].any()


def test_it_learns():
    torch.manual_seed(0)
    encoder = WhisperEncoder(TINY).train()
    head = torch.nn.Linear(16, 2)
    features = whisper_features(8, 40)
    features[::2, :, :20] += 1
    lens, classes = torch.full((8,), 40), torch.arange(8) % 2
    optimizer = torch.optim.Adam([*encoder.parameters(), *head.parameters()], lr=3e-3)
    for _ in range(30):
        out, _ = encoder(features, lens)
        loss = F.cross_entropy(head(out.mean(1)), classes)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.1


def test_only_the_encoder_is_read_and_all_of_it_is_needed(released, tmp_path):
    from safetensors.torch import load_file, save_file

    theirs, folder, encoder = released
    assert {p.dtype for p in encoder.parameters()} == {torch.float32} and all(
        p.requires_grad for p in encoder.parameters()
    )
    torch.testing.assert_close(encoder.layers[2].fc2.weight, theirs.get_encoder().layers[2].fc2.weight)
    weights = load_file(folder / "model.safetensors")
    (name,) = (name for name in weights if name.endswith("encoder.layers.1.fc1.bias"))
    del weights[name]
    save_file(weights, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    with pytest.raises(ValueError, match=r"missing: layers\.1\.fc1\.bias"):
        load_encoder(tmp_path)


def test_errors(encoder):
    with pytest.raises(UserError, match=r"2\.01 s, but this Whisper encoder.* end at 2 s: lower data\.max_seconds"):
        encoder(whisper_features(1, 201), torch.tensor([201]))
    with pytest.raises(ValueError, match=r"must be \(N, T, 80\)"):
        encoder(whisper_features(1, 20, bins=128), torch.tensor([20]))
    for change, message in (
        ({"num_mel_bins": 81}, "num_mel_bins is 81, but must be 80 or 128"),
        ({"encoder_attention_heads": 3}, "d_model is 16, .* multiple of encoder_attention_heads, 3"),
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"d_model": "16"}, "d_model is '16', but must be a whole number"),
        ({"encoder_layers": None}, "encoder_layers is None, but must be a whole number"),
        ({"num_mel_bins": [80]}, "must be a whole number"),
        ({"dropout": "0"}, "dropout is '0', but must be a number"),
    ):
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(TINY, **change)
    with pytest.raises(ValueError, match="d_model, encoder_layers, .* missing"):
        WhisperEncoderConfig.from_released({"num_mel_bins": 80, "model_type": "whisper"})


@pytest.mark.parametrize(
    "prefix", ["audio_encoder.", "audio_encoder.encoder.", "encoder.", "module._orig_mod.speech_encoder."]
)
def test_the_encoder_of_a_composite_model(released, tmp_path, prefix):
    """As Auden has it: WhisperEncoder of transformers, or Auden's own module around it."""
    theirs, _, encoder = released
    weights = {f"{prefix}{name}": t for name, t in theirs.get_encoder().state_dict().items()}
    torch.save({**weights, "llm.model.layers.0.weight": torch.zeros(2)}, tmp_path / "model.pt")
    sizes = dataclasses.asdict(TINY)
    for model_type in ("whisper", "whisper-encoder"):
        config = {"model_type": "lalm", "audio_encoder_config": {"model_type": model_type, **sizes}}
        (tmp_path / "config.json").write_text(json.dumps(config))
        loaded = load_encoder(tmp_path)
        for name, value in encoder.state_dict().items():
            torch.testing.assert_close(loaded.state_dict()[name], value)
        assert EncoderSection(path=str(tmp_path)).min_frames == loaded.min_frames  # known without loading it


def test_the_encoder_alone_as_rwkv_asr_keeps_it(released, tmp_path):
    """whisper_encoder/ with Whisper's config.json, and the names of the bare encoder in pytorch_model.bin; trained,
    they are `whisper_encoder.*` beside two projectors and two RWKV-7."""
    theirs, folder, encoder = released
    bare = theirs.get_encoder().state_dict()
    others = ("projector1.weight", "audio_lm_model.blocks.0.ln1.weight", "llm.blocks.0.ln1.weight")
    trained = {f"whisper_encoder.{name}": x for name, x in bare.items()} | dict.fromkeys(others, torch.zeros(2))
    config = (folder / "config.json").read_text()
    for name, weights in (("alone", bare), ("trained", trained)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(config)
        torch.save(weights, tmp_path / name / "pytorch_model.bin")
        loaded = load_encoder(tmp_path / name).state_dict()
        for key, value in encoder.state_dict().items():
            torch.testing.assert_close(loaded[key], value)


@pytest.mark.parametrize("weights, tolerance", [("float32", 1e-5), ("bfloat16", 0.03), ("int8", 0.04)])
@torch.no_grad()
def test_packed_for_inference(encoder, weights, tolerance):
    features, lens = whisper_features(3, 120), torch.tensor([120, 77, 30])
    expected, _ = encoder(features, lens)
    count = sum(type(module) is Linear for module in encoder.modules())
    packed = pack_for_inference(encoder, weights)
    assert sum(type(module) is PackedLinear for module in packed.modules()) == count == 3 * 6
    with torch.autocast("cpu", torch.bfloat16, enabled=weights != "float32"):
        out, _ = packed(features, lens)
    assert (out - expected).norm() < tolerance * expected.norm()
