"""Text normalization: named steps in the order of the configuration (`data.text`), the same for training and scoring.

    nfc, nfkc            Unicode normal forms (UAX #15); nfkc takes an acute accent that stands alone for an apostrophe
                         (l´amour), leaves other lone accents as they are, and drops the Arabic tatweel
    lowercase, uppercase by the rules of the language, where it is known: I is ı in Turkish and Azerbaijani
    remove_punctuation   punctuation and symbols become spaces, except within words and numbers: don't, mother-in-law,
                         3.5, 1,000, 10:30, 50%; the tatweel, which only stretches a word, is dropped
    halfwidth            full-width ASCII and the ideographic space to half width, and nothing else that NFKC does
    simplified           Chinese to simplified characters, by OpenCC (https://github.com/BYVoid/OpenCC)
    traditional          Chinese to traditional characters, in OpenCC's standard forms (not those of one region)
    split_chinese        spaces around each Chinese character, so that a character is a word
    join_chinese         no spaces between Chinese characters
    leaderboard          English as the Open ASR Leaderboard scores it, by Whisper's English normalizer: lowercase, no
                         punctuation, one spelling, contractions written out, numbers in figures
    leaderboard_multilingual  other languages as there, by Whisper's basic normalizer: lowercase, no punctuation

The last two are PyPI's whisper-normalizer and are used alone, for scoring.

White space is single afterwards, with none at the ends, and what nobody sees or hears is gone whatever the steps:
zero-width spaces, soft hyphens, byte order marks, direction marks and other control characters. The joiners that say
how letters are shaped (zero width non-joiner and joiner in Persian and in Indic scripts, joiners of emoji) stay where
they do that. A step that is applied again changes nothing (the last two aside, in rare cases): a hypothesis can
be normalized like its reference, which has been through the steps once already. No step raises for any string.
"""

from __future__ import annotations

import difflib
import importlib
import re
import sys
import unicodedata
from collections.abc import Callable, Iterable, Sequence
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
# What is never seen: control and format characters, and fillers that Unicode counts among letters and marks. Signs that
# Unicode calls format characters but that are seen (Arabic number signs and the like), and the tags in emoji of flags,
# are not among them.
_SEEN = frozenset([*range(0x600, 0x606), 0x6DD, 0x70F, 0x890, 0x891, 0x8E2, 0x110BD, 0x110CD, *range(0xE0020, 0xE0080)])
_FILLERS = frozenset([0x34F, 0x115F, 0x1160, 0x17B4, 0x17B5, 0x3164, 0xFFA0])
# Zero width non-joiner and joiner, and the Mongolian vowel separator: invisible, but they shape the letters by them.
_JOINERS = "\u180e\u200c\u200d"
# Letters and marks of scripts whose letters join or stack: Arabic, Syriac, ..., Indic, Mongolian and their extensions.
_SHAPED = (
    "\u0600-\u109f\u1780-\u18af\u1a20-\u1aaf\u1b00-\u1bff\ua800-\uabff\ufb50-\ufdff\ufe70-\ufefc\U00010a00-\U00011fff"
)
_TATWEEL = "\u0640"
# Lone accents that typewriters and keyboards have in the place of an apostrophe: those of Latin and of Greek.
_ACCENTS_AS_APOSTROPHES = "\u00b4\u0384\u1fbd\u1fbf\u1ffd\u1ffe"
# Languages that tell a dotted and a dotless i apart.
_DOTTED_CAPITAL_I = re.compile("\u0130|I\u0307")
_DOTLESS_I = frozenset(["tr", "az", "crh", "gag", "kaa"])
# What joins emoji, or says how they are shown; it goes with them.
_EMOJI_JOINERS = "\u200d\u20e3\ufe0e\ufe0f"
_ENCODABLE = re.compile("[^\ud800-\udfff]+")
# More than any text was seen to need.
_MAX_PASSES = 10

_CONTRADICTORY = (("lowercase", "uppercase"), ("simplified", "traditional"), ("split_chinese", "join_chinese"))


def normalize_text(text: str, steps: Sequence[str], language: str | None = None) -> str:
    """`text` after each of `steps` in order, with single spaces and without what is never seen.

    Args:
        steps: names that `check_steps` has accepted.
        language: the tag of the language of `text`, for the steps that depend on it.

    Raises:
        UserError: a step needs OpenCC or whisper-normalizer, which is not installed.
    """
    text = _visible(text)
    dotless = language is not None and language.partition("-")[0] in _DOTLESS_I
    for step in steps:
        if dotless and step in _TURKIC_CASE:
            text = _DOTTED_CAPITAL_I.sub("i", text).translate(_TURKIC_CASE[step])
        if step in _FOR_ASCII or not text.isascii():
            text = _STEPS[step](text)
    return " ".join(_visible(text).split())


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


