#!/usr/bin/env python3
"""Make an n-gram language model small enough to lie in a model's folder, and readable without kenlm.

    tools/pack_ngram.py 3-gram.arpa.gz ngram.safetensors --most 500000
    tools/pack_ngram.py en-us.lm.bin ngram.safetensors --most 500000 --words lexicon.txt --relative

SOURCE is an ARPA file, perhaps compressed by gzip, or a binary one of CMU Sphinx (pocketsphinx has one of English, of
3.7 million n-grams, in its Python package). TARGET is for `--ngram` of `speechllm transcribe` and recipes/decode.py,
and for `model.decoding` of a configuration.

--words keeps the n-grams of these words alone: the first of each line counts, as in a lexicon. --most keeps so many of
two words and more, those that say most beyond shorter ones: by their part of the relative entropy, P(n-gram) times how
far its log probability is from that without its first word (Stolcke, arXiv cs/0006025). The weights of what backs off
are computed again, so that probabilities of all words still sum to one.

--relative writes how much more probable the words before make a word than it is by itself, in place of its
probability. How frequent a word is the language model that is decoded knows already, and texts are not the better
the fewer words they have.
"""

from __future__ import annotations

import argparse
import gzip
import struct
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from speechllm.decode.ngram import LEAST_LOG10, PackedNGram
from speechllm.errors import UserError

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]
UNKNOWN = "<unk>"
SPHINX = b"Trie Language Model"


@dataclass
class Grams:
    """The n-grams of one length: `words` (N, n) as numbers, sorted; natural logarithms of probabilities and of the
    weights of what backs off to them (N,), 0 of the longest."""

    words: Integers
    log_probs: Floats
    backoffs: Floats

    def taken(self, keep: NDArray[np.bool_]) -> Grams:
        return Grams(self.words[keep], self.log_probs[keep], self.backoffs[keep])


