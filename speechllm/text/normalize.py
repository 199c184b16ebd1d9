"""Text normalisation: named steps in the order of the configuration (`data.text`), the same for training and scoring.

    nfc, nfkc            Unicode normal forms (UAX #15)
    lowercase, uppercase
    remove_punctuation   punctuation and symbols become spaces, except within words and numbers: don't, mother-in-law,
                         3.5, 1,000, 10:30, 50%
    halfwidth            full-width ASCII and the ideographic space to half width, and nothing else that NFKC does
    simplified           Chinese to simplified characters, by OpenCC (https://github.com/BYVoid/OpenCC)
    traditional          Chinese to traditional characters, in OpenCC's standard forms (not those of one region)
    split_chinese        spaces around each Chinese character, so that a character is a word
    join_chinese         no spaces between Chinese characters
    leaderboard          English as the Open ASR Leaderboard scores it, by Whisper's English normalizer: lowercase, no
                         punctuation, one spelling, contractions written out, numbers in figures
    leaderboard_multilingual  other languages as there, by Whisper's basic normalizer: lowercase, no punctuation

The last two are PyPI's whisper-normalizer and are used alone, for scoring.

White space is single afterwards, with none at the ends. A step that is applied again changes nothing (the last two
aside, in rare cases): a hypothesis can be normalised like its reference, which has been through the steps once already.
No step raises for any string.
"""

from __future__ import annotations

import difflib
import importlib
import re
import sys
import unicodedata
from collections.abc import Callable, Sequence
from functools import cache
from itertools import groupby

from speechllm.errors import UserError

# CJK Unified and Compatibility Ideographs, all extensions, and the zero of dates (U+3007).
_IDEOGRAPH = "[\u3007\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]"
_IDEOGRAPHS = re.compile(_IDEOGRAPH)
_SPACE_BETWEEN_IDEOGRAPHS = re.compile(rf"(?<={_IDEOGRAPH})\s+(?={_IDEOGRAPH})")
_HALFWIDTH = {0x3000: " "} | {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)}
_APOSTROPHES = "'\u2019"
_HYPHENS = "\\-\u2010\u2011"
# Between digits, as decimal points, between thousands, in times and fractions; the last two are Arabic. After a digit.
_WITHIN_NUMBERS = ".,:/\u066b\u066c"
_AFTER_NUMBERS = "%\u2030\u066a"
# What joins emoji, or says how they are shown; it goes with them.
_EMOJI_JOINERS = "\u200d\u20e3\ufe0e\ufe0f"
_ENCODABLE = re.compile("[^\ud800-\udfff]+")
# More than any text was seen to need.
_MAX_PASSES = 10

_CONTRADICTORY = (("lowercase", "uppercase"), ("simplified", "traditional"), ("split_chinese", "join_chinese"))


def normalize_text(text: str, steps: Sequence[str]) -> str:
    """`text` after each of `steps` in order, with single spaces.

    Args:
        steps: names that `check_steps` has accepted.

    Raises:
        UserError: a step needs OpenCC or whisper-normalizer, which is not installed.
    """
    for step in steps:
        if step in _FOR_ASCII or not text.isascii():
            text = _STEPS[step](text)
    return " ".join(text.split())


def check_steps(steps: Sequence[str]) -> None:
    """Check the names of steps, and that what they need is installed.

    Raises:
        ValueError: an unknown name, or steps that undo each other.
        UserError: a step needs OpenCC or whisper-normalizer, which is not installed.
    """
    for step in steps:
        if step not in _STEPS:
            near = difflib.get_close_matches(str(step), STEPS, n=1)
            hint = f"did you mean {near[0]}? " if near else ""
            raise ValueError(f"text: unknown step {step!r}; {hint}the steps are {', '.join(STEPS)}")
    for one, other in _CONTRADICTORY:
        if one in steps and other in steps:
            raise ValueError(f"text: {one} and {other} undo each other; take one of them out")
    for step in ("simplified", "traditional", "leaderboard", "leaderboard_multilingual"):
        if step in steps:
            _STEPS[step]("")


def _nfc(text: str) -> str:
    return unicodedata.normalize("NFC", text)


def _nfkc(text: str) -> str:
    return unicodedata.normalize("NFKC", text)


def _remove_punctuation(text: str) -> str:
    """Each character of the Unicode categories P and S becomes a space.

    A single apostrophe or hyphen with a character of a word on either side stays, written as in ASCII; so do a mark
    between two digits that belongs to their number, and a percent sign after a digit.
    """
    return _punctuation().sub(_kept_of_punctuation, text)


