"""Language models of transformers: their files and settings, and a SpeechLLM with one. The seam: test_llm.py."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from speechllm.config import from_dict, to_dict
from speechllm.decode.recognizer import RecognizeOptions
from speechllm.decode.search import SearchOptions
from speechllm.encoder import init_from_data
from speechllm.linear import pack_for_inference
from speechllm.llm.adapters import TuneConfig, merge, tune, unmerge
from speechllm.llm.transformers import load_transformers_lm, new_transformers_lm
from speechllm.llm.transformers_files import gpu_kernels_only_on_gpus
from speechllm.model.config import LLMSection, ModelConfig
from speechllm.model.speech_llm import SpeechLLM
from speechllm.optim.optimizer import OptimConfig, build_optimizer
from speechllm.prompt.request import Request
from speechllm.rwkv7 import RWKV7Config
from speechllm.text.tokenizer import load_tokenizer
from speechllm.train.checkpoint import load_trained, trained_state_dict
from tests.conftest import SENTENCES
from tests.hf_tokenizers import train_byte_fallback, train_byte_level
from tests.llm.gguf_files import write_gguf
from tests.llm.tiny_llms import SIZES, TRANSFORMERS, tiny_llm


@pytest.mark.parametrize("kind", TRANSFORMERS)
@torch.no_grad()
def test_logits_are_those_of_transformers(kind):
    model, ids = tiny_llm(kind), torch.randint(0, 40, (2, 20))
    torch.testing.assert_close(model(ids)[0], model.causal_lm(ids).logits)


@pytest.mark.parametrize("kind", TRANSFORMERS)
def test_a_folder_of_transformers_loads_as_it_is(kind, tmp_path):
    model, ids = tiny_llm(kind), torch.randint(0, 40, (2, 20))
    model.causal_lm.save_pretrained(tmp_path)
    loaded = load_transformers_lm(tmp_path)
    assert torch.equal(loaded(ids)[0], model(ids)[0])
    assert loaded.config == model.config and new_transformers_lm(loaded.config).config == model.config
    assert all(p.dtype == torch.float32 for p in loaded.parameters()) and not loaded.training
    trains = {name: p.requires_grad for name, p in model.named_parameters()}  # not so of what balances experts
    assert {name: p.requires_grad for name, p in loaded.named_parameters()} == trains


def test_folders_that_do_not_load(tmp_path):
    tiny_llm("qwen3").causal_lm.save_pretrained(tmp_path)
    config, weights = json.loads((tmp_path / "config.json").read_text()), load_file(tmp_path / "model.safetensors")

    def refused(message: str, error: type = ValueError, **changes) -> None:
        changed = {name: value for name, value in (config | changes).items() if value is not None}
        (tmp_path / "config.json").write_text(json.dumps(changed))
        with pytest.raises(error, match=message):
            load_transformers_lm(tmp_path)

    refused("'qwen33' is no type of a causal .* did you mean qwen3", model_type="qwen33")
    refused("'own' .* for example: llama", model_type="own", auto_map={"AutoModelForCausalLM": "own.Model"})
    refused("hidden_size.*expected int, got str", hidden_size="wide")
    refused("qwen3 is not supported: its weights are quantized", quantization_config={"quant_method": "gptq"})
    for model_type, message in (
        ("llama4_text", "layers of the type chunked_attention; those of the types conv, full_attention, .* are"),
        ("jamba", "its layers go on from what they have read one token at a time only"),
        ("recurrent_gemma", "its layers keep what they have read in themselves"),
        ("mamba", "its forward does not take position_ids"),
        ("bloom", "its forward does not take position_ids"),
        ("bert", "it is an encoder"),
    ):
        refused(f"{model_type} is not supported: {message}", layer_types=None, model_type=model_type)
    refused("(?s)another shape: .*embed_tokens.weight", vocab_size=50)
    refused("(?s)missing: model.layers.2.*", num_hidden_layers=3, layer_types=["full_attention"] * 3)
    save_file(weights | {"model.extra": torch.ones(1)}, tmp_path / "model.safetensors", {"format": "pt"})
    refused("unexpected: model.extra")
    (tmp_path / "model.safetensors").write_bytes(b"hello")
    refused("not safetensors files, or truncated ones")
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    refused("neither model.safetensors nor", FileNotFoundError)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="config.json: not a JSON object"):
        load_transformers_lm(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match="config.json: no such file"):
        load_transformers_lm(tmp_path)


@pytest.mark.parametrize("section, message", [
    ({"transformers": TRANSFORMERS["llama"], "path": "x"}, "either path .* or rwkv7 or transformers"),
    ({}, "either path .* or rwkv7 or transformers"),
    ({"transformers": SIZES}, "llm: .*transformers: model_type: None is no type"),
    ({"transformers": {"model_type": "qwen3", "hiden_size": 8}}, "hiden_size: qwen3 has no such .* mean hidden_size?"),
    ({"transformers": {"model_type": "qwen3", "hidden_size": "8"}}, "hidden_size.* expected int"),
    ({"transformers": TRANSFORMERS["llama"], "freeze": True}, "freeze without path"),
    ({"transformers": TRANSFORMERS["llama"], "tune": {"method": "lora"}}, "tune without path"),
])  # fmt: skip
def test_settings_that_make_no_sense(section, message):
    with pytest.raises(ValueError, match=message):
        from_dict(LLMSection, section, "llm")


def test_older_names_of_settings_are_known():
    model = new_transformers_lm(TRANSFORMERS["llama"] | {"rope_theta": 500.0})
    assert model.config.get("rope_parameters", model.config)["rope_theta"] == 500.0


def test_a_folder_of_an_older_or_newer_transformers_has_its_own_rope(tmp_path):
    model = tiny_llm("llama", rope_theta=500.0, rope_scaling={"rope_type": "linear", "factor": 4.0})
    token_ids = torch.arange(20)[None]
    expected = model(token_ids)[0]
    model.causal_lm.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for name in ("rope_parameters", "rope_theta", "rope_scaling"):
        config.pop(name, None)
    for rope in (
        {"rope_theta": 500.0, "rope_scaling": {"rope_type": "linear", "factor": 4.0}},  # 4.57
        {"rope_parameters": {"rope_theta": 500.0, "rope_type": "linear", "factor": 4.0}},  # 5
    ):
        (tmp_path / "config.json").write_text(json.dumps(config | rope))
        torch.testing.assert_close(load_transformers_lm(tmp_path)(token_ids)[0], expected)
        settings = {**TRANSFORMERS["llama"], **rope}
        assert new_transformers_lm(settings).config == model.config


@pytest.mark.parametrize("frozen", [False, True])
def test_checkpoint_blocks_computes_a_layer_again(frozen):
    model, embeds = tiny_llm("llama").train(not frozen), torch.randn(2, 5, 32, requires_grad=True)
    model.requires_grad_(not frozen)
    model.checkpoint_blocks = True
    labels, computed = torch.randint(0, 40, (2, 5)), []
    model.causal_lm.model.layers[0].mlp.register_forward_pre_hook(lambda *_: computed.append(1))
    model.loss(labels, inputs_embeds=embeds)[0][0].backward()
    assert len(computed) == 2 and embeds.grad.abs().sum() > 0
    assert all(module.training != frozen for module in model.modules())
    _, state = model(inputs_embeds=embeds)
    with pytest.raises(ValueError, match="checkpoint_blocks llama cannot go on from a state"):
        model.loss(labels, inputs_embeds=embeds, state=state)
    with torch.no_grad():
        loss = model.loss(labels, inputs_embeds=embeds, state=state)[0][0]
        torch.testing.assert_close(loss, -model(inputs_embeds=embeds, state=state)[0].log_softmax(-1).gather(
            2, labels[..., None]).sum())  # fmt: skip


@torch.no_grad()
def test_rows_that_have_read_nothing():
    model, ids = tiny_llm("qwen2"), torch.tensor([[1, 2, 3], [4, 5, 6]])
    _, state = model(ids, lens=torch.tensor([3, 0]))
    expected, _ = model(ids[:1])
    nothing = state.select(torch.tensor([1]))
    torch.testing.assert_close(model(ids[:1], state=nothing)[0], expected)
    torch.testing.assert_close(model.step(ids[0, :1], nothing)[0], expected[:, 0])


# ---- in a SpeechLLM -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def hf_tokenizer_dir(tmp_path_factory):
    tags = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|en|>", "<|es|>"]
    return train_byte_level(SENTENCES * 20, tmp_path_factory.mktemp("hf_tokenizer"), 300, tags)


@pytest.fixture
def config(model_config, hf_tokenizer_dir):
    """A tiny Qwen 3 with tied embeddings, of which a few have no token, as in the released ones."""
    llm = LLMSection(transformers=TRANSFORMERS["qwen3"] | {"vocab_size": 310})
    return dataclasses.replace(model_config, tokenizer=str(hf_tokenizer_dir), llm=llm)


def train(model, batch, steps, lr=5e-3):
    optimizer, losses = build_optimizer(model, OptimConfig(lr=lr)), []
    for step in range(steps):
        model.encoder.set_batch_count(step)
        out = model(*batch)
        (out["loss"] / out["tokens"]).backward()
        assert [n for n, p in model.named_parameters() if (p.grad is not None) != p.requires_grad] == []
        nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(out["loss"].item())
    return losses


def texts(model, batch, **search):
    features, lens, _, requests = batch
    options = RecognizeOptions(SearchOptions(**search))
    return [(r.text, r.nbest[0].score) for r in model.recognize(features, lens, requests, options=options)]


def test_a_small_model_learns_and_is_saved_and_loaded(config, batch, tmp_path):
    torch.manual_seed(0)
    model = SpeechLLM.from_config(config)
    init_from_data(model.encoder, *batch[:2])
    losses = train(model, batch, 40)
    assert losses[-1] < 0.1 * losses[0]
    model.eval().save_pretrained(tmp_path / "model")
    assert {p.name for p in (tmp_path / "model").iterdir()} == {
        "README.md", "config.yaml", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    assert "qwen3 language model" in (tmp_path / "model" / "README.md").read_text()
    loaded = SpeechLLM.from_pretrained(tmp_path / "model")
    assert loaded.llm.causal_lm.lm_head.weight is loaded.llm.causal_lm.model.embed_tokens.weight
    assert {n for n, _ in loaded.named_parameters()} == {n for n, _ in model.named_parameters()}
    for name, value in loaded(*batch).items():
        assert torch.equal(value, model(*batch)[name])
    for search in ({}, {"method": "beam", "beam": 3}):
        found = texts(model, batch, **search)
        assert texts(loaded, batch, **search) == [(text, pytest.approx(score, abs=1e-5)) for text, score in found]
        assert [text for text, _ in found] == batch[2]
        for i in range(3):
            rows = [batch[0][i : i + 1, : batch[1][i]], *(column[i : i + 1] for column in batch[1:])]
            assert texts(model, rows, **search) == [(found[i][0], pytest.approx(found[i][1], abs=1e-3))]


@pytest.fixture
def tune_config(config, tmp_path):
    """A function of a method: the configuration of a model whose language model is tuned by it."""
    tiny_llm("qwen3", vocab_size=310).causal_lm.save_pretrained(tmp_path / "llm")

    def configured(method: str, **options):
        llm = LLMSection(path=str(tmp_path / "llm"), tune=TuneConfig(method, **options))
        return from_dict(ModelConfig, to_dict(dataclasses.replace(config, llm=llm)))

    return configured


@pytest.mark.parametrize("method", ["full", "lora", "rslora", "dora", "pissa", "miss", "adalora"])
def test_a_tuned_model_is_saved_merged_and_as_an_adapter(method, tune_config, batch, tmp_path):
    config = tune_config(method)
    model = SpeechLLM.from_config(config).train()
    train(model, batch, 2)
    model.eval()
    expected = model(*batch)["loss"]
    before = {name: t.clone() for name, t in model.llm.state_dict().items()}
    stored = trained_state_dict(model)
    assert any(name.startswith("llm.") for name in stored)
    resumed = SpeechLLM.from_config(config).eval()
    load_trained(resumed, stored, "checkpoint")
    torch.testing.assert_close(resumed(*batch)["loss"], expected)

    model.save_pretrained(tmp_path / "merged")
    assert all(torch.equal(t, before[name]) for name, t in model.llm.state_dict().items())
    merged = SpeechLLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(merged(*batch)["loss"], expected, rtol=1e-4, atol=1e-4)
    assert (tmp_path / "merged" / "adapter").exists() == (method != "full")
    if method == "full":
        return
    frozen = [n for n, p in model.llm.named_parameters() if not p.requires_grad]
    assert frozen and not any(f"llm.{name}" in stored for name in frozen)
    model.save_pretrained(tmp_path / "apart", merged=False)
    assert not any(name.startswith("llm.") for name in load_file(tmp_path / "apart" / "model.safetensors"))
    apart = SpeechLLM.from_pretrained(tmp_path / "apart")
    torch.testing.assert_close(apart(*batch)["loss"], expected, rtol=1e-4, atol=1e-4)
    apart.save_pretrained(tmp_path / "merged again")
    again = SpeechLLM.from_pretrained(tmp_path / "merged again")
    torch.testing.assert_close(again(*batch)["loss"], expected, rtol=1e-4, atol=1e-4)
    merge(model.llm)
    torch.testing.assert_close(model(*batch)["loss"], expected, rtol=1e-4, atol=1e-4)
    unmerge(model.llm)
    assert all(torch.equal(t, before[name]) for name, t in model.llm.state_dict().items())

    ids = torch.randint(0, 310, (2, 9))
    base = AutoModelForCausalLM.from_pretrained(config.llm.path)
    by_peft = peft.PeftModel.from_pretrained(base, tmp_path / "apart" / "adapter").eval()
    torch.testing.assert_close(by_peft(ids).logits, model.llm(ids)[0], rtol=1e-4, atol=1e-4)


def test_loading_prints_nothing(tune_config, tmp_path):
    model = SpeechLLM.from_config(tune_config("lora"))
    model.save_pretrained(tmp_path / "apart", merged=False)
    program = (
        "from speechllm import SpeechLLM\n"
        f"model = SpeechLLM.from_pretrained({str(tmp_path / 'apart')!r})\n"
        "model.llm.checkpoint_blocks = True\n"
        "import torch, warnings\n"
        "embeds = torch.randn(1, 4, model.llm.hidden_size, requires_grad=True)\n"
        "model.llm.loss(torch.zeros(1, 4, dtype=torch.long), inputs_embeds=embeds)[0][0].backward()\n"
        "from transformers.utils import logging\n"
        "assert logging.is_progress_bar_enabled()  # for others\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "always::FutureWarning", "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout == "" and done.stderr == ""


def test_targets(tune_config, tmp_path):
    path = tune_config("lora").llm.path

    def tuned(**options):
        return tune(load_transformers_lm(path), TuneConfig("lora", **options))

    trained = {n.split(".lora")[0].split(".", 4)[4] for n, p in tuned().named_parameters() if p.requires_grad}
    assert trained == {
        *(f"self_attn.{x}_proj" for x in "qkvo"), *(f"mlp.{x}_proj" for x in ("gate", "up", "down")),
    }  # fmt: skip
    trained = [n for n, p in tuned(targets=["q_proj"]).named_parameters() if p.requires_grad]
    assert len(trained) == 4 and all("q_proj" in name for name in trained)
    with pytest.raises(ValueError, match="no matrix of qwen3 is called receptance; there are self_attn.q_proj, "):
        tuned(targets=["receptance"])
    with pytest.raises(ValueError, match="lm_head of qwen3 is its embedding too"):
        tuned(targets=["lm_head"])
    with pytest.raises(ValueError, match="rank: 20 is too high: the target .* of qwen3 is a matrix of 16 x 32"):
        tuned(rank=20)


def test_what_a_released_configuration_says_besides_is_not_saved(tune_config, tmp_path):
    """Released files have notes of other programs, and settings of other versions."""
    config = tune_config("lora")
    path = Path(config.llm.path) / "config.json"
    notes = {"transformers.js_config": {"dtype": "q4"}, "is_llama_config": True, "unk_token_id": 0}
    path.write_text(json.dumps(json.loads(path.read_text()) | notes))
    SpeechLLM.from_config(config).save_pretrained(tmp_path / "model")
    loaded = SpeechLLM.from_pretrained(tmp_path / "model")
    assert notes.keys().isdisjoint(loaded.llm.config) and loaded.llm.config["hidden_size"] == 32


def test_a_frozen_model_stays_as_it_is(tune_config, batch):
    config = tune_config("full")
    config.llm = LLMSection(path=config.llm.path, freeze=True)
    model = SpeechLLM.from_config(config).train()
    assert not model.llm.training
    train(model, batch, 2)
    stored = trained_state_dict(model)
    assert not any(name.startswith("llm.") for name in stored)
    load_trained(model, stored, "checkpoint")


def test_what_only_rwkv7_has(tune_config, config, tmp_path):
    with pytest.raises(ValueError, match="tune.method: state: is for RWKV-7; the language model is qwen3"):
        SpeechLLM.from_config(tune_config("state"))
    for llm in (config.llm, LLMSection(path=tune_config("lora").llm.path)):
        llm = dataclasses.replace(llm, wkv_backend="chunked")
        with pytest.raises(ValueError, match="llm.wkv_backend: chunked is for RWKV-7; the language model is qwen3"):
            SpeechLLM.from_config(dataclasses.replace(config, llm=llm))
    model = SpeechLLM.from_config(config).eval()
    with pytest.raises(ValueError, match="state files are for RWKV-7; the language model is qwen3"):
        model.recognize(
            torch.randn(1, 100, 80), torch.tensor([100]), [Request(language="en")], RecognizeOptions(initial_state="x")
        )
    with pytest.raises(ValueError, match="weights 'int8' are for RWKV-7"):
        pack_for_inference(model.llm, "int8")
    Path(tmp_path / "initial_state.safetensors").touch()
    llm = LLMSection(path=tune_config("lora").llm.path, freeze=True, adapter=str(tmp_path))
    with pytest.raises(ValueError, match="initial_state.safetensors: is for RWKV-7; the language model is qwen3"):
        SpeechLLM.from_config(dataclasses.replace(config, llm=llm))


def test_a_vocabulary_too_small_for_the_tokenizer(config):
    llm = LLMSection(transformers=TRANSFORMERS["qwen3"])
    with pytest.raises(ValueError, match=r"language model \(qwen3\) has a vocabulary of 40, the tokenizer"):
        SpeechLLM.from_config(dataclasses.replace(config, llm=llm))


# ---- the text part of models that also see ------------------------------------------------------------------------

_TEXT = {**SIZES, "vocab_size": 60, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_ROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_IMAGES = {"hidden_size": 32, "intermediate_size": 32, "patch_size": 14}
_QWEN_IMAGES = {**_IMAGES, "depth": 1, "num_heads": 2, "out_hidden_size": 32}
MULTIMODAL = {
    "gemma3": {
        "text_config": {**_TEXT, "layer_types": ["sliding_attention", "full_attention"], "sliding_window": 5},
        "vision_config": {**_IMAGES, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28},
        "mm_tokens_per_image": 4,
    },
    "qwen3_5": {
        "text_config": {
            **_TEXT, "layer_types": ["linear_attention", "full_attention"], "linear_num_key_heads": 2,
            "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
        },
        "vision_config": _QWEN_IMAGES,
    },
    "qwen2_vl": {
        "text_config": {**_TEXT, "rope_parameters": _ROPE},
        "vision_config": {"depth": 1, "embed_dim": 32, "num_heads": 2, "hidden_size": 32, "patch_size": 14},
    },
    "qwen3_vl": {"text_config": {**_TEXT, "rope_parameters": _ROPE}, "vision_config": _QWEN_IMAGES},
    "qwen3_vl_moe": {"text_config": {**_TEXT, "rope_parameters": _ROPE, **_EXPERTS}, "vision_config": _QWEN_IMAGES},
    "llava": {
        "text_config": {"model_type": "llama", **_TEXT},
        "vision_config": {
            "model_type": "clip_vision_model", **_IMAGES, "num_hidden_layers": 1, "num_attention_heads": 2,
            "image_size": 28,
        },
    },
}  # fmt: skip


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", MULTIMODAL)
@torch.no_grad()
def test_the_text_part_of_a_multimodal_folder(kind, tied, tmp_path):
    torch.manual_seed(0)
    with gpu_kernels_only_on_gpus():
        config = AutoConfig.for_model(kind, **MULTIMODAL[kind], tie_word_embeddings=tied)
        whole = AutoModelForImageTextToText.from_config(config).eval()
    for p in whole.parameters():
        p.add_(torch.randn_like(p) * 0.05)
    whole.save_pretrained(tmp_path)
    model, ids = load_transformers_lm(tmp_path), torch.randint(10, 60, (2, 9))
    torch.testing.assert_close(model(ids)[0], whole(input_ids=ids).logits)
    assert sum(p.numel() for p in model.parameters()) < sum(p.numel() for p in whole.parameters())
    again = new_transformers_lm(model.config)
    again.load_state_dict(model.state_dict())
    torch.testing.assert_close(again.eval()(ids)[0], model(ids)[0])
    if not tied:
        weights = load_file(tmp_path / "model.safetensors")
        name = next(name for name in weights if "self_attn.o_proj" in name)
        save_file({n: x for n, x in weights.items() if n != name}, tmp_path / "model.safetensors", {"format": "pt"})
        with pytest.raises(ValueError, match="missing: model.layers.*self_attn.o_proj.weight"):
            load_transformers_lm(tmp_path)


# ---- GGUF ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def gguf_tokenizers(tmp_path_factory, hf_tokenizer_dir):
    byte_fallback = train_byte_fallback(SENTENCES * 20, tmp_path_factory.mktemp("llama") / "tokenizer")
    return {"llama": byte_fallback, "qwen2": hf_tokenizer_dir, "qwen3": hf_tokenizer_dir}


# The largest error of a logit, of some 0.6.
@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("weights, dtype, error", [
    ("F32", torch.float32, 0.0), ("F16", torch.float16, 1e-3), ("BF16", torch.bfloat16, 1e-2),
    ("Q8_0", torch.bfloat16, 0.03), ("Q4_0", torch.bfloat16, 0.3),
])  # fmt: skip
@torch.no_grad()
def test_a_gguf_file_is_a_model_and_a_tokenizer(kind, weights, dtype, error, gguf_tokenizers, tmp_path):
    own = load_tokenizer(gguf_tokenizers[kind])
    torch.manual_seed(0)
    sizes = {"vocab_size": own.vocab_size + 4, "hidden_size": 64, "intermediate_size": 64}
    model = new_transformers_lm(TRANSFORMERS[kind] | sizes).eval()
    path, ids = tmp_path / "model.GGUF", torch.randint(0, own.vocab_size, (2, 9))
    write_gguf(path, model.causal_lm, gguf_tokenizers[kind], weights)
    loaded = load_transformers_lm(path)
    assert loaded.dtype == torch.float32 and load_transformers_lm(path, None).dtype == dtype
    assert (loaded(ids)[0] - model(ids)[0]).abs().max() <= error
    tokenizer = load_tokenizer(path)
    assert tokenizer.eos_id == own.eos_id and tokenizer.vocab_size == loaded.vocab_size
    for text in (" one two three", "one", "  two", "\u00f1and\u00fa <|en|> \u4e2d\n"):
        assert tokenizer.encode(text) == own.encode(text) and tokenizer.decode(own.encode(text)) == own.decode(
            own.encode(text)
        )
    tokenizer.save(tmp_path / "saved")
    assert load_tokenizer(tmp_path / "saved").identity() == tokenizer.identity()


def test_a_speech_llm_from_a_gguf_file(config, batch, gguf_tokenizers, tmp_path, capfd):
    path = tmp_path / "qwen3.gguf"
    base = tiny_llm("qwen3", vocab_size=310, intermediate_size=64)
    write_gguf(path, base.causal_lm, gguf_tokenizers["qwen3"], "Q8_0")
    capfd.readouterr()  # what the writer says is not what is looked at here
    llm = LLMSection(path=str(path), tune=TuneConfig("lora"), dtype="bfloat16")
    model = SpeechLLM.from_config(dataclasses.replace(config, tokenizer=str(path), llm=llm))
    assert "tensors" not in capfd.readouterr().err  # a progress bar
    train(model, batch, 2)
    model.eval().save_pretrained(tmp_path / "apart", merged=False)
    apart = SpeechLLM.from_pretrained(tmp_path / "apart")
    assert apart.llm.dtype == torch.bfloat16
    torch.testing.assert_close(apart(*batch)["loss"], model(*batch)["loss"])


def test_gguf_files_that_do_not_load(gguf_tokenizers, tmp_path, monkeypatch):
    path = tmp_path / "llama.gguf"
    with pytest.raises(FileNotFoundError, match="llama.gguf: no such file"):
        load_transformers_lm(path)
    with pytest.raises(FileNotFoundError, match="llama.gguf: no such file"):
        load_tokenizer(path)
    write_gguf(path, tiny_llm("llama", vocab_size=310).causal_lm, gguf_tokenizers["llama"])
    whole = path.read_bytes()
    for content, message in (
        (b"hello", "not a GGUF file"),
        (whole[:20], "is it whole"),
        (whole[:-4000], "is it whole"),
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f"llama.gguf: .*{message}"):
            load_transformers_lm(path)
    path.write_bytes(whole.replace(b"llama", b"rwkv9"))
    with pytest.raises(ValueError, match="llama.gguf: .*rwkv9"):
        load_transformers_lm(path)
    path.write_bytes(whole)
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    with pytest.raises(ValueError, match=r"needs the package gguf: pip install 'speechllm\[gguf\]'"):
        load_transformers_lm(path)


# ---- attention ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_implementations_of_attention_agree(tmp_path, config):
    model, ids = tiny_llm("qwen3"), torch.randint(0, 40, (2, 9))
    model.causal_lm.save_pretrained(tmp_path)
    for attention in ("sdpa", "eager"):
        loaded = load_transformers_lm(tmp_path, attention=attention)
        assert loaded.causal_lm.config._attn_implementation == attention
        torch.testing.assert_close(loaded(ids)[0], model(ids)[0])
    assert model.causal_lm.config._attn_implementation == "sdpa"
    with pytest.raises(ValueError, match="(?i)flash.?attention"):
        load_transformers_lm(tmp_path, attention="flash_attention_2")
    with pytest.raises(ValueError, match="attention: unknown 'fast', choose from sdpa, flash_attention_2, eager"):
        LLMSection(path="x", attention="fast")
    llm = LLMSection(rwkv7=RWKV7Config(2, 32, 300, head_size=16), attention="sdpa")
    with pytest.raises(ValueError, match="attention: sdpa is for models of transformers; RWKV-7 has none"):
        SpeechLLM.from_config(dataclasses.replace(config, llm=llm))


@pytest.mark.parametrize("kind", ["qwen2", "mistral", "minicpm3", "qwen3_next", "falcon_h1"])
@torch.no_grad()
def test_keys_and_values_go_on_in_the_room_behind_them(kind):
    """Over more tokens than there is room for, while rows change places and leave, the longest one first."""
    model = tiny_llm(kind)
    torch.manual_seed(1)
    prompt, lens, ids = torch.randint(0, 40, (4, 9)), torch.tensor([4, 9, 8, 7]), torch.randint(0, 40, (4, 60))
    _, state = model(prompt, lens=lens)
    rows, memory = torch.arange(4), set()
    read = [prompt[i, :n].tolist() for i, n in enumerate(lens)]
    for t in range(50):
        if t in (3, 20, 30):
            chosen = {3: [2, 2, 0, 1], 20: [0, 2, 1], 30: [1, 2]}[t]
            state, rows = state.select(torch.tensor(chosen), overwrite=True), rows[chosen]
            read = [[*read[i]] for i in chosen]
        logits, state = model.step(ids[rows, t], state, overwrite=True)
        memory.add(next(layer for layer in state.layers if layer.attention).attention[0].data_ptr())
        for i, row in enumerate(rows.tolist()):
            read[i].append(ids[row, t].item())
    for i, row in enumerate(read):
        torch.testing.assert_close(logits[i], model(torch.tensor([row]))[0][0, -1], rtol=1e-4, atol=1e-4)
    if kind != "falcon_h1":  # attention and recurrence in one layer: transformers' own cache
        assert len(memory) <= 3
