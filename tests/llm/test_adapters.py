import copy
import dataclasses
import importlib.util
import json

import pytest
import torch
from torch import nn

from speechllm.errors import UserError
from speechllm.linear import pack_for_inference
from speechllm.llm.adapters import (
    METHODS,
    RankAllocation,
    TuneConfig,
    load_adapter,
    merge,
    merged_state_dict,
    save_adapter,
    tune,
    unmerge,
)
from speechllm.rwkv7 import RWKV7, RWKV7Config, RWKV7State, tuning_table
from speechllm.train.checkpoint import average_state_dicts, load_trained, trained_state_dict
from tests.llm.tiny_llms import tiny_llm

ADAPTERS = [method for method in METHODS if method not in ("full", "state")]
TUNED = [*ADAPTERS, "state"]
CONFIG = RWKV7Config(2, 32, 40, head_size=16, lora_ranks={"decay": 4, "a": 4, "v": 4, "gate": 4})


@pytest.fixture(scope="module")
def base():
    torch.manual_seed(0)
    model = RWKV7(CONFIG).eval()
    for name, p in model.named_parameters():
        if name.endswith(("output.weight", "value.weight")):  # they start at zero
            nn.init.normal_(p, std=0.2)
    return model


def data(rows=3, length=12):
    tokens = torch.randint(1, CONFIG.vocab_size, (rows, length + 1), generator=torch.Generator().manual_seed(1))
    return tokens[:, :-1], tokens[:, 1:]


def train(model, steps=3, lr=1e-2, ranks=None, start=0):
    """Some steps of AdamW; the mean loss at each."""
    torch.manual_seed(start)  # of dropout
    inputs, labels = data()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=0.0)
    losses = []
    model.train()
    for step in range(start + 1, start + steps + 1):
        (loss, tokens, _), _ = model.loss(labels, input_ids=inputs)
        (loss / tokens + (0.0 if ranks is None else ranks.loss())).backward()
        optimizer.step()
        if ranks is not None:
            ranks.step(step)
        optimizer.zero_grad()
        losses.append(loss.item() / tokens.item())
    model.eval()
    return losses


def tuned(base, method, steps=3, **options):
    torch.manual_seed(2)
    model = tune(copy.deepcopy(base), TuneConfig(method, **options))
    ranks = RankAllocation(model, max(steps, 1))
    train(model, steps, ranks=ranks)
    return model


def logits(model, state=None):
    with torch.no_grad():
        return model(input_ids=data()[0], state=state)[0]


def decoded(model):
    """Logits of the same input, a token at a time."""
    inputs = data()[0]
    state, out = model.initial_state(len(inputs)), []
    for token in inputs.T:
        step, state = model.step(token, state)
        out.append(step)
    return torch.stack(out, dim=1)


def assert_close(x, y):
    torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)


# ---- what trains ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_the_start_is_the_base(base, method):
    assert_close(logits(tuned(base, method, steps=0)), logits(base))


@pytest.mark.parametrize("method", METHODS)
def test_what_trains_gets_a_gradient_and_the_base_stays(base, method):
    model = tune(copy.deepcopy(base), TuneConfig(method)).train()
    before = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    assert (len(before) > 0) == (method != "full")
    inputs, labels = data()
    for _ in range(2):  # at first one half of an adapter is zero, and so is the gradient of the other
        model.zero_grad()
        model.loss(labels, input_ids=inputs)[0].loss.backward()
        with torch.no_grad():
            for p in model.parameters():
                if p.requires_grad:
                    p.add_(p.grad, alpha=-1e-3)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert trained and all(p.grad is not None and p.grad.any() for p in trained.values())
    for name, value in before.items():
        p = model.get_parameter(name)
        assert p.grad is None and torch.equal(p, value), name


@pytest.mark.parametrize("method", METHODS)
def test_it_learns(base, method):
    model = tune(copy.deepcopy(base), TuneConfig(method))
    losses = train(model, 15, lr=1e-1 if method == "state" else 1e-2, ranks=RankAllocation(model, 15))
    assert losses[-1] < 0.95 * losses[0]
    assert not torch.allclose(logits(model), logits(base), atol=1e-2)


@pytest.mark.parametrize("method", TUNED)
def test_decoding_is_the_forward_pass(base, method):
    model = tuned(base, method)
    assert_close(decoded(model), logits(model))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("targets", [None, ["blocks.1.att.value"]])
