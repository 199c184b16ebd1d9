"""Language models whose weights are in half precision, with what trains in float32."""

import dataclasses

import pytest
import torch
from safetensors.torch import load_file

from speechllm.config import from_dict, to_dict
from speechllm.decode.recognizer import RecognizeOptions
from speechllm.linear import PackedLinear
from speechllm.llm.adapters import METHODS, TuneConfig, load_adapter, merge, merged_state_dict, save_adapter, tune
from speechllm.llm.precision import base_dtype, convert
from speechllm.llm.transformers import load_transformers_lm
from speechllm.model.build import load_model, prepare_for_inference, usable_device
from speechllm.model.config import LLMSection, ModelConfig
from speechllm.model.speech_llm import SpeechLLM
from speechllm.rwkv7 import load_rwkv7, save_rwkv7
from speechllm.train.checkpoint import load_trained, trained_state_dict
from speechllm.train.preflight import check_precision
from tests.llm.tiny_llms import tiny_llm

HALF = torch.bfloat16
ADAPTERS = [method for method in METHODS if method not in ("full", "state")]


def half(kind: str, **settings):
    """A model whose weights are in bfloat16, and the same weights in float32."""
    return tiny_llm(kind, **settings).to(HALF), tiny_llm(kind, **settings).to(HALF).float()


def loss_of(model) -> float:
    torch.manual_seed(1)
    ids = torch.randint(0, 40, (8, 24))
    (loss, tokens, _), _ = model.loss(ids, ids)
    return loss.item() / tokens.item()


def some_steps(model, steps: int = 3) -> None:
    torch.manual_seed(1)
    ids = torch.randint(0, 40, (8, 24))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    for _ in range(steps):
        (loss, tokens, _), _ = model.loss(ids, ids)
        (loss / tokens).backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("kind, method", [
    ("rwkv7", "state"), *((kind, method) for kind in ("rwkv7", "qwen2", "qwen3", "llama") for method in ADAPTERS),
])  # fmt: skip
def test_half_a_base_and_a_float32_adapter_have_the_loss_of_float32(kind, method):
    low, full = (tune(model, TuneConfig(method)) for model in half(kind))
    some_steps(low)
    assert low.dtype == HALF and {p.dtype for p in low.parameters() if p.requires_grad} == {torch.float32}
    load_trained(full, trained_state_dict(low), "the other")
    assert loss_of(low) == pytest.approx(loss_of(full), rel=1e-3)
    if method != "adalora":  # which is slow to begin
        assert loss_of(half(kind)[1]) != pytest.approx(loss_of(full), rel=1e-3)


@pytest.mark.parametrize("kind", ["rwkv7", "qwen3"])
def test_the_recurrent_state_is_float32(kind):
    model, _ = half(kind)
    ids = torch.randint(0, 40, (2, 5))
    for autocast in (False, True):
        with torch.no_grad(), torch.autocast("cpu", HALF, enabled=autocast):
            logits, state = model(ids)
            stepped, state = model.step(ids[:, 0], state)
        assert logits.dtype == stepped.dtype == HALF
        if kind == "rwkv7":
            assert state.wkv.dtype == torch.float32


@pytest.mark.parametrize("kind", ["rwkv7", "qwen3"])
def test_merging_rounds_once(kind):
    low, full = (tune(model, TuneConfig("lora")) for model in half(kind))
    some_steps(full)
    load_trained(low, trained_state_dict(full), "the other")
    expected = merged_state_dict(full)
    merged = merged_state_dict(low)
    merge(low)
    for name, weight in merged.items():
        assert weight.dtype == HALF and torch.equal(weight, expected[name].to(HALF)), name
    for name, weight in low.state_dict().items():
        if "lora" not in name:
            assert torch.equal(weight, merged[name.replace(".base_layer", "")])


def test_own_types_of_files(tmp_path):
    low, _ = half("rwkv7")
    save_rwkv7(low, tmp_path / "rwkv7.pth")
    assert load_rwkv7(tmp_path / "rwkv7.pth", base_dtype(None, False, True)).dtype == HALF
    low, _ = half("qwen3")
    low.causal_lm.save_pretrained(tmp_path / "qwen3")
    for name, trains, on_gpu, dtype in (
        (None, False, True, HALF), (None, True, True, torch.float32), (None, False, False, torch.float32),
        ("float16", False, False, torch.float16), ("bfloat16", False, False, HALF),
    ):  # fmt: skip
        assert load_transformers_lm(tmp_path / "qwen3", base_dtype(name, trains, on_gpu)).dtype == dtype


def test_converting_leaves_what_is_float32(tmp_path):
    model = tune(tiny_llm("rwkv7"), TuneConfig("state"))
    convert(model, HALF)
    assert model.dtype == HALF and model.initial_wkv.dtype == torch.float32
    model = tune(tiny_llm("qwen3"), TuneConfig("lora"))
    convert(model, HALF)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    tables = [name for name, x in model.named_buffers() if x.is_floating_point() and x.dtype != torch.float32]
    assert tables == []
    model.causal_lm.lm_head.weight.data.fill_(0)
    assert not model.embed(torch.tensor([1])).any()  # tied weights still are
    save_adapter(model, tmp_path)
    assert loss_of(load_adapter(half("qwen3")[0], tmp_path)) > 0


# ---- in a SpeechLLM -----------------------------------------------------------------------------------------------


