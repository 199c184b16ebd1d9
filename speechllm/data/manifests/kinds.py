"""The kinds of manifests, and which one a path is of: by what is in a folder, a file's suffix, or its first line.

| kind | |
|---|---|
| lines | JSON lines of NeMo's fields (`nemo.py`), lhotse cuts (`cuts.py`) |
| tarred | NeMo's tarred form |
| shar | a directory of lhotse's Shar format (`shar.py`) |
| kaldi | a Kaldi data directory (`kaldi.py`) |
| parquet | Parquet files of Hugging Face datasets (`parquet.py`) |
| arrow | the same on disk, as `save_to_disk` writes them (`parquet.py`) |
| webdataset | tar files of WebDataset and WeNet, or a list of them (`webdataset.py`) |
| messages | conversations with audio of one question and answer (`messages.py`) |
| table | Common Voice, audio folders, LJSpeech, lists of WeNet and FunASR (`tables.py`) |
"""

from __future__ import annotations

import fnmatch
import glob
import itertools
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from pathlib import Path

from speechllm.data.manifests.lines import check_is_text, existing, expanded, numbered_lines, parse_line
from speechllm.data.manifests.source import (
    LINE_ERRORS,
    ManifestError,
    SourceConfig,
    audio_path,
    is_remote,
    is_url,
    is_url_of_shar,
)
from speechllm.hub import HubId, dataset_files, hub_id

# The two names of what a line of messages consists of.
MESSAGES = ("messages", "conversations")
# Files of rows, by suffix.
ROW_FILES = ("parquet", "arrow")
# How deep they are in a folder: one of another kind may hold millions of files.
_DEPTHS = ("", "*/", "*/*/")
# What Dataset.save_to_disk writes beside its files.
_STATE = "state.json"
# Metadata of audio folders, as Hugging Face datasets calls it.
_METADATA = ("metadata.csv", "metadata.tsv", "metadata.jsonl")
# Fields that JSON lines of WeNet and FunASR have, and NeMo lines and cuts do not.
_ROWS = (("wav", "txt"), ("source", "target"))
_OF_LINES = ("audio_filepath", "type", "text")
# Of names that can only be those of files here.
_OTHER_SUFFIXES = (".json", ".jsonl", ".gz", ".tsv", ".csv", ".txt", ".list", ".scp", ".tar", ".arrow")
_HUB_DATASETS = re.compile(r"hf:/+datasets/")
_LISTED_TAR = re.compile(rb"[^{}\[\]\"\t,]+\.tar")
_LINES_READ = 20
_LISTED = 8


def kind_of(source: SourceConfig) -> str:
    """One of the kinds of this file's table.

    Raises:
        ManifestError: it is a directory of none of them.
    """
    if source.tar_path is not None:
        return "tarred"
    if source.kind in ("nemo", "lhotse"):
        return "lines"
    if source.kind != "auto":
        return source.kind
    if is_url_of_shar(source.path):
        return "shar"
    if _dataset_id(source.path) is not None:
        return "parquet"
    if Path(source.path).is_dir():
        return _kind_of_folder(Path(source.path))
    return _kind_of_file(next(iter(expanded(source.path)), source.path))


def _kind_of_folder(folder: Path) -> str:
    if (folder / "wav.scp").is_file():
        return "kaldi"
    if any(folder.glob("cuts.*.jsonl*")):
        return "shar"
    if (folder / "dataset_dict.json").is_file():
        splits = json.loads((folder / "dataset_dict.json").read_text(encoding="utf-8"))["splits"]
        names = ", ".join(str(folder / name) for name in splits)
        raise ManifestError(f"{folder}: a directory with several sets; name one of them: {names}")
    if (folder / _STATE).is_file():
        return "arrow"
    if _metadata_in(folder) is not None:
        return "table"
    for kind in ROW_FILES:
        if any(any(folder.glob(f"{depth}*.{kind}")) for depth in _DEPTHS):
            return kind
    if tables := sorted(path.name for path in folder.glob("*.tsv")):
        raise ManifestError(f"{folder}: a directory with tables; name the one that is meant: {', '.join(tables)}")
    raise ManifestError(
        f"{folder}: a directory, with neither a wav.scp as Kaldi's have, nor cuts.*.jsonl.gz as those of lhotse Shar, "
        f"nor Parquet or Arrow files, nor {_METADATA[0]}"
    )


def _metadata_in(folder: Path) -> str | None:
    return next((str(folder / name) for name in _METADATA if (folder / name).is_file()), None)


def _kind_of_file(path: str) -> str:
    suffix = Path(path.removesuffix(".gz")).suffix
    if suffix in (".tsv", ".csv"):
        return "table"
    if suffix.removeprefix(".") in ROW_FILES:
        return suffix.removeprefix(".")
    if suffix == ".tar":
        return "webdataset"
    if not is_url(path) and not os.path.isfile(path):
        return "lines"
    try:
        for _, line in itertools.islice(numbered_lines(path), _LINES_READ):
            if _LISTED_TAR.fullmatch(line.strip()):
                return "webdataset"
            try:
                names = parse_line(line).keys()
            except LINE_ERRORS:
                continue
            if not names.isdisjoint(MESSAGES):
                return "messages"
            is_row = any(names >= set(row) for row in _ROWS) and names.isdisjoint(_OF_LINES)
            return "table" if is_row or ("file_name" in names and "audio_filepath" not in names) else "lines"
    except ManifestError:
        if is_url(path):
            raise
        # whoever reads it says what is wrong
    return "lines"