def test_bfloat16_autocast(base, method, targets):
    """An adapter may give float32 where its base gives bfloat16, also in one layer and not in the other."""
    model = tuned(base, method, **({"targets": targets} if targets and method in ADAPTERS else {}))
    expected = logits(model)
    inputs, labels = data()
    model.train()
    with torch.autocast("cpu", torch.bfloat16):
        (loss, tokens, _), _ = model.loss(labels, input_ids=inputs)
        got = model(inputs)[0]
    (loss / tokens).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
    assert (got.float() - expected).norm() <= 0.05 * expected.norm()


@pytest.mark.parametrize("method", ADAPTERS)
def test_dropout_is_for_training_only(base, method, tmp_path):
    model = tuned(base, method, dropout=0.5)
    inputs, _ = data()
    assert torch.equal(logits(model), logits(model))
    save_adapter(model, tmp_path)
    assert_close(logits(load_adapter(copy.deepcopy(base), tmp_path, trainable=True)), logits(model))
    model.train()
    assert not torch.equal(model(input_ids=inputs)[0], model(input_ids=inputs)[0])


def test_blocks_may_be_checkpointed(base):
    plain, checkpointed = tune(copy.deepcopy(base), TuneConfig("miss")), tune(copy.deepcopy(base), TuneConfig("miss"))
    checkpointed.checkpoint_blocks = True
    assert train(plain) == pytest.approx(train(checkpointed), rel=1e-5)


def test_targets(base):
    model = tune(copy.deepcopy(base), TuneConfig("lora", targets=["att.key", "head"]))
    names = {name.split(".lora_")[0] for name, p in model.named_parameters() if p.requires_grad}
    assert names == {"blocks.0.att.key", "blocks.1.att.key", "head"}
    model = tune(copy.deepcopy(base), TuneConfig("miss", targets=["key"]))
    assert sum(p.requires_grad for p in model.parameters()) == 4
    with pytest.raises(UserError, match=r"called keys, gate; there are att.receptance, .*ffn.value, head"):
        tune(copy.deepcopy(base), TuneConfig("lora", targets=["keys", "gate", "att.value"]))
    for options in ({"method": "pissa", "rank": 33}, {"method": "adalora", "rank": 8, "initial_rank": 33}):
        with pytest.raises(UserError, match="tune.rank: 33 is too high: the target blocks.0.* is a matrix of 32 x 32"):
            tune(copy.deepcopy(base), TuneConfig(**options))


@pytest.mark.parametrize("options, message", [
    ({"method": "loar"}, "'loar' is unknown; choose from full, lora"),
    ({"method": "state", "rank": 4}, "rank: method state does not have it; it has quantize"),
    ({"method": "full", "quantize": "int8"}, "quantize: method full does not have it; it has no options"),
    ({"method": "miss", "alpha": 4.0}, "alpha: method miss does not have it"),
    ({"method": "lora", "rank": 0}, "rank must be at least 1"),
    ({"method": "lora", "dropout": 1.0}, "dropout must be in"),
    ({"method": "lora", "targets": []}, "targets: name at least one"),
    ({"method": "dora", "quantize": "nf4"}, "quantize: method dora does not have it"),
    ({"method": "lora", "quantize": "int3"}, "'int3' is unknown; choose from none, int8, nf4"),
    ({"method": "adalora", "rank": 8, "initial_rank": 8}, r"initial_rank must be above rank \(8\)"),
])  # fmt: skip
def test_options_that_do_not_fit(options, message):
    with pytest.raises(ValueError, match=message):
        TuneConfig(**options)


@pytest.mark.parametrize("method", METHODS)
def test_a_config_with_its_defaults_is_a_config(method):
    config = TuneConfig(method)
    assert TuneConfig(**dataclasses.asdict(config)) == config


def test_wrong_order(base):
    model = copy.deepcopy(base)
    with pytest.raises(UserError, match="was not tuned"):
        merge(model)
    tune(model, TuneConfig("lora"))
    with pytest.raises(UserError, match="tuned already"):
        tune(model, TuneConfig("lora"))
    with pytest.raises(UserError, match="not merged"):
        unmerge(model)
    merge(model)
    with pytest.raises(UserError, match="merged already"):
        merge(model)


def test_dora_has_no_direction_for_zeros():
    with pytest.raises(UserError, match=r"blocks.0.att.output has rows of zeros"):
        tune(RWKV7(CONFIG), TuneConfig("dora"))


