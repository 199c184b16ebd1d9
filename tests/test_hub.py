"""Ids of the Hugging Face Hub where folders are taken, against a hub on this machine, and against the cache alone."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import huggingface_hub.constants
import huggingface_hub.file_download
import pytest
import soundfile
import torch
import yaml

from speechllm import SpeechLLM, hub
from speechllm.cli.main import main
from speechllm.data import ManifestError, SourceConfig, describe_cut, read_manifest
from speechllm.data.index import open_index
from speechllm.data.manifests import kinds
from speechllm.encoder import load_encoder
from speechllm.encoder.pretrained import save_encoder
from speechllm.errors import UserError
from speechllm.llm.adapters import TuneConfig
from speechllm.model.build import load_model, model_identity
from speechllm.model.config import LLMSection, load_model_config
from speechllm.rwkv7 import load_rwkv7
from speechllm.rwkv7.checkpoint import save_rwkv7
from speechllm.text.tokenizer import load_tokenizer
from speechllm.weights import file_hash
from tests import hub_server
from tests.data.corpora import write_corpus, write_rows
from tests.transcribe.conftest import RATE, melody


@pytest.fixture
def server(tmp_path, monkeypatch):
    with hub_server.running() as running:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", running.url)
        template = running.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(huggingface_hub.file_download.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.chdir(tmp_path)
        forget()
        yield running
    forget()


def forget():
    hub._downloaded.cache_clear()
    kinds._dataset_files.cache_clear()


@pytest.fixture
def offline(monkeypatch):
    def go():
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        forget()

    return go


def test_what_is_an_id_and_what_is_a_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "exp").mkdir()
    ids = {
        "openai/whisper-small": ("openai/whisper-small", None, None),
        "Qwen/Qwen2.5-0.5B@v1.0": ("Qwen/Qwen2.5-0.5B", "v1.0", None),
        "BlinkDL/rwkv7-g1/a.pth": ("BlinkDL/rwkv7-g1", None, "a.pth"),
        "me/m@main/exp/pretrained.pt": ("me/m", "main", "exp/pretrained.pt"),
        "hf://exp/model.pth": ("exp/model.pth", None, None),
        "me/set@refs/convert/parquet/en/train/*.parquet": ("me/set", "refs/convert/parquet", "en/train/*.parquet"),
    }
    assert {text: hub.hub_id(text) for text in ids} == ids
    assert hub.hub_id(Path("hf://me/model")) == ("me/model", None, None)
    paths = ["exp/iter-5", "model", "/data/model", "./a/b", "../a", "~/model", "data/rwkv7.pth", "a/bpe.model", ""]
    assert [hub.hub_id(path) for path in paths] == [None] * len(paths)


@pytest.mark.parametrize(
    ("names", "kept"),
    [
        (
            [
                "config.json",
                "model.safetensors",
                "pytorch_model.bin",
                "flax_model.msgpack",
                "onnx/model.onnx",
                ".gitattributes",
            ],
            ["config.json", "model.safetensors"],
        ),
        (["exp/pretrained.pt", "exp/epoch-30.pt", "bpe.model"], ["exp/pretrained.pt", "bpe.model"]),
        (["config.json", "only.pth"], ["config.json", "only.pth"]),
    ],
)
def test_the_same_weights_are_not_fetched_twice(names, kept):
    assert hub.wanted(names, "me/model") == kept


def test_one_of_several_checkpoints_is_to_be_named():
    with pytest.raises(UserError, match="holds 2 checkpoints; name one of them, such as me/world/a.pth"):
        hub.wanted(["a.pth", "b.pth", "README.md"], "me/world")


def test_parts_come_from_the_hub_and_then_from_the_cache(server, offline, model, tokenizer_dir, tmp_path):
    save_encoder(model.encoder, tmp_path / "parts" / "encoder")
    save_rwkv7(model.llm, tmp_path / "parts" / "world" / "rwkv.pth")
    server.add("me/encoder", tmp_path / "parts" / "encoder")
    server.add("me/world", tmp_path / "parts" / "world")
    server.add("me/tokenizer", tokenizer_dir)

    def load():
        encoder, llm = load_encoder("me/encoder"), load_rwkv7("me/world/rwkv.pth")
        return {**encoder.state_dict(), **llm.state_dict()}, load_tokenizer("me/tokenizer").encode("one two")

    weights, ids = load()
    assert ids == model.tokenizer.encode("one two")
    assert all(torch.equal(weights[name], tensor) for name, tensor in model.llm.state_dict().items())
    asked = len(server.requests)
    load()
    assert len(server.requests) == asked  # once in a process
    hashed = file_hash("me/encoder")
    offline()
    again, _ = load()
    assert len(server.requests) == asked
    assert all(torch.equal(again[name], tensor) for name, tensor in weights.items())
    assert file_hash("me/encoder") == hashed
    with pytest.raises(FileNotFoundError, match=r"me/other: is no path here.*not in the cache"):
        load_encoder("me/other")


def test_a_hub_that_cannot_be_reached_is_as_no_network(server, model, tmp_path, monkeypatch, caplog):
    save_encoder(model.encoder, tmp_path / "parts" / "encoder")
    server.add("me/encoder", tmp_path / "parts" / "encoder")
    load_encoder("me/encoder")
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")  # nothing listens there
    hub._downloaded.cache_clear()
    load_encoder("me/encoder")
    assert "what is in the cache is taken" in caplog.text
    with pytest.raises(FileNotFoundError, match="cannot be reached, and it is not in the cache"):
        load_encoder("me/other")


def test_what_the_hub_does_not_have_says_so(server, model, tmp_path):
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts" / "a.pth").write_bytes(b"")
    server.add("me/model", tmp_path / "parts")
    for name, message in (
        ("me/none", "there is no such repository, or it is private"),
        ("me/model@v9", "it has no such revision"),
        ("me/model/none.pth", "it has no such file"),
    ):
        with pytest.raises(FileNotFoundError, match=f"{name}: is no path here; .*{message}"):
            load_rwkv7(name)


def test_a_model_goes_to_the_hub_and_comes_back(server, model, batch, tmp_path, monkeypatch):
    model.config.languages = ["en", "es>en"]
    with pytest.raises(UserError, match="me/model: cannot be pushed to the Hugging Face Hub: .*HF_TOKEN"):
        model.save_pretrained(tmp_path / "a", push_to_hub="me/model")
    with pytest.raises(UserError, match="expected OWNER/NAME"):
        model.save_pretrained(tmp_path / "a", push_to_hub="model")
    monkeypatch.setenv("HF_TOKEN", "secret")
    model.save_pretrained(tmp_path / "a", push_to_hub="me/model")
    assert set(server.repos["me/model"]["main"]) == {p.name for p in (tmp_path / "a").iterdir() if p.is_file()}
    for name in ("me/model", "me/model@main", "hf://me/model"):
        loaded = load_model(name)
        assert torch.equal(loaded(*batch)["loss"], model.eval()(*batch)["loss"])
    data = huggingface_hub.ModelCard(server.repos["me/model"]["main"]["README.md"].decode()).data
    assert (data.library_name, data.pipeline_tag) == ("speechllm", "automatic-speech-recognition")
    assert data.language == ["en", "es"]
    assert model_identity("me/model") == model_identity(tmp_path / "a")


def test_an_adapter_names_its_base_by_its_id(server, model, model_config, batch, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "secret")
    save_rwkv7(model.llm, tmp_path / "parts" / "base.pth")
    server.add("me/base", tmp_path / "parts")
    for path, pushes in (("me/base/base.pth", True), (str(tmp_path / "parts" / "base.pth"), False)):
        section = LLMSection(path=path, tune=TuneConfig(method="lora", rank=2))
        tuned = SpeechLLM.from_config(dataclasses.replace(model_config, llm=section)).eval()
        if not pushes:
            with pytest.raises(UserError, match="which is on this machine only"):
                tuned.save_pretrained(tmp_path / "b", merged=False, push_to_hub="me/tuned")
            continue
        tuned.save_pretrained(tmp_path / "a", merged=False, push_to_hub="me/tuned")
        assert load_model_config("me/tuned").llm.path == path
        card = yaml.safe_load((tmp_path / "a" / "README.md").read_text().split("---\n")[1])
        assert card["base_model"] == ["me/base"]
        torch.testing.assert_close(load_model("me/tuned")(*batch)["loss"], tuned(*batch)["loss"])


def test_commands_take_ids(server, model, tmp_path):
    """In a process of its own, which reads HF_ENDPOINT and HF_HOME as a user sets them."""
    model.save_pretrained(tmp_path / "model")
    server.add("me/model", tmp_path / "model")
    soundfile.write(tmp_path / "a.wav", melody(["do", "re"], 0.3), RATE)
    env = {**os.environ, "HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": "secret"}
    env["PYTHONPATH"] = str(Path(__file__).parents[1])
    command = [sys.executable, "-m", "speechllm.cli", "transcribe", "a.wav", "--model", "me/model", "--language", "en"]
    first = subprocess.run([*command, "--format", "json"], env=env, cwd=tmp_path, capture_output=True, text=True)
    assert first.returncode == 0, first.stderr
    assert json.loads(first.stdout)["id"] == "a"


def test_the_command_push(server, model, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", "secret")
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(SystemExit) as caught:
        main(["push", "model", "me/copy"])
    assert caught.value.code == 0
    assert capsys.readouterr().out.startswith(f"{server.url}/me/copy/commit/")
    assert (
        server.repos["me/copy"]["main"]["model.safetensors"] == (tmp_path / "model" / "model.safetensors").read_bytes()
    )


def test_data_sets_come_from_the_hub_and_then_from_the_cache(server, offline, tmp_path):
    lines = write_corpus(tmp_path)
    (tmp_path / "repo").mkdir()
    for name in ("clean", "other"):
        write_rows("parquet", tmp_path / "repo" / name, tmp_path, lines)
    server.add("me/speech", tmp_path / "repo")
    server.add("me/speech", tmp_path / "repo" / "clean", "v1")
    ids = [line["id"] for line in lines]
    for path in ("me/speech/clean", "me/speech@v1", "hf://datasets/me/speech/other/train-*.parquet"):
        index = open_index(SourceConfig(path), folder=tmp_path / "index")
        assert [index.cut(i).id for i in range(len(index))] == ids
    assert len(list(read_manifest("me/speech/*/train-00000-of-00002.parquet"))) == 6  # a pattern may mean several sets
    sets = r"2 sets; .*: me/speech/clean/train-\*.parquet, me/speech/other/train-\*.parquet"
    for path, message in (
        ("me/speech", f"me/speech: holds {sets}"),
        ("me/speech/dirty", r"me/speech/dirty: no Parquet file there; .* me/speech@refs/convert/parquet"),
        ("me/nothing", "me/nothing: is no path here; as an id of the Hugging Face Hub: there is no such repository"),
        ("data/train.tsv", "data/train.tsv: no such manifest file"),
    ):
        with pytest.raises(ManifestError, match=message):
            read_manifest(path)
    offline()
    assert [describe_cut(cut).text for cut in read_manifest("me/speech/clean")] == [x["text"].strip() for x in lines]
    with pytest.raises(ManifestError, match="me/else: is no path here; .*, and it is not in the cache"):
        read_manifest("me/else")


def test_a_data_set_of_which_the_cache_has_a_part_is_not_taken_for_the_whole(server, offline, tmp_path):
    lines = write_corpus(tmp_path)
    write_rows("parquet", tmp_path / "repo", tmp_path, lines)
    server.add("me/speech", tmp_path / "repo")
    part = "me/speech/train-00000-of-*.parquet"
    assert len(list(read_manifest(part))) == 3
    offline()
    assert len(list(read_manifest(part))) == 3
    with pytest.raises(ManifestError, match="cannot be reached, and train-00001-of-00002.parquet is not in the cache"):
        read_manifest("me/speech")
