"""Writes what a revision leaves behind: a run to resume, model folders, and what they compute.

    cd OTHER_REVISION && PYTHONPATH=. python MAKE.PY REVISION.tar.xz

where MAKE.PY is this file. `test_compatibility.py` loads and resumes what is in the archive with the code of today.
"""

import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import numpy as np
import soundfile
import torch
import yaml
from safetensors.torch import save_file

from speechllm import SpeechLLM
from speechllm.rwkv7 import RWKV7, RWKV7Config, save_rwkv7
from tests.conftest import SENTENCES, train_sentencepiece

ZIPFORMER = {
    "downsampling_factor": [2], "num_encoder_layers": [1], "encoder_dim": [8], "encoder_unmasked_dim": [8],
    "feedforward_dim": [16], "num_heads": [2], "query_head_dim": [4], "value_head_dim": [4], "pos_dim": 8,
    "cnn_module_kernel": [7], "subsampling_channels": [2, 4, 4],
}  # fmt: skip
LM = RWKV7Config(2, 16, 300, head_size=8, lora_ranks={"decay": 4, "a": 4, "v": 4, "gate": 4})


def write_corpus(folder: Path) -> None:
    """Tones of 0.4 s for words: small as FLAC."""
    folder.mkdir()
    with open(folder / "manifest.jsonl", "w") as manifest:
        for i, words in enumerate((["one"], ["two", "three"], ["three"], ["two"])):
            t = np.arange(6400) / 16000
            samples = np.concatenate([0.3 * np.sin(2 * np.pi * 100 * len(word) * t) for word in words])
            soundfile.write(folder / f"{i}.flac", samples, 16000)
            line = {"audio_filepath": f"{i}.flac", "duration": 0.4 * len(words), "text": " ".join(words), "lang": "en"}
            manifest.write(json.dumps(line) + "\n")


def main(folder: Path) -> None:
    write_corpus(folder / "corpus")
    train_sentencepiece(SENTENCES * 20, folder / "tokenizer", vocab_size=300, special_tokens=["User: ", "<|en|>"])
    torch.manual_seed(0)
    save_rwkv7(RWKV7(LM).bfloat16(), folder / "lm.pth")
    manifest = [{"path": "corpus/manifest.jsonl"}]
    config = {
        "model": {
            "tokenizer": "tokenizer",
            "encoder": {"zipformer": ZIPFORMER},
            "llm": {"path": "lm.pth", "tune": {"method": "lora", "rank": 2}},
            "ctc_weight": 0.3,
        },
        "data": {"train": manifest, "valid": manifest, "max_duration": 2, "num_buckets": 2, "num_workers": 0},
        "optim": {"warmup_steps": 5},
        "train": {"num_steps": 3, "valid_every_n": 100, "save_every_n": 3, "average_period": 1, "tensorboard": False},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    repository = Path.cwd()
    environment = {"PYTHONPATH": str(repository), "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"}

    def run(*args: str) -> None:
        subprocess.run([sys.executable, *args], cwd=folder, env=environment, check=True)

    run(str(repository / "recipes/train.py"), "--config", "config.yaml", "--exp-dir", "exp")
    for name in ("log", "epoch-1.pt", "best-valid-loss.pt", "best-valid-wer.pt", "plot.png"):
        path = folder / "exp" / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    average = str(repository / "tools/average_ckpt.py")
    run(average, "exp/checkpoint-3.pt", "--output", "merged")
    run(average, "exp/checkpoint-3.pt", "--output", "adapted", "--no-merge")
    config_file = folder / "adapted" / "config.yaml"  # has the base's whole path
    config_file.write_text(config_file.read_text().replace(str(folder / "lm.pth"), "lm.pth"))
    expected, texts = {}, {}
    features, lens = torch.randn(1, 40, 80, generator=torch.Generator().manual_seed(0)), torch.tensor([40])
    os.chdir(folder)
    for name in ("merged", "adapted"):
        model = SpeechLLM.from_pretrained(name)
        with torch.no_grad():
            expected[f"{name}.encoder_out"], _, expected[f"{name}.audio_embeds"], _ = model.encode(features, lens)
            expected[f"{name}.logits"] = model.llm(input_ids=torch.arange(1, 11)[None])[0][:, -1].contiguous()
        texts[name] = [t.text for t in model.transcribe(["corpus/1.flac"], language="en")]
    save_file({"features": features, "lens": lens, **expected}, folder / "expected.safetensors")
    (folder / "expected.json").write_text(json.dumps(texts) + "\n")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name, tarfile.open(sys.argv[1], "x:xz") as archive:
        main(Path(name))
        archive.add(name, arcname=".")