# ---- merging ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ADAPTERS)
def test_merge_and_unmerge_are_exact(base, method):
    model = tuned(base, method)
    before, out = {k: v.clone() for k, v in model.state_dict().items()}, logits(model)
    merge(model)
    assert_close(logits(model), out)
    assert_close(decoded(model), out)
    merged = model.state_dict()
    assert any(not torch.equal(merged[name], x) for name, x in before.items())
    unmerge(model)
    assert all(torch.equal(model.state_dict()[name], x) for name, x in before.items())
    assert torch.equal(logits(model), out)


@pytest.mark.parametrize("method", ADAPTERS)
def test_a_merged_model_can_be_packed(base, method):
    model = tuned(base, method)
    out = logits(model)
    merge(model)
    assert_close(logits(pack_for_inference(model)), out)


@pytest.mark.parametrize("method", METHODS)
def test_merged_state_dict_is_a_plain_model(base, method):
    model = tuned(base, method)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    weights = merged_state_dict(model)
    plain = RWKV7(CONFIG).eval()
    if method == "state":
        plain.add_initial_state()
    plain.load_state_dict(weights)
    assert_close(logits(plain), logits(model))
    assert all(torch.equal(model.state_dict()[name], x) for name, x in before.items())
    if method in ADAPTERS:
        merge(model)
        for name, x in merged_state_dict(model).items():
            assert_close(x, weights[name])


# ---- mixtures of experts, Conv1D, latent attention --------------------------------------------------------------

_EXPERTS = ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]  # peft takes these names for the experts' stacks


@pytest.mark.parametrize("kind, method, targets", [
    *((kind, "lora", None) for kind in ("qwen2_moe", "deepseek_v3", "ernie4_5_moe", "minicpm3", "qwen3_5", "gpt2")),
    *(("deepseek_v3", method, None) for method in ("dora", "pissa", "miss", "adalora")),
    *(("gpt2", method, None) for method in ("dora", "pissa", "adalora")),
    ("deepseek_v3", "lora", _EXPERTS), ("ernie4_5_moe", "rslora", _EXPERTS), ("deepseek_v3", "miss", _EXPERTS),
])  # fmt: skip
def test_adapters_of_other_matrices_merge(kind, method, targets, tmp_path):
    base = tiny_llm(kind)
    for p in base.parameters():
        p.data.mul_(0.5)
    model = tuned(base, method, rank=4, **({} if targets is None else {"targets": targets}))
    out, before = logits(model), {k: v.clone() for k, v in model.state_dict().items()}
    assert not torch.allclose(out, logits(base), atol=1e-4) or method == "adalora"
    plain = base.untuned()
    plain.load_state_dict(merged_state_dict(model), assign=True)
    plain.tie_weights()
    assert_close(logits(plain.eval()), out)
    save_adapter(model, tmp_path)
    assert_close(logits(load_adapter(copy.deepcopy(base), tmp_path)), out)
    merge(model)
    assert_close(logits(model), out)
    unmerge(model)
    assert all(torch.equal(model.state_dict()[name], x) for name, x in before.items())


def test_default_targets_are_the_matrices_of_the_layers():
    attention = {f"self_attn.{x}_proj" for x in "qkvo"}
    latent = {f"self_attn.{x}" for x in ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")}
    dense = {f"mlp.{x}_proj" for x in ("gate", "up", "down")}
    for kind, expected in (
        ("qwen2", attention | dense), ("qwen2_moe", attention), ("deepseek_v3", latent), ("minicpm3", latent | dense),
        ("gpt2", {"attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"}),
    ):  # fmt: skip
        model = tiny_llm(kind)
        assert set(model.default_targets()) == expected
        tune(model, TuneConfig("lora", rank=4))
        trained = {name.split(".lora_")[0] for name, p in model.named_parameters() if p.requires_grad}
        assert {name.split(".", 4 if kind != "gpt2" else 4)[-1] for name in trained} == expected
        assert len(trained) == 2 * len(expected)  # in both layers


@pytest.mark.parametrize("kind, options, message", [
    ("qwen2_moe", {"targets": ["mlp.shared_expert_gate"]}, "8 is too high: the target .*shared_expert_gate of qwen2_moe"
     " is a matrix of 1 x 32"),
    ("gpt2", {"method": "miss"}, "miss of gpt2: .*Conv1D.* is not supported"),
    ("deepseek_v3", {"method": "dora", "targets": _EXPERTS}, "dora of deepseek_v3: .*ParamWrapper"),
    ("deepseek_v3", {"method": "pissa", "targets": _EXPERTS}, "pissa decomposes matrices, and .*experts is a stack"),
    ("qwen2_moe", {"targets": ["mlp.gate_proj"]}, "no matrix of qwen2_moe is called mlp.gate_proj; there are .*shared"),
])  # fmt: skip
def test_matrices_that_take_no_adapter_are_named(kind, options, message):
    with pytest.raises(UserError, match=f"tune.*{message}"):
        tune(tiny_llm(kind), TuneConfig(**{"method": "lora", **options}))


# ---- files ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ADAPTERS)
def test_an_adapter_is_a_standard_folder(base, method, tmp_path):
    from peft import PeftModel

    model = tuned(base, method)
    save_adapter(model, tmp_path / "adapter", base="models/rwkv7.pth")
    files = sorted(p.name for p in (tmp_path / "adapter").iterdir())
    assert files == ["adapter_config.json", "adapter_model.safetensors"]
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "models/rwkv7.pth"

    elsewhere = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "adapter").get_base_model().eval()
    assert_close(logits(elsewhere), logits(model))
    here = load_adapter(copy.deepcopy(base), tmp_path / "adapter")
    assert_close(logits(here), logits(model))
    assert not any(p.requires_grad for p in here.parameters())
    merge(here)
    assert_close(logits(here), logits(model))