def _visible(text: str) -> str:
    if text.isascii() and text.isprintable():
        return text
    candidates, invisible = _invisible()
    return invisible.sub("", text) if candidates.search(text) else text


@cache
def _invisible() -> tuple[re.Pattern, re.Pattern]:
    """Matches one character that is perhaps never seen, fast; and one that is not, and shapes none that is."""
    codes = [
        code
        for code in (*range(0x20000), 0xE0001)  # there are no others further on
        if code in _FILLERS
        or (unicodedata.category(chr(code)) in ("Cc", "Cf") and code not in _SEEN and not chr(code).isspace())
        if chr(code) not in _JOINERS
    ]
    # A joiner at the end of a word shapes it too, in Indic scripts; a non-joiner has nothing to keep apart there.
    return re.compile(f"[{_character_class(codes)}{_JOINERS}]"), re.compile(
        f"[{_character_class(codes)}]"
        rf"|(?<![{_SHAPED}])\u200c|\u200c(?![{_SHAPED}])"
        rf"|(?<![{_SHAPED}])\u180e"
        rf"|(?<![{_SHAPED}{_emoji()}])\u200d|(?<=[{_emoji()}])\u200d(?![{_emoji()}])"
    )


@cache
def _emoji() -> str:
    """What may stand beside a joiner in emoji: symbols, skin tones and the selectors of how they are shown."""
    codes = [code for code in range(0x2000, 0x20000) if unicodedata.category(chr(code)) in ("So", "Sk", "Sm")]
    return _character_class([*codes, *map(ord, "\u20e3\ufe0e\ufe0f")])


def _character_class(codes: Iterable[int]) -> str:
    """The inside of a regular expression's [...] for these characters."""
    ranges = ""
    for _, group in groupby(enumerate(sorted(codes)), key=lambda item: item[1] - item[0]):
        run = [code for _, code in group]
        ranges += f"{re.escape(chr(run[0]))}-{re.escape(chr(run[-1]))}"
    return ranges


def _nfc(text: str) -> str:
    return unicodedata.normalize("NFC", text)


def _nfkc(text: str) -> str:
    """NFKC makes of an accent that stands alone a space and an accent above it, which nobody has written."""
    parts = _lone_accents().split(text)  # text and lone accent in turns
    for i, part in enumerate(parts):
        if i % 2 == 0:
            parts[i] = unicodedata.normalize("NFKC", part).replace(_TATWEEL, "")
        elif part in _ACCENTS_AS_APOSTROPHES:
            parts[i] = "'"
        elif part >= "\ufe70":  # the signs of Arabic vowels on their own, as old files have them
            parts[i] = unicodedata.normalize("NFKC", part).strip()
    return "".join(parts)


@cache
def _lone_accents() -> re.Pattern:
    compatible = ((code, unicodedata.normalize("NFKC", chr(code))) for code in range(0x10000))
    codes = [code for code, form in compatible if form[0] == " " and len(form) > 1 and unicodedata.combining(form[1])]
    return re.compile(f"([{_character_class(codes)}])")


def _lowercase(text: str) -> str:
    return _DOTTED_CAPITAL_I.sub("i", text).lower()  # str.lower would leave a second dot above the i


def _remove_punctuation(text: str) -> str:
    """Each character of the Unicode categories P and S becomes a space; the tatweel is dropped.

    A single apostrophe or hyphen with a character of a word on either side stays, written as in ASCII; so do a mark
    between two digits that belongs to their number, and a percent sign after a digit.
    """
    return _punctuation().sub(_kept_of_punctuation, _visible(text.replace(_TATWEEL, "")))


def _kept_of_punctuation(match: re.Match) -> str:
    if match.lastgroup == "number":
        return match[0]
    return {"apostrophe": "'", "hyphen": "-"}.get(match.lastgroup or "", " ")


@cache
def _punctuation() -> re.Pattern:
    """Matches one punctuation mark or symbol; one that stays is in the group `apostrophe`, `hyphen` or `number`."""
    marks = _character_class(code for code in range(sys.maxunicode + 1) if unicodedata.category(chr(code))[0] in "PS")
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
    "lowercase": _lowercase,
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
# What is done to the text before the step, in languages with a dotless i.
_TURKIC_CASE = {"lowercase": str.maketrans({"I": "ı"}), "uppercase": str.maketrans({"i": "İ"})}
# The others leave ASCII as it is.
_FOR_ASCII = frozenset(["lowercase", "uppercase", "remove_punctuation", "leaderboard", "leaderboard_multilingual"])
