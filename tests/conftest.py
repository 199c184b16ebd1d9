"""Small models and batches that many tests share."""

import random

import pytest
import torch

from speechllm.encoder import ZipformerConfig
from speechllm.model.config import EncoderSection, LLMSection, ModelConfig
from speechllm.model.speech_llm import SpeechLLM
from speechllm.prompt.request import requests_of
from speechllm.rwkv7 import RWKV7Config
from speechllm.text.tokenizer import train_sentencepiece

SENTENCES = [" one two three", " three two", " uno dos tres", " tres uno", " two"]


def pytest_configure(config):
    config.addinivalue_line("markers", 'slow: takes more than half a minute; tools/test.sh -m "not slow" leaves it out')
    config.addinivalue_line("markers", "cuda: needs a GPU; tools/check_gpu.sh runs these")


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("cuda"):
                item.add_marker(pytest.mark.skip(reason="PyTorch sees no GPU"))


@pytest.fixture(scope="session", autouse=True)
def index_dir(tmp_path_factory):
    """Indexes of the tests' manifests do not end up in the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def python_random():
    """Zipformer's training draws from Python's `random` too: what a test learns depends on no other test."""
    random.seed(0)


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    tags = ["User: ", "\n\nAssistant:", "<|en|>", "<|es|>"]
    train_sentencepiece(SENTENCES * 20, folder, vocab_size=300, special_tokens=tags)
    return folder


@pytest.fixture
def model_config(tokenizer_dir):
    """A SpeechLLM of some 10,000 parameters, trained from scratch, with a CTC head."""
    zipformer = ZipformerConfig(
        downsampling_factor=[1, 2],
        num_encoder_layers=[1, 1],
        encoder_dim=[16, 24],
        encoder_unmasked_dim=[16, 16],
        feedforward_dim=[32, 32],
        num_heads=[2, 2],
        query_head_dim=[8],
        value_head_dim=[8],
        pos_head_dim=[4],
        pos_dim=16,
        cnn_module_kernel=[7, 7],
    )
    return ModelConfig(
        tokenizer=str(tokenizer_dir),
        encoder=EncoderSection(zipformer=zipformer),
        llm=LLMSection(rwkv7=RWKV7Config(n_layer=2, n_embd=32, head_size=16, vocab_size=300)),
        ctc_weight=0.3,
    )


@pytest.fixture
def model(model_config):
    torch.manual_seed(0)
    return SpeechLLM.from_config(model_config)


@pytest.fixture
def batch():
    """features (3, 120, 80) with garbage behind each length, lens, texts, requests."""
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(3, 120, 80, generator=generator)
    feature_lens = torch.tensor([120, 77, 50])
    for i, n in enumerate(feature_lens):
        features[i, n:] = 1e4
    return features, feature_lens, ["one two three", "tres", "two"], requests_of(["en", "es", "en"])
