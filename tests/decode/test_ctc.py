"""CTC decoding, scores and alignments: equal to sums and maxima over all alignments, written out."""

import math
from collections import defaultdict
from itertools import groupby, product

import pytest
import torch
import torch.nn.functional as F

from speechllm.decode.ctc import (
    IMPOSSIBLE,
    CTCScorer,
    ctc_greedy,
    ctc_prefix_beam_search,
    forced_align,
)

VOCABULARY = 3
BLANK = 3
EOS = 0  # a class that no alignment has to do with where it is used as the end of text
LENS = torch.tensor([5, 3, 1, 4])


@pytest.fixture(params=range(3))
def log_probs(request):
    """(4, 5, 4), NaN beyond the lengths."""
    torch.manual_seed(request.param)
    log_probs = (2 * torch.randn(4, 5, VOCABULARY + 1)).log_softmax(-1)
    log_probs[torch.arange(5)[None] >= LENS[:, None]] = math.nan
    return log_probs


def collapse(path):
    return tuple(token for token, _ in groupby(path) if token != BLANK)


def alignments(log_probs):
    """Every path over the frames, and its log probability."""
    for path in product(range(VOCABULARY + 1), repeat=len(log_probs)):
        yield path, sum(frame[i].item() for frame, i in zip(log_probs, path, strict=True))


def sequence_probs(log_probs):
    probs = defaultdict(float)
    for path, log_prob in alignments(log_probs):
        probs[collapse(path)] += math.exp(log_prob)
    return probs


def rows(log_probs):
    return [row[:n] for row, n in zip(log_probs, LENS, strict=True)]


def test_greedy_is_the_best_alignment(log_probs):
    expected = [list(collapse(max(alignments(row), key=lambda a: a[1])[0])) for row in rows(log_probs)]
    assert ctc_greedy(log_probs, LENS, BLANK) == expected


def test_prefix_beam_search_with_room_for_everything_is_exact(log_probs):
    found = ctc_prefix_beam_search(log_probs, LENS, BLANK, beam=1000, nbest=1000)
    for hypotheses, row in zip(found, rows(log_probs), strict=True):
        expected = sequence_probs(row)
        assert {h.tokens: h.log_prob for h in hypotheses} == pytest.approx(
            {tokens: math.log(prob) for tokens, prob in expected.items()}, abs=1e-5
        )
        assert [h.log_prob for h in hypotheses] == sorted((h.log_prob for h in hypotheses), reverse=True)


def test_prefix_beam_search_with_little_room():
    """Of 300 frames, whose probabilities no float can hold, with more prefixes than the beam."""
    torch.manual_seed(0)
    log_probs = torch.randn(2, 300, 8).log_softmax(-1)
    lens = torch.tensor([300, 120])
    found = ctc_prefix_beam_search(log_probs, lens, 7, beam=8, nbest=4, candidates=6)
    assert found[1] == ctc_prefix_beam_search(log_probs[1:, :120], lens[1:], 7, beam=8, nbest=4, candidates=6)[0]
    greedy = ctc_greedy(log_probs, lens, 7)
    for row, n, hypotheses, best_path in zip(log_probs, lens, found, greedy, strict=True):
        assert len({h.tokens for h in hypotheses}) == 4
        exact = [total(row[:n], h.tokens, 7) for h in hypotheses]
        assert all(h.log_prob <= log_prob + 1e-3 for h, log_prob in zip(hypotheses, exact, strict=True))
        assert exact[0] > total(row[:n], best_path, 7)  # what the sum over alignments is for


def total(log_probs, tokens, blank):
    """PyTorch's CTC, of one row, in double precision."""
    lengths = torch.tensor([len(log_probs)]), torch.tensor([len(tokens)])
    return -F.ctc_loss(log_probs[:, None].double(), torch.tensor([tokens]), *lengths, blank, "sum").item()


@pytest.mark.parametrize("sizes", [{"beam": 0}, {"nbest": 0}, {"candidates": 0}, {"beam": 2, "nbest": 3}])
def test_prefix_beam_search_refuses_sizes(sizes):
    with pytest.raises(ValueError, match="at least 1 and nbest at most beam"):
        ctc_prefix_beam_search(torch.zeros(1, 2, 3), torch.tensor([2]), 2, **sizes)


