#!/usr/bin/env python3
r"""Make English text to train a language model on: the transcripts, and what people wrote and said, with phones.

    recipes/english/prepare_text.py --packages-dir PACKAGES --corpus-dir recipes/english/data/corpus \
        --lexicon recipes/english/data/lexicon --output-dir recipes/english/data/text

PACKAGES holds, unpacked, the Debian packages

    dict-wn             WordNet: the sentences that show how a word is used, which are the most like speech
    dict-gcide          the Collaborative International Dictionary: quotations, many of them old
    fortunes            sayings, dialogues and jokes
    r-cran-janeaustenr  Jane Austen's novels, for long sentences; without Sense and Sensibility, of which `other` is

Every text is normalized as the transcripts are (english_text.py); sentences with words that are in no dictionary, or
of fewer than four words, are left out, and so are those of the test sets. One in 200 texts is for validation, and the
validation transcripts.

The language model learns to write what a CTC head of phones hears before there is one: texts are cut into pieces,
their words become phones, and some of these are wrong (phones.py). It learns that a word stands for its phones soonest
where there are few to choose from, so there are three levels of pieces, as long as utterances and as wrong as phones
may be in the last. Result, for `speechllm tune`: OUTPUT/{train,valid}-{1,2,3}.jsonl, {"prompt": phones, "text": words}
a line; all of the text in each file, otherwise cut and misheard.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import re
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Set
from dataclasses import dataclass
from pathlib import Path

from english_text import EnglishText, installed_dictionary
from phones import Mishearing
from prepare_corpus import find
from tqdm import tqdm

from speechllm.errors import UserError
from speechllm.files import replaced_folder
from speechllm.text.tokenizer import LexiconTokenizer

# Packages with short sentences of many words; and all that have text.
DICTIONARIES = ("dict-wn", "dict-gcide", "fortunes")
ALL_TEXTS = (*DICTIONARIES, "r-cran-janeaustenr")
SENTENCE_WORDS = 4
VALID_SHARE = 200
# What is in quotation marks. With an author after it where marks are used for other things too, so that what lies
# between two quotations is taken for none.
_EXAMPLE = re.compile(r'"([^"]{12,600})"')
_CITATION = re.compile(r'"([^"]{12,600})"\s*--[A-Z]')
_END_OF_SENTENCE = re.compile(r"(?<=[.!?;:])[\s\"')]+|--+")
# The first line of the novel of which recordings are in the test sets.
_IN_TEST_SET = "SENSE AND SENSIBILITY"
# Who said it, at the end of a saying.
_ATTRIBUTION = re.compile(r"\n\s+--.*", re.DOTALL)
# Tables, code, verse that is drawn, and languages other than English.
_NOT_PROSE = frozenset(["art", "ascii-art", "perl", "translate-me", "knghtbrd", "linuxcookie", "debian", "zippy"])


@dataclass(frozen=True)
class Level:
    """Pieces of fewest to most words, of whose phones at most the share `wrong` is."""

    fewest: int
    most: int
    wrong: float


# Of the last one the lengths are those of utterances in the training set, nearly always.
LEVELS = (Level(1, 4, 0.15), Level(2, 10, 0.25), Level(2, 24, 0.35))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--packages-dir", type=Path, required=True, help="where the packages are unpacked")
    parser.add_argument("--corpus-dir", type=Path, required=True, help="that prepare_corpus.py has written")
    parser.add_argument("--output-dir", type=Path, required=True, help="folder of the text; replaced as a whole")
    parser.add_argument("--lexicon", type=Path, required=True, help="folder that phones.py has written")
    parser.add_argument("--dictionary", type=Path, help="as of prepare_corpus.py")
    args = parser.parse_args()
    try:
        text = EnglishText.load(args.dictionary or installed_dictionary())
        documents = collect_text(args.packages_dir, args.corpus_dir, text)
        write_readings(documents, LexiconTokenizer(args.lexicon), args.output_dir)
    except (UserError, OSError) as e:
        sys.exit(f"error: {e}")


def collect_text(packages: Path, corpus: Path, text: EnglishText) -> dict[str, list[str]]:
    """The texts for `train` and `valid`.

    Raises:
        UserError: a package is missing. FileNotFoundError: the corpus is.
    """
    held_out = {words for name in ("test", "other", "valid") for words in transcripts(corpus, name)}
    documents = {"train": list(transcripts(corpus, "train")), "valid": list(transcripts(corpus, "valid"))}
    for name, written in paragraphs(packages).items():
        seen: set[str] = set()
        for paragraph in tqdm(written, desc=name, unit="paragraph", disable=None):
            document = " ".join(sentences(paragraph, text, held_out))
            if document and document not in seen:
                seen.add(document)
                # by its hash, so that a change of one text moves no other
                is_valid = zlib.crc32(document.encode()) % VALID_SHARE == 0
                documents["valid" if is_valid else "train"].append(document)
        print(f"{name}: {len(seen)} documents, {sum(len(d.split()) for d in seen)} words")
    return documents


def write_readings(documents: dict[str, list[str]], lexicon: LexiconTokenizer, output: Path) -> None:
    with replaced_folder(output) as folder:
        for name, lines in documents.items():
            print(f"{name}: {len(lines)} documents, {sum(len(d.split()) for d in lines)} words")
            for number, level in enumerate(LEVELS, start=1):
                # Python's random numbers of one seed are the same everywhere
                misheard, cut = Mishearing(number, level.wrong), random.Random(f"{name} {number}")
                with open(folder / f"{name}-{number}.jsonl", "w", encoding="utf-8") as file:
                    for piece in pieces(lines, level, cut):
                        phones = misheard([lexicon.piece(i) for i in lexicon.encode(piece)])
                        prompt = "".join(f"<|{phone.strip('<>')}|>" for phone in phones)
                        # as in the prompt of configs/english-rwkv7.yaml, and a label begins with a space
                        file.write(json.dumps({"prompt": prompt + "\n", "text": f" {piece}"}) + "\n")


def pieces(documents: list[str], level: Level, cut: random.Random) -> Iterator[str]:
    """The documents, long ones cut anywhere."""
    for document in documents:
        words = document.split()
        while words:
            size = cut.randint(level.fewest, level.most)
            if len(words) <= level.most and cut.random() < 0.5:
                size = len(words)
            yield " ".join(words[:size])
            words = words[size:]


def paragraphs(packages: Path, names: Iterable[str] = ALL_TEXTS) -> dict[str, Iterator[str]]:
    """What is written in each of the packages.

    Raises:
        UserError: a package is missing.
    """
    readers: dict[str, Callable[[], Iterator[str]]] = {
        "dict-wn": lambda: quotations(find(packages, "wn.dict.dz"), _EXAMPLE),
        "dict-gcide": lambda: quotations(find(packages, "gcide.dict.dz"), _CITATION),
        "fortunes": lambda: sayings(find(packages, "games/fortunes")),
        "r-cran-janeaustenr": lambda: novels(find(packages, "janeaustenr/data/Rdata.rdb")),
    }
    return {name: readers[name]() for name in names}


def transcripts(corpus: Path, name: str) -> Iterator[str]:
    for line in (corpus / f"{name}.jsonl").read_text(encoding="utf-8").splitlines():
        yield json.loads(line)["text"]


def quotations(dictionary: Path, quoted: re.Pattern) -> Iterator[str]:
    """What `quoted` finds in a dictionary of dictd's form, which is gzip, its lines indented and broken."""
    content = gzip.decompress(dictionary.read_bytes()).decode("utf-8", errors="replace")
    for match in quoted.finditer(re.sub(r"\s+", " ", content)):
        # markup: an entry between two quotations, after a mark that was missed
        if not re.search(r"[\[\]{}\\]|--|\d", match[1]):
            yield match[1]


