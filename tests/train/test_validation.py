"""Validation: the language model's texts, or the CTC head's alone while it does not train."""

import dataclasses

import pytest
import torch
from accelerate import Accelerator

from speechllm.model.speech_llm import SpeechLLM
from speechllm.scoring import score, transcripts
from speechllm.train.validation import validate
from tests.train.reading import batch_of


@pytest.fixture
def model(model_config):
    torch.manual_seed(0)
    return SpeechLLM.from_config(model_config)


def test_a_language_model_that_does_not_train_yet_is_not_asked(model, batch, monkeypatch):
    data, accelerator = batch_of(batch), Accelerator(cpu=True)
    requests = [dataclasses.replace(request, id=str(i)) for i, request in enumerate(data.requests)]
    data = dataclasses.replace(data, requests=requests)
    both, examples = validate(accelerator, model, [data], ())
    heard = model.eval().recognize(data.features, data.feature_lens, data.requests)
    expected = 100 * score(transcripts(data, [result.ctc_text for result in heard], ())).rate
    monkeypatch.setattr(SpeechLLM, "recognize", None)
    alone, of_ctc = validate(accelerator, model, [data], (), ctc_only=True)
    assert alone == {name: value for name, value in both.items() if name not in ("wer", "cer")}
    assert alone["ctc_wer"] == expected and model.training
    assert of_ctc.count("ref: ") == examples.count("ref: ") == len(data.texts)
