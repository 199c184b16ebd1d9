"""What manifests of all kinds share: their place in the configuration, entries, lines and errors."""

from __future__ import annotations

import json
import math
import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from lhotse.serialization import open_best

from speechllm.errors import UserError
from speechllm.prompt.label import LabelError, LabelTemplate, WordTime
from speechllm.text.normalize import normalize_text

# Words may begin and end so many seconds outside of the audio that a manifest says.
_TIME_TOLERANCE = 0.1

KINDS = ("auto", "nemo", "lhotse", "shar", "kaldi")

# What people call the tasks: NeMo's manifests, and Canary's among them.
_TASKS = {"asr": "asr", "transcribe": "asr", "ast": "ast", "s2t_translation": "ast", "translate": "ast"}


class DataError(UserError):
    """Data that cannot be trained or decoded with; the message says which and why."""


class ManifestError(DataError):
    """A manifest that is missing, or a line of it that cannot be used; the message has file and line number."""


# What a line that is nonsense raises.
LINE_ERRORS = (ValueError, KeyError, TypeError, AssertionError)


def explain(error: Exception) -> str:
    """One of `LINE_ERRORS` in words."""
    if isinstance(error, json.JSONDecodeError):
        return f"invalid JSON: {error}"
    if isinstance(error, UnicodeError):
        return f"not UTF-8: {error}"
    if isinstance(error, KeyError):
        return f"missing field {error}"
    return str(error)


@dataclass
class SourceConfig:
    """One manifest in the configuration.

    `path`: a file, a Kaldi data or Shar directory, or a brace pattern of shards. `kind`: nemo, lhotse, shar or kaldi;
    auto looks. `tar_path`: the tar shards of NeMo's tarred form. `weight`: the share of an epoch that is drawn from
    this source, relative to the others; null in all of them: each utterance once. `lang`, `target_lang`, `task` (asr
    or ast): of lines that do not say theirs. `channel`: which one to take of several; null averages them. `stream`:
    read in order instead of by index, for data that cannot be read at random. Only streams may be URLs or `pipe:`
    commands: the tar shards of NeMo, or a brace pattern of the cuts.*.jsonl.gz of Shar, with recording.*.tar beside
    them. lhotse does not unpack what comes from commands: `| gzip -dcf` does, and passes tar files on as they are.
    """

    path: str
    kind: str = "auto"
    tar_path: str | None = None
    weight: float | None = None
    lang: str | None = None
    target_lang: str | None = None
    task: str | None = None
    channel: int | None = None
    stream: bool = False

    def __post_init__(self) -> None:
        self._require(self.kind in KINDS, "kind", f"is none of {', '.join(KINDS)}")
        fits = self.tar_path is None or self.kind in ("auto", "nemo")
        self._require(fits, "tar_path", f"is of NeMo's tarred form, and kind is {self.kind}")
        weight = self.weight
        is_number = isinstance(weight, (int, float)) and not isinstance(weight, bool)
        self._require(weight is None or (is_number and 0 < weight < math.inf), "weight", "is not a positive number")
        self._require(self.task in (None, "asr", "ast"), "task", "is neither asr nor ast")
        is_index = isinstance(self.channel, int) and not isinstance(self.channel, bool) and self.channel >= 0
        self._require(self.channel is None or is_index, "channel", "is not the number of a channel, 0 or more")
        for name in ("path", "tar_path"):
            remote = is_remote(getattr(self, name) or "")
            self._require(not remote or self.stream, name, "can only be read as a stream: set stream: true")

    def _require(self, condition: bool, name: str, complaint: str) -> None:
        if not condition:
            raise ValueError(f"source {self.path}: {name}: {getattr(self, name)!r} {complaint}")


@dataclass(frozen=True)
class Entry:
    """What a manifest says of one utterance, audio aside; `duration` in seconds, `task` asr or ast; `words` of `text`,
    in seconds from the start of the utterance; `previous` and `hotwords`, for the prompt's slots, None where it says
    nothing."""

    id: str
    duration: float
    text: str
    lang: str | None = None
    task: str = "asr"
    ast_text: str = ""
    target_lang: str | None = None
    words: tuple[WordTime, ...] | None = None
    previous: str | None = None
    hotwords: tuple[str, ...] | None = None

    @property
    def target(self) -> str:
        """What the model is to write."""
        return self.ast_text if self.task == "ast" else self.text


def is_remote(path: str) -> bool:
    """Whether it is a URL or a `pipe:` command."""
    return path.startswith("pipe:") or "://" in path


def expand_braces(pattern: str) -> list[str]:
    """`a_{0..2}.tar` or `a_{x,y}.tar` as bash expands them, all combinations; `_OP_` and `_CL_` are braces too, as in
    NeMo. What can be neither stays as it is."""
    pattern = pattern.replace("_OP_", "{").replace("_CL_", "}")
    match = re.search(r"\{(?:(\d+)\.\.(\d+)|([^{}]*,[^{}]*))\}", pattern)
    if match is None:
        return [pattern]
    first, last, names = match.groups()
    if names is None:
        padded = any(len(number) > 1 and number[0] == "0" for number in (first, last))
        width = max(len(first), len(last)) if padded else 0
        step = 1 if int(first) <= int(last) else -1
        choices = [f"{number:0{width}}" for number in range(int(first), int(last) + step, step)]
    else:
        choices = names.split(",")
    rests = expand_braces(pattern[match.end() :])
    return [pattern[: match.start()] + choice + rest for choice in choices for rest in rests]


def existing_files(pattern: str) -> list[str]:
    """The files that a brace pattern stands for; also that of a file whose own name has braces.

    Raises:
        ManifestError: one of them does not exist.
    """
    files = [pattern] if Path(pattern).is_file() else expand_braces(pattern)
    for file in files:
        if not is_remote(file) and not Path(file).is_file():
            raise ManifestError(f"{file}: no such manifest file")
    return files