def test_scores_are_those_of_all_alignments(log_probs):
    """Of hypotheses of all utterances at once, at every step: repeated tokens, and more tokens than frames."""
    utterances = rows(log_probs)
    scorer = CTCScorer(0.3, utterances.__getitem__, BLANK, EOS)
    texts = [sequence_probs(row) for row in utterances]
    hypotheses = [(i, tokens) for i in range(4) for tokens in ((1, 1, 2), (2, 1, 1), (1, 2, 1), (2, 2, 2))]
    states = [scorer.start(i) for i, _ in hypotheses]
    candidates = torch.tensor([[2, EOS, 1]]).repeat(len(hypotheses), 1)

    def log_prob(utterance, prefix):
        return math.log(sum(p for text, p in texts[utterance].items() if text[: len(prefix)] == prefix) or 1e-300)

    for step in range(4):
        scores = scorer.score(states, candidates)
        for (i, tokens), row in zip(hypotheses, scores.tolist(), strict=True):
            prefix = tokens[:step]
            ends = math.log(texts[i].get(prefix) or 1e-300)
            totals = torch.tensor([log_prob(i, (*prefix, 2)), ends, log_prob(i, (*prefix, 1))])
            expected = totals - log_prob(i, prefix)
            expected[totals < -600] = IMPOSSIBLE
            assert row == pytest.approx(expected.tolist(), abs=1e-4)
        if step < 3:
            states = scorer.advance(states, [tokens[step] for _, tokens in hypotheses])


def test_scores_of_long_utterances_add_up_to_the_log_probability():
    torch.manual_seed(1)
    lens = (700, 250)
    utterances = [(3 * torch.randn(n, 40)).log_softmax(-1) for n in lens]
    utterances[0][100:300, 5] = -math.inf  # a token that some frames exclude
    texts = [torch.randint(1, 39, (60,)).tolist() for _ in lens]
    texts[0][10:13] = [5, 5, 5]
    scorer = CTCScorer(1.0, utterances.__getitem__, blank=39, eos_id=0)
    states = [scorer.start(i) for i in range(2)]
    totals = torch.zeros(2)
    for tokens in zip(*texts, strict=True):
        totals += scorer.score(states, torch.tensor(tokens)[:, None])[:, 0]
        states = scorer.advance(states, tokens)
    totals += scorer.score(states, torch.zeros(2, 1, dtype=torch.long))[:, 0]
    expected = [total(x, text, 39) for x, text in zip(utterances, texts, strict=True)]
    assert totals.tolist() == pytest.approx(expected, abs=2e-3)


def test_what_is_no_class_is_impossible():
    """The blank, and the rows that a language model has in excess of its tokenizer."""
    scorer = CTCScorer(1.0, lambda _: torch.zeros(3, 4).log_softmax(-1), BLANK, EOS)
    state = scorer.start(0)
    assert scorer.score([state], torch.tensor([[BLANK, 7, 1]]))[0].tolist()[:2] == [IMPOSSIBLE] * 2
    after = scorer.advance([state, state], [7, 1])
    scores = scorer.score(after, torch.tensor([[1, EOS], [2, EOS]]))
    assert scores[0].tolist() == [IMPOSSIBLE] * 2
    assert (scores[1] > -10).all()


@pytest.mark.parametrize("text", [(1,), (1, 2), (2, 2), (1, 1, 0), (0, 1, 2, 0), (2, 2, 2), ()])
def test_forced_alignment_is_the_best_of_all(log_probs, text):
    found = forced_align(log_probs, LENS, [text] * 4, BLANK)
    for spans, row in zip(found, rows(log_probs), strict=True):
        paths = [(path, log_prob) for path, log_prob in alignments(row) if collapse(path) == text]
        if not paths:
            assert spans is None
            continue
        best, _ = max(paths, key=lambda path: path[1])
        expected, t = [], 0
        for token, frames in groupby(best):
            n = len(list(frames))
            if token != BLANK:
                expected.append((token, t, t + n, row[t : t + n, token].mean().item()))
            t += n
        assert [span[:3] for span in spans] == [e[:3] for e in expected]
        assert [span.score for span in spans] == pytest.approx([e[3] for e in expected], abs=1e-5)


def test_forced_alignment_in_a_batch_is_that_alone(log_probs):
    texts = [(1, 1), (2, 0, 1), (), (7,)]
    together = forced_align(log_probs, LENS, texts, BLANK)
    assert together[2] == () and together[3] is None  # 7 is no class
    for i in range(4):
        assert forced_align(log_probs[i : i + 1, : LENS[i]], LENS[i : i + 1], texts[i : i + 1], BLANK) == [together[i]]


def test_forced_alignment_needs_a_frame_for_each_token_and_each_repetition():
    log_probs = torch.zeros(3, 4, 4).log_softmax(-1)
    lens = torch.tensor([4, 4, 0])
    found = forced_align(log_probs, lens, [(1, 1, 2), (1, 1, 1), (1,)], BLANK)
    assert [span[:3] for span in found[0]] == [(1, 0, 1), (1, 2, 3), (2, 3, 4)]
    assert found[1:] == [None, None]
