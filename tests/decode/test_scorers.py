"""Hotwords and n-gram language models: what they add to a text, against brute force; in the search; their errors."""

import itertools
import math
import random
import re
import sys

import pytest
import sentencepiece
import torch

from speechllm.decode.hotwords import Hotwords
from speechllm.decode.ngram import LEAST_LOG10, KenLM
from speechllm.decode.options import RecognizeOptions
from speechllm.decode.search import Prompt, SearchOptions, search
from speechllm.decode.word_scorer import WordScorer
from speechllm.errors import UserError
from speechllm.rwkv7 import RWKV7, RWKV7Config
from speechllm.text.tokenizer import (
    RWKVTokenizer,
    SentencePieceTokenizer,
    StreamDecoder,
    Tokenizer,
    train_sentencepiece,
)

EOS = 0


class ListedTokenizer(Tokenizer):
    """Greedy longest match over a few byte strings; id 0 ends a text, the last one is for what has no other."""

    eos_id = EOS

    def __init__(self, *pieces: str | bytes) -> None:
        self._bytes_of = {i: p if isinstance(p, bytes) else p.encode() for i, p in enumerate(pieces, 1)}
        self.vocab_size = len(pieces) + 2
        self.unknown_id = self.vocab_size - 1

    def encode(self, text):
        ids, data = [], text.encode()
        while data:
            longest = max((i for i, p in self._bytes_of.items() if data.startswith(p)), key=self._length, default=None)
            ids.append(longest or self.unknown_id)
            data = data[self._length(longest) if longest else 1 :]
        return ids

    def stream(self, keep_tags=False):
        return StreamDecoder(self._bytes_of, self._bytes_of)

    def _length(self, index):
        return len(self._bytes_of[index])


# Words in several spellings, pieces of words, punctuation, and characters without spaces, one of them in bytes.
TOKENIZER = ListedTokenizer(
    "a", "b", "ab", " a", " ab", " b", " ", "art", " art", "ist", "p", ".", " (", "'s", "7",
    "北", "京", b"\xe5\x96", b"\x86", "京a", "\n", "(", " art art",
)  # fmt: skip


def scores_of(scorer, tokens, candidates=None):
    """What the scorer adds for each token and then for the end, each scored among all others."""
    everything = torch.arange(TOKENIZER.vocab_size)[None] if candidates is None else candidates
    end = EOS if candidates is None else candidates[0, -1].item()
    (state,), scores = [scorer.start(0)], []
    for token in (*tokens, end):
        scored = scorer.score([state], everything)
        assert scored.shape == everything.shape
        scores.append(scored[0, everything[0].tolist().index(token)].item())
        if token != end:
            (state,) = scorer.advance([state], [token])
    return scores


def random_texts(count, longest, seed=0, tokens=None):
    generator = random.Random(seed)
    return [
        generator.choices(tokens or range(1, TOKENIZER.unknown_id), k=generator.randint(0, longest))
        for _ in range(count)
    ]


# ------------------------------------------------------------------------------------------------------------ hotwords

SPACED = "[a-zA-Z0-9]"


def found_in(tokens, phrases):
    """The boosts of all occurrences, by looking at every place in the tokens and at the text on both sides of it."""
    total = 0.0
    for phrase, boost in phrases.items():
        spellings = [TOKENIZER.encode(phrase), TOKENIZER.encode(" " + phrase)]
        # A lone space is not part of the phrase.
        spellings = [ids for ids in spellings if TOKENIZER.decode(ids[:1]) != " "]
        for start, spelling in itertools.product(range(len(tokens)), spellings):
            end = start + len(spelling)
            if tokens[start:end] == spelling:
                before, text, after = (TOKENIZER.decode(part) for part in (tokens[:start], spelling, tokens[end:]))
                if not any(re.fullmatch(SPACED * 2, a[-1:] + b[:1]) for a, b in ((before, text), (text, after))):
                    total += boost * len(spelling)
    return total


PHRASES = {
    "a": 1.0,
    "ab": 0.5,
    "a b": 2.0,
    "art": 1.5,
    "b art a": 3.0,
    "art.": 0.25,
    "北京": 0.75,
    "京喆": 4.0,
    "p 7": 1.0,
}


