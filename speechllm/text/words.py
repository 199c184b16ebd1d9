"""Where the words of a text are, and what single tokens say of it."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from functools import cache

from speechllm.text.tokenizer import Tokenizer

# Scripts that are written without spaces between words: Thai, Lao, Myanmar, Khmer, Kana, Han.
_SPACELESS = re.compile(
    "[\u0e01-\u0e46\u0e80-\u0ec6\u1000-\u103f\u1050-\u108f\u1780-\u17d3\u3007\u3041-\u30fa\u30fc-\u30ff\u31f0-\u31ff"
    "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff66-\uff9f\U00020000-\U0003ffff]"
)


def word_spans(text: str) -> list[tuple[int, int]]:
    """Where the words of `text` are: (start, end) in characters. What is not in a word is white space.

    Words end at white space. A character of a script without spaces is a word by itself, with the combining marks and
    the punctuation that follow it and the opening punctuation before it.
    """
    spans: list[tuple[int, int]] = []
    start = None
    is_character = has_letters = False  # of the word that begins at `start`
    for i, character in enumerate(text + " "):
        category = unicodedata.category(character)
        is_opening = category in ("Ps", "Pi")
        is_letter = category[0] in "LN"
        is_spaceless = is_letter and bool(_SPACELESS.match(character))
        splits = (is_spaceless and has_letters) or (is_character and (is_letter or is_opening))
        if start is not None and (character.isspace() or splits):
            spans.append((start, i))
            start = None
        if start is None and not character.isspace():
            start, is_character, has_letters = i, False, False
        is_character |= is_spaceless
        has_letters |= is_letter
    return spans


@cache
def is_spaceless(character: str) -> bool:
    """Whether it is a letter of a script without spaces, and so a word by itself; not white space."""
    return len(word_spans("a" + character)) == 2


class TokenTexts:
    """What tokens say in the middle of a text; at its start some tokenizers leave out a space."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._before = tokenizer.encode("a")
        self._before_length = len(tokenizer.decode(self._before))

    def of(self, tokens: Sequence[int]) -> tuple[str, bool]:
        """The text, and whether its last character is complete: else it is U+FFFD."""
        stream = self._tokenizer.stream()
        text = "".join(stream.push(token) for token in (*self._before, *tokens))
        incomplete = stream.finish()
        return text[self._before_length :] + incomplete, not incomplete
