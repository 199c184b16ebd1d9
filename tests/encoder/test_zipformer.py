import json
import random
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch.nn.parallel import DistributedDataParallel

from speechllm.encoder import Zipformer, ZipformerConfig, init_from_data, load_encoder, zipformer
from speechllm.encoder.scaling import constant
from speechllm.encoder.zipformer import NonlinAttention, ZipformerLayer
from speechllm.linear import pack_for_inference

GOLDEN = Path(__file__).parent.parent / "golden" / "zipformer"
MODELS = ["offline", "three_stacks", "causal"]


def tiny_config(**kwargs) -> ZipformerConfig:
    values = dict(
        downsampling_factor=[1, 2, 4, 2],
        num_encoder_layers=[1, 2, 1, 1],
        encoder_dim=[32, 40, 48, 40],
        encoder_unmasked_dim=[32, 32, 32, 32],
        feedforward_dim=64,
        num_heads=2,
        query_head_dim=8,
        value_head_dim=4,
        cnn_module_kernel=[15, 15, 7, 15],
        pos_dim=16,
        subsampling_channels=[4, 8, 16],
    )
    return ZipformerConfig(**{**values, **kwargs})


def seeded(config, seed=0):
    random.seed(seed)
    torch.manual_seed(seed)
    return Zipformer(config)


def log_mel(n=4, t=120, dim=80):
    """Something like it: smooth over time and frequency, far from 0."""
    x = torch.randn(n, t + 4, dim + 4).unfold(1, 5, 1).mean(-1).unfold(2, 5, 1).mean(-1)
    return x * 18 - 10


def golden(name):
    return load_encoder(GOLDEN / name), load_file(GOLDEN / name / "io.safetensors")


def utterances(io):
    return [io[f"features.{i}"].float() for i in range(sum(k.startswith("features.") for k in io))]


def alone(encoder, features):
    with torch.no_grad():
        out, lens = encoder(features[None], torch.tensor([len(features)]))
    assert out.shape[1] == lens[0]
    return out[0]