def _kept_of_punctuation(match: re.Match) -> str:
    return match[0] if match.lastgroup == "number" else {"apostrophe": "'", "hyphen": "-"}.get(match.lastgroup, " ")


@cache
def _punctuation() -> re.Pattern:
    """Matches one punctuation mark or symbol; one that stays is in the group `apostrophe`, `hyphen` or `number`."""
    marks = ""
    codes = range(sys.maxunicode + 1)
    for is_mark, group in groupby(codes, key=lambda code: unicodedata.category(chr(code))[0] in "PS"):
        if is_mark:
            first, *rest = group
            marks += f"{re.escape(chr(first))}-{re.escape(chr(rest[-1] if rest else first))}"
    inside = rf"[^\s{marks}{_EMOJI_JOINERS}]"
    # The first lookaheads are for speed: letters and spaces are passed over without a look at the long list of marks.
    return re.compile(
        rf"(?=[\W_])(?!\s)(?:(?<={inside})(?:(?P<apostrophe>[{_APOSTROPHES}])|(?P<hyphen>[{_HYPHENS}]))(?={inside})"
        rf"|(?<=\d)(?P<number>[{_WITHIN_NUMBERS}](?=\d)|[{_AFTER_NUMBERS}])"
        rf"|[{marks}][{_EMOJI_JOINERS}]*)"
    )


def _halfwidth(text: str) -> str:
    return text.translate(_HALFWIDTH)


def _simplified(text: str) -> str:
    return _converted(text, _opencc("t2s"))


def _traditional(text: str) -> str:
    """By way of simplified Chinese: OpenCC takes its input for simplified, and would make 萬裏 of its own 萬里."""
    to_simplified, to_traditional = _opencc("t2s"), _opencc("s2t")
    return _converted(text, lambda part: to_traditional(to_simplified(part)))


def _converted(text: str, convert: Callable[[str], str]) -> str:
    """`convert` until nothing changes: for rare characters it makes ones that it would convert further."""
    for _ in range(_MAX_PASSES):
        # OpenCC takes UTF-8, which has no lone surrogates; JSON has.
        converted = _ENCODABLE.sub(lambda match: convert(match.group()), text)
        if converted == text:
            break
        text = converted
    return text


@cache
def _opencc(config: str) -> Callable[[str], str]:
    try:
        import opencc
    except ImportError as error:
        raise UserError(
            "the text steps simplified and traditional need OpenCC: pip install 'speechllm[chinese]'"
        ) from error
    return opencc.OpenCC(config).convert


def _split_chinese(text: str) -> str:
    return _IDEOGRAPHS.sub(r" \g<0> ", text)


def _join_chinese(text: str) -> str:
    return _SPACE_BETWEEN_IDEOGRAPHS.sub("", text)


def _leaderboard(text: str) -> str:
    return _whisper_normalizer("english", "EnglishTextNormalizer")(text)


def _leaderboard_multilingual(text: str) -> str:
    # without their marks, words of many languages of Asia would be broken up; those of the leaderboard have none
    return _whisper_normalizer("basic", "BasicTextNormalizer", preserve_marks=True)(text)


@cache
def _whisper_normalizer(module: str, name: str, **options: bool) -> Callable[[str], str]:
    try:
        return getattr(importlib.import_module(f"whisper_normalizer.{module}"), name)(**options)
    except ImportError as error:
        raise UserError(
            "the text steps leaderboard and leaderboard_multilingual need whisper-normalizer: "
            "pip install 'speechllm[leaderboard]'"
        ) from error


_STEPS: dict[str, Callable[[str], str]] = {
    "nfc": _nfc,
    "nfkc": _nfkc,
    "lowercase": str.lower,
    "uppercase": str.upper,
    "remove_punctuation": _remove_punctuation,
    "halfwidth": _halfwidth,
    "simplified": _simplified,
    "traditional": _traditional,
    "split_chinese": _split_chinese,
    "join_chinese": _join_chinese,
    "leaderboard": _leaderboard,
    "leaderboard_multilingual": _leaderboard_multilingual,
}
STEPS = tuple(_STEPS)
# The others leave ASCII as it is.
_FOR_ASCII = frozenset(["lowercase", "uppercase", "remove_punctuation", "leaderboard", "leaderboard_multilingual"])
