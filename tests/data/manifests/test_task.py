"""What is to be written: transcripts and translations in the forms that NeMo's lines have them, and in lhotse cuts."""

import json

import pytest
from lhotse import MonoCut, SupervisionSegment
from lhotse.testing.dummies import dummy_recording

from speechllm.data import SourceConfig
from speechllm.data.manifests.manifest import describe, describe_cut, to_cut

LINE = {"audio_filepath": "x/1.wav", "duration": 1.0}


def forms(fields: dict, source: dict):
    """The same fields in a NeMo line, and in a lhotse cut whose supervision, or which itself, has the custom fields."""
    yield LINE | fields, SourceConfig("m.jsonl", **source)
    custom = {name: value for name, value in fields.items() if name not in ("text", "lang")}
    for of_supervision in (True, False):
        supervision = SupervisionSegment("s", "r", 0.0, 1.0, text=fields.get("text"), language=fields.get("lang"))
        supervision.custom = dict(custom) if of_supervision else None
        cut = MonoCut("c", 0.0, 1.0, 0, supervisions=[supervision], recording=dummy_recording(0))
        cut.custom = None if of_supervision else dict(custom)
        yield cut.to_dict(), SourceConfig("cuts.jsonl", **source)


def understood(obj: dict, source: SourceConfig):
    """What a line, its cut, and the cut written to a file and read again say, which is the same."""
    stored = json.loads(json.dumps(obj))
    entry = describe(obj, source)
    cut = to_cut(stored, source)
    assert describe_cut(cut) == entry and stored == obj
    again = json.loads(json.dumps(cut.to_dict()))
    plain = SourceConfig("c.jsonl", languages=source.languages)
    assert describe(again, plain) == entry == describe_cut(to_cut(again, plain))
    return entry


EN_DE = {"source_lang": "en", "target_lang": "de"}


@pytest.mark.parametrize(
    ("fields", "source", "task", "text", "ast_text"),
    [
        ({"text": "hi"}, {}, "asr", "hi", ""),
        ({"text": "hi", "source_lang": "en", "target_lang": "en"}, {}, "asr", "hi", ""),
        ({"text": "hi", "source_lang": "en-US", "target_lang": "English"}, {}, "asr", "hi", ""),
        # Canary Flash and 2: the languages say it
        ({"text": "hallo"} | EN_DE, {}, "ast", "", "hallo"),
        ({"text": "hallo", "lang": "English", "target_lang": "ger"}, {}, "ast", "", "hallo"),
        ({"text": "hallo", "target_lang": "de"}, {"lang": "en"}, "ast", "", "hallo"),
        ({"text": "hallo"} | EN_DE, {"task": "asr"}, "asr", "", "hallo"),
        # Canary 1
        ({"text": "hi", "task": "asr", "source_lang": "en", "target_lang": "en"}, {}, "asr", "hi", ""),
        ({"text": "hallo", "task": "ast"} | EN_DE, {}, "ast", "", "hallo"),
        ({"text": "hallo", "taskname": "s2t_translation"} | EN_DE, {}, "ast", "", "hallo"),
        ({"text": "hallo", "task": "translate"} | EN_DE, {}, "ast", "", "hallo"),
        ({"text": "hi", "answer": "hallo", "taskname": "ast"} | EN_DE, {}, "ast", "hi", "hallo"),
        ({"text": "hi", "answer": "na", "taskname": "asr"}, {}, "asr", "hi", ""),
        ({"answer": "na", "taskname": "asr"}, {}, "asr", "", ""),
        ({"answer": "hi", "taskname": "asr"}, {}, "asr", "hi", ""),
        ({"text": "hi", "translation": "hallo"} | EN_DE, {}, "ast", "hi", "hallo"),
        # with both, as data for both tasks have it
        ({"text": "hi", "ast_text": "hallo"} | EN_DE, {}, "asr", "hi", "hallo"),
        ({"text": "hi", "ast_text": "hallo"} | EN_DE, {"task": "ast"}, "ast", "hi", "hallo"),
        ({"text": "hi", "ast_text": "hallo"} | EN_DE, {"task": "asr"}, "asr", "hi", "hallo"),
        ({"asr_text": "hi", "ast_text": "hallo"} | EN_DE, {"task": "asr"}, "asr", "hi", "hallo"),
        # a transcript alone is no translation, unless the source says where that is
        ({"text": "hi"}, {"task": "ast", "lang": "en", "target_lang": "de"}, "ast", "hi", ""),
        ({"text": "hallo"}, {"task": "ast", "target_lang": "de", "text_field": "text"}, "ast", "", "hallo"),
        # a prompt and its answer
        ({"context": "Transcribe", "answer": "hi", "task": "asr"}, {}, "asr", "hi", ""),
        ({"context": "Who speaks?", "answer": "Bob", "text": "hi"}, {}, "asr", "hi", ""),
        ({"context": "Say it", "answer": "hi"}, {"text_field": "answer"}, "asr", "hi", ""),
    ],
)
def test_what_is_written(fields, source, task, text, ast_text):
    for obj, config in forms(fields, source):
        entry = understood(obj, config)
        assert (entry.task, entry.text, entry.ast_text) == (task, text, ast_text), obj
        assert entry.target == (ast_text if task == "ast" else text)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"text": "hallo", "target_lang": "de"}, "target_lang: 'de', but neither the task nor the language"),
        ({"context": "Transcribe", "answer": "hi"}, "context: a prompt and its answer"),
        ({"question": "Who speaks?", "answer": "Bob"}, "question: a prompt and its answer"),
        ({"context": "Transcribe"}, "context: a prompt and its answer"),
        ({"answer": "hi"}, "answer: without a task"),
        ({"text": "hi", "task": "tts"}, "task: 'tts' is none of"),
        ({"text": "hi", "ast_text": ["a", "b"], "task": "ast"}, "ast_text: expected a string, found a list of 2"),
    ],
)
def test_what_cannot_be_told_is_refused(fields, message):
    for obj, config in forms(fields, {}):
        for function in (describe, to_cut):
            with pytest.raises(ValueError, match=message):
                function(obj, config)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (LINE | {"text": ["a", "b"]}, r"text: expected a string, found a list of 2; .* text_field: text.0"),
        (LINE | {"audio_filepath": ["a.wav", "b.wav"]}, "audio_filepath: a list of 2 files"),
        ({"id": "1", "conversations": [{"from": "User", "value": "x", "type": "text"}]}, "conversations: .* not used"),
        (LINE | {"text_filepath": "x.txt"}, "text_filepath: .* not read"),
        (LINE | {"text": "x", "channel": "left"}, "channel: expected the number of a channel"),
        (LINE | {"text": "x", "channel": [0, -1]}, "channel: expected the number of a channel"),
    ],
)
def test_other_kinds_of_lines_are_refused_by_name(line, message):
    for function in (describe, to_cut):
        with pytest.raises(ValueError, match=message):
            function(line, SourceConfig("m.jsonl"))