@pytest.mark.parametrize("name", MODELS)
def test_golden_outputs(name):
    encoder, io = golden(name)
    for i, features in enumerate(utterances(io)):
        torch.testing.assert_close(alone(encoder, features), io[f"encoder_out.{i}"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("garbage", [float("nan"), 1e30])
def test_batch_invariance(name, garbage):
    """Each utterance gets what it gets alone, whatever lies in the padding, down to the shortest possible."""
    encoder, io = golden(name)
    batch = utterances(io)
    expected = [io[f"encoder_out.{i}"] for i in range(len(batch))]
    for length in (9, 10, 24, 41, 42, 100, 133):
        batch.append(batch[0][:length])
        expected.append(alone(encoder, batch[-1]))
    lens = torch.tensor([len(f) for f in batch])
    x = torch.full((len(batch), int(lens.max()) + 11, 80), garbage)
    for i, f in enumerate(batch):
        x[i, : len(f)] = f
    with torch.no_grad():
        out, out_lens = encoder(x, lens)
    assert out_lens.tolist() == [len(e) for e in expected] == encoder.output_lens(lens).tolist()
    for o, e in zip(out, expected, strict=True):
        torch.testing.assert_close(o[: len(e)], e, atol=1e-4, rtol=0)


@pytest.mark.parametrize("chunk_size", [-1, 16, 32])
def test_batch_invariance_at_every_chunk_size(chunk_size):
    encoder, io = golden("causal")
    torch.nn.init.normal_(encoder.encoder.encoders[0].layers[0].conv_module1.depthwise_conv.chunkwise_conv_scale)
    features = utterances(io)[0]
    lens = torch.tensor([len(features), 30, 77])
    with torch.no_grad():
        out, out_lens = encoder(features.expand(3, -1, -1), lens, chunk_size=chunk_size)
        for o, n, m in zip(out, lens, out_lens, strict=True):
            single, _ = encoder(features[None, :n], n[None], chunk_size=chunk_size)
            torch.testing.assert_close(o[:m], single[0], atol=1e-4, rtol=0)


@pytest.mark.parametrize("scores_at_once", [1, 300, 5000, 2**18])
@pytest.mark.parametrize("causal", [False, True])
def test_without_gradients_it_computes_the_same_by_other_ways(causal, scores_at_once, monkeypatch):
    """Attention in blocks of queries or utterances, sums and activations in place, the front end as matrix products."""
    monkeypatch.setattr(zipformer, "_SCORES_AT_ONCE", scores_at_once)
    monkeypatch.setattr(zipformer, "_LEAST_QUERIES", 3)
    encoder = seeded(tiny_config(causal=causal)).eval()
    features = log_mel(3, 150)
    before = features.clone()
    for lens in (torch.tensor([150, 150, 150]), torch.tensor([150, 31, 90])):
        plain, _ = encoder(features, lens)
        assert plain.requires_grad
        with torch.no_grad():
            fast, _ = encoder(features, lens)
        torch.testing.assert_close(fast, plain.detach(), atol=1e-4, rtol=1e-4)
    assert torch.equal(features, before)


@pytest.mark.parametrize("weights, tolerance", [("float32", 1e-5), ("bfloat16", 0.05), ("int8", 0.07)])
@torch.no_grad()
def test_packed_for_inference(weights, tolerance):
    encoder = seeded(tiny_config()).eval()
    features, lens = log_mel(), torch.tensor([120, 88, 60, 31])
    expected, expected_lens = encoder(features, lens)
    packed = pack_for_inference(encoder, weights)
    with torch.autocast("cpu", torch.bfloat16, enabled=weights != "float32"):
        out, out_lens = packed(features, lens)
    assert torch.equal(out_lens, expected_lens) and (out - expected).norm() < tolerance * expected.norm()


def test_causal_outputs_do_not_depend_on_later_chunks():
    encoder, io = golden("causal")
    x = utterances(io)[0][None, :200].clone()
    lens = torch.tensor([200])
    with torch.no_grad():
        before, _ = encoder(x, lens)
        x[:, 150:] += 3.0  # the front end sees 9 frames ahead, a chunk has 32 feature frames and 8 output frames
        after, _ = encoder(x, lens)
    torch.testing.assert_close(before[:, :32], after[:, :32], atol=1e-5, rtol=0)
    assert not torch.allclose(before[:, 36:], after[:, 36:])


@pytest.mark.parametrize("name", MODELS)
def test_gradients_are_those_of_the_golden_function(name):
    """Those of the reference, computed without its balancers and whitening, and finite differences in float64."""
    encoder, io = golden(name)
    weight = io["loss_weight.0"].double()
    x = utterances(io)[0].double().requires_grad_()
    encoder.double()
    lens = torch.tensor([len(x)])

    def loss(x):
        return (encoder(x[None], lens)[0][0] * weight).sum()

    loss(x).backward()
    parameters = dict(encoder.named_parameters())
    assert all(p.grad is not None for p in parameters.values())
    mine = {f"grad.0.{name}": p.grad for name, p in parameters.items()} | {"features_grad.0": x.grad}
    golden_gradients = {key: value.double() for key, value in io.items() if "grad" in key}
    assert len(golden_gradients) > 10
    for key, value in golden_gradients.items():
        assert (mine[key] - value).norm() <= 1e-3 * value.norm(), key

    torch.manual_seed(0)
    step = 1e-5
    with torch.no_grad():
        direction = torch.randn_like(x)
        difference = (loss(x + step * direction) - loss(x - step * direction)) / (2 * step)
        torch.testing.assert_close((x.grad * direction).sum(), difference, rtol=1e-6, atol=1e-6)
        directions = {k: torch.randn_like(p) * p.square().mean().sqrt() for k, p in parameters.items()}
        slope = sum((p.grad * directions[k]).sum() for k, p in parameters.items())
        ends = []
        for move in (step, -2 * step):
            for k, p in parameters.items():
                p.add_(directions[k], alpha=move)
            ends.append(loss(x))
        torch.testing.assert_close(slope, (ends[0] - ends[1]) / (2 * step), rtol=1e-5, atol=1e-6)


def test_released_encoder_loads_strictly():
    shapes = {k: tuple(v) for k, v in json.loads((GOLDEN / "tta_m10_shapes.json").read_text()).items()}
    stacks = [f"encoder.encoders.{i}." + ("encoder." if i else "") for i in range(6)]
    first = [f"{s}layers.0." for s in stacks]
    heads = [4, 4, 4, 8, 4, 4]
    config = ZipformerConfig(
        downsampling_factor=[1] + [shapes[f"encoder.encoders.{i}.downsample.bias"][0] for i in range(1, 6)],
        num_encoder_layers=[sum(k.startswith(s) and k.endswith(".norm.bias") for k in shapes) for s in stacks],
        encoder_dim=[shapes[f + "norm.bias"][0] for f in first],
        feedforward_dim=[shapes[f + "feed_forward2.in_proj.bias"][0] for f in first],
        num_heads=heads,
        value_head_dim=[shapes[f + "self_attn1.in_proj.bias"][0] // h for f, h in zip(first, heads, strict=True)],
        pos_dim=shapes[first[0] + "self_attn_weights.linear_pos.weight"][1],
        cnn_module_kernel=[shapes[f + "conv_module1.depthwise_conv.weight"][2] for f in first],
    )
    with torch.device("meta"):
        encoder = Zipformer(config)
        state = {k: torch.empty(s) for k, s in shapes.items()}
    assert {k: tuple(v.shape) for k, v in encoder.state_dict().items()} == shapes
    assert sum(p.numel() for p in state.values()) == pytest.approx(152.7e6, rel=0.001)


@pytest.mark.parametrize("causal", [False, True])
def test_every_parameter_gets_a_gradient_in_every_step(causal):
    encoder = seeded(tiny_config(causal=causal, chunk_size=[8, 16, -1])).train()
    features, lens = log_mel(), torch.tensor([120, 88, 60, 31])
    for seed in range(12):
        random.seed(seed)
        torch.manual_seed(seed)
        encoder.set_batch_count(seed * 500)
        encoder.zero_grad()
        out, out_lens = encoder(features, lens)
        out.square().mean().backward()
        assert out.isfinite().all()
        missing = [k for k, p in encoder.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
        assert missing == []


def test_training_is_reproducible_and_eval_deterministic():
    encoder = seeded(tiny_config(causal=True, chunk_size=[8, 16, -1])).train()
    features, lens = log_mel(), torch.tensor([120, 88, 60, 31])

    def step(seed):
        random.seed(seed)
        torch.manual_seed(seed)
        encoder.zero_grad()
        out, _ = encoder(features, lens)
        out.square().mean().backward()
        return [out] + [p.grad for p in encoder.parameters()]

    assert all(torch.equal(a, b) for a, b in zip(step(1), step(1), strict=True))
    assert not torch.equal(step(1)[0], step(2)[0])
    encoder.eval()
    assert torch.equal(step(1)[0], step(2)[0])


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_checkpointed_layers_change_no_number(causal, autocast):
    """Outputs, gradients and the random numbers that come next, bit for bit, with all regularizers at work."""
    encoder = seeded(tiny_config(causal=causal, chunk_size=[8, 16, -1])).train()
    features, lens = log_mel(), torch.tensor([120, 88, 60, 31])
    layers, calls = [m for m in encoder.modules() if isinstance(m, ZipformerLayer)], []
    for module in (encoder.encoder_embed, *layers):
        module.register_forward_pre_hook(lambda module, _: calls.append(module))

    def step(seed, checkpoint_layers):
        random.seed(seed)
        torch.manual_seed(seed)
        encoder.checkpoint_layers = checkpoint_layers
        encoder.set_batch_count(seed * 1000)
        encoder.zero_grad()
        calls.clear()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            out, _ = encoder(features, lens)
        after_forward = random.getstate(), torch.get_rng_state()
        out.square().sum().backward()
        assert len(calls) == (1 + len(layers)) * (2 if checkpoint_layers else 1)
        assert random.getstate() == after_forward[0] and torch.equal(torch.get_rng_state(), after_forward[1])
        return random.getstate(), [torch.get_rng_state(), out] + [p.grad for p in encoder.parameters()]

    for seed in range(6):
        (python_state, expected), (checkpointed_python_state, checkpointed) = step(seed, False), step(seed, True)
        assert python_state == checkpointed_python_state
        assert all(torch.equal(a, b) for a, b in zip(expected, checkpointed, strict=True))


def saved_bytes(encoder, features, lens):
    """Of the tensors that a forward pass keeps for the gradient, parameters not counted, shared memory once."""
    parameters = {p.untyped_storage().data_ptr() for p in encoder.parameters()}
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        encoder(features, lens)
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept}
    return sum(size for address, size in storages.items() if address not in parameters)


def test_checkpointed_layers_keep_their_inputs_only():
    features, lens = log_mel(), torch.tensor([120, 88, 60, 31])
    kept = {}
    for num_layers in (1, 4):
        encoder = seeded(tiny_config(num_encoder_layers=num_layers)).train()
        for encoder.checkpoint_layers in (False, True):
            random.seed(0)
            kept[num_layers, encoder.checkpoint_layers] = saved_bytes(encoder, features, lens)
    assert kept[1, True] < 0.1 * kept[1, False]
    more_layers = {checkpointed: kept[4, checkpointed] - kept[1, checkpointed] for checkpointed in (False, True)}
    assert more_layers[True] < 0.05 * more_layers[False]


def test_nothing_is_checkpointed_without_gradients(monkeypatch):
    encoder = seeded(tiny_config()).train()
    encoder.checkpoint_layers = True
    monkeypatch.setattr("speechllm.encoder.zipformer.checkpoint", None)  # not to be called
    with torch.no_grad():
        assert encoder(log_mel(), torch.tensor([120, 88, 60, 31]))[0].isfinite().all()


def test_checkpointed_layers_under_distributed_data_parallel():
    """Every parameter is reduced in every step, which DDP demands, and the gradients are those without it."""
    encoder = seeded(tiny_config()).train()
    encoder.checkpoint_layers = True
    features, lens = log_mel(), torch.tensor([120, 88, 60, 31])

    def gradients(model, seed):
        random.seed(seed)
        torch.manual_seed(seed)
        model.zero_grad()
        model(features, lens)[0].square().sum().backward()
        return [p.grad.clone() for p in encoder.parameters()]

    expected = [gradients(encoder, seed) for seed in range(3)]
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model = DistributedDataParallel(encoder)
        for seed in range(3):
            torch.testing.assert_close(gradients(model, seed), expected[seed])
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("causal", [False, True])
def test_it_learns(causal):
    """A frame-wise target that needs the features: the mean over the neighborhood, delayed."""
    encoder = seeded(tiny_config(causal=causal, chunk_size=[16])).train()
    features, lens = log_mel(8, 100), torch.full((8,), 100)
    init_from_data(encoder, features, lens)
    head = torch.nn.Linear(encoder.output_dim, 4)
    optimizer = torch.optim.AdamW([*encoder.parameters(), *head.parameters()], lr=2e-3)
    losses = []
    for i in range(60):
        encoder.set_batch_count(i * 200)
        out, _ = encoder(features, lens)
        target = features[:, 4 : 4 + 4 * out.shape[1] : 4].reshape(8, -1, 4, 20).mean(-1)[:, : out.shape[1]] + 10
        loss = (head(out)[:, : target.shape[1]] - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-10:]) < 0.5 * sum(losses[:10])


def test_bfloat16_autocast():
    encoder = seeded(tiny_config()).train()
    features, lens = log_mel(), torch.tensor([120, 88, 60, 31])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, _ = encoder(features, lens)
    out.float().square().mean().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in encoder.parameters())
    encoder.eval()
    with torch.no_grad():
        exact, _ = encoder(features, lens)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            rough, _ = encoder(features, lens)
    assert (exact - rough).norm() < 0.05 * exact.norm()


def test_init_from_data_keeps_the_signal_alive():
    features, lens = log_mel(8, 150), torch.tensor([150, 140, 130, 120, 110, 100, 90, 80])
    config = tiny_config(encoder_dim=[64, 64, 64, 64], subsampling_channels=[8, 32, 128])

    def front_end_std(encoder):
        embed = encoder.encoder_embed.eval()
        with torch.no_grad():
            return embed.project(embed.convolve(features[:, :80], None)).std(dim=(0, 1)).mean()

    encoder = seeded(config)
    names = {k: v.shape for k, v in encoder.state_dict().items()}
    assert front_end_std(encoder) < 0.2
    init_from_data(encoder, features, lens)
    assert 0.7 < front_end_std(encoder) < 1.3
    assert {k: v.shape for k, v in encoder.state_dict().items()} == names


def test_batch_count_is_part_of_the_state():
    encoder = seeded(tiny_config())
    skip_rate = encoder.encoder.encoders[0].layers[0].bypass.skip_rate
    assert skip_rate.value == 0.5
    encoder.set_batch_count(100000)
    assert skip_rate.value == pytest.approx(0.035)
    other = seeded(tiny_config())
    other.load_state_dict(encoder.state_dict())
    assert other.encoder.encoders[0].layers[0].bypass.skip_rate.value == pytest.approx(0.035)


def test_bad_input():
    encoder = seeded(tiny_config()).eval()
    assert encoder(torch.zeros(1, 9, 80), torch.tensor([9]))[0].shape == (1, 1, encoder.output_dim)
    with pytest.raises(ValueError, match="8 feature frames.*at least 9"):
        encoder(torch.zeros(2, 50, 80), torch.tensor([50, 8]))
    with pytest.raises(ValueError, match="51 frames, but features have 50"):
        encoder(torch.zeros(1, 50, 80), torch.tensor([51]))
    with pytest.raises(ValueError, match=r"\(N, T, 80\)"):
        encoder(torch.zeros(1, 50, 40), torch.tensor([50]))


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(encoder_dim=[32, 40]), r"encoder_dim is \[32, 40\].*1 or 4 numbers"),
        (dict(cnn_module_kernel=[31, 31, 16, 31]), "cnn_module_kernel.*odd"),
        (dict(encoder_unmasked_dim=64), "encoder_unmasked_dim.*no larger"),
        (dict(causal=True, chunk_size=[10]), "chunk_size.*multiples of 4"),
        (dict(num_heads="four"), "num_heads.*whole number"),
        (dict(pos_dim=15), "pos_dim.*even"),
    ],
)
def test_bad_configurations(change, message):
    with pytest.raises(ValueError, match=message):
        tiny_config(**change)


