"""Prompts and the splice."""

import pytest

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


def test_errors():
    with pytest.raises(ValueError, match="the utterance has no language"):
        splice(PromptConfig(), tokenizer, [2], [None])
    with pytest.raises(ValueError, match="after_audio: unknown slot {speaker}"):
        PromptConfig(after_audio="{speaker}")
    with pytest.raises(ValueError, match="needs text"):
        PromptConfig(before_audio="", after_audio="")