@pytest.fixture(params=["rwkv7", "qwen3"])
def config(request, model_config, tmp_path):
    """Of a bfloat16 checkpoint with a float32 adapter, on the CPU."""
    if request.param == "rwkv7":
        low = SpeechLLM.from_config(model_config).llm.to(HALF)
        save_rwkv7(low, tmp_path / "llm.pth")
        path = tmp_path / "llm.pth"
    else:
        low, _ = half("qwen3", vocab_size=300)
        low.causal_lm.save_pretrained(tmp_path / "llm")
        path = tmp_path / "llm"
    llm = LLMSection(path=str(path), tune=TuneConfig("lora"), dtype="bfloat16")
    return from_dict(ModelConfig, to_dict(dataclasses.replace(model_config, llm=llm)))


def trained(config, batch):
    torch.manual_seed(0)
    model = SpeechLLM.from_config(config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    for _ in range(2):
        model.train()(*batch)["loss"].backward()
        assert [n for n, p in model.named_parameters() if (p.grad is not None) != p.requires_grad] == []
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def types(path) -> set[torch.dtype]:
    return {x.dtype for name, x in load_file(path).items() if name.startswith("llm.")}


def test_each_weight_is_stored_and_loaded_in_its_own_type(config, batch, tmp_path):
    model = trained(config, batch)
    full = trained(dataclasses.replace(config, llm=dataclasses.replace(config.llm, dtype="float32")), batch)
    load_trained(full, trained_state_dict(model), "the other")
    loss = model(*batch)["loss"].item()
    assert loss == pytest.approx(full(*batch)["loss"].item(), rel=1e-3)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32} and model.llm.dtype == HALF
    assert {x.dtype for x in trained_state_dict(model).values() if x.is_floating_point()} == {torch.float32}
    model.save_pretrained(tmp_path / "merged")
    assert types(tmp_path / "merged" / "model.safetensors") == {HALF}
    merged = SpeechLLM.from_pretrained(tmp_path / "merged")
    assert merged.llm.dtype == HALF and merged.encoder.encoder_embed.out.weight.dtype == torch.float32
    assert merged(*batch)["loss"].item() == pytest.approx(loss, rel=2e-3)
    model.save_pretrained(tmp_path / "apart", merged=False)
    apart = SpeechLLM.from_pretrained(tmp_path / "apart")
    assert apart.llm.dtype == HALF and apart(*batch)["loss"].item() == loss
    full.save_pretrained(tmp_path / "full")
    assert types(tmp_path / "full" / "model.safetensors") == {torch.float32}


def test_inference_on_the_cpu_is_float32_unless_asked(config, batch, tmp_path):
    trained(config, batch).save_pretrained(tmp_path / "model")
    features, lens, _, requests = batch

    def recognized(**how):
        model = load_model(tmp_path / "model")
        prepare_for_inference(model, "cpu", **how)
        found = model.recognize(features, lens, requests, options=RecognizeOptions(timestamps=True))
        return model, [(r.text, r.ctc_text) for r in found]

    model, expected = recognized()
    assert model.llm.dtype == torch.float32 and model.autocast_dtype is None
    for dtype in ("bfloat16", "float16"):
        model, found = recognized(dtype=dtype)
        assert model.llm.dtype == model.autocast_dtype == getattr(torch, dtype) and len(found) == len(expected)
        encoder_out, _, audio, _ = model.encode(features, lens)
        assert encoder_out.dtype == torch.float32 and audio.isfinite().all()
    with pytest.raises(ValueError, match="--llm-weights int8 packs a model that computes in float32, and not in bf"):
        recognized(dtype="bfloat16", llm_weights="int8")
    for weights in ("bfloat16", "int8"):
        model, found = recognized(encoder_weights=weights)
        assert model.llm.dtype == torch.float32 and model.autocast_dtype == HALF and len(found) == len(expected)
        assert {m.weights for m in model.encoder.modules() if isinstance(m, PackedLinear)} == {weights}
    with pytest.raises(ValueError, match="--encoder-weights float32: with --dtype bfloat16 the encoder computes in bf"):
        recognized(dtype="bfloat16", encoder_weights="float32")
    with pytest.raises(ValueError, match="--encoder-weights int8 is for the CPU, with --dtype float32 or bfloat16"):
        recognized(dtype="float16", encoder_weights="int8")


def test_what_trains_in_place_is_float32(config, model_config):
    for llm in (
        {"path": config.llm.path, "dtype": "bfloat16"},
        {"path": config.llm.path, "tune": {"method": "full"}, "dtype": "float16"},
        {"rwkv7": to_dict(model_config.llm.rwkv7), "dtype": "bfloat16"},
    ):
        with pytest.raises(ValueError, match="dtype: b?float16 is for weights that do not train, and all of these do"):
            from_dict(LLMSection, llm, "llm")
    with pytest.raises(ValueError, match="dtype: unknown 'half', choose from float32, bfloat16, float16"):
        from_dict(LLMSection, {"path": config.llm.path, "freeze": True, "dtype": "half"}, "llm")
    llm = LLMSection(path=config.llm.path)
    assert SpeechLLM.from_config(dataclasses.replace(config, llm=llm)).llm.dtype == torch.float32


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_half_a_base_under_autocast(amp, config, batch):
    computes_in = {"bf16": "bfloat16", "fp16": "float16"}[amp]
    model = SpeechLLM.from_config(dataclasses.replace(config, llm=dataclasses.replace(config.llm, dtype=computes_in)))
    check_precision(amp, model)
    with torch.autocast("cpu", getattr(torch, computes_in)):
        out = model.train()(*batch)
    (out["loss"] / out["tokens"]).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
    other = "fp16" if amp == "bf16" else "bf16"
    with pytest.raises(ValueError, match=f"mixed_precision: {other} is another half .* weights, {computes_in}: set"):
        check_precision(other, model)


def test_devices_that_are_not_there():
    assert usable_device("cpu").type == "cpu"
    for name in ("gpu", "cuda:99", "mps:7"):
        with pytest.raises(ValueError, match=f"--device {name}: cannot be used"):
            usable_device(name)