MISTYPED = {
    "encoder_dims": "encoder_dim",
    "encoderDim": "encoder_dim",
    "feed-forward-dim": "feedforward_dim",
    "num_encoder_layer": "num_encoder_layers",
    "downsample_factor": "downsampling_factor",
    "n_heads": "num_heads",
    "num_layers": "num_encoder_layers",
    "cnn_module_kernel_size": "cnn_module_kernel",
    "is_causal": "causal",
    "left_context": "left_context_frames",
    "dropuot": "dropout",
}


@pytest.mark.parametrize("key", MISTYPED)
def test_a_key_that_looks_mistyped_is_an_error(key):
    with pytest.raises(ValueError, match=f"unknown key {key}, did you mean {MISTYPED[key]}\\?"):
        ZipformerConfig.from_dict({"model_type": "zipformer", "architectures": ["Encoder"], key: [1]})


def test_keys_of_frameworks_and_writers_do_not_matter():
    from transformers import PretrainedConfig

    framework = PretrainedConfig(num_labels=3).to_dict()
    older = ["torch_dtype", "torchscript", "use_bfloat16", "num_beams", "num_beam_groups", "max_length", "is_decoder",
             "tie_encoder_decoder", "encoder_no_repeat_ngram_size", "bos_token_id", "hidden_size", "num_hidden_layers",
             "num_attention_heads", "attention_dropout"]  # fmt: skip
    writers = ["auden_version", "auto_map", "_name_or_path", "_attn_implementation", "decoder_dim", "joiner_dim",
               "context_size", "attention_decoder_num_layers", "use_transducer", "use_ctc", "vocab_size",
               "subsampling_factor", "encoder_out_dim", "icefall_git_sha1", "training_args"]  # fmt: skip
    names = {"encoder_name": "m10", "encoder_model": "zipformer", "feature_norm": "utterance", "encoder": "zipformer"}
    others = framework | dict.fromkeys([*older, *writers], 3) | names
    sizes = {"encoder_dim": [192, 256, 512, 768, 512, 256]}
    config = ZipformerConfig.from_dict(others | sizes | {"model_type": "zipformer"})
    assert config == ZipformerConfig.from_dict(sizes | {"model_type": "zipformer"})


