"""A tiny experiment for the recipes' scripts: synthetic tones instead of speech, a model of some 10,000 parameters."""

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
import yaml

REPOSITORY = Path(__file__).parents[2]


def write_corpus(folder: Path, count: int, seed: int) -> Path:
    """`count` utterances of 0.3 to 1 s, a tone for each word, and their NeMo manifest."""
    rng = np.random.default_rng(seed)
    words = ["one", "two", "three"]
    folder.mkdir()
    lines = []
    for i in range(count):
        digits = rng.integers(3, size=rng.integers(1, 4))
        t = np.arange(4800) / 16000
        samples = np.concatenate([0.3 * np.sin(2 * np.pi * 400 * (d + 1) * t) for d in digits])
        soundfile.write(folder / f"{i}.wav", samples + 0.01 * rng.standard_normal(len(samples)), 16000)
        text = " ".join(words[d] for d in digits)
        entry = {"audio_filepath": f"{i}.wav", "duration": len(samples) / 16000, "text": text, "lang": "en"}
        lines.append(json.dumps(entry) + "\n")
    (folder / "manifest.jsonl").write_text("".join(lines))
    return folder / "manifest.jsonl"


@pytest.fixture(scope="session")
def experiment(tmp_path_factory, tokenizer_dir) -> Path:
    """The configuration file of a run of 12 steps, which takes some 5 seconds."""
    folder = tmp_path_factory.mktemp("experiment")
    train = write_corpus(folder / "train", 24, seed=0)
    valid = write_corpus(folder / "valid", 4, seed=1)
    config = {
        "model": {
            "tokenizer": str(tokenizer_dir),
            "encoder": {
                "zipformer": {
                    "downsampling_factor": [1, 2],
                    "num_encoder_layers": [1],
                    "encoder_dim": [16, 24],
                    "encoder_unmasked_dim": [16],
                    "feedforward_dim": [32],
                    "num_heads": [2],
                    "query_head_dim": [8],
                    "value_head_dim": [8],
                    "pos_dim": 16,
                    "cnn_module_kernel": [7],
                }
            },
            "llm": {"rwkv7": {"n_layer": 2, "n_embd": 32, "head_size": 16, "vocab_size": 300}},
            "ctc_weight": 0.3,
        },
        "data": {
            "train": [{"path": str(train)}],
            "valid": [{"path": str(valid)}],
            "test": {"tones": [{"path": str(valid)}]},
            "max_duration": 4,
            "num_buckets": 2,
            "num_workers": 1,
            "augment": {
                "speed": {"factors": [0.9, 1.0, 1.1]},
                "volume": {"probability": 0.5},
                "spec_augment": {"freq_mask_bins": 10},
            },
        },
        "optim": {"warmup_steps": 5},
        "train": {
            "num_steps": 12,
            "valid_every_n": 5,
            "save_every_n": 2,
            "log_every_n": 3,
            "keep_last_k": 3,
            "tensorboard": False,
        },
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return path
