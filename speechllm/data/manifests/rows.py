"""A row of a table, or the object of a JSON line, as a NeMo line: which column is what.

The names are those of Hugging Face datasets, Common Voice, WeNet and west (`key`, `wav`, `txt`), FunASR (`key`,
`source`, `target`) and audio folders (`file_name`).
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from speechllm.data.manifests.source import SourceConfig, audio_path, field_at, is_remote

# What a column is called that has the audio, or where it is; of several that are there the first counts.
AUDIO_COLUMNS = ("audio", "audio_filepath", "file_name", "path", "file", "wav", "source", "audio_path", "audio_file")
TEXT_COLUMNS = ("text", "sentence", "transcription", "transcript", "txt", "target")
_LANGUAGES = ("lang", "language", "locale", "text_language")
_IDS = ("id", "key")
# Columns that mean what they mean in NeMo lines.
_STRINGS = ("lang", "source_lang", "target_lang", "task", "ast_text", "translation", "speaker", "previous")
_KEPT = (*_STRINGS[1:], "duration", "hotwords")
_PREFIXES = ("", "clips", "wavs")
_SUFFIXES = ("", ".wav", ".flac", ".mp3")


@dataclass(frozen=True)
class Columns:
    """Which column is what: `audio`; `fields`, what each field of the NeMo line is taken from."""

    audio: str
    fields: dict[str, str]

    @property
    def names(self) -> list[str]:
        """The columns that are needed, the audio's first."""
        return list(dict.fromkeys([self.audio, *(name.partition(".")[0] for name in self.fields.values())]))


def columns_of(names: Iterable[str], source: SourceConfig, audio: str | None = None) -> Columns:
    """Which of the columns is what.

    Args:
        audio: the column with the audio, where its type says so; "" where that is none.

    Raises:
        ValueError: there is no audio, or no text; two may be the text.
    """
    return _columns_of(tuple(names), source.text_field, source.lang_field, audio)


@lru_cache(maxsize=256)
def _columns_of(names: tuple[str, ...], text_field: str | None, lang_field: str | None, audio: str | None) -> Columns:
    listed = ", ".join(names)
    audio = _first(AUDIO_COLUMNS, names) if audio is None else audio
    if audio is None:
        raise ValueError(f"no column with the audio ({', '.join(AUDIO_COLUMNS)}) among {listed}")
    fields = {name: name for name in _KEPT if name in names}
    for field, of_field in (("id", _IDS), ("lang", _LANGUAGES)):
        if (column := _first(of_field, names)) is not None:
            fields[field] = column
    for stated in (text_field, lang_field):
        if stated is not None:
            if stated not in names and stated.partition(".")[0] not in names:
                raise ValueError(f"no column {stated!r} among {listed}")
            fields[stated] = stated
    if text_field is None:
        texts = [name for name in TEXT_COLUMNS if name in names and name != audio]
        if not texts or (len(texts) > 1 and texts[0] != "text"):
            what = f"the text may be {' or '.join(texts)}" if texts else "no column with the text is known by its name"
            raise ValueError(f"{what}; say which it is with text_field: NAME (the columns are {listed})")
        fields["text"] = texts[0]
    return Columns(audio, fields)


def _first(wanted: Iterable[str], names: Iterable[str]) -> str | None:
    return next((name for name in wanted if name in names), None)


def fields_of(row: Mapping[str, Any], columns: Columns) -> dict[str, Any]:
    """The fields of the NeMo line that a row says; those that are null are left out.

    Raises:
        ValueError: text or language are no strings.
    """
    fields = {}
    for field, column in columns.fields.items():
        value = field_at(dict(row), column) if "." in column and column not in row else row.get(column)
        if field == "speaker" and isinstance(value, int):
            value = str(value)
        # others are not what the name says, such as a column `translation` into several languages
        if value is not None and (isinstance(value, str) or field not in _STRINGS):
            fields[field] = value
    if isinstance(said := fields.get("duration"), str):  # all that a text file has are strings
        fields["duration"] = _number(said) if said.strip() else None
    if columns.fields.get("lang") == "text_language" and isinstance(fields.get("lang"), str):
        fields["lang"] = fields["lang"].strip("<|>")  # FunASR: <|zh|>
    return fields


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"duration: expected seconds, found {text!r}") from None


class AudioFinder:
    """Finds the files that the rows of a table name: by their paths, or beside the table, there also in `clips` as of
    Common Voice and in `wavs`, without suffix, as of LJSpeech."""

    def __init__(self, folder: str) -> None:
        self._folder = folder
        self._likely = ("", "")

    def path(self, name: str) -> str:
        """Where a file is; one that is nowhere would be where the last one was."""
        if is_remote(name) or is_remote(self._folder):
            return audio_path(name, self._folder)
        name = os.path.expanduser(name)
        places = [self._likely, *((prefix, suffix) for prefix in _PREFIXES for suffix in _SUFFIXES)]
        for prefix, suffix in places:
            if os.path.exists(path := os.path.join(self._folder, prefix, name + suffix)):
                self._likely = prefix, suffix
                return os.path.abspath(path)
        if os.path.exists(name):  # from the current directory, as NeMo looks for it
            return os.path.abspath(name)
        prefix, suffix = self._likely
        return os.path.abspath(os.path.join(self._folder, prefix, name + suffix))


def name_without_suffix(path: str) -> str:
    """The id of an utterance that has no other than its file: the path as it is given, without suffix."""
    return os.path.splitext(path)[0]
