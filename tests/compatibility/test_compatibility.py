"""What earlier revisions wrote loads, computes the same, and goes on: model folders, and a run that was stopped.

The archives beside this file are named after the revision that wrote them, by `make.py`.
"""

import json
import sys
import tarfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from speechllm import SpeechLLM
from speechllm.decode.interface import RecognizeOptions
from speechllm.train.checkpoint import load_checkpoint
from tests.programs import REPOSITORY, run

REVISIONS = sorted(Path(__file__).parent.glob("*.tar.xz"))


@pytest.fixture(params=REVISIONS, ids=lambda path: path.name.partition(".")[0])
def written(request, tmp_path, monkeypatch):
    """The folder that a revision wrote, as the current one: its configurations name files from there."""
    with tarfile.open(request.param) as archive:
        archive.extractall(tmp_path, filter="data")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", ["merged", "adapted"])
def test_a_model_folder_computes_what_it_did(written, name):
    expected = load_file(written / "expected.safetensors")
    model = SpeechLLM.from_pretrained(name)
    with torch.no_grad():
        encoder_out, _, audio_embeds, _ = model.encode(expected["features"], expected["lens"])
        logits = model.llm(input_ids=torch.arange(1, 11)[None])[0][:, -1]
    for key, value in {"encoder_out": encoder_out, "audio_embeds": audio_embeds, "logits": logits}.items():
        torch.testing.assert_close(value, expected[f"{name}.{key}"], rtol=1e-4, atol=1e-5)
    # The revision cut a text that a guard has stopped; today the default is the text of the CTC head.
    options = RecognizeOptions(fallback="cut")
    texts = [recording.text for recording in model.transcribe(["corpus/1.flac"], language="en", options=options)]
    assert texts == json.loads((written / "expected.json").read_text())[name]


def test_a_run_goes_on(written):
    """From its checkpoint, with its configuration; not from the beginning, which is 3 steps away."""
    before = load_checkpoint("exp/checkpoint-3.pt")
    script = [sys.executable, str(REPOSITORY / "recipes" / "train.py")]
    arguments = ["--config", "config.yaml", "--exp-dir", "exp", "--train.num_steps", "5"]
    result = run(*script, *arguments, cwd=written)
    after = load_checkpoint("exp/checkpoint-5.pt")
    assert before["step"] == 3 and after["step"] == 5
    assert "checkpoint-3.pt" in result.stderr
    assert before["model"].keys() == after["model"].keys()
    moved = [name for name, value in before["model"].items() if not torch.equal(value, after["model"][name])]
    assert len(moved) > 0.9 * len(before["model"])
    largest = max((after["model"][n] - before["model"][n]).abs().max() for n in moved if "batch_count" not in n)
    assert largest < 0.1  # small steps from where it was
