"""A CTC head of other pieces in the search: what it makes of words, against PyTorch's CTC loss."""

import random

import pytest
import torch
import torch.nn.functional as F

from speechllm.decode.ctc import IMPOSSIBLE, CTCScorer
from speechllm.decode.ctc_words import CTCWords
from speechllm.decode.search import Prompt, SearchOptions, search
from speechllm.decode.word_scorer import END, WordScorer
from speechllm.rwkv7 import RWKV7, RWKV7Config
from speechllm.text.tokenizer import LexiconTokenizer, Tokenizer
from tests.decode.test_scorers import ListedTokenizer

WORDS = ("the", "then", "there", "a", "an", "hat", "heart", "hearts", "he")
LEXICON = """\
the DH AH
he HH IY
then DH EH N
there DH EH R
a AH
an AE N
hat HH AE T
heart HH AA R T
hearts HH AA R T S
"""


@pytest.fixture
def lexicon(tmp_path):
    (tmp_path / "lexicon.txt").write_text(LEXICON, encoding="utf-8")
    return LexiconTokenizer(tmp_path)


def log_probs_of(classes, frames=40, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(frames, classes, generator=generator) * 2).log_softmax(-1)


def words_model(tokenizer, utterances):
    return CTCWords(lambda number: utterances[number], tokenizer.encode, tokenizer.beginnings, tokenizer.eos_id)


def whole(log_probs, pieces, blank):
    """CTC's log probability of pieces that are all that is said."""
    lens = torch.tensor([len(log_probs)]), torch.tensor([len(pieces)])
    return -F.ctc_loss(log_probs[:, None], torch.tensor([pieces]), *lens, blank, reduction="none").item()


def begins(log_probs, pieces, blank):
    """That what is said begins with pieces, the last of which is another than the one before: by the frame in which
    the last one begins."""
    before = [0.0 if len(pieces) == 1 else -1e9] + [whole(log_probs[:t], pieces[:-1], blank) for t in range(1, 40)]
    return (torch.tensor(before) + log_probs[:, pieces[-1]]).logsumexp(0).item()


def test_the_scores_of_a_text_are_the_log_probability_of_its_pieces(lexicon):
    rng = random.Random(1)
    utterances = [log_probs_of(lexicon.vocab_size, frames, frames) for frames in (40, 25)]
    model = words_model(lexicon, utterances)
    for _ in range(30):
        words = tuple(rng.choices(WORDS, k=rng.randint(1, 4)))
        for number, log_probs in enumerate(utterances):
            state, total = model.start(number), 0.0
            for word in (*words, END):
                ((score, state),) = model.read([(state, (word,))])
                total += score
            expected = whole(log_probs, lexicon.encode(" ".join(words)), lexicon.eos_id)
            assert total == pytest.approx(max(expected, IMPOSSIBLE), rel=1e-4)


def test_words_are_scored_alike_one_by_one_and_together(lexicon):
    utterances = [log_probs_of(lexicon.vocab_size, frames, frames) for frames in (40, 25)]
    rng = random.Random(2)
    texts = [(rng.randrange(2), tuple(rng.choices(WORDS, k=rng.randint(0, 3)))) for _ in range(40)]
    together = words_model(lexicon, utterances)
    starts = [together.start(0), together.start(1)]
    scores = [score for score, _ in together.read([(starts[number], words) for number, words in texts])]
    beginnings = together.expect([(starts[number], "h") for number, _ in texts])
    for (number, words), score, expected in zip(texts, scores, beginnings, strict=True):
        alone = words_model(lexicon, utterances)
        state, total = alone.start(number), 0.0
        assert alone.expect([(state, "h")]) == pytest.approx([expected], rel=1e-5)
        for word in words:
            ((of_word, state),) = alone.read([(state, (word,))])
            total += of_word
        assert total == pytest.approx(score, rel=1e-5)


def test_of_a_word_that_is_not_whole_the_best_beginning_is_expected(lexicon):
    log_probs = log_probs_of(lexicon.vocab_size)
    model = words_model(lexicon, [log_probs])
    ((said, state),) = model.read([(model.start(0), ("an",))])
    before = lexicon.encode("an hat")[:3]
    phone = {name: lexicon.encode(word)[0] for name, word in (("DH", "the"), ("HH", "he"), ("AH", "a"))}
    for written, phones in {"th": [[phone["DH"]]], "the": [[phone["DH"], phone["AH"]]], "h": [[]], "xy": []}.items():
        (expected,) = model.expect([(state, written)])
        best = [begins(log_probs, [*before, *of_word], lexicon.eos_id) - said for of_word in phones]
        if written == "the":  # or what "then" and "there" begin with
            assert expected >= best[0] - 1e-4
        else:
            assert expected == pytest.approx(max(best, default=IMPOSSIBLE), rel=1e-4)
    assert model.expect([(state, "")]) == [0.0]


