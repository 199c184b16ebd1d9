"""Packed n-grams: as the ARPA file says, in whatever form they come; probabilities that sum to one."""

import gzip
import itertools
import math
import random
import runpy
import struct
import sys
from pathlib import Path

import numpy as np
import pytest

from speechllm.decode.ngram import LEAST_LOG10, PackedNGram, load_ngram
from speechllm.errors import UserError

PROGRAM = Path(__file__).parents[2] / "tools" / "pack_ngram.py"
WORDS = ["<s>", "</s>", "a", "b", "c", "d"]


def random_model(seed=0):
    """Log probabilities (base 10) and weights by n-gram: a proper model of three words, some n-grams known."""
    draw = random.Random(seed)
    known = {1: {(w,) for w in WORDS}}
    for n, count in ((2, 14), (3, 12)):
        every = [(*g, w) for g in sorted(known[n - 1]) if g[-1] != "</s>" for w in WORDS[1:]]
        known[n] = set(draw.sample(every, count))
    log_probs, backoffs = {("<s>",): -99.0}, {}
    share = {w: draw.uniform(1, 4) for w in WORDS[1:]}
    log_probs |= {(w,): math.log10(x / sum(share.values())) for w, x in share.items()}
    for n in (2, 3):
        for history in sorted(known[n - 1]):
            words = [g[-1] for g in sorted(known[n]) if g[:-1] == history]
            if not words:
                continue
            left = draw.uniform(0.2, 0.6)
            share = {w: draw.uniform(1, 4) for w in words}
            log_probs |= {(*history, w): math.log10((1 - left) * x / sum(share.values())) for w, x in share.items()}
            rest = 1 - sum(10 ** score(log_probs, backoffs, (*history[1:], w)) for w in words)
            backoffs[history] = math.log10(left / rest)
    return log_probs, backoffs


def score(log_probs, backoffs, gram):
    """The definition: log10 P of the last word after the others."""
    if gram in log_probs or len(gram) == 1:
        return log_probs[gram]
    return backoffs.get(gram[:-1], 0.0) + score(log_probs, backoffs, gram[1:])


def arpa(log_probs, backoffs):
    sections = []
    for n in (1, 2, 3):
        grams = [g for g in log_probs if len(g) == n]
        random.Random(n).shuffle(grams)  # the format asks for no order
        lines = [
            f"{log_probs[g]:.7f}\t{' '.join(g)}" + (f"\t{backoffs[g]:.7f}" if g in backoffs else "") for g in grams
        ]
        sections.append((n, lines))
    counts = "\n".join(f"ngram {n}={len(lines)}" for n, lines in sections)
    body = "\n\n".join(f"\\{n}-grams:\n" + "\n".join(lines) for n, lines in sections)
    return f"made by a test\n\\data\\\n{counts}\n\n{body}\n\n\\end\\\n"


