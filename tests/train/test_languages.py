"""What a run has trained on, as its checkpoints and its model's folder have it."""

from types import SimpleNamespace

from speechllm.prompt.request import requests_of
from speechllm.train.languages import TrainedLanguages, languages_of


def batch(*pairs):
    return SimpleNamespace(requests=requests_of(*zip(*pairs, strict=True)))


def test_transcripts_and_translations_of_all_processes_and_stages():
    one, other = TrainedLanguages(["it"]), TrainedLanguages()
    one.add([batch(("en", None), ("en", "de")), batch((None, None), (None, "fr"))])
    other.add([batch(("es", None))])
    checkpoint = {"languages": [one.state_dict(), other.state_dict()]}
    assert languages_of(checkpoint) == ["->fr", "en", "en>de", "es", "it"]
    assert languages_of({}) is None
    resumed = TrainedLanguages()
    resumed.load_state_dict(one.state_dict())
    assert resumed.state_dict() == one.state_dict()