@pytest.mark.parametrize("phrases", [PHRASES, {"a b a b": 1.0, "b a b a": 1.0, "b a a": 7.0}, {"京": 2.0}])
def test_the_boosts_of_a_text_are_those_of_the_phrases_in_it(phrases):
    scorer = Hotwords(phrases, TOKENIZER)
    of_phrases = sorted({token for phrase in phrases for token in TOKENIZER.encode(" " + phrase)})
    texts = random_texts(150, 12) + random_texts(150, 15, tokens=of_phrases)
    totals = [found_in(text, phrases) for text in texts]
    assert sum(total > 0 for total in totals) > 50
    for text, total in zip(texts, totals, strict=True):
        assert sum(scores_of(scorer, text)) == pytest.approx(total, abs=1e-4), TOKENIZER.decode(text)


def test_every_token_of_a_phrase_is_boosted_and_what_is_not_completed_taken_back():
    scorer = Hotwords({"a b art": 2.0}, TOKENIZER)
    a, b, art, p = (TOKENIZER.encode(text)[0] for text in (" a", " b", " art", "p"))
    assert scores_of(scorer, [p, a, b, art]) == [0, 2, 2, 2, 0]
    assert scores_of(scorer, [a, b, p]) == [2, 2, -4, 0]
    assert scores_of(scorer, [a, b]) == [2, 2, -4]
    assert scores_of(scorer, [a, a, b, art]) == [2, 0, 2, 2, 0]
    assert scores_of(scorer, [a, b, art, p]) == [2, 2, 2, -6, 0]  # the word is "artp"


def test_a_phrase_that_begins_inside_another_is_found_when_that_fails():
    scorer = Hotwords({"a b art": 2.0, "b p": 3.0}, TOKENIZER)
    a, b, space, p = (TOKENIZER.encode(text)[0] for text in (" a", " b", " ", "p"))
    assert sum(scores_of(scorer, [a, b, space, p])) == 9  # " b", " ", "p"
    a, b, art = (TOKENIZER.encode(text)[0] for text in (" a", " b", " art"))
    scorer = Hotwords({"a b": 2.0, "b art": 3.0}, TOKENIZER)
    assert scores_of(scorer, [a, b, art]) == [2, 2 + 3, 3, 0]  # " b" ends one and begins the other


@pytest.fixture(scope="module", params=["rwkv", "sentencepiece", "sentencepiece that puts a space before a text"])
def real_tokenizer(request, tmp_path_factory):
    if request.param == "rwkv":
        return RWKVTokenizer()
    folder, texts = tmp_path_factory.mktemp("tokenizer"), [" art is art", "art party artist's (art"] * 5
    if request.param == "sentencepiece":
        return train_sentencepiece(texts, folder, vocab_size=300)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_prefix=str(folder / "space"), vocab_size=300, hard_vocab_limit=False,
        byte_fallback=True, minloglevel=2,
    )  # fmt: skip
    return SentencePieceTokenizer(folder / "space.model")


def test_whole_words_are_found_however_they_are_spelled(real_tokenizer):
    scorer = Hotwords({"art": 1.0}, real_tokenizer)
    for text, count in {
        "art": 1, "art art": 2, "party": 0, "artist": 0, "art's art.": 2, "(art art7": 1, "Art": 0, "art\nart": 2,
        "7art": 0, "北art京": 1,
    }.items():  # fmt: skip
        tokens = real_tokenizer.encode(text)
        scores = scores_of(scorer, tokens, torch.tensor([[*tokens, real_tokenizer.eos_id]]))
        assert sum(scores) == count, text  # it is one token in each of its spellings


def scores_as_batch(scorer, texts, candidates):
    """All hypotheses together, the shorter ones leaving: scores (C,) at each position of each text."""
    states, scores = [scorer.start(i) for i in range(len(texts))], [[] for _ in texts]
    running = list(range(len(texts)))
    for position in itertools.count():
        if not running:
            return scores
        for i, row in zip(running, scorer.score(states, candidates.expand(len(running), -1)), strict=True):
            scores[i].append(row)
        kept = [k for k, i in enumerate(running) if len(texts[i]) > position]
        running = [running[k] for k in kept]
        states = scorer.advance([states[k] for k in kept], [texts[i][position] for i in running])