@pytest.mark.parametrize("method", TUNED)
def test_a_loaded_adapter_goes_on_training(base, method, tmp_path):
    save_adapter(tuned(base, method), tmp_path)
    model = load_adapter(copy.deepcopy(base), tmp_path, trainable=True)
    losses = train(model, 10)
    assert losses[-1] < losses[0]
    save_adapter(model, tmp_path / "more")
    assert_close(logits(load_adapter(copy.deepcopy(base), tmp_path / "more")), logits(model))


def test_a_tuned_state_is_a_state_file(base, tmp_path):
    model = tuned(base, "state", steps=5)
    save_adapter(model, tmp_path / "adapter")
    (path,) = (tmp_path / "adapter").iterdir()
    assert path.stat().st_size < 4 * sum(p.numel() for p in model.parameters()) / 10
    state = RWKV7State.load(path)
    assert len(state) == 1
    assert_close(logits(base, state.repeat(3)), logits(model))
    assert_close(logits(load_adapter(copy.deepcopy(base), tmp_path / "adapter")), logits(model))


def test_what_cannot_be_saved_or_loaded(base, tmp_path):
    with pytest.raises(UserError, match="no adapter, all of the model was trained"):
        save_adapter(tune(copy.deepcopy(base), TuneConfig("full")), tmp_path / "full")
    assert not (tmp_path / "full").exists()
    with pytest.raises(FileNotFoundError, match="adapter_config.json: no such file; expected a PEFT folder"):
        load_adapter(copy.deepcopy(base), tmp_path)
    other = RWKV7(dataclasses.replace(CONFIG, n_layer=1))
    wider = RWKV7(dataclasses.replace(CONFIG, n_embd=64, ffn_size=128))
    for method in ("lora", "state"):
        save_adapter(tuned(base, method), tmp_path / method)
    with pytest.raises(UserError, match="unexpected: .*blocks.1.att.key.lora_A"):
        load_adapter(other, tmp_path / "lora")
    with pytest.raises(UserError, match=r"size mismatch for .*blocks.0.*lora_A"):
        load_adapter(wider, tmp_path / "lora")
    for model in (other, wider):
        assert RWKV7(model.config).state_dict().keys() == model.state_dict().keys()
        with pytest.raises(UserError, match="initial_state.safetensors: does not fit the model: .*shape"):
            load_adapter(model, tmp_path / "state")
    (tmp_path / "lora" / "adapter_config.json").write_text('{"peft_type": "LORE"}')
    with pytest.raises(UserError, match="not an adapter that this version of peft reads"):
        load_adapter(copy.deepcopy(base), tmp_path / "lora")


# ---- checkpoints of a training ----------------------------------------------------------------------------------


@pytest.mark.parametrize("method", TUNED)
def test_a_checkpoint_is_small_and_resumes_exactly(base, method):
    model = tuned(base, method)
    state = {name: x.clone() for name, x in trained_state_dict(model).items()}
    assert not any(torch.equal(x, y) for x in state.values() for y in base.state_dict().values() if x.shape == y.shape)
    torch.manual_seed(9)  # another start
    again = tune(copy.deepcopy(base), TuneConfig(method))
    load_trained(again, state, "checkpoint")
    assert torch.equal(logits(again), logits(model))
    assert train(again, start=3) == train(model, start=3)
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("method", ["lora", "pissa", "miss", "adalora", "state"])
def test_checkpoints_average_as_adapters(base, method, tmp_path):
    model = tuned(base, method)
    states = [{name: x.clone() for name, x in trained_state_dict(model).items()}]
    train(model, start=3)
    states.append(trained_state_dict(model))
    average = tune(copy.deepcopy(base), TuneConfig(method))
    load_trained(average, average_state_dicts(states), "average")
    save_adapter(average, tmp_path)
    assert_close(logits(load_adapter(copy.deepcopy(base), tmp_path)), logits(average))
    for name, p in average.named_parameters():
        if p.requires_grad:
            assert_close(p, (states[0][name] + states[1][name]) / 2)