def table_files(source: SourceConfig) -> list[str]:
    """The files of a table.

    Raises:
        ManifestError: one is missing, or no text.
    """
    if Path(source.path).is_dir():
        metadata = _metadata_in(Path(source.path))
        if metadata is None:
            raise ManifestError(f"{source.path}: no {', '.join(_METADATA)} in it")
        return [metadata]
    files = existing(source.path)
    for file in files:
        check_is_text(file)
    return files


def row_files(source: SourceConfig, kind: str) -> list[str]:
    """The Parquet or Arrow files of a source, in their order; those of a folder that are of one set.

    Raises:
        ManifestError: there are none; there are several sets.
    """
    if is_remote(source.path):
        raise ManifestError(f"{source.path}: Parquet and Arrow files are read from disk; download them first")
    if (id := _dataset_id(source.path)) is not None:
        return _dataset_files(id)
    folder = Path(source.path)
    if not folder.is_dir():
        return existing(source.path)
    if (folder / _STATE).is_file():
        state = json.loads((folder / _STATE).read_text(encoding="utf-8"))
        return [file for data in state["_data_files"] for file in existing(str(folder / data["filename"]))]
    files = sorted(str(path) for depth in _DEPTHS for path in folder.glob(f"{depth}*.{kind}"))
    if not files:
        raise ManifestError(f"{folder}: no .{kind} file in it")
    _check_one_set(str(folder), files)
    return files


def tar_files(source: SourceConfig) -> list[str]:
    """The tar files of a source: its path, or those that a list there names, beside it or from the current directory.

    Raises:
        ManifestError: one is missing, or at a URL.
    """
    files = []
    for file in existing(source.path):
        for where, tar in [(file, file)] if file.endswith(".tar") else _listed_tars(file):
            if is_remote(tar):
                raise ManifestError(f"{where}: tar files of this kind are read from disk; download {tar} first")
            if not os.path.isfile(tar):
                raise ManifestError(f"{where}: no such tar file: {tar}")
            files.append(tar)
    return files


def _listed_tars(file: str) -> Iterator[tuple[str, str]]:
    for where, line in numbered_lines(file):
        yield where, audio_path(line.decode(errors="replace").strip(), os.path.dirname(file))


def _dataset_id(path: str) -> HubId | None:
    """What a path names on the Hugging Face Hub, where nothing here has that name."""
    if path.endswith(_OTHER_SUFFIXES) or is_url(path) or any(map(os.path.exists, expanded(path))):
        return None
    return hub_id(_HUB_DATASETS.sub("hf://", path))


@cache
def _dataset_files(id: HubId) -> list[str]:
    def choose(names: Sequence[str]) -> list[str]:
        files = sorted(name for name in names if name.endswith(".parquet"))
        pattern = id.file or ""
        if glob.has_magic(pattern):
            files = fnmatch.filter(files, pattern)
        elif pattern:
            files = [name for name in files if name == pattern or name.startswith(f"{pattern.rstrip('/')}/")]
        if not files:
            raise ManifestError(
                f"{_name_of(id, id.file)}: no Parquet file there; the Hub has converted many other data sets, at the "
                f"revision {_name_of(id._replace(revision='refs/convert/parquet'))}"
            )
        if not glob.has_magic(pattern):
            _check_one_set(_name_of(id, id.file), files, f"{_name_of(id)}/")
        return files

    try:
        return [str(path) for path in dataset_files(id, choose)]
    except FileNotFoundError as error:
        raise ManifestError(str(error)) from error


def _name_of(id: HubId, file: str | None = None) -> str:
    return id.repo + (f"@{id.revision}" if id.revision else "") + (f"/{file}" if file else "")


def _check_one_set(name: str, files: Sequence[str], prefix: str = "") -> None:
    """Whether files are shards of one set.

    Raises:
        ManifestError: they are not; test data must not be trained on because it lies beside.
    """
    patterns = patterns_of(files)
    if len(patterns) > 1:
        raise ManifestError(
            f"{name}: holds {len(patterns)} sets; name the one that is meant, or several by a pattern with *: "
            f"{listed([prefix + pattern for pattern in patterns])}"
        )


def patterns_of(files: Iterable[str]) -> list[str]:
    """Patterns for the shards of sets: of files whose names differ in numbers."""
    patterns: dict[tuple[str, str], None] = {}
    for file in files:
        folder, name = os.path.split(file)
        patterns[re.sub(r"([-_.]?)\d+(-of-\d+)?(?=\D*$)", r"\1*", name), folder] = None
    return [os.path.join(folder, name) for name, folder in patterns]


def listed(names: Sequence[str]) -> str:
    """The first names, for errors."""
    return ", ".join(names[:_LISTED]) + (f" and {len(names) - _LISTED} more" if len(names) > _LISTED else "")
