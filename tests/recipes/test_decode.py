"""recipes/decode.py: no utterance ends the decoding of a test set, and processes that share it find what one finds."""

import json
import re
import sys

import numpy as np
import soundfile
import torch
import yaml

from speechllm.config import to_dict
from tests.programs import REPOSITORY, run


def write_noise(folder, utterances):
    """A WAV file of each name, seconds and language, and their manifest's lines."""
    rng, lines = np.random.default_rng(0), []
    for name, seconds, language in utterances:
        soundfile.write(folder / f"{name}.wav", 0.1 * rng.standard_normal(int(16000 * seconds)), 16000)
        line = {"id": name, "audio_filepath": str(folder / f"{name}.wav"), "duration": seconds, "text": "one"}
        lines.append(json.dumps(line | ({"lang": language} if language else {})) + "\n")
    return lines


def test_utterances_that_cannot_be_recognized(model, tmp_path):
    model.save_pretrained(tmp_path / "model")
    lines = write_noise(tmp_path, (("a", 1.0, "en"), ("short", 0.025, "en"), ("unknown", 1.0, None), ("b", 0.5, "es")))
    (tmp_path / "all.jsonl").write_text("".join(lines))
    (tmp_path / "none.jsonl").write_text(lines[2])
    sources = {name: [{"path": str(tmp_path / f"{name}.jsonl")}] for name in ("none", "all")}
    data = {"train": sources["all"], "valid": sources["all"], "test": sources, "num_workers": 0}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump({"model": to_dict(model.config), "data": data}))
    command = [sys.executable, str(REPOSITORY / "recipes/decode.py"), "--config", str(tmp_path / "c.yaml")]
    result = run(*command, "--exp-dir", str(tmp_path), "--model", str(tmp_path / "model"))
    assert "left out: unknown: the prompt has a {lang} slot but utterance unknown has no language" in result.stderr
    assert "all: 3 utterances" in result.stderr and "none: no utterance of this test set" in result.stderr
    for search in ("greedy_search", "ctc_greedy_search"):
        recogs = (tmp_path / search / "recogs-all-model.txt").read_text()
        assert "short:\thyp=[]" in recogs and "unknown" not in recogs and "b:\thyp=" in recogs
        assert not list((tmp_path / search).glob("part-*"))


def test_processes_that_share_test_sets_find_what_one_finds(model, tmp_path):
    """One of them killed half-way through a line; each started by itself, in any order."""
    model.save_pretrained(tmp_path / "model")
    rng = np.random.default_rng(1)
    utterances = [(f"{i:02}", rng.uniform(0.3, 1.0), "en" if i % 3 else "es") for i in range(12)]
    (tmp_path / "all.jsonl").write_text("".join(write_noise(tmp_path, utterances)))
    sources = [{"path": str(tmp_path / "all.jsonl")}]
    data = {"train": sources, "valid": sources, "test": {"noise": sources}, "num_workers": 0, "max_cuts": 2}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump({"model": to_dict(model.config), "data": data}))

    def decode(name, *options):
        command = [sys.executable, str(REPOSITORY / "recipes/decode.py"), "--config", str(tmp_path / "c.yaml")]
        return run(*command, "--exp-dir", str(tmp_path / name), "--model", str(tmp_path / "model"), *options)

    def contents(name):
        return {p.relative_to(tmp_path / name): p.read_text() for p in (tmp_path / name).glob("*_search/*")}

    bare = (tmp_path / "model/README.md").read_text()
    one = decode("one")
    card = (tmp_path / "model/README.md").read_text()
    (tmp_path / "model/README.md").write_text(bare)
    shares = [["--world-size", "2", "--rank", str(rank)] for rank in (0, 1)]
    assert decode("two", *shares[1]).stdout == "rank 1 of 2 is done; the one that finishes last writes the results\n"
    (part,) = (tmp_path / "two/greedy_search").glob("part-1-of-2-noise-model-*.jsonl")
    whole = part.read_bytes()
    assert whole.count(b'"results": {"greedy_search"') == 3  # batches
    part.write_bytes(whole[: whole.rfind(b'"results": {"greedy_search"') + 40])
    assert "rank 1 of 2 is done" in decode("two", *shares[1]).stdout
    assert part.read_bytes().count(b'"results": {"greedy_search"') == 4  # the one cut off is made again, no other
    result = decode("two", *shares[0])
    assert result.stdout == one.stdout and re.search("noise: 6 utterances", result.stderr)
    assert contents("two") == contents("one") and len(contents("two")) == 8
    assert (tmp_path / "model/README.md").read_text() == card != bare


def test_a_process_without_a_batch_and_another_model_of_the_same_name(model, tmp_path):
    """What an earlier model has found is not taken for the new one's."""
    model.save_pretrained(tmp_path / "model")
    (tmp_path / "all.jsonl").write_text("".join(write_noise(tmp_path, [("a", 0.5, "en")])))
    sources = [{"path": str(tmp_path / "all.jsonl")}]
    data = {"train": sources, "valid": sources, "test": {"noise": sources}, "num_workers": 0}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump({"model": to_dict(model.config), "data": data}))

    def decode(rank):
        command = [sys.executable, str(REPOSITORY / "recipes/decode.py"), "--config", str(tmp_path / "c.yaml")]
        command += ["--exp-dir", str(tmp_path), "--model", str(tmp_path / "model")]
        return run(*command, "--world-size", "2", "--rank", str(rank)).stdout

    assert "rank 0 of 2 is done" in decode(0)
    with torch.no_grad():
        model.projector.out_proj.weight.mul_(2)
    model.save_pretrained(tmp_path / "model")
    assert "rank 1 of 2 is done" in decode(1) and not list((tmp_path / "greedy_search").glob("recogs-*"))
    assert re.search("noise +en +1 ", decode(0))
    assert "a:\thyp=" in (tmp_path / "greedy_search/recogs-noise-model.txt").read_text()