def sphinx(log_probs, backoffs):
    """pocketsphinx's binary form of it: the words before a word are below it."""
    scale = math.log(10) / math.log(1.0001)
    # what must be there for longer ones to be below it
    between = {g[1:] for g in log_probs if len(g) == 3} - set(log_probs)
    log_probs = log_probs | {g: score(log_probs, backoffs, g) for g in between}
    number = {w: i for i, w in enumerate(WORDS)}
    levels = [sorted((tuple(number[w] for w in reversed(g)), g) for g in log_probs if len(g) == n) for n in (1, 2, 3)]
    below = [[sum(key[:-1] < own for key, _ in levels[n + 1]) for own, _ in levels[n]] for n in (0, 1)]
    probs = [sorted({log_probs[g] for _, g in level}) for level in levels]
    weights = sorted({backoffs.get(g, 0.0) for _, g in levels[1]})

    def table(values):
        return np.array([v * scale for v in values] + [0.0] * (65536 - len(values)), "<f4").tobytes()

    def packed(records, widths):
        value, at = 0, 0
        for record in records:
            for field, width in zip(record, widths, strict=True):
                value |= field << at
                at += width
        return value.to_bytes(((len(records) + (widths[-1] == 16)) * sum(widths) + 7) // 8 + 8, "little")

    counts = [len(level) for level in levels]
    vocab = counts[0].bit_length()
    middle = [
        (key[-1], weights.index(backoffs.get(g, 0.0)), probs[1].index(log_probs[g]), start)
        for (key, g), start in zip(levels[1], below[1], strict=True)
    ]
    middle.append((0, 0, 0, counts[2]))
    longest = [(key[-1], probs[2].index(log_probs[g])) for key, g in levels[2]]
    single = [
        (log_probs[g] * scale, backoffs.get(g, 0.0) * scale, s) for (_, g), s in zip(levels[0], below[0], strict=True)
    ]
    words = "".join(f"{w}\0" for w in WORDS).encode()
    return b"".join([
        b"Trie Language Model", struct.pack("<B3Ii", 3, *counts, 1),
        table(probs[1]), table(weights), table(probs[2]),
        *(struct.pack("<ffI", *x) for x in [*single, (0.0, 0.0, counts[1])]),
        packed(middle, [vocab, 16, 16, counts[2].bit_length()]), packed(longest, [vocab, 16]),
        struct.pack("<I", len(words)), words,
    ])  # fmt: skip


@pytest.fixture
def pack(monkeypatch, tmp_path):
    """Runs the program on a file with this content; the model that it wrote."""

    def run(content, *options):
        source, target = tmp_path / "source", tmp_path / "packed.safetensors"
        source.write_bytes(content)
        monkeypatch.setattr(sys, "argv", [PROGRAM.name, str(source), str(target), *map(str, options)])
        runpy.run_path(str(PROGRAM), run_name="__main__")
        return load_ngram(target)

    return run


def natural(model, *words):
    """Natural logarithm of the probability of the last of these words after the others, which begin a text if <s>."""
    before = model.start(0) if words[0] == "<s>" else ()
    rest = words[words[0] == "<s>" :]
    ((_, before),) = model.read([(before, tuple(rest[:-1]))])
    return model.read([(before, (rest[-1],))])[0][0]


HISTORIES = [h for n in (0, 1, 2) for h in itertools.product(WORDS[:1] + WORDS[2:], repeat=n) if "<s>" not in h[1:]]
FORMS = {"arpa": lambda *m: arpa(*m).encode(), "gzip": lambda *m: gzip.compress(arpa(*m).encode()), "sphinx": sphinx}


@pytest.mark.parametrize("form", FORMS)
def test_as_the_file_says(pack, form):
    log_probs, backoffs = random_model()
    model = pack(FORMS[form](log_probs, backoffs))
    for history in HISTORIES:
        for word in WORDS[1:]:
            expected = math.log(10) * score(log_probs, backoffs, (*history, word))
            assert natural(model, *history, word) == pytest.approx(expected, abs=0.01), (history, word)  # float16
    # a longer past does not matter, and what is unknown has no past
    assert natural(model, "d", "a", "b", "c") == natural(model, "a", "b", "c")
    assert natural(model, "a", "zebra", "c") == natural(model, "c")
    assert natural(model, "zebra") == pytest.approx(LEAST_LOG10 * math.log(10))


@pytest.mark.parametrize("options", [(), ("--most", 12), ("--most", 3), ("--words", "LEXICON", "--most", 10)])
def test_probabilities_sum_to_one(pack, tmp_path, options):
    """Of all words after any others, whatever was left out."""
    (tmp_path / "LEXICON").write_text("a EY\nb B IY\nd D IY\n")
    options = [tmp_path / o if o == "LEXICON" else o for o in options]
    model = pack(arpa(*random_model()).encode(), *options)
    words = [w for w in WORDS[1:] if not options or len(options) == 2 or w != "c"]
    for history in HISTORIES:
        assert sum(math.exp(natural(model, *history, w)) for w in words) == pytest.approx(1, abs=0.02), history
    if len(options) == 4:
        assert natural(model, "c") == pytest.approx(LEAST_LOG10 * math.log(10))


def test_what_says_least_is_left_out_first(pack):
    """The more n-grams are kept, the nearer are the probabilities of what is likely."""
    log_probs, backoffs = random_model(1)
    source = arpa(log_probs, backoffs).encode()
    far = []
    for most in (2, 6, 12, 100):
        model = pack(source, "--most", most)
        chance = {g: 10 ** (score(log_probs, backoffs, g[:1]) + score(log_probs, backoffs, g[:2])) for g in
                  itertools.product(WORDS[2:], repeat=3)}  # fmt: skip
        far.append(sum(
            p * abs(natural(model, *g) - math.log(10) * score(log_probs, backoffs, g)) for g, p in chance.items()
        ))  # fmt: skip
    assert far == sorted(far, reverse=True) and far[-1] < 0.01 < far[0]


def test_relative_to_single_words(pack):
    source = arpa(*random_model()).encode()
    plain = pack(source)
    expected = {(*h, w): natural(plain, *h, w) - natural(plain, w) for h in HISTORIES for w in WORDS[1:]}
    relative = pack(source, "--relative")
    for gram, value in expected.items():
        assert natural(relative, *gram) == pytest.approx(value, abs=0.02), gram
    assert natural(relative, "zebra") == 0


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda x: b"no model at all", "no n-gram language model"),
        (lambda x: x[: len(x) // 2], "or damaged"),
        (lambda x: x.replace(b"\\2-grams", b"\\2-gram"), "or damaged"),
        (lambda x: x.replace(b"-99", b"ninety"), "or damaged"),
        (lambda x: sphinx(*random_model())[:400000], "or damaged"),
    ],
)
def test_what_is_damaged_is_refused(pack, tmp_path, damage, message):
    with pytest.raises(SystemExit, match=f"error: .*source: .*{message}"):
        pack(damage(arpa(*random_model()).encode()))
    assert not (tmp_path / "packed.safetensors").exists()


def test_a_packed_file_that_is_none(pack, tmp_path):
    with pytest.raises(FileNotFoundError, match="none.safetensors: no such n-gram"):
        PackedNGram.load(tmp_path / "none.safetensors")
    model = pack(arpa(*random_model()).encode())
    model._tensors["words.2"] = model._tensors["words.2"][:-1]
    model.save(tmp_path / "damaged.safetensors")
    (tmp_path / "text.safetensors").write_text("text")
    for name in ("damaged", "text"):
        with pytest.raises(UserError, match=f"{name}.safetensors: no n-gram language model of tools/pack_ngram.py"):
            load_ngram(tmp_path / f"{name}.safetensors")
