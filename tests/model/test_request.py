"""What is asked of a model is held against what it was trained for."""

import dataclasses

import pytest

from speechllm.errors import UserError
from speechllm.model.request import asked_languages
from speechllm.prompt.template import PromptConfig, PromptContext


def test_names_become_tags_and_what_is_not_known_is_not_checked(model_config):
    assert asked_languages(model_config, "English", "German") == ("en", "de")
    assert asked_languages(model_config, None, None) == (None, None)
    own = dataclasses.replace(model_config, languages=["English"])
    assert asked_languages(own, "English", None) == ("English", None)


@pytest.mark.parametrize(
    ("languages", "asked", "message"),
    [
        (["en", "en>de"], ("fr", None), "language fr: the model was trained with en$"),
        (
            ["en", "en>de", "en>fr"],
            ("en", "Spanish"),
            "target language es: the model was trained to translate into de, fr",
        ),
        (["en", "es"], ("en", "de"), "target language de: the model was trained on transcripts alone, en, es"),
        ([], ("en", "de"), "trained on transcripts alone, of languages that its data did not name"),
    ],
)
def test_an_error_names_the_languages_of_training(model_config, languages, asked, message):
    with pytest.raises(UserError, match=message):
        asked_languages(dataclasses.replace(model_config, languages=languages), *asked)


def test_what_has_no_slot_in_the_prompt(model_config):
    plain = dataclasses.replace(model_config, prompt=PromptConfig(asr="{audio}>", ast="{audio}<|{target_lang}|>"))
    for asked in (
        ("en", None),
        ("en", "de"),
        (None, None, PromptContext(previous="")),
        (None, "de", PromptContext(hotwords=("x",))),
    ):
        with pytest.raises(UserError, match="takes no notice of it, as its prompt has no {"):
            asked_languages(plain, *asked)
    assert asked_languages(plain, None, "de") == (None, "de")
    by_name = PromptConfig("qwen", instructions=["In {language}:"], ast_instructions=["Into {target_language}:"])
    by_name = dataclasses.replace(model_config, prompt=by_name)
    assert asked_languages(by_name, "en", None) == ("en", None)
    with pytest.raises(UserError, match="no {lang} slot"):
        asked_languages(by_name, "en", "de")
