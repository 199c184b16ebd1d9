#!/usr/bin/env python3
"""Download a corpus, and make lhotse cuts of it, with lhotse's own corpus preparers.

    tools/prepare_corpus.py download librispeech corpora --parts train-clean-100 dev-clean test-clean
    tools/prepare_corpus.py manifests librispeech corpora/LibriSpeech data --parts train-clean-100 dev-clean test-clean

`manifests` writes data/librispeech_cuts_PART.jsonl.gz for each part (all of them where --parts does not say), with
absolute paths, in the order of the utterances' ids, and with the language tag that the model is prompted with.

AISHELL-1 (https://www.openslr.org/33) is read as it is distributed: CORPUS_DIR has data_aishell/wav and
data_aishell/transcript; LibriSpeech (https://www.openslr.org/12): CORPUS_DIR has a folder for each part.
"""

from __future__ import annotations

import argparse
import gzip
import http.client
import json
import os
import sys
import tarfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lhotse import CutSet
from lhotse.cut import Cut
from lhotse.recipes import download_aishell, download_librispeech, prepare_aishell, prepare_librispeech
from lhotse.recipes.librispeech import LIBRISPEECH

from speechllm.errors import UserError
from speechllm.files import replaced_file


def check_aishell(corpus_dir: Path, parts: list[str]) -> None:
    """Whether all that is to be read is there.

    Raises:
        UserError: the folder is not AISHELL-1 as distributed and unpacked.
    """
    data = corpus_dir / "data_aishell"
    transcript = data / "transcript" / "aishell_transcript_v0.8.txt"
    if not transcript.is_file():
        raise UserError(f"{transcript}: no such file; give the folder in which data_aishell is as --corpus-dir")
    missing = [part for part in parts if not (data / "wav" / part).is_dir()]
    if missing and any((data / "wav").glob("*.tar.gz")):
        raise UserError(f"{data / 'wav'}: the speakers are packed; unpack each *.tar.gz in that folder")
    _check_folders(data / "wav", missing)


def check_librispeech(corpus_dir: Path, parts: list[str]) -> None:
    """Whether all that is to be read is there.

    Raises:
        UserError: a part is missing.
    """
    _check_folders(corpus_dir, [part for part in parts if not (corpus_dir / part).is_dir()])


def _check_folders(folder: Path, missing: list[str]) -> None:
    if missing:
        raise UserError(f"{folder}: no {', '.join(missing)} in it; is the corpus complete, and the folder right?")


@dataclass(frozen=True)
class Corpus:
    """`download(folder, parts)` gives the corpus' own folder, `prepare(corpus_dir, parts)` the manifests by part."""

    language: str
    parts: tuple[str, ...]
    download: Callable[[Path, list[str]], Path]
    check: Callable[[Path, list[str]], None]
    prepare: Callable[[Path, list[str]], Mapping[str, Mapping[str, Any]]]


CORPORA = {
    "aishell": Corpus(
        "zh",
        ("train", "dev", "test"),
        lambda folder, parts: download_aishell(folder),
        check_aishell,
        lambda corpus_dir, parts: prepare_aishell(corpus_dir),
    ),
    "librispeech": Corpus(
        "en",
        LIBRISPEECH,
        download_librispeech,
        check_librispeech,
        lambda corpus_dir, parts: prepare_librispeech(corpus_dir, dataset_parts=parts, num_jobs=os.cpu_count() or 1),
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    download = commands.add_parser("download", help="download and unpack; goes on where it stopped")
    manifests = commands.add_parser("manifests", help="make lhotse cuts")
    for command in (download, manifests):
        command.add_argument("corpus", choices=CORPORA)
    download.add_argument("folder", type=Path, metavar="FOLDER", help="where the archives and the corpus go")
    manifests.add_argument("corpus_dir", type=Path, metavar="CORPUS_DIR", help="the unpacked corpus")
    manifests.add_argument("output_dir", type=Path, metavar="OUTPUT_DIR", help="where the manifests go")
    for command in (download, manifests):
        command.add_argument("--parts", nargs="+", metavar="PART", help="parts of the corpus (default: all)")
    args = parser.parse_args()
    corpus = CORPORA[args.corpus]
    parts = args.parts or list(corpus.parts)
    if unknown := [part for part in parts if part not in corpus.parts]:
        parser.error(f"--parts {unknown[0]}: {args.corpus} has {', '.join(corpus.parts)}")
    try:
        if args.command == "download":
            print(f"{args.corpus} is in {download_corpus(corpus, args.folder, parts)}")
        else:
            make_manifests(args.corpus, args.corpus_dir, args.output_dir, parts)
    except UserError as e:
        sys.exit(f"error: {e}")


def download_corpus(corpus: Corpus, folder: Path, parts: list[str]) -> Path:
    try:
        return corpus.download(folder, parts)
    except (OSError, EOFError, http.client.HTTPException, tarfile.TarError) as e:
        raise UserError(
            f"cannot download to {folder}: {e}; the same command goes on where it stopped; for a corpus that is on "
            "disk already, give its folder as --corpus-dir to prepare.sh"
        ) from e


def make_manifests(name: str, corpus_dir: Path, output_dir: Path, parts: list[str]) -> None:
    """Write NAME_cuts_PART.jsonl.gz for each of `parts`, each whole or not at all.

    Raises:
        UserError: the corpus is not as distributed; lhotse cannot read it, or finds no transcribed audio in a part.
    """
    corpus = CORPORA[name]
    corpus_dir = corpus_dir.resolve()
    corpus.check(corpus_dir, parts)
    try:
        manifests = corpus.prepare(corpus_dir, parts)
    except Exception as e:  # lhotse has no error of its own for what it cannot read
        raise UserError(f"{corpus_dir}: lhotse cannot prepare it: {type(e).__name__}: {e}") from e
    for part in parts:
        cuts = CutSet.from_manifests(manifests[part]["recordings"], manifests[part]["supervisions"])
        cuts = sorted((tagged(cut, corpus.language) for cut in cuts), key=lambda cut: cut.id)
        path = output_dir / f"{name}_cuts_{part}.jsonl.gz"
        write_cuts(path, cuts)
        print(f"wrote {path}: {len(cuts)} utterances, {sum(cut.duration for cut in cuts) / 3600:.2f} hours")


def tagged(cut: Cut, language: str) -> Cut:
    """The cut of one utterance under the utterance's id, in `language`: lhotse has names such as Chinese."""
    (supervision,) = cut.supervisions
    supervision.language = language
    return cut.with_id(supervision.id)


def write_cuts(path: Path, cuts: list[Cut]) -> None:
    with replaced_file(path) as tmp, tmp.open("wb") as raw, gzip.GzipFile("", "wb", fileobj=raw, mtime=0) as file:
        for cut in cuts:
            file.write(json.dumps(cut.to_dict(), ensure_ascii=False).encode() + b"\n")


if __name__ == "__main__":
    main()
