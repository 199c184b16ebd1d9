"""The training and decoding scripts, run as a user runs them."""

import importlib
import json
import re
import sys

import pytest
import torch
import yaml
from accelerate import Accelerator
from safetensors.torch import load_file

from speechllm.config import ConfigError, from_dict, load_config, override, to_dict
from speechllm.data import Batch
from speechllm.encoder import WhisperEncoderConfig, save_encoder
from speechllm.errors import UserError
from speechllm.llm.adapters import load_adapter
from speechllm.model.config import EncoderSection, ModelConfig
from speechllm.model.encoder_model import EncoderModel
from speechllm.model.speech_llm import SpeechLLM
from speechllm.prompt.request import Request
from speechllm.rwkv7 import RWKV7, RWKV7Config, load_rwkv7, save_rwkv7
from speechllm.train import preflight
from speechllm.train.checkpoint import load_checkpoint, save_checkpoint
from speechllm.train.stages import init_weights
from tests.conftest import SENTENCES
from tests.hf_tokenizers import train_byte_level
from tests.llm.tiny_llms import tiny_llm
from tests.programs import REPOSITORY, run, run_in_processes


def command(experiment, exp_dir, *settings):
    return [
        sys.executable, "recipes/train.py", "--config", str(experiment), "--exp-dir", str(exp_dir), *settings
    ]  # fmt: skip


@pytest.fixture(scope="module")
def finished(experiment, tmp_path_factory):
    """The folder of a run that was never stopped."""
    exp_dir = tmp_path_factory.mktemp("exp")
    run(*command(experiment, exp_dir, "--tensorboard", "true"))
    return exp_dir


def test_exp_folder_is_as_icefall_users_expect(finished):
    names = {p.name for p in finished.iterdir()}
    assert {
        "checkpoint-8.pt",
        "checkpoint-10.pt",
        "checkpoint-12.pt",
        "best-valid-loss.pt",
        "best-valid-wer.pt",
        "plot.png",
        "epoch-1.pt",
    } <= names
    assert {"config.yaml", "log", "tensorboard"} <= names and "checkpoint-6.pt" not in names
    assert list((finished / "tensorboard").iterdir())
    log = "".join(p.read_text() for p in (finished / "log").iterdir())
    assert "ref: " in log and "hyp: " in log and "the largest batches fit" in log
    assert "Epoch 1, step 3, loss[" in log and "validation: loss: " in log and "ctc_wer: " in log
    assert (finished / "config.yaml").read_text().startswith("# recipes/train.py --config")