def test_a_hypothesis_is_scored_alike_in_any_batch_and_among_any_candidates(ngram):
    everything = torch.arange(TOKENIZER.vocab_size)[None]
    texts = random_texts(40, 12)
    for scorer in (Hotwords(PHRASES, TOKENIZER), ngram):
        for text, rows in zip(texts, scores_as_batch(scorer, texts, everything), strict=True):
            found = [rows[i][token].item() for i, token in enumerate([*text, EOS])]
            assert found == scores_of(scorer, text)
            (alone,) = scores_as_batch(scorer, [text], everything.flip(1))
            assert torch.equal(torch.stack(rows), torch.stack(alone).flip(1))


def test_ids_that_the_tokenizer_does_not_have_are_in_no_phrase_and_no_word(ngram):
    """The vocabulary of a language model may be larger."""
    beyond = TOKENIZER.vocab_size + 5
    a, b = TOKENIZER.encode(" a b")
    hotwords = Hotwords({"a b": 1.0}, TOKENIZER)
    assert scores_of(hotwords, [a, beyond, b], torch.tensor([[a, b, beyond, EOS]])) == [1, -1, 0, 0]
    with_it = scores_of(ngram, [a, beyond, b], torch.tensor([[a, b, beyond, EOS]]))
    assert with_it == scores_of(ngram, [a, b])[:1] + [0.0] + scores_of(ngram, [a, b])[1:]


def test_a_file_of_phrases(tmp_path):
    path = tmp_path / "hotwords.txt"
    path.write_bytes("\ufeff# names\r\na b\t2.5\r\n\r\n  art \n北京\t0.5".encode())
    read = Hotwords.from_file(path, TOKENIZER, 0.7)
    expected = Hotwords({"a b": 2.5, "art": 1.0, "北京": 0.5}, TOKENIZER, 0.7)
    assert read.weight == expected.weight == 0.7
    texts = random_texts(100, 10)
    assert [scores_of(read, text) for text in texts] == [scores_of(expected, text) for text in texts]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "hotwords.txt: there is no phrase"),
        (b"# only\n\n", "hotwords.txt: there is no phrase"),
        (b"a\nb\tmuch\n", "hotwords.txt:2: 'much' is not a number"),
        (b"a\nb\t1\t2\n", "hotwords.txt:2: .* is not a number"),
        (b"a\n\nb\t-1\n", "hotwords.txt:3: hotword 'b': the boost must be above 0"),
        (b"a\nb\tnan\n", "hotwords.txt:2: hotword 'b': the boost must be above 0"),
        (b"a\n#\na\t3", "hotwords.txt:3: 'a' is already on line 1"),
        (b"a\n\xff\n", "hotwords.txt:2: not UTF-8"),
        (b"a\nxyz\n", "hotwords.txt:2: hotword 'xyz': has characters that the tokenizer cannot write"),
        (b"a\n\t3\n", "hotwords.txt:2: hotword '': is empty"),
    ],
)
def test_what_is_wrong_with_a_file_is_said_with_the_line(content, message, tmp_path):
    path = tmp_path / "hotwords.txt"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        Hotwords.from_file(path, TOKENIZER)


def test_what_cannot_be_used_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="none.txt: no such file of hotwords"):
        Hotwords.from_file(tmp_path / "none.txt", TOKENIZER)
    with pytest.raises(UserError, match="there is no phrase"):
        Hotwords({}, TOKENIZER)
    with pytest.raises(UserError, match="hotword ' ': is empty"):
        Hotwords({" ": 1.0}, TOKENIZER)
    for weight in (-1.0, math.nan, math.inf):
        with pytest.raises(UserError, match="hotword_weight must be at least 0"):
            RecognizeOptions(hotwords="phrases", hotword_weight=weight)
        with pytest.raises(UserError, match="ngram_weight must be at least 0"):
            RecognizeOptions(ngram="arpa", ngram_weight=weight)


# ------------------------------------------------------------------------------------------------------------- n-grams

ARPA_FILE = """\\data\\
ngram 1=8
ngram 2=5
ngram 3=2

\\1-grams:
-1.5\t<unk>
-99\t<s>\t-0.3
-1.1\t</s>
-0.6\ta\t-0.25
-0.9\tab\t-0.4
-1.2\tart\t-0.2
-1.4\t北\t-0.1
-1.7\tart.\t-0.05

\\2-grams:
-0.4\t<s> a\t-0.15
-0.5\ta ab\t-0.35
-0.2\tab art\t-0.45
-0.3\tart </s>
-0.7\ta 北\t-0.65

\\3-grams:
-0.12\t<s> a ab
-0.34\ta ab art

\\end\\
"""


