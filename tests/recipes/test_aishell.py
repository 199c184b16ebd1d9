"""The AISHELL recipe from the corpus' folder to the error rates, with tiny models in the released formats."""

import os
import re
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from speechllm.config import load_config, override
from speechllm.encoder import Zipformer, ZipformerConfig, save_encoder
from speechllm.rwkv7 import RWKV7, RWKV7Config, save_rwkv7
from speechllm.train.checkpoint import load_checkpoint
from tests.recipes.conftest import REPOSITORY
from tests.recipes.mandarin import SENTENCES, SPEAKERS, write_aishell

STAGES = {  # and what trains in them
    "projector": {"projector"},
    "adapter": {"projector", "llm"},
    "encoder": {"projector", "llm", "encoder"},
}
SETTINGS = [
    "--world-size", "2",
    "--train.num_steps", "4", "--train.save_every_n", "2", "--train.valid_every_n", "4", "--train.log_every_n", "2",
    "--train.mixed_precision", "null", "--data.num_workers", "0", "--data.max_duration", "8", "--data.num_buckets", "1",
]  # fmt: skip


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    """A copy of the repository's scripts: the recipes write below their own folders."""
    folder = tmp_path_factory.mktemp("repository")
    for name in ("recipes", "tools", "configs"):
        shutil.copytree(REPOSITORY / name, folder / name, ignore=shutil.ignore_patterns("data", "exp*", "sounds"))
    return folder


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """An encoder's folder and an official RWKV-7 file with the RWKV world vocabulary."""
    folder = tmp_path_factory.mktemp("parts")
    torch.manual_seed(0)
    sizes = {
        "downsampling_factor": [1, 2], "num_encoder_layers": [1, 1], "encoder_dim": [16, 24],
        "encoder_unmasked_dim": [16, 16], "feedforward_dim": [32, 32], "num_heads": [2, 2], "query_head_dim": [8],
        "value_head_dim": [8], "pos_head_dim": [4], "pos_dim": 16, "cnn_module_kernel": [7, 7],
    }  # fmt: skip
    save_encoder(Zipformer(ZipformerConfig(**sizes)), folder / "encoder")
    save_rwkv7(RWKV7(RWKV7Config(2, 32, 65536, head_size=16)), folder / "rwkv7-tiny.pth")
    return folder


@pytest.fixture(scope="module")
def run(repository):
    """Runs a script of the copied repository; what it printed."""
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(REPOSITORY),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
    }

    def run(script, *args, check=True):
        command = [str(repository / "recipes" / script), *map(str, args)]
        result = subprocess.run(command, env=environment, cwd="/", capture_output=True, text=True)
        assert not check or result.returncode == 0, result.stdout + result.stderr
        return result

    return run


@pytest.fixture(scope="module")
def prepared(run, parts, tmp_path_factory):
    """The options of a preparation that has been done."""
    corpus_dir = tmp_path_factory.mktemp("corpus")
    write_aishell(corpus_dir)
    options = ["--corpus-dir", corpus_dir, "--encoder", parts / "encoder", "--llm", parts / "rwkv7-tiny.pth"]
    result = run("aishell/prepare.sh", *options)
    assert "== 3. manifests" in result.stdout and "== 5. check" in result.stdout
    return options


@pytest.fixture(scope="module")
def trained(run, repository, prepared):
    """The experiment folder, all three stages done."""
    run("aishell/train.sh", *SETTINGS)
    return repository / "recipes" / "aishell" / "exp"


def test_prepare_goes_on_where_it_stopped(run, repository, prepared, tmp_path):
    result = run("aishell/prepare.sh", *prepared)
    assert result.stdout.count("done before") == 3 and "wrote" not in result.stdout
    (repository / "recipes" / "aishell" / "data" / ".manifests.done").unlink()
    result = run("aishell/prepare.sh", *prepared, "--stop-stage", "4")
    assert result.stdout.count("done before") == 1 and result.stdout.count("wrote") == 3


@pytest.mark.parametrize("stage", STAGES)
def test_each_stage_trains_its_parts(trained, stage):
    names = load_checkpoint(trained / stage / "checkpoint-4.pt")["model"]
    names = [name for name in names if ".weight" in name or ".lora_" in name]  # not the buffers
    assert {name.partition(".")[0] for name in names} == STAGES[stage]
    assert all(".lora_" in name for name in names if name.startswith("llm."))


def test_each_stage_starts_from_the_last(trained):
    for before, stage in pairwise(STAGES):
        log = "".join(path.read_text() for path in (trained / stage / "log").glob("log-train-*"))
        assert f"starting from recipes/aishell/exp/{before}/checkpoint-4.pt" in log