def test_absent_keys_have_the_defaults_of_who_wrote_the_rest():
    auden = ZipformerConfig.from_dict({"model_type": "zipformer"})
    assert auden.feedforward_dim == [576, 768, 1152, 1536, 1152, 768]
    assert ZipformerConfig.from_dict({}).feedforward_dim == [512, 768, 1024, 1536, 1024, 768]
    assert {**auden.to_dict(), "feedforward_dim": None} == {**ZipformerConfig().to_dict(), "feedforward_dim": None}
    assert ZipformerConfig.from_dict(ZipformerConfig().to_dict()) == ZipformerConfig()  # what we write has all keys


@pytest.mark.parametrize("name", MODELS)
def test_outputs_of_all_stacks(name):
    """The last is the output; each is what a shorter encoder would give, and the same alone as in a batch."""
    encoder, io = golden(name)
    batch = utterances(io)[:2]
    lens = torch.tensor([len(f) for f in batch])
    x = torch.nn.utils.rnn.pad_sequence(batch, batch_first=True, padding_value=float("nan"))
    with torch.no_grad():
        out, out_lens, stacks = encoder(x, lens, return_stacks=True)
        assert torch.equal(out, encoder(x, lens)[0]) and torch.equal(out, stacks[-1])
        assert stacks.shape == (encoder.num_stacks, *out.shape)
        for i, n in enumerate(out_lens):
            _, _, single = encoder(batch[i][None], lens[i : i + 1], return_stacks=True)
            torch.testing.assert_close(stacks[:, i, :n], single[:, 0], atol=1e-4, rtol=0)
        # of the first stack nothing has followed, so it is as wide as it is
        dim = encoder.config.encoder_dim[0]
        assert stacks[0, ..., :dim].any() and not stacks[0, ..., dim:].any()
        kept = encoder.encoder.encoders
        encoder.encoder.encoders = kept[:-1]
        shorter, _ = encoder(x, lens)
        encoder.encoder.encoders = kept
    torch.testing.assert_close(stacks[-2, ..., : shorter.shape[-1]], shorter)