# ---- AdaLoRA ----------------------------------------------------------------------------------------------------


def ranks_left(model):
    return sum(int((p != 0).sum()) for name, p in model.named_parameters() if ".lora_E." in name)


def test_adalora_ends_with_the_average_rank(base, tmp_path):
    model = tune(copy.deepcopy(base), TuneConfig("adalora", rank=2, initial_rank=4))
    matrices = 2 * 6
    ranks = RankAllocation(model, 20)
    train(model, 2, ranks=ranks)
    assert ranks_left(model) == 4 * matrices  # the first tenth
    train(model, 18, ranks=ranks, start=2)
    assert ranks_left(model) == 2 * matrices
    save_adapter(model, tmp_path)
    again = load_adapter(copy.deepcopy(base), tmp_path)
    assert ranks_left(again) == 2 * matrices
    assert_close(logits(again), logits(model))


@pytest.mark.parametrize("stop", [4, 8, 18])
def test_adalora_resumes_exactly(base, stop, tmp_path):
    def fresh():
        torch.manual_seed(2)
        model = tune(copy.deepcopy(base), TuneConfig("adalora", rank=2))
        return model, RankAllocation(model, 20)

    model, ranks = fresh()
    train(model, stop, ranks=ranks)
    weights, state = copy.deepcopy((trained_state_dict(model), ranks.state_dict()))
    save_adapter(model, tmp_path)  # which leaves the model as it is
    train(model, 20 - stop, ranks=ranks, start=stop)
    again, its_ranks = fresh()
    load_trained(again, weights, "checkpoint")
    its_ranks.load_state_dict(state)
    train(again, 20 - stop, ranks=its_ranks, start=stop)
    assert torch.equal(logits(again), logits(model))


def test_other_methods_have_no_ranks_to_allocate(base):
    for model in (copy.deepcopy(base), tune(copy.deepcopy(base), TuneConfig("lora"))):
        ranks = RankAllocation(model, 10)
        ranks.step(1)
        ranks.load_state_dict(ranks.state_dict())
        assert ranks.loss() == 0 and ranks.state_dict() == {}


# ---- quantized bases --------------------------------------------------------------------------------------------

needs_torchao = pytest.mark.skipif(
    torch.cuda.is_available() or importlib.util.find_spec("torchao") is None, reason="torchao is an extra, for the CPU"
)


@pytest.fixture(scope="module")
def wide():
    """Wide enough for the blocks of nf4."""
    torch.manual_seed(0)
    model = RWKV7(dataclasses.replace(CONFIG, n_embd=128, ffn_size=256)).eval()
    for name, p in model.named_parameters():
        if name.endswith(("output.weight", "value.weight")):
            nn.init.normal_(p, std=0.1)
    return model


@needs_torchao
@pytest.mark.parametrize("method", ["lora", "state"])
@pytest.mark.parametrize("quantize, tolerance", [("int8", 0.02), ("nf4", 0.3)])
def test_a_quantized_base(wide, method, quantize, tolerance, tmp_path):
    model = tune(copy.deepcopy(wide), TuneConfig(method, quantize=quantize)).eval()
    expected = logits(wide)
    error = (logits(model) - expected).norm() / expected.norm()
    assert 0 < error < tolerance
    losses = train(model, 10)
    assert losses[-1] < losses[0]
    out = logits(model)
    assert_close(decoded(model), out)
    if method != "state":
        with pytest.raises(UserError, match="the base is quantized"):
            merge(model)

    plain = RWKV7(model.config).eval()
    if method == "state":
        plain.add_initial_state()
    plain.load_state_dict(merged_state_dict(model))
    torch.testing.assert_close(logits(plain), out, rtol=1e-3, atol=1e-3)

    again = tune(copy.deepcopy(wide), TuneConfig(method, quantize=quantize)).eval()
    load_trained(again, {name: x.clone() for name, x in trained_state_dict(model).items()}, "checkpoint")
    assert torch.equal(logits(again), out)

    save_adapter(model, tmp_path)
    difference = logits(load_adapter(copy.deepcopy(wide), tmp_path)) - out
    assert difference.norm() / out.norm() < 2 * tolerance