def test_a_whisper_encoder_is_trained_in_part(experiment, tmp_path):
    from transformers import WhisperConfig, WhisperModel

    sizes = {"d_model": 16, "encoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 16}
    whisper = WhisperModel(WhisperConfig(**sizes, decoder_layers=1, decoder_attention_heads=2, decoder_ffn_dim=16))
    whisper.save_pretrained(tmp_path / "whisper")
    settings = [
        "--model.encoder", f"{{path: {tmp_path / 'whisper'}, freeze_stacks: 1}}", "--data.num_workers", "0",
        "--train.save_every_n", "1", "--train.valid_every_n", "2", "--optim.warmup_steps", "0",
        "--data.max_seconds", "27",
    ]  # fmt: skip
    run(*command(experiment, tmp_path / "exp", *settings, "--train.num_steps", "2"))
    one, two = (load_checkpoint(tmp_path / f"exp/checkpoint-{step}.pt") for step in (1, 2))
    assert set(one["base_weights"]) == {"encoder"} and one["base_weights"] == two["base_weights"]
    assert not any(name.startswith(("encoder.conv", "encoder.layers.0.")) for name in two["model"])
    assert not torch.equal(one["model"]["encoder.layers.1.fc1.weight"], two["model"]["encoder.layers.1.fc1.weight"])
    failed = run(*command(experiment, tmp_path / "exp", *settings, "--data.max_seconds", "30"), check=False)
    assert failed.returncode and "data.max_seconds: 30, played 0.9 times as fast, is longer than" in failed.stderr


def test_a_frozen_whisper_is_cached_in_training_and_hears_in_decoding(experiment, tmp_path):
    """With the CTC head as the projector; the configuration that training leaves is for decoding too."""
    sizes = WhisperEncoderConfig(80, 16, 2, 2, 32, 1500)
    alone = ModelConfig(
        yaml.safe_load(experiment.read_text())["model"]["tokenizer"], EncoderSection(whisper=sizes), ctc_weight=1.0
    )
    EncoderModel.from_config(alone).save_pretrained(tmp_path / "alone")
    settings = [
        "--model.encoder", f"{{path: {tmp_path / 'alone'}, freeze_stacks: 1}}",
        "--model.projector", "{kind: ctc, downsample: 1}", "--data.cache_encoder", str(tmp_path / "cache"),
        "--data.augment.speed", "null", "--data.augment.volume", "null", "--data.max_seconds", "27",
    ]  # fmt: skip
    exp = tmp_path / "exp"
    run(*command(experiment, exp, *settings, "--train.num_steps", "2"))
    assert len(list((tmp_path / "cache").rglob("*.npy"))) == 24 + 4
    assert "the CTC head is that of" in next((exp / "log").glob("*")).read_text()
    run(sys.executable, "tools/average_ckpt.py", "--exp-dir", str(exp), "--iter", "2", "--avg", "1")
    model = ["--exp-dir", str(exp), "--model", str(exp / "iter-2-avg-1")]
    run(sys.executable, "recipes/decode.py", "--config", str(exp / "config.yaml"), *model)
    assert len(list(exp.rglob("recogs-tones-*.txt"))) == 2  # the language model's and the CTC head's


def test_two_processes_learn_as_one_with_the_same_global_batch(experiment, tmp_path):
    """A step is the whole epoch, so that it has the same utterances whatever the order."""
    torch.manual_seed(0)
    encoder = SpeechLLM.from_config(from_dict(ModelConfig, yaml.safe_load(experiment.read_text())["model"])).encoder
    save_encoder(encoder, tmp_path / "encoder")
    settings = [
        "--model.encoder.path", str(tmp_path / "encoder"), "--model.encoder.zipformer", "null",
        "--model.encoder.freeze", "true", "--data.augment", "{}", "--data.max_cuts", "1", "--data.num_workers", "0",
        "--train.num_steps", "4", "--train.log_every_n", "1", "--train.valid_every_n", "4", "--optim.lr", "1e-2",
    ]  # fmt: skip
    for name, processes in (("one", 1), ("two", 2)):
        accumulate = ["--train.accumulate", str(24 // processes)]
        run_in_processes(processes, *command(experiment, tmp_path / name, *accumulate, *settings))
    one, two = (load_checkpoint(tmp_path / name / "checkpoint-4.pt") for name in ("one", "two"))
    torch.testing.assert_close(two["total"], one["total"], rtol=1e-4, atol=0)
    assert one["loader"][0]["epoch"] == two["loader"][1]["epoch"] and two["best"] == pytest.approx(
        one["best"], rel=1e-4
    )
    for name, value in one["model"].items():
        torch.testing.assert_close(two["model"][name], value, rtol=1e-2, atol=1e-4)


def test_processes_whose_batches_are_all_bad_end_the_epoch_with_the_others(experiment, tmp_path):
    lines = [json.loads(line) for line in (experiment.parent / "train" / "manifest.jsonl").read_text().splitlines()]
    for i, line in enumerate(lines):
        line["audio_filepath"] = str(experiment.parent / "train" / line["audio_filepath"]) if i % 3 else "missing.wav"
    (tmp_path / "m.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    settings = ["--data.train", f"[{{path: {tmp_path}/m.jsonl}}]", "--data.max_cuts", "1", "--train.num_steps", "16"]
    result = run(*command(experiment, tmp_path / "exp", "--world-size", "2", *settings))
    assert "done: 16 steps" in result.stderr and "missing file" in result.stderr
    assert len(load_checkpoint(tmp_path / "exp" / "checkpoint-16.pt")["loader"]) == 2


def test_stages_start_from_one_another(experiment, tmp_path):
    torch.manual_seed(0)
    save_rwkv7(RWKV7(RWKV7Config(2, 32, 300, head_size=16)), tmp_path / "lm.pth")
    config = yaml.safe_load(experiment.read_text())
    config["model"]["llm"] = {"path": str(tmp_path / "lm.pth"), "freeze": True}
    config["train"] |= {"num_steps": 3, "valid_every_n": 3}
    config["stages"] = {
        "projector": {"optim.freeze": ["encoder.encoder_embed"], "train.scan_largest_batches": False},
        "adapter": {
            "model.llm.freeze": False,
            "model.llm.tune": {"method": "lora", "rank": 2},
            "optim.freeze": ["encoder", "projector"],
        },
    }
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config, sort_keys=False))
    del config["stages"]["projector"]["optim.freeze"]  # a part of no file must not be frozen before it is trained
    result = run(*command(path, tmp_path / "exp"), check=False)
    assert result.returncode == 1 and "optim.freeze: encoder.encoder_embed" in result.stderr
    path.write_text(yaml.safe_dump(config, sort_keys=False))
    result = run(*command(path, tmp_path / "exp"))
    first, second = (load_checkpoint(tmp_path / "exp" / name / "checkpoint-3.pt") for name in config["stages"])
    parameters = {name for name in second["model_avg"]["model"] if name.startswith("llm.")}
    assert parameters and all(".lora_" in name for name in parameters)
    assert "projector.out_proj.weight" not in second["model_avg"]["model"]
    # what the first stage has trained comes along, unchanged
    for name, value in first["model"].items():
        if name.startswith(("encoder.", "projector.")):
            assert torch.equal(second["model"][name], value), name
    run(sys.executable, "tools/average_ckpt.py", "--exp-dir", str(tmp_path / "exp" / "adapter"), "--iter", "3",
        "--avg", "1")  # fmt: skip
    model = SpeechLLM.from_pretrained(tmp_path / "exp" / "adapter" / "iter-3-avg-1")
    assert torch.equal(model.projector.out_proj.weight, first["model"]["projector.out_proj.weight"])
    # started again there is nothing to do
    assert "resuming from" in run(*command(path, tmp_path / "exp", "--stage", "adapter")).stderr


def test_a_language_model_of_transformers_is_trained_and_tuned(experiment, tmp_path):
    """Its folder has its tokenizer too, as on the Hugging Face hub; two stages, an average, decoding."""
    tags = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|en|>"]
    train_byte_level(SENTENCES * 20, tmp_path / "lm", 300, tags)
    tiny_llm("qwen3", vocab_size=310).causal_lm.save_pretrained(tmp_path / "lm")
    config = yaml.safe_load(experiment.read_text())
    config["model"] |= {"tokenizer": str(tmp_path / "lm"), "llm": {"path": str(tmp_path / "lm"), "freeze": True}}
    config["model"]["prompt"] = {
        "preset": "qwen",
        "asr": "<|im_start|>user\n{audio}<|{lang}|><|im_end|>\n<|im_start|>assistant\n",
    }
    config["train"] |= {"num_steps": 3, "valid_every_n": 3, "scan_largest_batches": False}
    lora = {"model.llm.freeze": False, "model.llm.tune": {"method": "lora", "rank": 2}}
    config["stages"] = {"projector": {}, "adapter": lora | {"model.llm.checkpoint_blocks": True}}
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config, sort_keys=False))
    run(*command(path, tmp_path / "exp"))
    first, second = (load_checkpoint(tmp_path / "exp" / name / "checkpoint-3.pt") for name in config["stages"])
    assert not any(name.startswith("llm.") for name in first["model"])
    trained = [name for name in second["model"] if name.startswith("llm.")]
    assert trained and all(".lora_" in name for name in trained)
    assert second["base_weights"]["llm"]["path"] == str(tmp_path / "lm")
    model = tmp_path / "exp" / "adapter" / "iter-3-avg-1"
    run(sys.executable, "tools/average_ckpt.py", "--exp-dir", str(model.parent), "--iter", "3", "--avg", "1")
    decode = ["recipes/decode.py", "--config", str(path), "--exp-dir", str(model.parent), "--model", str(model)]
    assert "beam_search_4 WER %" in run(sys.executable, *decode, "--search", "beam").stdout
    refused = run(sys.executable, *decode, "--initial-state", "state.safetensors", check=False)
    assert (
        refused.returncode == 1 and "error: state files are for RWKV-7; the language model is qwen3" in refused.stderr
    )