def test_each_process_has_its_share(trained):
    logs = [path.read_text() for path in (trained / "projector" / "log").iterdir()]
    assert any("processes: 2" in log for log in logs)
    assert len(load_checkpoint(trained / "projector" / "checkpoint-4.pt")["rng"]) == 2


def test_decode_prints_character_error_rates_of_the_last_stage(run, trained):
    result = run("aishell/decode.sh", "--avg", "2")
    folder = trained / "encoder"
    assert {p.name for p in folder.iterdir()} >= {"iter-4-avg-2", "greedy_search"}
    table = [re.split("  +", line) for line in result.stdout.splitlines()]
    header = ["test set", "language", "words", *(f"greedy_search {what} %" for what in ("WER", "CER", "exact"))]
    table = table[table.index(header) + 1 :]
    assert [row[:2] for row in table] == [["dev", "zh"], ["dev", "all"], ["test", "zh"], ["test", "all"]]
    for part in ("dev", "test"):
        report = (folder / "greedy_search" / f"wer-by-language-{part}-iter-4-avg-2.txt").read_text()
        cer = report.splitlines()[-1].split()[4]
        assert [f"{row[4]}%" for row in table if row[0] == part] == [cer, cer]
        recogs = (folder / "greedy_search" / f"recogs-{part}-iter-4-avg-2.txt").read_text().splitlines()
        references = [line.partition("ref=")[2] for line in recogs if "ref=" in line]
        expected = [text.replace(" ", "") for text in SENTENCES[part] for _ in SPEAKERS[part]]
        assert references == [f"['{text}']" for text in expected]


@pytest.mark.parametrize(
    ("script", "options", "said"),
    [
        ("aishell/prepare.sh", ["--corpus-dir"], "--corpus-dir needs a value"),
        ("aishell/prepare.sh", ["--stage", "two"], "--stage needs a number, not two"),
        ("aishell/prepare.sh", ["--corpus", "x"], "unknown argument --corpus"),
        ("aishell/prepare.sh", ["--corpus-dir", "/nowhere", "--stage", "3"], "/nowhere/data_aishell/transcript"),
        ("aishell/prepare.sh", ["--encoder", "recipes"], "recipes: an encoder needs config.json"),
        ("aishell/prepare.sh", [], "Parts that are on disk already are given as --encoder DIR and --llm FILE."),
        ("aishell/train.sh", ["--stage", "lora"], "--stage: lora is none of projector, adapter, encoder"),
        ("custom/train.sh", ["--stage", "lora"], "--stage: lora is none of projector, adapter, encoder"),
        ("librispeech/train.sh", ["--stage", "lora", "--subset", "100"], "lora is none of projector, adapter, encoder"),
        ("librispeech/train.sh", ["--subset", "10"], "--subset is 100 or 960, not 10"),
        ("librispeech/decode.sh", ["--subset", "100", "--stage", "lora"], "exp-100/lora: no checkpoint-STEP.pt"),
        ("aishell/decode.sh", ["--exp-dir", "/nowhere"], "/nowhere: no checkpoint-STEP.pt"),
        ("custom/decode.sh", ["--config", "/nowhere.yaml"], "/nowhere.yaml: no such configuration file"),
        ("custom/decode.sh", ["--config", "configs/digits.yaml"], "recipes/custom/exp: no checkpoint-STEP.pt"),
        ("english/run.sh", ["--llm", "gpt2"], "--llm is rwkv7, smollm2 or none, not gpt2"),
        ("english/run.sh", ["--quick", "--llm"], "--llm needs a value"),
        ("english/run.sh", ["--config", "x"], "unknown argument --config"),
        ("english/prepare.sh", ["--flite", "--steel-skies"], "unknown argument --steel-skies"),
    ],
)
def test_mistakes(run, script, options, said):
    result = run(script, *options, check=False)
    assert result.returncode != 0 and said in result.stderr
    assert result.stderr.startswith("error: ") and "Traceback" not in result.stderr


@pytest.mark.parametrize("script", ["prepare.sh", "decode.sh"])
@pytest.mark.parametrize("recipe", ["aishell", "librispeech", "custom"])
def test_help(run, recipe, script):
    assert run(f"{recipe}/{script}", "--help").stdout.count(f"recipes/{recipe}/") >= 1


def test_help_of_a_whole_recipe(run):
    assert "--llm NAME" in run("english/run.sh", "--quick", "--help").stdout


@pytest.mark.parametrize("path", sorted((REPOSITORY / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_configurations_are_valid(path, monkeypatch):
    monkeypatch.syspath_prepend(REPOSITORY / "recipes")
    from train import Config

    config = load_config(Config, path)
    assert config.data.test
    for name, changes in config.stages.items():
        assert override(config, changes, source=name) != config
