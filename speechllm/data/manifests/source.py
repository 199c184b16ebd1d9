"""What manifests of all kinds share: their place in the configuration, entries, values of fields and errors."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from speechllm.errors import UserError
from speechllm.prompt.label import LabelError, LabelTemplate, WordTime
from speechllm.prompt.request import Request
from speechllm.text.languages import is_language_tag, language_tag
from speechllm.text.normalize import check_steps, normalize_text

# Words may begin and end so many seconds outside of the audio that a manifest says.
_TIME_TOLERANCE = 0.1

KINDS = ("auto", "nemo", "lhotse", "shar", "kaldi", "parquet", "arrow", "table", "webdataset", "messages")

# What people call the tasks: NeMo's manifests, and Canary's among them.
_TASKS = {
    "asr": "asr", "transcribe": "asr", "transcription": "asr",
    "ast": "ast", "s2t_translation": "ast", "translate": "ast", "translation": "ast",
}  # fmt: skip


class DataError(UserError):
    """Data that cannot be trained or decoded with; the message says which and why."""


class ManifestError(DataError):
    """A manifest that is missing, or a line of it that cannot be used; the message has file and line number."""


class ShardError(ManifestError):
    """A shard of which nothing, or nothing more, can be read."""


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

    `path`: a file, a directory, a pattern of files with braces or `*`, a URL of JSON lines or a table, or a data set of
    the Hugging Face Hub (OWNER/NAME[@REVISION][/FOLDER or pattern]). `kind`: nemo, lhotse, shar, kaldi, parquet, arrow,
    table, webdataset or messages (see `speechllm.data.manifests.kinds`); auto looks. `tar_path`: the tar shards of
    NeMo's tarred form. `weight`: the share of an epoch that is drawn from this source, relative to the others; null in
    all of them: each utterance once. `lang`, `target_lang`, `task` (asr or ast): of lines that do not say theirs.
    `channel`: which one to take of several; null averages them. `stream`: read in order instead of by index, for data
    that cannot be read at random. Only streams may be `pipe:` commands, and have tar files at URLs: the tar shards of
    NeMo, or a brace pattern of the cuts.*.jsonl.gz of Shar, with recording.*.tar beside them. lhotse does not unpack
    what comes from commands: `| gzip -dcf` does, and passes tar files on as they are.

    `text_field`, `lang_field`: where the text, and the language of the speech, are, if not in `text` and `lang`: a
    field of the line, or of the supervision of a lhotse cut, with dots on the way to it (`custom.texts.0` in
    Libriheavy, whose cuts have two texts). `text`: steps of normalization for the texts of this source, before those of
    `data.text`. `languages`: tags of your own, `{what the lines say: tag}`; other names and codes become tags of ISO
    639 (`speechllm.text.languages`).
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
    text_field: str | None = None
    lang_field: str | None = None
    text: list[str] = field(default_factory=list)
    languages: dict[str, str] = field(default_factory=dict)

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
        for name, needs_stream in (("path", is_url_of_shar(self.path)), ("tar_path", is_remote(self.tar_path or ""))):
            self._require(not needs_stream or self.stream, name, "can only be read as a stream: set stream: true")
        try:
            check_steps(self.text)
        except ValueError as error:
            raise ValueError(f"source {self.path}: {error}") from error

    def language(self, name: str | None) -> str | None:
        """The tag of a language that a line names."""
        if name is None or not name.strip():
            return None
        return self.languages[name] if name in self.languages else language_tag(name)

    @property
    def stated_lang(self) -> str | None:
        """`lang` as a tag."""
        return self.language(self.lang)

    @property
    def stated_target_lang(self) -> str | None:
        """`target_lang` as a tag."""
        return self.language(self.target_lang)

    def is_known_language(self, tag: str | None) -> bool:
        """Whether a tag is of ISO 639, or stated in the configuration; None says nothing that is not known."""
        own = (self.stated_lang, self.stated_target_lang, *self.languages.values())
        return tag is None or tag in own or is_language_tag(tag)

    def unknown_languages(self, entry: Entry) -> list[str]:
        """Those tags of an utterance that are not known."""
        return [tag for tag in (entry.lang, entry.target_lang) if tag and not self.is_known_language(tag)]

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

    @property
    def request(self) -> Request:
        """What is asked for the utterance."""
        target_language = self.target_lang if self.task == "ast" else None
        return Request(self.id, self.previous, self.hotwords, language=self.lang, target_language=target_language)


def is_remote(path: str) -> bool:
    """Whether it is a URL or a `pipe:` command; not an id of the Hugging Face Hub, whose files are downloaded."""
    return path.startswith("pipe:") or ("://" in path and not path.startswith("hf:"))


def is_url(path: str) -> bool:
    """Whether it is a URL; not a `pipe:` command."""
    return is_remote(path) and not path.startswith("pipe:")


def is_url_of_shar(path: str) -> bool:
    """Whether it is a URL or command that can only be the cuts of a Shar directory, or one that tar files go with."""
    return is_remote(path) and (not is_url(path) or os.path.basename(path).startswith("cuts."))


def audio_path(path: str, folder: str) -> str:
    """Where a file is that a manifest in `folder` names: beside the manifest, or, if it is not there, from the current
    directory, as NeMo looks for it; never there if the folder is at a URL."""
    if is_remote(path):
        return path
    path = os.path.expanduser(path)
    beside = os.path.join(folder, path)
    if os.path.isabs(path) or is_url(folder) or os.path.exists(beside) or not os.path.exists(path):
        return beside
    return os.path.abspath(path)


def absolute(path: str) -> str:
    """A path that means the same from every directory; a URL as it is."""
    return path if is_url(path) else os.path.abspath(path)


def string_of(fields: dict, *names: str) -> str | None:
    """The first of the fields `names` that is not null.

    Raises:
        ValueError: it is no string.
    """
    for name in names:
        value = fields.get(name)
        if value is not None:
            return _string(value, name)
    return None


def _string(value: Any, name: str) -> str:
    if isinstance(value, list):
        raise ValueError(
            f"{name}: expected a string, found a list of {len(value)}; if one of them is the text, say which with "
            f"text_field: {name}.0"
        )
    if not isinstance(value, str):
        raise ValueError(f"{name}: expected a string, found {value!r}")
    return value


def field_at(fields: dict, path: str) -> str | None:
    """The field that is called `path`, or that dots lead to, such as `custom.texts.0`; None if it is null or missing.

    Raises:
        ValueError: it is no string.
    """
    if path in fields:
        return string_of(fields, path)
    value: Any = fields
    for name in re.sub(r"\[(\d+)\]", r".\1", path).split("."):
        if isinstance(value, list) and name.isdigit() and int(name) < len(value):
            value = value[int(name)]
        else:
            value = value.get(name) if isinstance(value, dict) else None
    return None if value is None else _string(value, path)


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
    if name is None:
        return None
    if name.lower() not in _TASKS:
        raise ValueError(f"task: {name!r} is none of {', '.join(_TASKS)}")
    return _TASKS[name.lower()]


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
        return target_text(entry, text_steps)


def target_text(entry: Entry, text_steps: Sequence[str]) -> str:
    """What the model is to write, normalized by the rules of its language."""
    return normalize_text(entry.target, text_steps, entry.target_lang if entry.task == "ast" else entry.lang)


def label_of(entry: Entry, template: LabelTemplate, text_steps: Sequence[str], speed: float = 1.0) -> str:
    """The label of an utterance.

    Args:
        text_steps: normalization of its text, and of its words one by one (`speechllm.text.normalize`).
        speed: how many times faster it is played.

    Raises:
        LabelError: it lacks what the template needs.
    """
    words = said_words(entry, text_steps, speed) if template.has_times and entry.task == "asr" else None
    return template.fill(target_text(entry, text_steps), entry.request, words)


def said_words(entry: Entry, text_steps: Sequence[str], speed: float = 1.0) -> list[WordTime] | None:
    """The words of an utterance as its transcript has them, in seconds as it is played; None where the manifest has no
    times.

    Args:
        text_steps, speed: see `label_of`.

    Raises:
        LabelError: a word is outside the utterance.
    """
    if entry.words is None:
        return None
    words = []
    for word, start, end in entry.words:
        if not -_TIME_TOLERANCE <= start <= end <= entry.duration + _TIME_TOLERANCE:
            raise LabelError(
                "word times outside",
                f"alignment: {word!r} would be at {start:g} to {end:g} s of {entry.duration:g} s; its times are in "
                "seconds from the beginning of the file",
            )
        if said := normalize_text(word, text_steps, entry.lang):  # others are silence
            words.append(WordTime(said, start / speed, end / speed))
    return words