def sayings(folder: Path) -> Iterator[str]:
    """The entries of fortune's files of prose, without who said them."""
    for path in sorted(folder.iterdir()):
        if path.suffix or path.name in _NOT_PROSE or not path.is_file():
            continue
        for entry in path.read_text(encoding="utf-8", errors="replace").split("\n%\n"):
            yield _ATTRIBUTION.sub("", entry)


def novels(database: Path) -> Iterator[str]:
    """The paragraphs of the novels in a database of R's lazy loading, the one apart of which a test set is.

    It is vectors of strings, a line of the book each, one after another: the length in four bytes, then zlib's form.
    """
    packed = database.read_bytes()
    while packed:
        unpacking = zlib.decompressobj()
        title, *lines = strings_of_r(unpacking.decompress(packed[4:]))
        packed = unpacking.unused_data
        if title != _IN_TEST_SET:
            yield from " ".join(lines).split("  ")  # an empty line


def strings_of_r(serialized: bytes) -> list[str]:
    """A vector of strings in the XDR form, version 3, of R's serialization (R Internals, section 1.8).

    Raises:
        UserError: it is something else.
    """
    vector, string, header = 16, 9, 14
    encoding_size = int.from_bytes(serialized[header : header + 4], "big")
    at = header + 4 + encoding_size
    if serialized[:6] != b"X\n\0\0\0\3" or serialized[at + 3] != vector:
        raise UserError("no vector of strings as R writes it: another version of the package r-cran-janeaustenr?")
    count = int.from_bytes(serialized[at + 4 : at + 8], "big")
    at += 8
    strings = []
    for _ in range(count):
        if serialized[at + 3] != string:
            raise UserError(f"byte {at}: no string in a vector of R's strings")
        size = int.from_bytes(serialized[at + 4 : at + 8], "big")
        strings.append(serialized[at + 8 : at + 8 + size].decode("utf-8", errors="replace"))
        at += 8 + size
    return strings


def sentences(paragraph: str, text: EnglishText, held_out: Set[str]) -> dict[str, str]:
    """The usable sentences of a paragraph, normalized, each with how it is written."""
    usable = {}
    for sentence in _END_OF_SENTENCE.split(paragraph):
        words = text.normalize(sentence)
        if len(words.split()) >= SENTENCE_WORDS and not text.unknown_words(words) and words not in held_out:
            usable[words] = sentence
    return usable


if __name__ == "__main__":
    main()