def test_epochs_bound_a_run_and_are_places_to_go_on_from(experiment, tmp_path):
    bounded = run(*command(experiment, tmp_path, "--num-epochs", "2", "--use-bf16", "--train.num_steps", "1000"))
    epochs = [load_checkpoint(tmp_path / f"epoch-{n}.pt") for n in (1, 2)]
    assert epochs[1]["epoch"] == 3 and f"done: {epochs[1]['step']} steps" in bounded.stderr
    assert epochs[1]["config"]["train"]["mixed_precision"] == "bf16"
    again = run(*command(experiment, tmp_path, "--num-epochs", "2", "--use-bf16", "--train.num_steps", "1000",
                         "--start-epoch", "2"))  # fmt: skip
    assert f"resuming from {tmp_path}/epoch-1.pt" in again.stderr
    second = load_checkpoint(tmp_path / "epoch-2.pt")
    assert second["step"] == epochs[1]["step"]
    assert all(torch.equal(value, second["model"][name]) for name, value in epochs[1]["model"].items())


def test_steps_without_a_finite_gradient_stop_the_run_with_the_batch(experiment, tmp_path):
    settings = ["--optim.lr", "1e30", "--optim.clip_grad_norm", "1e30", "--train.max_bad_steps", "2"]
    result = run(*command(experiment, tmp_path, *settings), check=False)
    assert result.returncode == 1 and "2 steps in a row without a finite gradient" in result.stderr
    (path,) = tmp_path.glob("bad-batch-*-rank0.pt")
    (batch,) = torch.load(path, weights_only=True)
    assert batch["features"].isfinite().all() and len(batch["requests"]) == len(batch["features"])