def test_pieces_that_another_word_changes_are_scored_anew():
    """A word more makes of the pieces before it others: the text counts as a whole."""

    class Merging(Tokenizer):
        vocab_size, eos_id = 5, 0

        def encode(self, text):
            return [" abc".index(character) + 1 for character in text.replace("a b", "c")]

    tokenizer = Merging()
    log_probs = log_probs_of(tokenizer.vocab_size)
    model = words_model(tokenizer, [log_probs])
    state, total = model.start(0), 0.0
    for word in ("a", "b", "a", END):
        ((score, state),) = model.read([(state, (word,))])
        total += score
    assert total == pytest.approx(whole(log_probs, tokenizer.encode("a b a"), tokenizer.eos_id), rel=1e-4)


class SimpleCTCWords:
    """The same in its simple form: each text from its start on, one piece after the other, by `CTCScorer`; of what is
    written of a word all beginnings, also those that begin with another one. Its state is the text."""

    def __init__(self, log_probs, lexicon):
        self._lexicon = lexicon
        self._end = lexicon.vocab_size
        self._scorer = CTCScorer(1.0, lambda number: log_probs, lexicon.eos_id, self._end)

    def start(self, utterance):
        return ()

    def read(self, texts):
        found = []
        for before, words in texts:
            after = (*before, *(word for word in words if word != END))
            end = [self._end] * (END in words)
            pieces, more = (self._lexicon.encode(" ".join(text)) for text in (before, after))
            found.append((self._log_prob([*more, *end]) - self._log_prob(pieces), after))
        return found

    def expect(self, texts):
        return [self._expected(said, word) if word else 0.0 for said, word in texts]

    def _expected(self, said, word):
        distinct = {}
        for whole, *phones in (line.split() for line in LEXICON.splitlines()):
            if whole.startswith(word):
                distinct[tuple(phones[: len(phones) * len(word) // len(whole)])] = whole
        border = [self._lexicon.encode("a a")[1]] * bool(said)
        before = self._lexicon.encode(" ".join(said))
        beginnings = [
            [*before, *border, *self._lexicon.encode(whole)[: len(phones)]]
            for phones, whole in list(distinct.items())[: LexiconTokenizer.MAX_BEGINNINGS]
        ]
        return max([self._log_prob(p) - self._log_prob(before) for p in beginnings], default=IMPOSSIBLE)

    def _log_prob(self, pieces):
        total, state = 0.0, self._scorer.start(0)
        for piece in pieces:
            total += self._scorer.score([state], torch.tensor([[piece]])).item()
            if piece != self._end:
                (state,) = self._scorer.advance([state], [piece])
        return total


def heard(lexicon, text):
    """Log probabilities of a head that is mostly right."""
    frames = [frame for piece in lexicon.encode(text) for frame in (piece, piece, lexicon.eos_id)]
    logits = torch.randn(len(frames), lexicon.vocab_size, generator=torch.Generator().manual_seed(len(text)))
    logits[torch.arange(len(frames)), frames] += 5.0
    return logits.log_softmax(-1)


def test_the_search_finds_what_it_finds_with_the_simple_form(lexicon):
    written = ListedTokenizer(
        *(f" {word}" for word in ("the", "then", "a", "h", "th")), "e", "n", "re", "at", "art", "s"
    )
    torch.manual_seed(3)
    llm = RWKV7(RWKV7Config(n_layer=1, n_embd=16, head_size=16, vocab_size=written.unknown_id)).eval()
    said = ["the hearts he", "a hat then a"]
    log_probs = [heard(lexicon, text) for text in said]
    prompts = [Prompt(torch.randn(3, 16, generator=torch.Generator().manual_seed(i)), 10) for i in range(2)]
    options = SearchOptions("beam", beam=4, nbest=4, length_penalty=0.0)
    together = dict(search(llm, prompts, options, written.eos_id, [
        WordScorer(words_model(lexicon, log_probs), written, 3.0)
    ]))  # fmt: skip
    for number, prompt in enumerate(prompts):
        scorer = WordScorer(SimpleCTCWords(log_probs[number], lexicon), written, 3.0)
        ((_, expected),) = search(llm, [prompt], options, written.eos_id, [scorer])
        assert [x.tokens for x in together[number]] == [x.tokens for x in expected]
        assert [x.score for x in together[number]] == pytest.approx([x.score for x in expected], rel=1e-5)
        assert written.decode(expected[0].tokens).strip() == said[number]
