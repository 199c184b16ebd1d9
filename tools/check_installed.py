"""README's Python example with a tiny model, from nothing but an installed speechllm: no test packages, no checkout.

    python tools/check_installed.py      # run from another directory, so that the installed package is the one imported

Exits with an error if speechllm comes from the directory above this file.
"""

import tempfile
from pathlib import Path

import numpy as np
import soundfile
import torch

import speechllm
import speechllm.serve
from speechllm import SpeechLLM
from speechllm.config import from_dict
from speechllm.model.config import ModelConfig
from speechllm.prompt import Request
from speechllm.text.tokenizer import train_sentencepiece

SENTENCES = ["one two three", "tres uno", "two", "uno dos tres"]


def tiny_model(tokenizer: Path) -> SpeechLLM:
    zipformer = {
        "downsampling_factor": [1, 2],
        "num_encoder_layers": [1, 1],
        "encoder_dim": [16, 24],
        "encoder_unmasked_dim": [16, 16],
        "feedforward_dim": [32, 32],
        "num_heads": [2, 2],
        "query_head_dim": [8],
        "value_head_dim": [8],
        "pos_head_dim": [4],
        "pos_dim": 16,
        "cnn_module_kernel": [7, 7],
    }
    config = {
        "tokenizer": str(tokenizer),
        "encoder": {"zipformer": zipformer},
        "llm": {"transformers": {"model_type": "qwen3", "hidden_size": 32, "intermediate_size": 48,
                                 "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
                                 "head_dim": 8, "vocab_size": 300}},
        "ctc_weight": 0.3,
    }  # fmt: skip
    return SpeechLLM.from_config(from_dict(ModelConfig, config))


def main() -> None:
    checkout = Path(__file__).resolve().parents[1]
    if checkout in Path(speechllm.__file__).resolve().parents and "site-packages" not in speechllm.__file__:
        raise SystemExit(f"error: {speechllm.__file__} is the checkout's; run this from another directory")
    # the page, and no need of what serves it
    assert (Path(speechllm.serve.__file__).parent / "static" / "index.html").is_file()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tags = ["User: ", "\n\nAssistant:", "<|en|>", "<|es|>"]
        train_sentencepiece(SENTENCES * 20, folder / "tokenizer", vocab_size=300, special_tokens=tags)
        model = tiny_model(folder / "tokenizer")

        features, feature_lens = torch.randn(2, 300, 80), torch.tensor([300, 250])
        requests = [Request(language="en"), Request(language="es")]
        out = model.train()(features, feature_lens, ["one two", "tres"], requests)
        (out["loss"] / out["tokens"]).backward()
        assert torch.isfinite(out["loss"]) and all(p.grad is not None for p in model.parameters())

        model.eval().save_pretrained(folder / "model")
        model = SpeechLLM.from_pretrained(folder / "model")
        noise = 0.1 * np.random.default_rng(0).standard_normal(22050).astype(np.float32)
        soundfile.write(folder / "noise.wav", noise, 22050)  # resampled
        (recording,) = model.transcribe([str(folder / "noise.wav")], language="en")
        assert isinstance(recording.text, str)
    print(f"speechllm from {Path(speechllm.__file__).parent}: trained a step, saved, loaded, transcribed")


if __name__ == "__main__":
    main()