@dataclass
class Model:
    """Words by their numbers, and the n-grams of each length, from 1."""

    vocabulary: list[str]
    grams: list[Grams]

    def __post_init__(self) -> None:
        for i, grams in enumerate(self.grams):
            order = np.lexsort(grams.words.T[::-1])
            self.grams[i] = Grams(grams.words[order], grams.log_probs[order], grams.backoffs[order])

    def places(self, words: Integers) -> Integers:
        """Where the n-grams (N, n) are among those of their length, -1 for none; also of length 0, (N, 0)."""
        places = np.zeros(len(words), np.int64)
        for n in range(1, words.shape[1] + 1):
            keys, wanted = self._keys(n), places * len(self.vocabulary) + words[:, n - 1]
            found = np.searchsorted(keys, wanted)
            is_there = (places >= 0) & (found < len(keys)) & (keys[np.minimum(found, len(keys) - 1)] == wanted)
            places = np.where(is_there, found, -1)
        return places

    def _keys(self, n: int) -> Integers:
        """A number for each n-gram of length n, in order: where its beginning is, and its last word."""
        words = self.grams[n - 1].words
        beginnings = np.zeros(len(words), np.int64) if n == 1 else self._beginnings(n)
        return beginnings * len(self.vocabulary) + words[:, n - 1]

    def _beginnings(self, n: int) -> Integers:
        """Where the first n - 1 words of each n-gram of length n are among those of that length."""
        places = self.places(self.grams[n - 1].words[:, : n - 1])
        if (places < 0).any():
            raise UserError(f"{(places < 0).sum()} n-grams of {n} words whose first {n - 1} are none: it is damaged")
        return places

    def log_probs(self, words: Integers) -> Floats:
        """The log probability (N,) of the last of the words (N, n) after the others, backing off as needed."""
        n = words.shape[1]
        places = self.places(words)
        own = self.grams[n - 1].log_probs[places]
        if n == 1 or (places >= 0).all():
            return own
        history = self.places(words[:, :-1])
        backoffs = np.where(history >= 0, self.grams[n - 2].backoffs[history], 0.0)
        return np.where(places >= 0, own, backoffs + self.log_probs(words[:, 1:]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, metavar="SOURCE", help="ARPA file, or CMU Sphinx's *.lm.bin")
    parser.add_argument("target", type=Path, metavar="TARGET", help="file to write, *.safetensors")
    parser.add_argument("--words", type=Path, metavar="FILE", help="keep the n-grams of these words alone, one a line")
    parser.add_argument("--most", type=int, metavar="N", help="keep so many n-grams of two words and more")
    parser.add_argument("--relative", action="store_true", help="write probabilities relative to those of single words")
    args = parser.parse_args()
    try:
        model = read_model(args.source)
        if args.words is not None:
            lines = args.words.read_text(encoding="utf-8").splitlines()
            model = with_words(model, {line.split()[0] for line in lines if line.strip()})
        if args.most is not None:
            model = pruned(model, args.most)
        pack(model, args.relative).save(args.target)
    except (UserError, OSError) as e:
        sys.exit(f"error: {e}")
    counts = ", ".join(f"{len(grams.words):,} of {n}" for n, grams in enumerate(model.grams, start=1))
    print(f"wrote {args.target}: n-grams: {counts}; {args.target.stat().st_size / 1e6:.1f} MB")


def read_model(path: Path) -> Model:
    """An ARPA file, perhaps compressed, or a binary one of CMU Sphinx.

    Raises:
        FileNotFoundError: no such file. UserError: it is neither, or damaged.
    """
    with path.open("rb") as file:
        start = file.read(len(SPHINX))
    try:
        if start.startswith(b"\x1f\x8b"):
            with gzip.open(path) as lines:
                return read_arpa(lines)
        content = path.read_bytes()
        return read_sphinx(content) if start == SPHINX else read_arpa(content.splitlines())
    except (ValueError, IndexError, KeyError, struct.error, EOFError, gzip.BadGzipFile) as e:
        raise UserError(f"{path}: no n-gram language model in ARPA's or CMU Sphinx's form, or damaged: {e}") from e


def read_arpa(lines: Iterable[bytes]) -> Model:
    """A section for each length: log10 P, the words, and log10 of the weight of what backs off, perhaps."""
    sections: list[list[bytes]] = []
    for line in lines:
        line = line.strip()
        if line.startswith(b"\\"):
            if line.endswith(b"-grams:"):
                sections.append([])
            elif line == b"\\end\\":
                break
        elif line and sections:
            sections[-1].append(line)
    else:
        raise ValueError("there is no line \\end\\")
    vocabulary = [line.split()[1].decode() for line in sections[0]]
    numbers = {word.encode(): i for i, word in enumerate(vocabulary)}
    grams = []
    for n, section in enumerate(sections, start=1):
        words, values = np.empty((len(section), n), np.int64), np.zeros((len(section), 2))
        for i, line in enumerate(section):
            first, *rest = line.split()
            words[i] = [numbers[word] for word in rest[:n]]
            values[i] = float(first), float(rest[n]) if len(rest) > n else 0.0
        grams.append(Grams(words, *(values * np.log(10)).T))
    return Model(vocabulary, grams)


def read_sphinx(content: bytes) -> Model:
    """pocketsphinx's src/lm/ngram_model_trie.c writes it: a tree from a word to the words before it, as packed bits.

    Little-endian: u8 n, n u32 counts; i32; tables of 65536 float32: log probabilities and weights of each length from 2
    to n - 1, log probabilities of the longest; of each word, and one more, float32 log probability and weight and u32
    where the n-grams that end in it begin; then of each length all n-grams, bit by bit: the word before, the place in
    each table, where the longer ones begin (not of the longest); u32 length of the words, and these, each ended by NUL.
    """
    place = len(SPHINX)

    def take(dtype: str, count: int) -> NDArray:
        nonlocal place
        values = np.frombuffer(content, dtype, count, place)
        place += values.nbytes
        return values

    (order,) = take("u1", 1)
    counts = [int(count) for count in take("<u4", order)]
    if order < 2:
        raise ValueError("it has single words only")
    take("<i4", 1)
    tables = [(take("<f4", 65536), take("<f4", 65536)) for _ in range(order - 2)]
    longest = take("<f4", 65536)
    unigrams = np.frombuffer(content, [("prob", "<f4"), ("backoff", "<f4"), ("next", "<u4")], counts[0] + 1, place)
    place += unigrams.nbytes
    # to natural logarithms: Sphinx's are of base 1.0001
    scale = np.log(1.0001)
    numbers = np.arange(counts[0])
    levels = [Grams(numbers[:, None], unigrams["prob"][:-1] * scale, unigrams["backoff"][:-1] * scale)]
    starts = unigrams["next"].astype(np.int64)
    for n in range(2, order + 1):
        # the tree may have fewer than are counted
        is_longest, count = n == order, int(starts[-1])
        widths = [counts[0].bit_length(), 16] if is_longest else [counts[0].bit_length(), 16, 16]
        if not is_longest:
            widths.append(counts[n].bit_length())
        size = ((1 + counts[n - 1]) * sum(widths) + 7) // 8 + 8
        fields = unpacked_bits(take("u1", size), widths, count + 1)
        # whose children they are: those of the shorter n-gram whose range they are in
        parents = np.repeat(np.arange(len(starts) - 1), np.diff(starts))
        words = np.concatenate([fields[0][:count, None], levels[-1].words[parents]], 1)
        if is_longest:
            grams = Grams(words, longest[fields[1][:count]] * scale, np.zeros(count))
        else:
            probs, backoffs = tables[n - 2]
            # the lower bits of the two are the weight's
            grams = Grams(words, probs[fields[2][:count]] * scale, backoffs[fields[1][:count]] * scale)
            starts = fields[3]  # one more than there are, where the last one's end
        levels.append(grams)
    (size,) = take("<u4", 1)
    vocabulary = take("u1", int(size)).tobytes().decode("utf-8").split("\0")[:-1]
    if len(vocabulary) != counts[0]:
        raise ValueError(f"{len(vocabulary)} words for {counts[0]} unigrams")
    return Model(vocabulary, levels)


def unpacked_bits(packed: NDArray[np.uint8], widths: list[int], count: int) -> list[Integers]:
    """Fields of these widths, lowest bits first, of `count` records without gaps: a column (count,) for each."""
    starts = np.arange(count, dtype=np.int64) * sum(widths)
    columns = []
    for width in widths:
        bytes_at = starts >> 3
        value = np.zeros(count, np.uint64)
        for i in range(5):  # 7 bits before it, and at most 32 of its own
            value |= packed[np.minimum(bytes_at + i, len(packed) - 1)].astype(np.uint64) << np.uint64(8 * i)
        columns.append(((value >> (starts & 7).astype(np.uint64)) & np.uint64((1 << width) - 1)).astype(np.int64))
        starts = starts + width
    return columns


def with_words(model: Model, words: set[str]) -> Model:
    """The n-grams of these words, and of the marks of a text's ends and of unknown words."""
    kept = [w in words or w in (UNKNOWN, "<s>", "</s>") for w in model.vocabulary]
    keep, numbers = np.array(kept), np.cumsum(kept) - 1
    grams = [g.taken(keep[g.words].all(1)) for g in model.grams]
    for g in grams:
        g.words = numbers[g.words]
    return renormalized(Model([w for w, k in zip(model.vocabulary, kept, strict=True) if k], grams))


def pruned(model: Model, most: int) -> Model:
    """The `most` n-grams of two words and more that say most beyond shorter ones, and what these begin with."""
    gains = []
    # texts begin as often as they end
    single = model.grams[0].log_probs.copy()
    if {"<s>", "</s>"} <= set(model.vocabulary):
        single[model.vocabulary.index("<s>")] = single[model.vocabulary.index("</s>")]
    for n, grams in enumerate(model.grams[1:], start=2):
        before = single[grams.words[:, 0]]
        for i in range(2, n):
            before = before + model.log_probs(grams.words[:, :i])
        history = model.grams[n - 2].backoffs[model.places(grams.words[:, :-1])]
        without = history + model.log_probs(grams.words[:, 1:])
        gains.append(np.exp(before + grams.log_probs) * np.abs(grams.log_probs - without))
    every = np.concatenate(gains)
    least = np.sort(every)[-most] if most < len(every) else 0.0
    kept: list[Grams] = [model.grams[0]]
    needed = np.empty((0, 0), np.int64)  # beginnings of longer ones that are kept
    for grams, gain in reversed(list(zip(model.grams[1:], gains, strict=True))):
        keep = gain >= least
        if len(needed):
            keep[model.places(needed)] = True
        kept.insert(1, grams.taken(keep))
        needed = kept[1].words[:, :-1]
    return renormalized(Model(model.vocabulary, kept))


def renormalized(model: Model) -> Model:
    """Probabilities of single words that sum to one, and weights with which those of all words after others do."""
    unigrams = model.grams[0]
    start = np.array([word == "<s>" for word in model.vocabulary])  # is never written
    unigrams.log_probs -= np.log(np.exp(unigrams.log_probs[~start]).sum())
    for n, grams in enumerate(model.grams[1:], start=2):
        beginnings = model.places(grams.words[:, :-1])
        shorter = model.log_probs(grams.words[:, 1:])
        size = len(model.grams[n - 2].words)
        here = np.bincount(beginnings, np.exp(grams.log_probs), size)
        there = np.bincount(beginnings, np.exp(shorter), size)
        weights = np.log(np.maximum(1 - here, 1e-6)) - np.log(np.maximum(1 - there, 1e-6))
        model.grams[n - 2].backoffs[:] = weights
    return model


def pack(model: Model, relative: bool) -> PackedNGram:
    """Args: relative: each log probability less that of its last word by itself."""
    single = np.zeros(len(model.vocabulary))
    if relative:
        single[model.grams[0].words[:, 0]] = model.grams[0].log_probs
    levels = []
    for n, grams in enumerate(model.grams, start=1):
        beginnings = np.zeros(len(grams.words), np.int64) if n == 1 else model.places(grams.words[:, :-1])
        words = grams.words[:, -1]
        levels.append((beginnings, words, grams.log_probs - single[words], grams.backoffs))
    unknown = 0.0 if relative else LEAST_LOG10 * np.log(10)
    if UNKNOWN in model.vocabulary and not relative:
        unknown = model.grams[0].log_probs[model.vocabulary.index(UNKNOWN)]
    return PackedNGram.of(model.vocabulary, levels, unknown)


if __name__ == "__main__":
    main()
