"""The released parts, from disk and from the Hub, become links."""

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).parents[2] / "tools" / "download_parts.py"


@pytest.fixture
def download(monkeypatch, capsys):
    """Runs the program; what it printed."""

    def run(*args):
        monkeypatch.setattr(sys, "argv", [PROGRAM.name, *map(str, args)])
        runpy.run_path(str(PROGRAM), run_name="__main__")
        return capsys.readouterr()

    return run


@pytest.fixture
def parts(tmp_path):
    """An encoder's folder and a language model's file, as far as this program looks at them."""
    (tmp_path / "parts" / "encoder").mkdir(parents=True)
    for name in ("encoder/config.json", "encoder/model.safetensors", "rwkv7.pth"):
        (tmp_path / "parts" / name).write_text(name)
    return tmp_path / "parts"


def test_parts_on_disk(download, parts, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # relative paths become absolute
    download("--output-dir", "data", "--encoder", "parts/encoder", "--llm", "parts/rwkv7.pth")
    data = tmp_path / "data"
    assert os.readlink(data / "encoder") == str(parts / "encoder")
    assert os.readlink(data / "llm.pth") == str(parts / "rwkv7.pth")
    (parts / "other.pth").write_text("other")
    download("--output-dir", "data", "--encoder", "data/encoder", "--llm", parts / "other.pth")
    assert os.readlink(data / "encoder") == str(parts / "encoder")
    assert (data / "llm.pth").read_text() == "other"
    assert sorted(path.name for path in data.iterdir()) == ["encoder", "llm.pth"]


@pytest.mark.parametrize(
    ("llm", "repo", "name"),
    [
        ("1.5b", "BlinkDL/rwkv7-g1", "rwkv7-g1i-1.5b-20260805-ctx16384.pth"),
        ("0.4B", "BlinkDL/rwkv7-g1", "rwkv7-g1d-0.4b-20260210-ctx8192.pth"),
        ("someone/models/folder/my.pth", "someone/models", "folder/my.pth"),
    ],
)
def test_what_is_asked_of_the_hub(download, parts, tmp_path, monkeypatch, llm, repo, name):
    asked = []

    def snapshot(repo_id, allow_patterns):
        asked.append((repo_id, "config.json" in allow_patterns, "model.safetensors" in allow_patterns))
        return str(parts / "encoder")

    def file(repo_id, filename, revision):
        asked.append((repo_id, filename, revision is not None))
        return str(parts / "rwkv7.pth")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", file)
    download("--output-dir", tmp_path / "data", "--llm", llm)
    assert asked == [("AudenAI/auden-encoder-tta-m10", True, True), (repo, name, repo.startswith("BlinkDL"))]
    assert (tmp_path / "data" / "llm.pth").read_text() == "rwkv7.pth"


def test_what_is_in_the_cache_needs_no_network(tmp_path):
    """The Hub's own client, with a cache as it leaves it after a download."""
    encoder, llm = "models--AudenAI--auden-encoder-tta-m10", "models--someone--models"
    commit = "0123456789abcdef0123456789abcdef01234567"
    for repo, names in ((encoder, ["config.json", "model.safetensors"]), (llm, ["my.pth"])):
        snapshot = tmp_path / "hub" / repo / "snapshots" / commit
        snapshot.mkdir(parents=True)
        for name in names:
            (snapshot / name).write_text(name)
        (tmp_path / "hub" / repo / "refs").mkdir()
        (tmp_path / "hub" / repo / "refs" / "main").write_text(commit)
    environment = {**os.environ, "HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(PROGRAM), "--output-dir", str(tmp_path / "data"), "--llm"]
    subprocess.run([*command, "someone/models/my.pth"], env=environment, check=True)
    assert (tmp_path / "data" / "encoder" / "config.json").read_text() == "config.json"
    assert (tmp_path / "data" / "llm.pth").read_text() == "my.pth"
    result = subprocess.run([*command, "0.1b"], env=environment, capture_output=True, text=True)
    assert result.returncode == 1 and result.stderr.startswith("error: cannot download BlinkDL/rwkv7-g1/rwkv7-g1d-0.1b")
    assert "--encoder DIR and --llm FILE" in result.stderr and "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("--llm", "3b", "none of 0.1b, 0.4b, 1.5b, 2.9b"),
        ("--encoder", "nowhere/at/all", "no such folder, and no OWNER/REPO"),
        ("--encoder", "empty", "an encoder needs config.json and one of"),
    ],
)
def test_mistakes(download, parts, tmp_path, monkeypatch, option, value, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    options = {"--encoder": parts / "encoder", "--llm": parts / "rwkv7.pth", option: value}
    with pytest.raises(SystemExit) as stopped:
        download("--output-dir", "data", *(x for pair in options.items() for x in pair))
    assert said in str(stopped.value) and not (tmp_path / "data").exists()


def test_a_real_file_is_not_replaced(download, parts, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "llm.pth").write_text("precious")
    with pytest.raises(SystemExit) as stopped:
        download("--output-dir", tmp_path / "data", "--encoder", parts / "encoder", "--llm", parts / "rwkv7.pth")
    assert "not a link" in str(stopped.value) and (tmp_path / "data" / "llm.pth").read_text() == "precious"
