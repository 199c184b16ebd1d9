"""Projectors of every kind: lengths, batch invariance, gradients, what learns, what cannot be configured."""

import dataclasses

import pytest
import torch
from torch import nn

from speechllm.config import ConfigError, from_dict, override, to_dict
from speechllm.encoder import init_from_data, save_encoder
from speechllm.encoder.zipformer_config import PER_STACK
from speechllm.llm.interface import IGNORE
from speechllm.model.config import EncoderSection, ModelConfig, MoreEncoder
from speechllm.model.speech_llm import SpeechLLM
from speechllm.optim.optimizer import OptimConfig, build_optimizer, parameter_groups
from speechllm.projector import ProjectorConfig, build_projector, one_after_another
from speechllm.rwkv7 import RWKV7, RWKV7Config

KINDS = [
    {"kind": "mlp"},
    {"kind": "conv"},
    {"kind": "qformer"},
    {"kind": "qformer", "num_queries": 3},
    {"kind": "transformer"},
    {"kind": "conformer"},
    {"kind": "rwkv"},
    {"kind": "rwkv", "bidirectional": True},
]
IDS = ["mlp", "conv", "qformer", "qformer-3", "transformer", "conformer", "rwkv", "birwkv"]
every_kind = pytest.mark.parametrize("settings", KINDS, ids=IDS)


def built(settings, k=2, **more):
    """A projector 6 -> 16 whose every weight has an effect."""
    torch.manual_seed(0)
    projector = build_projector(ProjectorConfig(**settings, downsample=k, **more), 6, 16, num_stacks=3)
    for p in projector.parameters():
        if p.dim() > 1 and not p.any():  # RWKV-7 begins with blocks that do nothing
            torch.nn.init.normal_(p, std=0.3)
    return projector


