"""Manifest files to lazy lhotse CutSets.

Two kinds are read, recognised line by line:

- NeMo JSON lines: `audio_filepath` (relative to the manifest), `duration` in seconds, `text`; optionally
  `lang` (or
  `source_lang`), `offset` in seconds for a segment of a longer file, `id`. Audio files are not opened here:
  what the file really is, is looked up when it is read for training (`speechllm.data.dataset`).
- lhotse cuts (`.jsonl`, `.jsonl.gz`), where the language is that of the first supervision.

A line that cannot be understood is an error that names file and line.
"""

from __future__ import annotations

import gzip
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from lhotse import AudioSource, CutSet, Recording, SupervisionSegment
from lhotse.cut import Cut, MonoCut
from lhotse.lazy import Dillable
from lhotse.serialization import deserialize_item

from speechllm.data.features import SAMPLE_RATE
from speechllm.errors import UserError

# Custom fields of cuts that come from NeMo lines: the header of the audio file has not been read yet.
HEADER_UNREAD = "header_unread"
IS_SEGMENT = "is_segment"


@dataclass
class SourceConfig:
    """One manifest in the configuration.

    `path`: the manifest file. `weight`: how often this source is drawn from, relative to the others. `lang`:
    the language of lines that do not say theirs.
    """

    path: str
    weight: float = 1.0
    lang: str | None = None

    def __post_init__(self) -> None:
        if not (isinstance(self.weight, (int, float)) and 0 < self.weight < math.inf):
            raise ValueError(f"weight of source {self.path}: {self.weight!r} is not a positive number")


class DataError(UserError):
    """Data that cannot be trained or decoded with; the message says which and why."""


class ManifestError(DataError):
    """A manifest that is missing, or a line of it that cannot be used; the message has file and line
    number."""


class LazyManifest(Dillable):
    """Iterates over the cuts of a manifest, reading one line at a time; may be iterated again and again."""

    def __init__(self, path: Path, lang: str | None) -> None:
        self.path = path
        self.lang = lang

    def __iter__(self) -> Iterator[Cut]:
        opener = gzip.open if self.path.suffix == ".gz" else open
        with opener(self.path, "rb") as file:
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                try:
                    cut = self._parse(json.loads(line))
                except (ValueError, KeyError, TypeError, AssertionError) as error:
                    raise ManifestError(f"{self.path}:{number}: {_explain(error)}") from error
                yield cut

    def _parse(self, entry: object) -> Cut:
        if not isinstance(entry, dict):
            raise ValueError(f"expected a JSON object, found {type(entry).__name__}")
        if "audio_filepath" in entry:
            return cut_from_nemo(entry, self.path.parent, self.lang)
        if "type" not in entry:
            raise ValueError("neither a NeMo line (no 'audio_filepath') nor a lhotse cut (no 'type')")
        cut = deserialize_item(entry)
        if not isinstance(cut, Cut):
            raise ValueError(f"a {type(cut).__name__}, where a cut is needed; make cuts of it with lhotse")
        if self.lang is not None:
            cut = cut.map_supervisions(self._fill_language)
        return cut

    def _fill_language(self, supervision: SupervisionSegment) -> SupervisionSegment:
        if supervision.language is None:
            supervision.language = self.lang
        return supervision


def _explain(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"invalid JSON: {error}"
    if isinstance(error, UnicodeDecodeError):
        return f"not UTF-8: {error}"
    if isinstance(error, KeyError):
        return f"missing field {error}"
    return str(error)


def cut_from_nemo(entry: dict, folder: Path, lang: str | None) -> MonoCut:
    """The cut of one NeMo line, without touching the audio file.

    The recording is declared as 16 kHz mono up to the end of the segment, and marked as such; the reader
    replaces it by what the file's header says.

    Raises:
        KeyError, ValueError: a field is missing or has a wrong type or value.
    """
    path = entry["audio_filepath"]
    if not isinstance(path, str) or not path:
        raise ValueError(f"audio_filepath: expected a path, found {path!r}")
    duration = _seconds(entry, "duration")
    if duration == 0:
        raise ValueError("duration: must be more than 0 seconds")
    offset = _seconds(entry, "offset") if entry.get("offset") is not None else 0.0
    text = entry.get("text", "")
    language = entry.get("lang", entry.get("source_lang", lang))
    for name, value in (("text", text), ("lang", language)):
        if not (isinstance(value, str) or (value is None and name == "lang")):
            raise ValueError(f"{name}: expected a string, found {value!r}")
    name = entry.get("id")
    if name is None:
        name = path.rsplit(".", 1)[0] + (f"@{offset:g}" if offset else "")
    num_samples = round((offset + duration) * SAMPLE_RATE)
    recording = Recording(
        id=str(name),
        sources=[AudioSource(type="file", channels=[0], source=str(folder / path))],
        sampling_rate=SAMPLE_RATE,
        num_samples=num_samples,
        duration=num_samples / SAMPLE_RATE,
    )
    supervision = SupervisionSegment(
        id=str(name), recording_id=str(name), start=0.0, duration=duration, text=text, language=language
    )
    return MonoCut(
        id=str(name),
        start=offset,
        duration=duration,
        channel=0,
        recording=recording,
        supervisions=[supervision],
        custom={HEADER_UNREAD: True, IS_SEGMENT: entry.get("offset") is not None},
    )


def _seconds(entry: dict, name: str) -> float:
    value = entry[name]
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
        raise ValueError(f"{name}: expected seconds, found {value!r}")
    return float(value)


def read_manifest(path: str | Path, lang: str | None = None) -> CutSet:
    """A lazy CutSet of a manifest.

    Args:
        path: NeMo JSON lines or lhotse cuts, plain or gzipped.
        lang: the language of cuts that have none.

    Raises:
        ManifestError: at once where the file is missing; while iterating for a line that cannot be used.
    """
    path = Path(path)
    if not path.is_file():
        raise ManifestError(f"{path}: no such manifest file")
    return CutSet(LazyManifest(path, lang))