@needs_torchao
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["qwen2", "qwen3"])  # with biases, with tied embeddings
@pytest.mark.parametrize("quantize, tolerance", [("int8", 0.03), ("nf4", 0.4)])
def test_a_quantized_transformers_model(kind, quantize, tolerance, dtype, tmp_path):
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_key_value_heads": 4}
    base = tiny_llm(kind, **sizes, **({"head_dim": 32} if kind == "qwen3" else {})).to(dtype)
    for p in base.parameters():
        p.data.mul_(0.3)
    model = tune(copy.deepcopy(base), TuneConfig("lora", quantize=quantize)).eval()
    expected = logits(base)
    error = (logits(model) - expected).norm() / expected.norm()
    assert 0 < error < tolerance
    losses = train(model, 10)
    assert losses[-1] < losses[0]
    with pytest.raises(UserError, match="the base is quantized"):
        merge(model)
    weights = merged_state_dict(model)
    assert {x.dtype for x in weights.values()} == {dtype}
    plain = base.untuned()
    plain.load_state_dict(weights, assign=True)
    plain.tie_weights()
    difference = logits(plain.eval()) - logits(model)
    assert difference.norm() < (1e-3 if dtype == torch.float32 else 0.03) * expected.norm()
    again = tune(copy.deepcopy(base), TuneConfig("lora", quantize=quantize)).eval()
    load_trained(again, {name: x.clone() for name, x in trained_state_dict(model).items()}, "checkpoint")
    assert torch.equal(logits(again), logits(model))
    save_adapter(model, tmp_path)
    difference = logits(load_adapter(copy.deepcopy(base), tmp_path)) - logits(model)
    assert difference.norm() / expected.norm() < 2 * tolerance


@pytest.mark.parametrize("kind, quantize, message", [
    ("qwen2_moe", "int8", r"layers.0.mlp.experts.gate_up_proj of qwen2_moe is no torch.nn.Linear"),
    ("gpt2", "int8", r"transformer.h.0.attn.c_attn.weight of gpt2 is no torch.nn.Linear"),
    ("qwen2", "nf4", r"layers.0.self_attn.q_proj of qwen2: nf4 needs a multiple of 16384 weights, it has \(32, 32\)"),
])  # fmt: skip
@needs_torchao
def test_matrices_that_are_not_quantized_are_named(kind, quantize, message):
    with pytest.raises(UserError, match=f"tune.quantize: .*{message}"):
        tune(tiny_llm(kind), TuneConfig("lora", quantize=quantize))


def test_a_missing_package_is_named(base, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "torchao.quantization", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=r"nf4 needs torchao .*speechllm\[quant\]"):
        tune(copy.deepcopy(base), TuneConfig("lora", quantize="nf4"))


# ---- the table --------------------------------------------------------------------------------------------------


def test_the_table_counts_what_is_there(base, tmp_path):
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in tuning_table(CONFIG, rank=4).splitlines()]
    assert rows[0] == ["method", "trained", "share %", "saved", "in training"]
    assert [row[0] for row in rows[2:]] == list(METHODS)
    total = sum(p.numel() for p in base.parameters())
    for method, trained, share, saved, _ in rows[2:]:
        options = {} if method in ("full", "state") else {"rank": 4}
        model = tuned(base, method, steps=0, **options)
        count = sum(p.numel() for p in model.parameters() if p.requires_grad)
        assert (trained, share) == (f"{count:,}", f"{100 * count / total:.3f}")
        if method != "full":
            save_adapter(model, tmp_path / method)
            (file,) = (tmp_path / method).glob("*.safetensors")
            size = float(saved.split()[0]) * {"B": 1, "KiB": 1024, "MiB": 1024**2}[saved.split()[1]]
            assert size == pytest.approx(file.stat().st_size, rel=0.35)  # the file's names count here


def test_the_table_of_a_large_model_takes_no_memory():
    table = tuning_table(RWKV7Config(32, 2560, 65536), methods=["miss", "state"])
    # rank * outputs of the 6 matrices of a block; 40 heads of 64 x 64
    assert f"| miss | {32 * 8 * (5 * 2560 + 10240):,} |" in table and f"| state | {32 * 40 * 64 * 64:,} |" in table