def test_memory_that_runs_out_names_the_settings():
    class TooLarge(torch.nn.Linear):
        def forward(self, *inputs):
            raise torch.OutOfMemoryError("CUDA out of memory")

    class Loader:
        def largest_batches(self):
            features, lens = torch.zeros(3, 250, 80), torch.tensor([250, 10, 10])
            yield Batch(["a"] * 3, ["a"] * 3, [Request("x")] * 3, [2.5, 0.1, 0.1], features, lens)

    accelerator, model = Accelerator(cpu=True), TooLarge(1, 1)
    with pytest.raises(preflight.MemoryRanOut, match="3 rows of 2.5 s: lower data.max_duration"):
        preflight.scan_largest_batches(accelerator, model, Loader())
    assert not preflight.fits_in_memory(accelerator, model, Loader())


def test_the_largest_duration_that_fits():
    tried = []
    found = preflight.largest_that_fits(lambda seconds: tried.append(seconds) or seconds <= 500, 30.0)
    assert 0.7 * 500 < found <= 0.9 * 500 and max(tried) > 500
    assert preflight.largest_that_fits(lambda seconds: seconds <= 31, 30.0) == 30
    assert preflight.largest_that_fits(lambda seconds: True, 30.0) <= 20000
    with pytest.raises(UserError, match="not even 30 s"):
        preflight.largest_that_fits(lambda seconds: False, 30.0)