class ARPAModel:
    """A back-off model as the ARPA format defines it; the state is the words before."""

    def __init__(self, text):
        self.log10, self.backoff = {}, {}
        for line in text.splitlines():
            if line.startswith("-"):
                log10, words, *backoff = line.split("\t")
                self.log10[tuple(words.split())] = float(log10)
                self.backoff[tuple(words.split())] = float(backoff[0]) if backoff else 0.0

    def start(self, utterance):
        return ("<s>",)

    def read(self, texts):
        found = []
        for state, words in texts:
            total = 0.0
            for word in words:
                log10, state = self.score(state, word)
                total += math.log(10) * log10
            found.append((total, state))
        return found

    def expect(self, texts):
        return [0.0] * len(texts)

    def score(self, state, word):
        if (word,) not in self.log10:
            word = "<unk>"
        state = state[-2:]
        following = (*state, word)
        total = 0.0
        while (*state, word) not in self.log10:
            total += self.backoff.get(state, 0.0)
            state = state[1:]
        return total + self.log10[(*state, word)], following


ARPA = ARPAModel(ARPA_FILE)


@pytest.fixture
def ngram():
    return WordScorer(ARPA, TOKENIZER, 0.5)


def words_of(text):
    """White space and the two Han characters of the tokenizer and the one that it spells in bytes separate words."""
    return re.findall(r"[北京喆]|[^\s北京喆]+", text)


def log_prob(lm, words):
    ((total, _),) = lm.read([(lm.start(0), (*words, "</s>"))])
    return total


def test_the_scores_of_a_text_are_its_log_probability(ngram):
    """Of any tokens, also of those that are no whole characters."""
    likely = TOKENIZER.encode(" a ab art 北.")
    for text in random_texts(300, 12) + random_texts(200, 12, tokens=likely):
        words = words_of(TOKENIZER.decode(text))
        assert sum(scores_of(ngram, text)) == pytest.approx(log_prob(ARPA, words), abs=1e-4), words


def test_a_word_is_scored_when_it_ends(ngram):
    tokens = TOKENIZER.encode(" a") + TOKENIZER.encode("b") + TOKENIZER.encode(" art") + TOKENIZER.encode("北.")
    state, log10 = ARPA.start(0), []
    for word in ("ab", "art", "北", ".", "</s>"):
        score, state = ARPA.score(state, word)
        log10.append(score)
    ab, art, bei, full_stop, end = log10
    expected = [0, 0, ab, art + bei, 0, full_stop + end]  # a character without spaces needs no sign of its end
    assert scores_of(ngram, tokens) == pytest.approx([math.log(10) * score for score in expected], abs=1e-5)


class ExpectingModel(ARPAModel):
    """Expects of a word what its letters cost, and of what comes after two words nothing."""

    def expect(self, texts):
        return [-0.5 * len(word) * (len(state) < 3) for state, word in texts]


def test_what_is_expected_of_a_word_counts_until_it_is_known(ngram):
    scorer = WordScorer(ExpectingModel(ARPA_FILE), TOKENIZER, 0.5)
    a, b, art = (TOKENIZER.encode(text)[0] for text in (" a", "b", " art"))
    assert scores_of(scorer, [a, b])[:2] == [-0.5, -0.5]
    assert scores_of(scorer, [a, b, art])[2] == pytest.approx(scores_of(ngram, [a, b, art])[2] + 1.0 - 1.5)
    for text in random_texts(200, 12):
        assert sum(scores_of(scorer, text)) == pytest.approx(sum(scores_of(ngram, text)), abs=1e-4)