def numbered_lines(path: str) -> Iterator[tuple[str, bytes]]:
    """FILE:LINE and the line, of all that are not blank; one at a time, unpacked when the name ends in .gz.

    Raises:
        ManifestError: the file cannot be read, or not to its end.
    """
    number = 0
    try:
        with open_best(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                if not line.isspace():
                    yield f"{path}:{number}", line
    except (OSError, EOFError, zlib.error) as error:  # the last two: a damaged gzip file
        raise ManifestError(f"{path}: cannot be read after line {number}: {error}") from error


def parse_line(line: bytes) -> dict:
    """The JSON object of one line.

    Raises:
        ValueError: it is not JSON, not UTF-8, or not an object.
    """
    obj = json.loads(line.removeprefix(b"\xef\xbb\xbf").decode())
    if not isinstance(obj, dict):
        raise ValueError(f"expected a JSON object, found {type(obj).__name__}")
    if b"\\ud" in line or b"\\uD" in line:  # an escaped half of a surrogate pair is JSON, and no text
        json.dumps(obj, ensure_ascii=False).encode()
    return obj


def parsed_lines(path: str) -> Iterator[tuple[str, dict | ManifestError]]:
    """FILE:LINE and its object, or what is wrong with the line."""
    for where, line in numbered_lines(path):
        try:
            yield where, parse_line(line)
        except LINE_ERRORS as error:
            yield where, ManifestError(f"{where}: {explain(error)}")


def string_of(fields: dict, *names: str) -> str | None:
    """The first of the fields `names` that is not null.

    Raises:
        ValueError: it is no string.
    """
    for name in names:
        value = fields.get(name)
        if value is not None:
            if not isinstance(value, str):
                raise ValueError(f"{name}: expected a string, found {value!r}")
            return value
    return None


def hotwords_of(fields: dict) -> tuple[str, ...] | None:
    """The field `hotwords`: a list of phrases, or a text, taken as it is; None where there is none.

    Raises:
        ValueError: it is something else.
    """
    value = fields.get("hotwords")
    if value is None:
        return None
    phrases = (value,) if isinstance(value, str) else value
    if not isinstance(phrases, (list, tuple)) or not all(isinstance(phrase, str) for phrase in phrases):
        raise ValueError(f"hotwords: expected a list of strings, or a string, found {value!r}")
    return tuple(phrases)


def seconds_of(fields: dict, name: str) -> float:
    """The field `name`, 0 or more and finite.

    Raises:
        KeyError, ValueError: it is missing, or no such number.
    """
    value = fields[name]
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
        raise ValueError(f"{name}: expected seconds, found {value!r}")
    return float(value)


def duration_of(fields: dict) -> float:
    """The field `duration`, more than 0 and finite.

    Raises:
        KeyError, ValueError: it is missing, or no such number.
    """
    duration = seconds_of(fields, "duration")
    if duration == 0:
        raise ValueError("duration: must be more than 0 seconds")
    return duration


def task_of(fields: dict) -> str | None:
    """asr or ast as the fields `task` or `taskname` say; None where they do not.

    Raises:
        ValueError: they say something else.
    """
    name = string_of(fields, "task", "taskname")
    if name is not None and name not in _TASKS:
        raise ValueError(f"task: {name!r} is none of {', '.join(_TASKS)}")
    return None if name is None else _TASKS[name]


def words_of(alignment: dict | None, start: float) -> tuple[WordTime, ...] | None:
    """The words of an `alignment`: {"word": [[word, start, duration], ...]}, in seconds from the beginning of the
    recording, as lhotse has it in supervisions.

    Args:
        start: where in the recording the utterance begins.

    Raises:
        ValueError: it is no such thing.
    """
    if alignment is None or "word" not in alignment:
        return None
    words = []
    for item in alignment["word"]:
        word, begin, duration = list(item)[:3]
        if not isinstance(word, str) or isinstance(begin + duration, bool) or not 0 <= begin + duration < math.inf:
            raise ValueError(f"alignment: expected [word, start, duration] in seconds, found {item!r}")
        words.append(WordTime(word, begin - start, begin + duration - start))
    return tuple(words)


def planned_label(entry: Entry, template: LabelTemplate, text_steps: Sequence[str]) -> str:
    """The label whose tokens are counted ahead; the text, of an utterance that is left out when its turn comes."""
    try:
        return label_of(entry, template, text_steps)
    except LabelError:
        return normalize_text(entry.target, text_steps)


def label_of(entry: Entry, template: LabelTemplate, text_steps: Sequence[str], speed: float = 1.0) -> str:
    """The label of an utterance.

    Args:
        text_steps: normalisation of its text, and of its words one by one (`speechllm.text.normalize`).
        speed: how many times faster it is played.

    Raises:
        LabelError: it lacks what the template needs.
    """
    words = None
    if template.has_times and entry.task == "asr" and entry.words is not None:
        words = []
        for word, start, end in entry.words:
            if not -_TIME_TOLERANCE <= start <= end <= entry.duration + _TIME_TOLERANCE:
                raise LabelError(
                    "word times outside",
                    f"alignment: {word!r} would be at {start:g} to {end:g} s of {entry.duration:g} s; its times are in "
                    "seconds from the beginning of the file",
                )
            if said := normalize_text(word, text_steps):  # others are silence
                words.append(WordTime(said, start / speed, end / speed))
    target_language = entry.target_lang if entry.task == "ast" else None
    return template.fill(normalize_text(entry.target, text_steps), entry.lang, target_language, words)
