"""The benchmark of the server: its clients hear what they are told, and the tables show it."""

import re
import subprocess
import sys
from pathlib import Path

from tests.data.corpora import write_manifest
from tests.decode.test_streaming import noise, speech_llm  # noqa: F401 (a fixture)
from tests.programs import ENV
from tests.serve.conftest import wav

ROOT = Path(__file__).parents[2]


def test_tables_of_a_tiny_model(speech_llm, tmp_path):  # noqa: F811
    speech_llm.save_pretrained(tmp_path / "tiny")
    (tmp_path / "a.wav").write_bytes(wav(noise(3.0, seed=1)).getvalue())
    line = {"audio_filepath": "a.wav", "duration": 3.0, "text": "one", "id": "a"}
    manifest = write_manifest(tmp_path / "m.jsonl", [line])
    command = [sys.executable, "tools/bench_serve.py", "--model", tmp_path / "tiny", "--manifest", manifest]
    options = ["--language", "en", "--options", "chunk-seconds=0.32", "device=cpu"]
    command += ["--streams", "1", "2", "--uploads", "2", "--seconds", "2", *options]
    done = subprocess.run(command, cwd=ROOT, env=ENV, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "live audio word by word" in done.stdout
    assert re.search(r"^\| 1 +\| [1-9]", done.stdout, re.M)
    assert re.search(r"uploads a minute.*\n.*\n\| 2 +\| [1-9]", done.stdout)
