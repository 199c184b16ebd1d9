"""recipes/decode.py: no utterance ends the decoding of a test set."""

import json
import sys

import numpy as np
import soundfile
import yaml

from speechllm.config import to_dict
from tests.programs import REPOSITORY, run


def test_utterances_that_cannot_be_recognized(model, tmp_path):
    model.save_pretrained(tmp_path / "model")
    rng, lines = np.random.default_rng(0), []
    for name, seconds, language in (("a", 1.0, "en"), ("short", 0.025, "en"), ("unknown", 1.0, None), ("b", 0.5, "es")):
        soundfile.write(tmp_path / f"{name}.wav", 0.1 * rng.standard_normal(int(16000 * seconds)), 16000)
        line = {"id": name, "audio_filepath": str(tmp_path / f"{name}.wav"), "duration": seconds, "text": "one"}
        lines.append(json.dumps(line | ({"lang": language} if language else {})) + "\n")
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