@every_kind
@pytest.mark.parametrize("k", [1, 2, 3, 4, 6])
@pytest.mark.parametrize("training", [False, True])
def test_lengths_and_batch_invariance(settings, k, training):
    projector = built(settings, k).train(training)
    lens = torch.tensor([17, 7, 4, 1])
    x = torch.randn(4, 17, 6)
    for i, n in enumerate(lens):
        x[i, n:] = float("nan")  # what lies beyond a length has no influence
    with torch.no_grad():
        out, out_lens = projector(x, lens)
        assert projector.downsample == k
        assert out_lens.tolist() == projector.output_lens(lens).tolist() == [-(-n // k) for n in lens.tolist()]
        assert out.shape == (4, out_lens[0], 16)
        for i, n in enumerate(lens):
            alone, alone_lens = projector(x[i : i + 1, :n], lens[i : i + 1])
            assert alone.shape[1] == alone_lens.item() == out_lens[i]
            torch.testing.assert_close(out[i, : out_lens[i]], alone[0], rtol=1e-4, atol=1e-5)


@every_kind
@pytest.mark.parametrize("k", [1, 3, 4])
def test_no_frame_is_lost(settings, k):
    """Each of 10 frames, those of a tail too, changes the output, and so does each parameter."""
    projector = built(settings, k)
    x = torch.randn(1, 10, 6, requires_grad=True)
    out, _ = projector(x, torch.tensor([10]))
    (out * torch.randn(out.shape)).sum().backward()
    assert x.grad[0].abs().sum(-1).all()
    assert [n for n, p in projector.named_parameters() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize(("settings", "first", "last"), [(KINDS[6], 3, 3), (KINDS[7], 0, 3)], ids=["rwkv", "birwkv"])
def test_rwkv_reads_in_one_direction_or_both(settings, first, last):
    """The positions that a change at position 3 of 4 reaches."""
    projector = built(settings)
    x = torch.randn(1, 8, 6)
    with torch.no_grad():
        before, _ = projector(x, torch.tensor([8]))
        x[0, 6:] += 1
        after, _ = projector(x, torch.tensor([8]))
    changed = [i for i in range(4) if not torch.allclose(before[0, i], after[0, i], atol=1e-7)]
    assert (changed[0], changed[-1]) == (first, last)


def test_rwkv_blocks_have_the_rules_of_their_own_training():
    projector = built({"kind": "rwkv"})
    rules = {p: g for g in parameter_groups(projector, OptimConfig(lr=1.0, weight_decay=0.1)) for p in g["params"]}
    att = projector.forwards.blocks[1].att
    assert rules[att.w0]["lr"] == 2.0 and rules[att.w1]["weight_decay"] == 0 and rules[att.r_k]["weight_decay"] == 0
    assert rules[att.key.weight]["weight_decay"] == rules[projector.in_proj.weight]["weight_decay"] == 0.1


@every_kind
def test_a_small_model_learns_with_it(settings):
    """Stacks' outputs -> projector -> language model: after a few steps it tells three utterances apart."""
    torch.manual_seed(0)
    stack_outs, lens = torch.randn(3, 3, 15, 6), torch.tensor([15, 15, 9])
    tokens = torch.tensor([[1, 2, 3, 0], [2, 2, 1, 0], [3, 1, 1, 0]])
    config = ProjectorConfig(**settings, downsample=4, layer_weights=True)
    llm = RWKV7(RWKV7Config(1, 32, vocab_size=4, head_size=16))
    model = nn.ModuleDict({"projector": build_projector(config, 6, 32, num_stacks=3), "llm": llm})
    optimizer = build_optimizer(model, OptimConfig(lr=1e-2))
    for _ in range(60):
        audio = model["projector"](stack_outs, lens)
        inputs, inputs_lens = one_after_another((audio[0], llm.embed(tokens)), (audio[1], torch.full((3,), 4)))
        labels = torch.full(inputs.shape[:2], IGNORE)
        for i, n in enumerate(audio[1]):
            labels[i, n - 1 : n + 3] = tokens[i]
        loss = llm.loss(labels, inputs_embeds=inputs, lens=inputs_lens)[0]
        optimizer.zero_grad()
        loss.loss.backward()
        assert all(p.grad is not None for p in model.parameters())
        optimizer.step()
    assert loss.correct == loss.tokens == 12 and loss.loss / loss.tokens < 0.2


def test_a_small_model_learns_from_several_encoders(three_encoders, batch):
    model = three_encoders.train()
    for _, _, encoder in model.encoders():
        init_from_data(encoder, *batch[:2])
    optimizer = build_optimizer(model, OptimConfig(lr=1e-2))
    losses = []
    for _ in range(15):
        out = model(*batch)
        losses.append(out["llm_loss"].item())
        optimizer.zero_grad()
        (out["loss"] / out["tokens"]).backward()
        optimizer.step()
    assert sum(losses[-3:]) < 0.7 * sum(losses[:3])


def test_weighted_stacks():
    projector = built({"kind": "mlp"}, layer_weights=True)
    stacks, lens = torch.randn(3, 2, 5, 6), torch.tensor([5, 3])
    torch.testing.assert_close(projector(stacks, lens), projector.projector(stacks.mean(0), lens))
    with torch.no_grad():
        projector.scores.copy_(torch.tensor([0.0, 100.0, 0.0]))
    torch.testing.assert_close(projector(stacks, lens), projector.projector(stacks[1], lens))
    projector(stacks, lens)[0].square().sum().backward()
    assert projector.scores.grad is not None


def test_one_after_another():
    lens = torch.tensor([2, 0, 3]), torch.tensor([1, 2, 0])
    parts = [torch.randn(3, 3, 4, requires_grad=True), torch.randn(3, 2, 4, requires_grad=True)]
    joined, joined_lens = one_after_another(parts, lens)
    assert joined_lens.tolist() == [3, 2, 3] and joined.shape == (3, 3, 4)
    for i in range(3):
        expected = torch.cat([x[i, : n[i]] for x, n in zip(parts, lens, strict=True)])
        assert torch.equal(joined[i, : joined_lens[i]], expected)
    joined, _ = one_after_another(parts, (lens[0], torch.zeros(3, dtype=torch.long)))
    joined.sum().backward()
    assert parts[1].grad is not None and not parts[1].grad.any()


@pytest.fixture
def three_encoders(model_config):
    """A second and a third encoder of another width, with projectors of other kinds and factors."""
    zipformer = dataclasses.replace(model_config.encoder.zipformer, encoder_dim=[16, 20])
    more = [
        MoreEncoder(EncoderSection(zipformer=zipformer), ProjectorConfig("qformer", downsample=4, layer_weights=True)),
        MoreEncoder(EncoderSection(zipformer=zipformer), ProjectorConfig("conv", downsample=3)),
    ]
    torch.manual_seed(0)
    return SpeechLLM.from_config(dataclasses.replace(model_config, more_encoders=more, encoder_dropout=0.6))


def test_more_encoders_are_batch_invariant_and_stand_one_after_another(three_encoders, batch):
    model = three_encoders.eval()
    features, lens, texts, requests = batch
    whole = model(*batch)
    rows = [
        model(features[i : i + 1, : lens[i]], lens[i : i + 1], texts[i : i + 1], requests[i : i + 1]) for i in range(3)
    ]
    for name, value in whole.items():
        torch.testing.assert_close(value, sum(row[name] for row in rows), rtol=1e-5, atol=1e-4)
    encoder_out, encoder_out_lens, audio_embeds, audio_lens = model.encode(features, lens)
    assert audio_lens.tolist() == [sum(-(-n // k) for k in (2, 4, 3)) for n in encoder_out_lens.tolist()]
    assert encoder_out.shape[2] == 24
    first, first_lens = model.projector(encoder_out, encoder_out_lens)
    torch.testing.assert_close(audio_embeds[1, : first_lens[1]], first[1, : first_lens[1]])
    seconds = torch.tensor([1009])
    positions = model.encode(torch.randn(1, 1009, 80), seconds)[3].item()
    assert positions * model.seconds_per_position == pytest.approx(10, abs=3 * model.seconds_per_position)


def test_encoder_dropout_leaves_one_at_least_and_every_gradient(three_encoders, batch):
    model = three_encoders.train()
    torch.manual_seed(0)
    lens = torch.tensor([[5], [3], [4]]).expand(3, 1000)
    dropped = model._with_encoder_dropout(lens)
    assert ((dropped == 0) | (dropped == lens)).all() and (dropped.sum(0) > 0).all()
    shares = (dropped > 0).float().mean(1)
    # 0.4, and a third of the 0.6 ** 3 in which none would be there
    torch.testing.assert_close(shares, torch.full((3,), 0.4 + 0.6**3 / 3), rtol=0, atol=0.05)
    for _ in range(3):
        model.zero_grad()
        model(*batch)["loss"].backward()
        assert [n for n, p in model.named_parameters() if p.grad is None] == []
    full = model.eval().encode(*batch[:2])[3]
    assert (full >= model.train().encode(*batch[:2])[3]).all()


def test_more_encoders_are_saved_and_loaded(three_encoders, batch, tmp_path):
    model = three_encoders.eval()
    model.save_pretrained(tmp_path / "model")
    loaded = SpeechLLM.from_pretrained(tmp_path / "model")
    assert loaded.config.encoder_dropout == 0.6
    for name, value in loaded(*batch).items():
        assert torch.equal(value, model(*batch)[name])
    assert "| Zipformer encoder 3 |" in (tmp_path / "model" / "README.md").read_text()


def test_one_of_several_encoders_may_be_frozen(three_encoders, model_config, batch, tmp_path):
    save_encoder(three_encoders.encoder, tmp_path / "encoder")
    section = EncoderSection(path=str(tmp_path / "encoder"), freeze=True)
    model = SpeechLLM.from_config(dataclasses.replace(model_config, more_encoders=[MoreEncoder(section)])).train()
    model(*batch)["loss"].backward()
    frozen = {n for n, p in model.named_parameters() if p.grad is None}
    assert frozen == {n for n, _ in model.named_parameters() if n.startswith("more_encoders.0.encoder.")}
    assert not model.more_encoders[0]["encoder"].training and model.encoder.training
    assert [name for name, _, _ in model.encoders()] == ["encoder", "more_encoders.0.encoder"]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"downsample": 0}, "downsample must be at least 1"),
        ({"kind": "lstm"}, "projector.kind: expected one of mlp, conv, qformer, transformer, conformer, rwkv"),
        ({"num_layers": 2}, "num_layers has no effect with kind: mlp; it is for kind: qformer, .*, conformer, rwkv"),
        ({"kind": "transformer", "num_queries": 2}, "num_queries has no effect with kind: transformer"),
        ({"kind": "conv", "bidirectional": True}, "bidirectional has no effect with kind: conv; it is for kind: rwkv"),
        ({"kind": "rwkv", "num_layers": 0}, "num_layers must be at least 1"),
        ({"kind": "rwkv", "hidden_dim": 20, "num_heads": 3}, "num_heads: 3 does not divide hidden_dim: 20"),
    ],
)
def test_settings_that_make_no_sense(settings, said, model_config):
    with pytest.raises(ConfigError, match=said):
        override(model_config, {f"projector.{key}": value for key, value in settings.items()}, "test")


def test_parts_that_do_not_fit(model_config):
    def built_with(**changes):
        return SpeechLLM.from_config(override(model_config, changes, "test"))

    with pytest.raises(ConfigError, match="num_heads: 5 does not divide the language model's width, 32"):
        built_with(projector={"kind": "transformer", "num_heads": 5})
    with pytest.raises(ConfigError, match="encoder_dropout leaves out .* no more_encoders"):
        built_with(encoder_dropout=0.5)
    with pytest.raises(ConfigError, match=r"more_encoders\[0\].projector: .*num_heads has no effect"):
        from_dict(ModelConfig, {"tokenizer": "x", "encoder": {"path": "x"}, "llm": {"path": "x"}, "more_encoders": [
            {"encoder": {"path": "x"}, "projector": {"num_heads": 2}}
        ]})  # fmt: skip
    zipformer = dataclasses.replace(model_config.encoder.zipformer, feature_dim=40)
    more = [MoreEncoder(EncoderSection(zipformer=zipformer))]
    with pytest.raises(ConfigError, match=r"more_encoders\[0\].encoder reads features of 40 bins, model.encoder of 80"):
        SpeechLLM.from_config(dataclasses.replace(model_config, more_encoders=more))
    sizes = to_dict(model_config.encoder.zipformer)
    one_stack = sizes | {key: sizes[key][:1] for key in PER_STACK}
    with pytest.raises(ConfigError, match="layer_weights: the encoder has one stack only"):
        built_with(**{"encoder.zipformer": one_stack, "projector.layer_weights": True})
