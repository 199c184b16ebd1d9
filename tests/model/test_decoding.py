"""The search that a model's folder asks for."""

import dataclasses

import pytest
import torch

from speechllm.decode.options import RecognizeOptions, SearchOptions
from speechllm.errors import UserError
from speechllm.model.build import load_model
from speechllm.model.config import load_model_config
from speechllm.model.speech_llm import SpeechLLM


def test_transcribe_searches_as_the_folder_says(model_config, tmp_path):
    torch.manual_seed(0)
    decoding = RecognizeOptions(SearchOptions("beam", beam=3, tokens_per_second=4))
    SpeechLLM.from_config(dataclasses.replace(model_config, decoding=decoding)).save_pretrained(tmp_path)
    assert load_model_config(tmp_path).decoding == decoding
    model, asked = load_model(tmp_path), []
    recognizer = model.recognizer
    model.recognizer = lambda options: asked.append(options) or recognizer(options)
    for options in (None, RecognizeOptions()):
        model.transcribe(0.1 * torch.randn(16000), language="en", options=options)
    assert asked == [dataclasses.replace(options, fallback="ctc") for options in (decoding, RecognizeOptions())]


def test_the_files_of_the_search_go_with_the_folder(model_config, tmp_path):
    """They are found wherever it is, and it is not written without them."""
    (tmp_path / "phrases.txt").write_text("one two\n")
    decoding = RecognizeOptions(hotwords=str(tmp_path / "phrases.txt"))
    config = dataclasses.replace(model_config, decoding=decoding)
    SpeechLLM.from_config(config).save_pretrained(tmp_path / "model")
    (tmp_path / "phrases.txt").unlink()
    (tmp_path / "model").rename(tmp_path / "elsewhere")
    loaded = load_model(tmp_path / "elsewhere")
    assert loaded.config.decoding.hotwords == str(tmp_path / "elsewhere/hotwords.txt")
    loaded.transcribe(0.1 * torch.randn(16000), language="en")
    loaded.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again/hotwords.txt").read_text() == "one two\n"
    with pytest.raises(UserError, match="model.decoding.hotwords: .*phrases.txt cannot be copied"):
        SpeechLLM.from_config(config).save_pretrained(tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_an_encoder_alone_has_no_search(model_config):
    with pytest.raises(ValueError, match="decoding leads to the language model"):
        dataclasses.replace(model_config, llm=None, ctc_weight=1.0, decoding=RecognizeOptions())
