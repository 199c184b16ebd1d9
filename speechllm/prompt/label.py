"""Labels: what the language model writes for an utterance, and what is read back from what it has written.

`model.label` is a template with one of the slots `{text}` and `{timed_text}` and, if the model is to identify the
language of the speech, `{lang}` (as Whisper does, arXiv 2212.04356):

    {text}                      one two
    <|{lang}|> {text}           <|en|> one two
    {timed_text}                <0.24>one<0.64><0.80> two<1.12>

Around each word of `{timed_text}` are its start and end in seconds, as arXiv 2505.15646 has them, in steps of the
positions that the language model has for audio. A translation has no word times: its `{timed_text}` is its text.
"""

from __future__ import annotations

import re
import string
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from speechllm.errors import UserError
from speechllm.prompt.request import Request

_SLOTS = ("lang", "text", "timed_text")
_MARK = re.compile(r"<(\d+\.\d\d)>")
_TIMED_WORD = re.compile(r"<(\d+\.\d\d)>(.+?)<(\d+\.\d\d)>", re.DOTALL)


class WordTime(NamedTuple):
    """A word and when it is said, in seconds."""

    word: str
    start: float
    end: float


class LabelError(UserError):
    """An utterance lacks what the label needs; `reason` is one of a few words to count by."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True)
class ReadWord:
    """A word with its times in seconds, and where in the label it is: characters [first, last)."""

    word: str
    start: float
    end: float
    first: int
    last: int


@dataclass(frozen=True)
class ReadLabel:
    """What was read from a label. `language` and `words` are None where the template has none, or they are not written
    as it says."""

    text: str
    language: str | None = None
    words: tuple[ReadWord, ...] | None = None


@dataclass(frozen=True)
class LabelTemplate:
    """See the module's docstring. `seconds_per_position`: the step of times.

    Raises:
        ValueError: the template has other slots, no text, or a language that cannot be told from its text.
    """

    template: str = "{text}"
    seconds_per_position: float = 0.08

    def __post_init__(self) -> None:
        try:
            slots = [slot for slot in self._slots() if slot is not None]
        except ValueError as error:
            raise ValueError(f"label: {error}; write {{{{ and }}}} for braces that are no slot") from error
        for slot in slots:
            if slot not in _SLOTS:
                raise ValueError(f"label: unknown slot {{{slot}}}; allowed: {', '.join(f'{{{s}}}' for s in _SLOTS)}")
        if len([slot for slot in slots if slot != "lang"]) != 1:
            raise ValueError(f"label: {self.template!r} needs {{text}} or {{timed_text}}, once")
        if slots.count("lang") > 1:
            raise ValueError(f"label: {self.template!r} has {{lang}} more than once")
        if re.search(r"\{lang\}\{|text\}\{lang\}", self.template):
            raise ValueError(f"label: {self.template!r}: nothing tells {{lang}} from the text; write '<|{{lang}}|>'")

    @property
    def is_plain(self) -> bool:
        """Whether a label is the text and nothing else."""
        return self.template == "{text}"

    @property
    def has_language(self) -> bool:
        return "lang" in self._slots()

    @property
    def has_times(self) -> bool:
        return "timed_text" in self._slots()

    def _slots(self) -> list[str | None]:
        return [slot for _, slot, _, _ in string.Formatter().parse(self.template)]

    def fill(
        self,
        text: str,
        request: Request = Request(),  # noqa: B008 - it is frozen
        words: Sequence[WordTime] | None = None,
    ) -> str:
        """The label of an utterance.

        Args:
            text: with single spaces, and none at the ends.
            request: of the utterance; with a target language, `text` is a translation.
            words: of `text`, in its order.

        Raises:
            LabelError: no language, no word times, or those of other words, and the template needs them.
        """
        if self.has_language and not request.language:
            raise LabelError(
                "no language",
                "model.label has a {lang} slot but the utterance has no language: give `lang` in its manifest line "
                "or data source, or take {lang} out of model.label",
            )
        values = {"lang": request.language, "text": text}
        if self.has_times:
            values["timed_text"] = text if request.target_language is not None else self._timed(text, words)
        return self.template.format(**values)

    def _timed(self, text: str, words: Sequence[WordTime] | None) -> str:
        if words is None:
            raise LabelError(
                "no word times",
                "model.label has a {timed_text} slot but the utterance has no word times: give `alignment` in its "
                "manifest line, or take {text} instead",
            )
        check_words(text, words)
        parts, place = [], 0
        for word in words:
            start = place
            for _ in "".join(word.word.split()):
                while text[place : place + 1].isspace():
                    place += 1
                place += 1
            parts += [self._mark(word.start), text[start:place], self._mark(word.end)]
        return "".join(parts)

    def _mark(self, seconds: float) -> str:
        step = self.seconds_per_position
        return f"<{max(0, round(seconds / step)) * step:.2f}>"

    def read(self, label: str, start: int = 0) -> ReadLabel:
        """The inverse of `fill`, from the character `start` on. What is not written as the template says is text; times
        never are."""
        match = self._pattern().fullmatch(label, start)
        language, first, last = None, start, len(label)
        if match is not None:
            language = match.groupdict().get("lang")
            first, last = match.span("text")
        if not self.has_times:
            return ReadLabel(label[first:last], language)
        return ReadLabel(_MARK.sub("", label[first:last]), language, _read_words(label, first, last))

    def _pattern(self) -> re.Pattern[str]:
        parts = []
        for literal, slot, _, _ in string.Formatter().parse(self.template):
            parts.append(re.escape(literal))
            if slot is not None:
                parts.append("(?P<lang>.+?)" if slot == "lang" else "(?P<text>.*)")
        return re.compile("".join(parts), re.DOTALL)


def check_words(text: str, words: Sequence[WordTime]) -> None:
    """Raise a `LabelError` unless these are the words of the text; white space aside."""
    if "".join(text.split()) != "".join("".join(word.word.split()) for word in words):
        timed = " ".join(word.word for word in words)
        raise LabelError("word times of another text", f"alignment: its words are {timed!r}, the text is {text!r}")


def _read_words(label: str, first: int, last: int) -> tuple[ReadWord, ...] | None:
    """The words of label[first:last]; None unless each has a start and an end, and all are in order."""
    words: list[ReadWord] = []
    place = first
    while place < last:
        match = _TIMED_WORD.match(label, place, last)
        if match is None or not match[2].strip() or _MARK.search(match[2]):
            return None
        words.append(ReadWord(match[2].strip(), float(match[1]), float(match[3]), *match.span(2)))
        place = match.end()
    times = [time for word in words for time in (word.start, word.end)]
    return tuple(words) if times == sorted(times) else None
