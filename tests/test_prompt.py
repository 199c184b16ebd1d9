"""Prompts and the splice."""

import pytest
import torch

from speechllm.prompt import IGNORE, PromptConfig, splice
from speechllm.tokenizer import RWKVTokenizer

tokenizer = RWKVTokenizer()


def test_layout_and_labels():
    prompt = PromptConfig()
    labels = [tokenizer.encode(" one two"), tokenizer.encode(" 三")]
    out = splice(prompt, tokenizer, [3, 5], ["en", "zh"], labels)
    for i, (audio_len, lang) in enumerate([(3, "en"), (5, "zh")]):
        before = tokenizer.encode("User: ")
        after = tokenizer.encode(f"<|{lang}|>\n\nAssistant:")
        row = out.token_ids[i, : out.lens[i]].tolist()
        assert row == before + [0] * audio_len + after + labels[i]
        assert out.audio_mask[i].nonzero().flatten().tolist() == list(range(len(before), len(before) + audio_len))
        # The last prompt position predicts the first label token, the last label token the end of text.
        start = len(before) + audio_len + len(after) - 1
        expected = [IGNORE] * start + [*labels[i], tokenizer.eos_id]
        assert out.labels[i, : out.lens[i]].tolist() == expected
        assert (out.labels[i, out.lens[i] :] == IGNORE).all()
        assert (out.token_ids[i, out.lens[i] :] == 0).all()


def test_without_labels_rows_end_with_the_prompt():
    out = splice(PromptConfig(before_audio="", after_audio=">"), tokenizer, [2], [None])
    assert out.token_ids.tolist() == [[0, 0, *tokenizer.encode(">")]]
    assert (out.labels == IGNORE).all()


def test_an_empty_label_is_only_the_end_of_text():
    out = splice(PromptConfig(after_audio=""), tokenizer, [2], [None], [[]])
    assert out.labels[0, -1] == tokenizer.eos_id and (out.labels[0, :-1] == IGNORE).all()


def test_rows_with_a_target_language_are_translations():
    prompt = PromptConfig()
    labels = [tokenizer.encode(text) for text in (" one", " 一", " un")]
    languages, targets = ["en", "en", "fr"], [None, "zh", None]
    out = splice(prompt, tokenizer, [2, 4, 3], languages, labels, targets)
    after = tokenizer.encode("<|en|><|zh|>\n\nAssistant:")
    assert out.token_ids[1, : out.lens[1]].tolist() == tokenizer.encode("User: ") + [0] * 4 + after + labels[1]
    for i, audio_len in enumerate([2, 4, 3]):
        alone = splice(prompt, tokenizer, [audio_len], languages[i : i + 1], labels[i : i + 1], targets[i : i + 1])
        for name in ("token_ids", "audio_mask", "labels"):
            assert torch.equal(getattr(out, name)[i, : out.lens[i]], getattr(alone, name)[0])
    transcripts = splice(prompt, tokenizer, [2, 3], ["en", "fr"], labels[::2])
    assert torch.equal(transcripts.token_ids[1, : out.lens[2]], out.token_ids[2, : out.lens[2]])


def test_a_translation_prompt_takes_the_slots_that_it_has():
    prompt = PromptConfig(before_audio="{lang}: ", after_audio=">", after_audio_ast=" in {target_lang}:")
    assert prompt.fill("fr") == ("fr: ", ">")
    assert prompt.fill("fr", "de") == ("fr: ", " in de:")
    assert PromptConfig(after_audio=">", after_audio_ast="{{{target_lang}}}").fill(None, "de") == ("User: ", "{de}")


def test_errors():
    with pytest.raises(ValueError, match="the utterance has no language"):
        splice(PromptConfig(), tokenizer, [2], [None])
    with pytest.raises(ValueError, match="after_audio: unknown slot {speaker}"):
        PromptConfig(after_audio="{speaker}")
    with pytest.raises(ValueError, match="before_audio: the slot {target_lang} is for translation"):
        PromptConfig(before_audio="{target_lang}")
    with pytest.raises(ValueError, match="after_audio_ast: unknown slot {task}; allowed: {lang} and {target_lang}"):
        PromptConfig(after_audio_ast="{lang}{task}")
    with pytest.raises(ValueError, match="after_audio: .* write {{ and }} for braces"):
        PromptConfig(after_audio="{lang")
    for texts in ({"after_audio": ""}, {"after_audio_ast": ""}):
        with pytest.raises(ValueError, match="needs text"):
            PromptConfig(before_audio="", **texts)
    with pytest.raises(ValueError, match="{lang} slot .* no language: give `lang` .* --language"):
        PromptConfig(after_audio=">").fill(None, "zh")
    with pytest.raises(ValueError, match="{target_lang} slot .* no target language: .* --target-language"):
        PromptConfig().fill("en", "")
