"""Calls that were right in 0.1 still are, for one release."""

import torch

from speechllm.decode.encoder_recognizer import EncoderRecogniser, EncoderRecognizer
from speechllm.decode.interface import RecogniseOptions
from speechllm.decode.recognizer import Recogniser
from speechllm.prompt import PromptContext
from speechllm.prompt.request import requests_of


def test_languages_targets_and_contexts_in_lists_of_their_own(model, batch):
    model.eval()
    features, lens, texts, _ = batch
    languages, targets = ["en", "es", "en"], [None, "en", None]
    contexts = [PromptContext("a"), PromptContext("b", "before"), PromptContext("c")]
    requests = requests_of(languages, targets, contexts)
    expected = model(features, lens, texts, requests)["loss"]
    for given, named in (
        ((languages, targets, None, contexts), {}),
        ((languages,), {"target_languages": targets, "labels": texts}),
        ((), {"languages": languages, "target_languages": targets}),
    ):
        assert torch.equal(model(features, lens, texts, *given, **named)["loss"], expected)
    found = model.recognise(features, lens, languages, targets, contexts)
    assert found == model.recognize(features, lens, requests)


def test_names_in_british_spelling(model):
    assert isinstance(model.recogniser(RecogniseOptions(ctc_weight=0.3)), Recogniser)
    assert issubclass(EncoderRecogniser, EncoderRecognizer)