@pytest.mark.parametrize("path", sorted((REPOSITORY / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_configurations_are_valid(path, monkeypatch):
    monkeypatch.syspath_prepend(REPOSITORY / "recipes")
    train = importlib.import_module("train")
    config = load_config(train.Config, path)
    for name, changes in config.stages.items():
        override(config, changes, source=f"{path}: stages.{name}")


def test_diagnostics_are_printed(experiment, tmp_path):
    result = run(*command(experiment, tmp_path, "--print-diagnostics"))
    assert "projector" in result.stdout and not list(tmp_path.glob("*.pt"))


def test_average_and_decode(experiment, finished):
    result = run(sys.executable, "tools/average_ckpt.py", "--exp-dir", str(finished), "--iter", "12", "--avg", "3")
    assert "checkpoint-8.pt" in result.stdout and "checkpoint-12.pt" in result.stdout
    folder = finished / "iter-12-avg-3"
    model = SpeechLLM.from_pretrained(folder)
    states = [load_checkpoint(finished / f"checkpoint-{n}.pt")["model"] for n in (8, 10, 12)]
    mean = sum(s["projector.out_proj.weight"].double() for s in states) / 3
    torch.testing.assert_close(model.projector.out_proj.weight.detach().double(), mean, rtol=0, atol=1e-7)

    manifest = experiment.parent / "valid" / "manifest.jsonl"
    lines = [json.loads(line) for line in manifest.read_text().splitlines()]
    translated = manifest.with_name("translated.jsonl")
    translated.write_text("".join(json.dumps(line | {"ast_text": f"Dos {i}!"}) + "\n" for i, line in enumerate(lines)))
    result = run(
        sys.executable, "recipes/decode.py", "--config", str(experiment), "--exp-dir", str(finished),
        "--model", str(folder), "--data.text", "[lowercase, remove_punctuation]",
        "--data.test.translated", json.dumps([{"path": str(translated), "task": "ast", "target_lang": "es"}]),
    )  # fmt: skip
    head, *rows = (re.split("  +", line) for line in result.stdout.strip().splitlines())
    rates = ["WER %", "CER %", "exact %"]
    columns = [f"{search} {rate}" for search in ("greedy_search", "ctc_greedy_search") for rate in rates]
    assert head == ["test set", "language", "words", *columns, "greedy_search BLEU"]
    assert [row[:2] for row in rows] == [
        ["tones", "en"],
        ["tones", "all"],
        ["translated", "en>es"],
        ["translated", "all"],
    ]
    assert [row[6:9] for row in rows[2:]] == [["-"] * 3] * 2 and [row[-1] for row in rows[:2]] == ["-"] * 2
    assert "-" not in [*rows[0][:9], rows[2][-1]]
    kinds = ("errs", "recogs", "wer-by-language", "wer-summary")
    for method, test_sets in (("greedy_search", ["tones", "translated"]), ("ctc_greedy_search", ["tones"])):
        names = {p.name for p in (finished / method).iterdir()}
        assert names == {f"{kind}-{test_set}-iter-12-avg-3.txt" for kind in kinds for test_set in test_sets}
    recogs = (finished / "greedy_search" / "recogs-translated-iter-12-avg-3.txt").read_text().splitlines()
    assert {line.split("\t")[1] for line in recogs[::2]} == {f"ref=['dos', '{i}']" for i in range(len(lines))}


ENCODER_ALONE = {
    "cr_ctc": ["--model.llm", "null", "--model.cr_ctc", "{weight: 0.2}"],
    "transducer": [
        "--model.llm", "null", "--model.ctc_weight", "0", "--model.transducer", "{decoder_dim: 16, joiner_dim: 16}",
    ],
}  # fmt: skip


@pytest.mark.parametrize("kind", ENCODER_ALONE)
def test_an_encoder_alone_is_trained_resumed_averaged_and_decoded(experiment, tmp_path, kind):
    """In the same loop; stopped and started again it ends where a run ends that was never stopped."""
    settings = [
        *ENCODER_ALONE[kind],
        "--train.num_steps",
        "4",
        "--train.valid_every_n",
        "4",
        "--train.save_every_n",
        "2",
    ]
    whole = run(*command(experiment, tmp_path / "whole", *settings))
    assert f"{kind}_loss=" in whole.stderr and "llm_loss" not in whole.stderr and "wer: " in whole.stderr
    (tmp_path / "stopped").mkdir()
    (tmp_path / "whole" / "checkpoint-2.pt").rename(tmp_path / "stopped" / "checkpoint-2.pt")
    assert "resuming from" in run(*command(experiment, tmp_path / "stopped", *settings)).stderr
    one, two = (load_checkpoint(tmp_path / name / "checkpoint-4.pt") for name in ("whole", "stopped"))
    assert all(torch.equal(value, two["model"][name]) for name, value in one["model"].items())
    run(sys.executable, "tools/average_ckpt.py", "--exp-dir", str(tmp_path / "stopped"), "--iter", "4", "--avg", "2")
    folder = tmp_path / "stopped" / "iter-4-avg-2"
    decode = [
        sys.executable, "recipes/decode.py", "--config", str(experiment), "--exp-dir", str(tmp_path / "stopped"),
        "--model", str(folder), *ENCODER_ALONE[kind],
    ]  # fmt: skip
    table = run(*decode).stdout
    names = {path.name for path in (tmp_path / "stopped").glob("*_search")}
    assert names == {"ctc_greedy_search" if kind == "cr_ctc" else "greedy_search"} and table.count("WER %") == 1
    wrong = run(*decode, "--search", "beam", check=False)
    assert wrong.returncode == 1 and "method: beam is for a language model" in wrong.stderr
    wav = experiment.parent / "valid" / "0.wav"
    transcribe = [sys.executable, "-m", "speechllm.cli", "transcribe", str(wav), "--model", str(folder)]
    words = json.loads(run(*transcribe, "--format", "json").stdout)
    assert words["duration"] > 0
    # and a language model is trained on it; what is frozen stays, whether it has a file or not
    settings = ["--model.encoder.path", str(folder), "--optim.freeze", "[encoder, projector]", "--train.num_steps", "1"]
    exp = tmp_path / "llm"
    assert "encoder 0." in run(*command(experiment, exp, "--model.encoder.zipformer", "null", *settings)).stderr
    run(sys.executable, "tools/average_ckpt.py", "--exp-dir", str(exp), "--iter", "1", "--avg", "1")
    weights = load_file(exp / "iter-1-avg-1" / "model.safetensors")
    for name, value in load_file(folder / "model.safetensors").items():
        assert not name.startswith("encoder.") or torch.equal(weights[name], value)
    projector = {n: v for n, v in load_checkpoint(exp / "checkpoint-1.pt")["model"].items() if "projector" in n}
    assert projector and all(torch.equal(weights[name], value) for name, value in projector.items())


def test_a_quantized_language_model_is_tuned_by_two_processes(experiment, tmp_path):
    torch.manual_seed(0)
    save_rwkv7(RWKV7(RWKV7Config(2, 32, 300, head_size=16)), tmp_path / "lm.pth")
    settings = [
        "--model.llm.path", str(tmp_path / "lm.pth"), "--model.llm.rwkv7", "null", "--model.llm.tune.method", "lora",
        "--model.llm.tune.quantize", "int8", "--train.num_steps", "4",
    ]  # fmt: skip
    result = run_in_processes(2, *command(experiment, tmp_path / "exp", *settings))
    assert "processes: 2" in result.stderr
    state = load_checkpoint(tmp_path / "exp" / "checkpoint-4.pt")
    names = [name for name in state["model"] if name.startswith("llm.")]
    assert names and all(".lora_" in name for name in names)
    assert state["base_weights"]["llm"]["path"] == str(tmp_path / "lm.pth")

    run(sys.executable, "tools/average_ckpt.py", "--exp-dir", str(tmp_path / "exp"), "--iter", "4", "--avg", "2")
    folder = tmp_path / "exp" / "iter-4-avg-2"
    merged = SpeechLLM.from_pretrained(folder).llm
    adapted = load_adapter(load_rwkv7(tmp_path / "lm.pth"), folder / "adapter")
    ids = torch.randint(0, 300, (1, 20))
    # the merged weights are those of the quantized base
    torch.testing.assert_close(merged(ids)[0], adapted(ids)[0], rtol=0.05, atol=0.05)


def test_transcribe_command(finished, experiment):
    folder = finished / "iter-12-avg-3"
    if not folder.exists():
        run(sys.executable, "tools/average_ckpt.py", "--exp-dir", str(finished), "--iter", "12", "--avg", "3")
    wav = experiment.parent / "valid" / "0.wav"
    broken = experiment.parent / "broken.wav"
    broken.write_bytes(wav.read_bytes()[:20])
    result = run(
        sys.executable, "-m", "speechllm.cli", "transcribe", str(broken), str(wav), "--model", str(folder),
        "--language", "en", check=False,
    )  # fmt: skip
    assert result.returncode == 1 and result.stdout.startswith(f"{wav}\t")
    assert f"error: unreadable audio: {broken}" in result.stderr and "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["--model.ctc_wieght", "0"], "unknown key model.ctc_wieght; did you mean model.ctc_weight?"),
        (["--data.train", "[{path: /nowhere.jsonl}]"], "/nowhere.jsonl: no such manifest file"),
        (["--model.tokenizer", "/nowhere"], "tokenizer '/nowhere': no such file or folder"),
        (["--train.mixed_precision", "fp8"], "mixed_precision must be bf16, fp16 or null"),
        (["--stage", "nowhere"], "--stage: nowhere is none of"),
        (
            ["--stages", "{a: {}, b: {model.projector.kind: transformer}}", "--stage", "b"],
            "stages.b has model.projector.kind: transformer, but goes on from the projector of stages.a, which has mlp",
        ),
        (["--model.projector.downsample", "1000"], "model.projector.downsample: 1000 makes one position of 40 s"),
        (
            ["--data.min_seconds", "1", "--data.max_positions", "14"],
            "data.max_positions: 14 leaves no position for a label and its end of text: with model.projector.",
        ),
        (["--optim.freeze", "[projector.nothing]"], "projector.nothing"),
        (["--max-duration", "auto"], "--max-duration auto needs a GPU"),
        (["--start-batch", "3"], "checkpoint-3.pt: no such checkpoint"),
        (["--model.llm", "null", "--model.ctc_weight", "0"], "there is nothing to train the encoder with"),
        (["--model.llm", "null", "--train.ctc_only_steps", "3"], "train.ctc_only_steps is about the language model"),
        (["--model.llm", "null", "--data.max_positions", "9"], "data.max_positions is about the language model"),
        (
            ["--model.llm", "null", "--model.cr_ctc", "{}", "--data.augment.spec_augment", "null"],
            "model.cr_ctc compares two views of an utterance, which differ by SpecAugment",
        ),
    ],
)
def test_mistakes_are_one_line(experiment, tmp_path, settings, said):
    result = run(*command(experiment, tmp_path / "exp", *settings), check=False)
    assert result.returncode == 1 and said in result.stderr and "Traceback" not in result.stderr


def test_a_stage_does_not_begin_with_another_projector(model_config, tmp_path):
    """Of the same names and shapes, so that the weights alone do not tell; an encoder more is no harm."""
    model = SpeechLLM.from_config(model_config)
    content = {"model": model.state_dict(), "step": 1, "config": {"model": to_dict(model_config)}}
    save_checkpoint(tmp_path / "checkpoint-1.pt", content)
    encoder = {"zipformer": to_dict(model_config.encoder.zipformer)}
    more = override(model_config, {"more_encoders": [{"encoder": encoder}]}, "test")
    assert init_weights(SpeechLLM.from_config(more), tmp_path) == set(content["model"])
    other = SpeechLLM.from_config(override(model_config, {"projector.kind": "transformer"}, "test"))
    with pytest.raises(ConfigError, match="checkpoint-1.pt: .*projector.kind: transformer, but .* which has mlp"):
        init_weights(other, tmp_path)


def test_a_checkpoint_of_another_shape(experiment, finished):
    result = run(*command(experiment, finished, "--model.llm.rwkv7.n_embd", "48"), check=False)
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert "llm.emb.weight: (300, 32) in the file, (300, 48) in the model" in result.stderr