def test_fields_and_steps_of_a_source():
    """LibriSpeech in upper case beside Libriheavy, whose cuts have a cased and a plain text."""
    texts = ["Mr. Smith, yes.", "MR SMITH YES"]
    cut = MonoCut("c", 0.0, 1.0, 0, recording=dummy_recording(0))
    cut.supervisions = [SupervisionSegment("s", "r", 0.0, 1.0, custom={"texts": texts, "speech_lang": "English"})]
    with pytest.raises(ValueError, match=r"custom.texts has 2 texts: say which .* text_field: custom.texts.0"):
        describe(cut.to_dict(), SourceConfig("c.jsonl"))
    for number, text in enumerate(texts):
        for field in (f"custom.texts.{number}", f"custom.texts[{number}]", f"texts.{number}"):
            source = SourceConfig("c.jsonl", text_field=field, lang_field="custom.speech_lang")
            entry = understood(cut.to_dict(), source)
            assert (entry.text, entry.lang) == (text, "en")
    line = LINE | {"text": "HELLO, I", "text_pc": "Hello.", "speech": "tr", "alignment": {"word": [["I", 0.5, 0.1]]}}
    entry = understood(line, SourceConfig("m.jsonl", text=["lowercase", "remove_punctuation"], lang_field="speech"))
    assert (entry.text, entry.lang, entry.words[0].word) == ("hello ı", "tr", "ı")
    assert understood(line, SourceConfig("m.jsonl", text_field="text_pc")).text == "Hello."
    assert understood(line, SourceConfig("m.jsonl", text_field="none")).text == ""
    with pytest.raises(ValueError, match=r"source m\.jsonl: text: unknown step 'lower'"):
        SourceConfig("m.jsonl", text=["lower"])


def test_languages_become_tags_and_unknown_ones_are_named():
    source = SourceConfig("m.jsonl", lang="Klingon", languages={"EN": "EN", "Sichuanese": "zh-sichuan"})
    for said, tag in (("English", "en"), ("cmn", "zh"), ("EN", "EN"), ("Sichuanese", "zh-sichuan"), ("xx", "xx")):
        for obj, config in forms({"text": "x", "lang": said}, {"lang": source.lang, "languages": source.languages}):
            entry = understood(obj, config)
            assert entry.lang == tag
            assert config.unknown_languages(entry) == (["xx"] if tag == "xx" else [])
    assert source.unknown_languages(describe(LINE | {"text": "x"}, source)) == []  # stated in the configuration