def test_kenlm_gives_what_the_format_defines(tmp_path, capfd):
    pytest.importorskip("kenlm", reason="kenlm is optional")
    path = tmp_path / "lm.arpa"
    path.write_text(ARPA_FILE, encoding="utf-8")
    scorer = WordScorer(KenLM(path), TOKENIZER, 0.5)
    assert "----" not in capfd.readouterr().err  # no progress bar
    reference = WordScorer(ARPA, TOKENIZER, 0.5)
    for text in random_texts(100, 12) + random_texts(100, 12, tokens=TOKENIZER.encode(" a ab art 北.")):
        assert scores_of(scorer, text) == pytest.approx(scores_of(reference, text), abs=1e-5)

    path.write_text(ARPA_FILE.replace("-1.5\t<unk>", "-3\t7"), encoding="utf-8")  # what is unknown is impossible
    without = KenLM(path)
    assert without.read([(without.start(0), ("p",))])[0][0] == pytest.approx(LEAST_LOG10 * math.log(10))

    path.write_text(ARPA_FILE.replace("ngram 2=5", "ngram 2=6"), encoding="utf-8")
    with pytest.raises(UserError, match="lm.arpa: kenlm cannot read it"):
        KenLM(path)
    with pytest.raises(FileNotFoundError, match="none.arpa: no such n-gram language model"):
        KenLM(tmp_path / "none.arpa")


def test_without_kenlm_it_is_said_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "kenlm", None)
    with pytest.raises(UserError, match="pip install kenlm"):
        KenLM(tmp_path / "lm.arpa")


# ---------------------------------------------------------------------------------------------------------- the search


WORDS = ListedTokenizer(
    " uno", " dos", " tres", " cuatro", " cinco", " seis", " siete", " ocho", " nueve", " diez", " once",
)  # fmt: skip


@pytest.fixture(scope="module")
def llm():
    torch.manual_seed(9)  # the second best texts differ in whole words, and end
    llm = RWKV7(RWKV7Config(n_layer=2, n_embd=32, head_size=16, vocab_size=WORDS.vocab_size)).eval()
    with torch.no_grad():
        for p in llm.parameters():
            p.add_(torch.randn_like(p) * 0.1)
        llm.head.weight.mul_(3.0)
    return llm


@pytest.fixture(scope="module")
def prompts():
    return [Prompt(torch.randn(n, 32, generator=torch.Generator().manual_seed(n)), 12) for n in (3, 5, 8, 2)]


def texts_of(llm, prompts, options, scorers=()):
    """The n-best texts of each prompt."""
    found = sorted(search(llm, prompts, options, EOS, scorers))
    return [[WORDS.decode(hypothesis.tokens) for hypothesis in nbest] for _, nbest in found]


@pytest.mark.parametrize(("options", "weight"), [(SearchOptions("beam", beam=6), 2.0), (SearchOptions(), 8.0)])
def test_a_phrase_that_was_second_best_appears_when_it_is_boosted(llm, prompts, options, weight):
    changed = 0
    for prompt, texts in zip(prompts, texts_of(llm, prompts, SearchOptions("beam", beam=6, nbest=6)), strict=True):
        phrase = texts[1].strip()
        assert phrase and phrase not in texts[0]
        without, found = (
            texts_of(llm, [prompt], options, [Hotwords({phrase: 1.0}, WORDS, used)])[0][0] for used in (0.0, weight)
        )
        assert without == texts[0] or options.method == "greedy"
        assert phrase in found
        changed += phrase not in without
    assert changed == (len(prompts) if options.method == "beam" else 3)  # greedy search finds a second best by itself


def test_the_search_ranks_by_what_the_whole_texts_are_given(llm, prompts):
    """Of the hotwords and the n-grams together: nothing of a phrase that is not completed remains in the score."""
    lm = ARPAModel("-1.5\t<unk>\n-0.5\ttres\t-0.2\n-0.1\ttres diez\n-1\t</s>")
    phrases = {"diez tres": 1.0, "tres diez ocho": 2.0, "seis cuatro": 0.5}
    scorers = [Hotwords(phrases, WORDS, 0.8), WordScorer(lm, WORDS, 0.4)]
    options = SearchOptions("beam", beam=6, nbest=6, length_penalty=0.0)
    found = sorted(search(llm, prompts, options, EOS, scorers))
    ended = [hypothesis for _, nbest in found for hypothesis in nbest if hypothesis.stopped == "end"]
    assert len(ended) > 12
    boosted = 0
    for hypothesis in ended:
        text = WORDS.decode(hypothesis.tokens)
        boosts = sum(
            boost * len(phrase.split()) * len(re.findall(rf"(?= {phrase}\b)", text))
            for phrase, boost in phrases.items()
        )
        boosted += boosts > 0
        expected = sum(hypothesis.log_probs) + 0.8 * boosts + 0.4 * log_prob(lm, text.split())
        assert hypothesis.score == pytest.approx(expected, abs=1e-3)
    assert 0 < boosted < len(ended)
