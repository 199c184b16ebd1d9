"""Words spell the text, whatever the script."""

import pytest

from speechllm.text.words import word_spans

TEXTS = [
    "one  two, three-four's 3.5 \u00e4\u00f6\n",
    "\u6211\u7231\u4f60\uff0c\u300c\u4e16\u754c\u300d\u3002hello 3.5\u5143",
    "\u3053\u3093\u306b\u3061\u306f \u30b3\u30fc\u30d2\u30fc",
    "\u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35 \ud55c\uad6d\uc5b4 \u0440\u0443\u0441",
    "\U00020000\U0001f600 \u201cquoted\u201d (x)",
    "",
    " \n",
]


def words_of(text):
    return [text[start:end] for start, end in word_spans(text)]


@pytest.mark.parametrize("text", TEXTS)
def test_words_are_all_but_white_space(text):
    assert "".join(words_of(text)) == "".join(text.split())
    ends = [0, *(i for span in word_spans(text) for i in span)]
    assert ends == sorted(ends)


def test_characters_of_scripts_without_spaces_are_words():
    assert words_of(TEXTS[0]) == ["one", "two,", "three-four's", "3.5", "\u00e4\u00f6"]
    assert words_of(TEXTS[1]) == [
        *("\u6211", "\u7231", "\u4f60\uff0c", "\u300c\u4e16", "\u754c\u300d\u3002", "hello", "3.5", "\u5143")
    ]
    assert words_of("\u0e2a\u0e27\u0e31\u0e2a") == ["\u0e2a", "\u0e27\u0e31", "\u0e2a"]  # a vowel is a combining mark
    assert words_of("\ud55c\uad6d\uc5b4 \u0440\u0443\u0441") == ["\ud55c\uad6d\uc5b4", "\u0440\u0443\u0441"]