def test_attention_is_at_times_made_constant_in_training():
    """Of NonlinAttention: uniform over the frames that are attended to, so as often as icefall says."""
    torch.manual_seed(0)
    module = NonlinAttention(8)
    x = torch.randn(2, 5, 8)
    weights = torch.randn(3, 2, 5, 5).masked_fill(torch.arange(5) > 3, -torch.inf).softmax(-1)
    uniform = torch.full((1, 2, 5, 5), 0.25).masked_fill(torch.arange(5) > 3, 0.0)
    expected = module.eval()(x, uniform)
    plain = module(x, weights)
    assert not torch.allclose(plain, expected)
    module.const_attention_rate = constant(1.0)
    assert torch.equal(module(x, weights), plain)  # never in evaluation
    for part in module.modules():
        part.training = isinstance(part, NonlinAttention)  # not the regularizers
    torch.testing.assert_close(module(x, weights), expected)
    rate = NonlinAttention(8).const_attention_rate
    for batch, value in ((0, 0.25), (2000, 0.1375), (4000, 0.025), (1e5, 0.025)):
        rate.set_batch_count(batch)
        assert rate.value == pytest.approx(value)


def test_gradients_of_the_first_convolution_are_scaled_in_training():
    """By a fifth; only of this layer, and so that nothing else changes."""
    torch.manual_seed(0)
    embed = Zipformer(tiny_config()).encoder_embed
    features = log_mel()

    def gradients(training):
        embed.eval().zero_grad()
        embed.training = training  # alone, not its regularizers
        embed.project(embed.convolve(features, None)).square().mean().backward()
        return {name: p.grad.clone() for name, p in embed.named_parameters() if p.grad is not None}

    scaled, plain = gradients(True), gradients(False)
    for name, value in plain.items():
        factor = 0.2 if name.startswith("conv.0.") else 1.0
        torch.testing.assert_close(scaled[name], factor * value)
