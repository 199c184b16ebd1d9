"""Searches: equal to plain and to exhaustive ones; what an utterance gets does not depend on the batch; the guards."""

import itertools
import math
from dataclasses import dataclass, field, replace

import pytest
import torch

from speechllm.decode.search import Prompt, SearchOptions, _best, loop_length, search
from speechllm.errors import UserError
from speechllm.rwkv7 import RWKV7, RWKV7Config, RWKV7State
from tests.rwkv7.small import random_state

EOS = 3
NEVER = 12  # no token of the models below


def sharp_model(vocab_size: int = 12, sharpness: float = 8.0, seed: int = 0) -> RWKV7:
    torch.manual_seed(seed)
    llm = RWKV7(RWKV7Config(n_layer=2, n_embd=32, head_size=16, vocab_size=vocab_size)).eval()
    with torch.no_grad():
        for p in llm.parameters():
            p.add_(torch.randn_like(p) * 0.1)
        llm.head.weight.mul_(sharpness)
    return llm


@pytest.fixture(scope="module")
def llm() -> RWKV7:
    """One whose texts differ in length, from 0 tokens to 8, and have no loops."""
    return sharp_model(sharpness=3.0, seed=17)


@pytest.fixture(scope="module")
def prompts() -> list[Prompt]:
    generator = torch.Generator().manual_seed(1)
    lens, limits = (5, 9, 2, 7, 1, 4, 6, 3, 8), (30, 12, 20, 4, 30, 1, 8, 30, 18)
    return [Prompt(torch.randn(n, 32, generator=generator), limit) for n, limit in zip(lens, limits, strict=True)]


def results(llm, prompts, options=None, scorers=(), eos_id=EOS):
    """The n-best of each prompt, by its number."""
    found = list(search(llm, iter(prompts), options or SearchOptions(), eos_id, scorers))
    assert sorted(number for number, _ in found) == list(range(len(prompts)))
    return [nbest for _, nbest in sorted(found)]


def assert_same(found, expected):
    """Equal but for the rounding of the numbers."""
    for a, b in zip(itertools.chain(*found), itertools.chain(*expected), strict=True):
        assert (a.tokens, a.stopped) == (b.tokens, b.stopped)
        assert a.log_probs == pytest.approx(b.log_probs, abs=1e-4) and a.score == pytest.approx(b.score, abs=1e-4)


@torch.no_grad()
def log_probs_after(llm, prompt, tokens):
    """(V,), from reading all again."""
    embeds = torch.cat([prompt.inputs_embeds, llm.embed(torch.tensor(tokens, dtype=torch.long))])
    return llm(inputs_embeds=embeds[None], state=prompt.state)[0][0, -1].log_softmax(-1)


def plain_greedy(llm, prompt, eos_id):
    """Tokens, log_probs, and whether the text has ended."""
    tokens, log_probs = [], []
    while len(tokens) < prompt.max_tokens:
        best = log_probs_after(llm, prompt, tokens)
        log_probs.append(best.max().item())
        if best.argmax() == eos_id:
            return tokens, log_probs, True
        tokens.append(best.argmax().item())
    return tokens, log_probs, False


@torch.no_grad()
def log_probs_of(llm, prompt, tokens):
    """Of each token after those before it, from reading all at once."""
    text = torch.tensor(tokens)
    embeds = torch.cat([prompt.inputs_embeds, llm.embed(text[:-1])])
    log_probs = llm(inputs_embeds=embeds[None], state=prompt.state)[0][0, -len(text) :].log_softmax(-1)
    return log_probs.gather(1, text[:, None])[:, 0].tolist()


METHODS = {
    "greedy": SearchOptions(),
    "beam": SearchOptions(method="beam", beam=4, nbest=3),
    "sample": SearchOptions(method="sample", nbest=2, top_p=0.9, seed=5),
}


def test_greedy_equals_the_plain_loop(llm, prompts):
    found = results(llm, prompts)
    for prompt, (hypothesis,) in zip(prompts, found, strict=True):
        tokens, log_probs, ended = plain_greedy(llm, prompt, EOS)
        assert list(hypothesis.tokens) == tokens
        assert hypothesis.stopped == ("end" if ended else "length")
        assert hypothesis.log_probs == pytest.approx(log_probs, abs=1e-4)
        assert hypothesis.score == pytest.approx(sum(log_probs) / len(log_probs), abs=1e-4)
    assert {hypothesis.stopped for (hypothesis,) in found} == {"end", "length"}
    assert len({len(hypothesis.tokens) for (hypothesis,) in found}) > 4


def test_a_beam_of_one_is_greedy(llm, prompts):
    assert_same(results(llm, prompts, SearchOptions(method="beam", beam=1)), results(llm, prompts))
    scorer = TokenScorer({0: -3.0, 1: -math.inf})
    beam, greedy = (results(llm, prompts, SearchOptions(m, beam=1), [scorer]) for m in ("beam", "greedy"))
    assert_same(beam, greedy)
    assert [n.tokens for (n,) in greedy] != [n.tokens for (n,) in results(llm, prompts)]


@pytest.mark.parametrize("options", METHODS.values(), ids=METHODS)
def test_a_batch_gives_each_utterance_what_it_gets_alone(llm, prompts, options):
    # Numbers are part of what an utterance gets when sampling: alone it has the same one.
    together = results(llm, prompts, options)
    for number, (prompt, expected) in enumerate(zip(prompts, together, strict=True)):
        others = [Prompt(torch.zeros(1, 32), 1)] * number
        assert_same([results(llm, [*others, prompt], options)[-1]], [expected])


@pytest.mark.parametrize("method", ["greedy", "beam"])
def test_the_order_of_the_batch_does_not_matter(llm, prompts, method):
    expected = results(llm, prompts, METHODS[method])
    order = [4, 8, 0, 2, 7, 1, 6, 3, 5]
    assert_same(results(llm, [prompts[i] for i in order], METHODS[method]), [expected[i] for i in order])


@dataclass
class Counting:
    """A language model that counts the rows of its steps, and how many prompts it reads."""

    llm: RWKV7
    rows: list[int] = field(default_factory=list)
    read: int = 0

    def __call__(self, **inputs):
        self.read += len(inputs["lens"])
        return self.llm(**inputs)

    def step(self, token_ids, state, overwrite=False):
        self.rows.append(len(token_ids))
        assert len(state) == len(token_ids)
        return self.llm.step(token_ids, state, overwrite)


@pytest.mark.parametrize("options", METHODS.values(), ids=METHODS)
@pytest.mark.parametrize("places", [1, 2, 4])
def test_finished_rows_make_place_for_the_next_utterances(llm, prompts, options, places):
    expected = results(llm, prompts, options)
    counting = Counting(llm)
    few = replace(options, max_rows=places * options.width)
    assert_same(results(counting, prompts, few), expected)
    assert max(counting.rows) <= few.max_rows
    assert counting.read == len(prompts)


@pytest.mark.parametrize("max_rows", [1, 3, 64])
def test_greedy_costs_one_row_for_each_token_that_another_follows(llm, prompts, max_rows):
    counting = Counting(llm)
    found = results(counting, prompts, SearchOptions(max_rows=max_rows, max_repeats=100))
    assert sum(counting.rows) == sum(len(hypothesis.log_probs) - 1 for (hypothesis,) in found)


def test_prompts_are_drawn_as_places_become_free(llm, prompts):
    drawn = []

    def watched():
        for number, prompt in enumerate(prompts):
            drawn.append(number)
            yield prompt

    found = search(llm, watched(), SearchOptions(max_rows=2), EOS)
    assert drawn == []
    next(found)
    assert len(drawn) < len(prompts)


@dataclass
class TokenScorer:
    """The score of a token does not depend on what is before it. The states are the hypotheses."""

    scores: dict[int, float]
    weight: float = 1.0

    def start(self, utterance):
        return (utterance,)

    def score(self, states, candidates):
        assert len(states) == len(candidates)
        table = torch.zeros(20)
        for token, score in self.scores.items():
            table[token] = score
        return table[candidates]

    def advance(self, states, tokens):
        assert EOS not in tokens
        return [(*state, token) for state, token in zip(states, tokens, strict=True)]


def exhaustive(llm, prompt, options, token_scores):
    """All texts of up to max_tokens tokens, ranked, those that end first."""
    found, open_texts = [], [((), [], 0.0)]
    for position in range(prompt.max_tokens):
        following = []
        for tokens, log_probs, total in open_texts:
            for token, log_prob in enumerate(log_probs_after(llm, prompt, tokens).tolist()):
                extended = [*log_probs, log_prob]
                score = total + log_prob + token_scores.get(token, 0.0)
                if token == EOS:
                    found.append((0, -score / len(extended) ** options.length_penalty, tokens, extended))
                elif position + 1 == prompt.max_tokens:
                    found.append((1, -score / len(extended) ** options.length_penalty, (*tokens, token), extended))
                else:
                    following.append(((*tokens, token), extended, score))
        open_texts = following
    return sorted(found)


@pytest.mark.parametrize("length_penalty", [0.0, 1.0, 2.0])
@pytest.mark.parametrize("token_scores", [{}, {0: -0.5, 2: 1.5}], ids=["alone", "scored"])
def test_a_beam_that_holds_everything_finds_what_an_exhaustive_search_finds(length_penalty, token_scores):
    llm = sharp_model(vocab_size=4, sharpness=2.0)
    torch.manual_seed(3)
    prompts = [Prompt(torch.randn(3, 32), limit) for limit in (4, 2, 1)]
    options = SearchOptions(method="beam", beam=200, nbest=30, length_penalty=length_penalty, max_rows=600)
    scorer = TokenScorer({token: score / 0.5 for token, score in token_scores.items()}, weight=0.5)
    found = results(llm, prompts, options, [scorer] if token_scores else ())
    for prompt, nbest in zip(prompts, found, strict=True):
        expected = exhaustive(llm, prompt, options, token_scores)[:30]
        assert len(nbest) == len(expected)
        for hypothesis, (rank, score, tokens, log_probs) in zip(nbest, expected, strict=True):
            assert hypothesis.tokens == tokens and hypothesis.stopped == ("end", "length")[rank]
            assert hypothesis.score == pytest.approx(-score, abs=1e-4)
            assert hypothesis.log_probs == pytest.approx(log_probs, abs=1e-4)


def plain_beam(llm, prompt, beam, length_penalty):
    """The tokens of the n-best of `search`, from all continuations by all tokens."""
    ended, running = [], [((), 0.0)]
    while True:
        ways = []
        for tokens, total in running:
            for token, log_prob in enumerate(log_probs_after(llm, prompt, tokens).tolist()):
                ways.append((total + log_prob, tokens, token))
        running = []
        for total, tokens, token in sorted(ways, reverse=True):
            if token == EOS:
                ended.append((tokens, total / (len(tokens) + 1) ** length_penalty))
            else:
                running.append(((*tokens, token), total))
            if len(running) == beam:
                break
        ended.sort(key=lambda text: -text[1])
        if len(running[0][0]) == prompt.max_tokens:
            return [tokens for tokens, _ in ended + running][:beam]
        best = running[0][1] / len(running[0][0]) ** length_penalty
        if len(ended) >= beam and best <= ended[beam - 1][1]:
            return [tokens for tokens, _ in ended][:beam]


@pytest.mark.parametrize("beam", [1, 2, 3, 5])
@pytest.mark.parametrize("seed", [2, 17])
@pytest.mark.parametrize("length_penalty", [0.0, 1.0])
def test_a_beam_equals_a_plain_one(prompts, seed, length_penalty, beam):
    llm = sharp_model(sharpness=3.0, seed=seed)
    prompts = [Prompt(prompt.inputs_embeds, min(prompt.max_tokens, 10)) for prompt in prompts]
    options = SearchOptions(method="beam", beam=beam, nbest=beam, length_penalty=length_penalty, max_rows=12)
    for prompt, nbest in zip(prompts, results(llm, prompts, options), strict=True):
        assert [hypothesis.tokens for hypothesis in nbest] == plain_beam(llm, prompt, beam, length_penalty)


def test_a_wider_beam_finds_what_greedy_misses(llm, prompts):
    by_sum = [SearchOptions(method="beam", beam=beam, length_penalty=0.0) for beam in (1, 8)]
    narrow, wide = (results(llm, prompts, options) for options in by_sum)
    both_end = [(a.score, b.score) for (a,), (b,) in zip(narrow, wide, strict=True) if a.stopped == b.stopped == "end"]
    assert any(b > a + 0.1 for a, b in both_end)


@pytest.mark.parametrize("options", METHODS.values(), ids=METHODS)
def test_log_probs_are_those_of_reading_the_text(llm, prompts, options):
    for prompt, nbest in zip(prompts, results(llm, prompts, options), strict=True):
        for hypothesis in nbest:
            text = hypothesis.tokens + (EOS,) * (hypothesis.stopped == "end")
            assert hypothesis.log_probs == pytest.approx(log_probs_of(llm, prompt, text), abs=1e-4)
            assert hypothesis.score == pytest.approx(sum(hypothesis.log_probs) / len(text))


def test_nbest_is_sorted_and_distinct(llm, prompts):
    for nbest in results(llm, prompts[:5], SearchOptions(method="beam", beam=6, nbest=6)):
        assert len(nbest) > 1 and len({hypothesis.tokens for hypothesis in nbest}) == len(nbest)
        ranks = [("end", "length", "loop").index(hypothesis.stopped) for hypothesis in nbest]
        assert ranks == sorted(ranks)
        for rank in set(ranks):
            scores = [hypothesis.score for hypothesis, r in zip(nbest, ranks, strict=True) if r == rank]
            assert scores == sorted(scores, reverse=True)
        for hypothesis in nbest:
            assert len(hypothesis.log_probs) == len(hypothesis.tokens) + (hypothesis.stopped == "end")


@pytest.mark.parametrize("method", ["greedy", "beam"])
def test_a_scorer_can_forbid_tokens(llm, prompts, method):
    def is_said(found):
        return any(token in (5, 7) for nbest in found for hypothesis in nbest for token in hypothesis.tokens)

    assert is_said(results(llm, prompts, METHODS[method]))
    forbidding = TokenScorer({5: -math.inf, 7: -math.inf})
    assert not is_said(results(llm, prompts, METHODS[method], [forbidding]))


class Follower:
    """A scorer that wants one text per utterance; its states must stay with their hypotheses through all reordering."""

    weight = 30.0

    def __init__(self, texts):
        self.texts = texts

    def start(self, utterance):
        return self.texts[utterance], 0

    def score(self, states, candidates):
        wanted = torch.tensor([(*text, EOS)[place] if place >= 0 else -1 for text, place in states])
        return (candidates == wanted[:, None]).float() - 1

    def advance(self, states, tokens):
        return [
            (text, place + 1 if 0 <= place < len(text) and token == text[place] else -1)
            for (text, place), token in zip(states, tokens, strict=True)
        ]


@pytest.mark.parametrize("method", ["greedy", "beam"])
@pytest.mark.parametrize("places", [2, 16])
def test_scorers_keep_their_states(llm, prompts, method, places):
    texts = [tuple(token for token in range(i % 3, 11, 1 + i % 4) if token != EOS) for i in range(len(prompts))]
    prompts = [Prompt(prompt.inputs_embeds, 30) for prompt in prompts]
    options = replace(METHODS[method], max_rows=places * METHODS[method].width)
    found = results(llm, prompts, options, [Follower(texts)])
    assert [nbest[0].tokens for nbest in found] == texts


def test_a_scorer_that_forbids_everything_is_an_error(llm, prompts):
    everything = TokenScorer(dict.fromkeys(range(12), -math.inf))
    with pytest.raises(UserError, match="prompt 0: the scorers forbid every candidate for token 1"):
        results(llm, prompts, scorers=[everything])
    with pytest.raises(UserError, match="no part in sampling"):
        results(llm, prompts, METHODS["sample"], [everything])


def test_logits_that_are_nan_are_an_error(llm, prompts):
    bad = Prompt(torch.full((2, 32), math.nan), 5)
    for options in METHODS.values():
        with pytest.raises(UserError, match="prompt 1: scores are NaN at token 1"):
            results(llm, [prompts[0], bad], options)


def test_prompts_go_on_from_a_state(llm, prompts):
    torch.manual_seed(4)
    before = torch.randn(1, 6, 32)
    with torch.no_grad():
        _, state = llm(inputs_embeds=before)
    kept = RWKV7State(*(x.clone() for x in vars(state).values()))
    for options in METHODS.values():
        # Every third prompt has no state: both kinds in one batch.
        whole = [
            prompt if i % 3 == 0 else Prompt(torch.cat([before[0], prompt.inputs_embeds]), prompt.max_tokens)
            for i, prompt in enumerate(prompts)
        ]
        split = [
            prompt if i % 3 == 0 else Prompt(prompt.inputs_embeds, prompt.max_tokens, state)
            for i, prompt in enumerate(prompts)
        ]
        assert_same(results(llm, split, options), results(llm, whole, options))
    for x, y in zip(vars(state).values(), vars(kept).values(), strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("options", METHODS.values(), ids=METHODS)
def test_no_prompts_no_results(llm, options):
    assert results(llm, [], options) == []


def repeating_model(token: int) -> RWKV7:
    """Says `token` for ever; second best is the end."""
    llm = sharp_model()
    with torch.no_grad():
        llm.head.weight.zero_()
        llm.ln_out.bias.fill_(1.0)
        llm.ln_out.weight.zero_()
        llm.head.weight[token] = 1.0
        llm.head.weight[EOS] = 0.9
    return llm


def test_loops_are_stopped_and_cut():
    llm = repeating_model(5)
    prompt = Prompt(torch.randn(2, 32), 200)
    ((greedy,),) = results(llm, [prompt])
    assert greedy.tokens == (5,) and greedy.stopped == "loop" and len(greedy.log_probs) == 1
    assert greedy.score == pytest.approx(greedy.log_probs[0])
    counting = Counting(llm)
    results(counting, [prompt])
    assert sum(counting.rows) == 10  # the 11th is one too many
    ((below,),) = results(llm, [prompt], SearchOptions(max_repeats=300))
    assert below.tokens == (5,) * 200 and below.stopped == "length"


def test_what_ends_by_itself_ranks_above_what_loops():
    llm = repeating_model(5)
    options = SearchOptions(method="beam", beam=4, nbest=4)
    (nbest,) = results(llm, [Prompt(torch.randn(2, 32), 200)], options)
    assert nbest[0].stopped == "end"
    assert any(h.stopped == "loop" for h in results(llm, [Prompt(torch.randn(2, 32), 200)], options, eos_id=NEVER)[0])


def test_loops_that_are_cut_to_a_text_that_has_ended_are_no_second_result():
    options = SearchOptions(method="beam", beam=6, nbest=6, max_repeats=2)
    (nbest,) = results(repeating_model(5), [Prompt(torch.randn(2, 32), 200)], options)
    assert [hypothesis.stopped for hypothesis in nbest if hypothesis.tokens == (5,)] == ["end"]
    assert len({hypothesis.tokens for hypothesis in nbest}) == len(nbest) > 1


def test_a_looping_utterance_leaves_the_others_alone(llm, prompts):
    class Stuck:
        """Makes the second utterance say one token for ever."""

        weight = 1.0

        def start(self, utterance):
            return utterance

        def score(self, states, candidates):
            stuck = torch.tensor([utterance == 1 for utterance in states])[:, None]
            return torch.where(stuck & (candidates != 6), -100.0, 0.0)

        def advance(self, states, tokens):
            return list(states)

    for method in ("greedy", "beam"):
        expected = results(llm, prompts, METHODS[method])
        long = [Prompt(prompt.inputs_embeds, 100) if i == 1 else prompt for i, prompt in enumerate(prompts)]
        found = results(llm, long, METHODS[method], [Stuck()])
        assert any(hypothesis.stopped == "loop" and hypothesis.tokens[-1] == 6 for hypothesis in found[1])
        if method == "greedy":  # a beam has more candidates with a scorer, but no more places
            assert found[1][0].tokens == (6,)
        assert_same(found[:1] + found[2:], expected[:1] + expected[2:])


def found_loop(tokens, max_repeats=10):
    """The tokens after which a loop is first found, and where it is cut to one occurrence."""
    for n in range(1, len(tokens) + 1):
        if length := loop_length(tokens[:n], max_repeats):
            return n, n - length
    return None


@pytest.mark.parametrize("said", [4, 8, 10])
@pytest.mark.parametrize("tokens_of_a_digit", [1, 2, 5, 8])
def test_a_digit_said_again_and_again_is_no_loop(said, tokens_of_a_digit):
    digits = tuple(range(100, 100 + tokens_of_a_digit))
    assert found_loop((7, 8, 9, *digits * said, 1, 2, *digits * said, 3)) is None


@pytest.mark.parametrize("n, allowed", [(1, 10), (2, 10), (8, 10), (9, 8), (16, 5), (20, 4), (27, 3), (60, 3)])
def test_an_ngram_may_be_repeated_less_often_the_longer_it_is(n, allowed):
    ngram, before = tuple(range(n)), (200, 201, 202)
    assert found_loop(before + ngram * allowed + ngram[:-1]) is None
    assert found_loop(before + ngram * 20) == (3 + n * (allowed + 1), 3 + n)


def test_loops_are_stopped_after_a_time_that_is_bounded_by_the_length_of_what_is_repeated():
    for n, max_repeats in itertools.product((1, 3, 10, 40), (1, 2, 5, 10)):
        stop, cut = found_loop(tuple(range(n)) * 30, max_repeats)
        assert cut == n and stop <= n * (max_repeats + 1)


def test_the_longest_text_follows_from_the_duration():
    options = SearchOptions(tokens_per_second=10.0)
    assert [options.max_tokens(seconds) for seconds in (0.0, 0.5, 1.0, 1.01, 30.0)] == [8, 8, 10, 11, 300]


def test_sampling_near_temperature_zero_and_from_the_best_token_alone_is_greedy(llm, prompts):
    greedy = results(llm, prompts)
    for options in (
        SearchOptions(method="sample", temperature=1e-4, seed=1),
        SearchOptions(method="sample", top_k=1, seed=2),
        SearchOptions(method="sample", top_p=1e-6, seed=3),
        SearchOptions(method="sample", top_p=1e-6, top_k=5, temperature=0.5, seed=4),
    ):
        assert_same(results(llm, prompts, options), greedy)  # log probabilities and scores too: at temperature 1


def expected_distribution(log_probs, options):
    probs = (log_probs.double() / options.temperature).softmax(-1)
    ids = probs.argsort(descending=True).tolist()
    if options.top_k:
        ids = ids[: options.top_k]
    total, reached, kept = sum(probs[i].item() for i in ids), 0.0, []
    for i in ids:
        if reached < options.top_p * total:
            kept.append(i)
        reached += probs[i].item()
    weights = {i: probs[i].item() for i in kept}
    return {i: weight / sum(weights.values()) for i, weight in weights.items()}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.5},
        {"temperature": 2.0},
        {"top_k": 4},
        {"top_p": 0.7},
        {"top_k": 6, "top_p": 0.8, "temperature": 1.5},
    ],
    ids=str,
)
def test_single_tokens_are_distributed_as_softmax(options):
    llm = sharp_model(sharpness=3.0)
    torch.manual_seed(6)
    prompt = Prompt(torch.randn(3, 32), 1)
    options = SearchOptions(method="sample", nbest=4000, max_rows=4000, seed=7, **options)
    log_probs = log_probs_after(llm, prompt, [])
    expected = expected_distribution(log_probs, options)
    assert len(expected) > 2
    counts = dict.fromkeys(range(12), 0)
    for hypothesis in results(llm, [prompt], options)[0]:
        token = hypothesis.tokens[0] if hypothesis.tokens else EOS
        counts[token] += 1
        assert hypothesis.log_probs[0] == pytest.approx(log_probs[token].item(), abs=1e-4)
    assert all(counts[token] == 0 for token in counts if token not in expected)
    chi_square = sum((counts[i] - 4000 * p) ** 2 / (4000 * p) for i, p in expected.items())
    assert chi_square < 33  # 0.999 of the distribution with 12 degrees of freedom


def test_samples_depend_on_seed_and_number_alone(llm, prompts):
    prompts = [Prompt(prompt.inputs_embeds, 30) for prompt in prompts]

    def tokens(prompts, **options):
        found = results(llm, prompts, SearchOptions(method="sample", **options))
        return [{hypothesis.tokens for hypothesis in nbest} for nbest in found]

    assert tokens(prompts, seed=1) == tokens(prompts, seed=1)
    assert tokens(prompts, seed=1) != tokens(prompts, seed=2)
    same = tokens([prompts[0]] * 6, seed=1)
    assert len(set(map(frozenset, same))) > 1
    for few, many in zip(tokens(prompts, nbest=2), tokens(prompts, nbest=5), strict=True):
        assert few <= many


@pytest.mark.parametrize(
    "options, message",
    [
        ({"method": "bean"}, "method: unknown 'bean', choose from greedy, beam, sample"),
        ({"beam": 0}, "beam must be at least 1, got 0"),
        ({"method": "sample", "temperature": 0.0}, "temperature must be above 0"),
        ({"method": "sample", "temperature": math.nan}, "temperature must be above 0"),
        ({"method": "sample", "top_p": 1.5}, "top_p must be above 0 and at most 1, got 1.5"),
        ({"method": "sample", "top_k": -1}, "top_k must be at least 0"),
        ({"length_penalty": -1.0}, "length_penalty must be at least 0"),
        ({"tokens_per_second": 0.0}, "tokens_per_second must be above 0"),
        ({"max_repeats": 0}, "max_repeats must be at least 1"),
        ({"max_rows": 0}, "max_rows must be at least 1"),
        ({"temperature": 0.5}, "temperature: is for method sample alone, the method is greedy"),
        ({"method": "beam", "top_k": 5}, "top_k: is for method sample alone"),
        ({"nbest": 2}, "nbest: 2 results need method beam with a beam of at least 2"),
        ({"method": "beam", "beam": 4, "nbest": 5}, "nbest: 5 results need"),
        ({"method": "beam", "beam": 8, "max_rows": 7}, "max_rows: 7 has no room for the 8 rows"),
        ({"method": "sample", "nbest": 8, "max_rows": 7}, "max_rows: 7 has no room for the 8 rows"),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(UserError, match=message):
        SearchOptions(**options)


def test_prompts_are_checked(llm):
    with pytest.raises(ValueError, match=r"shape \(0, 32\), expected \(L, D\)"):
        Prompt(torch.zeros(0, 32), 5)
    with pytest.raises(ValueError, match="max_tokens must be at least 1"):
        Prompt(torch.zeros(1, 32), 0)
    with pytest.raises(ValueError, match="must have one row, it has 2"):
        Prompt(torch.zeros(1, 32), 5, random_state(llm, 2))


@pytest.mark.parametrize("vocab", [70, 1000, 4096])
@pytest.mark.parametrize("count", [1, 5, 40])
def test_the_best_of_many_logits_are_those_of_all(vocab, count, monkeypatch):
    """In blocks of rows and groups of ids, the last of which is not full."""
    monkeypatch.setattr("speechllm.decode.search._GROUP", 32)
    monkeypatch.setattr("speechllm.decode.search._LOGITS_AT_ONCE", 3 * vocab)
    logits = torch.randn(7, vocab, generator=torch.Generator().manual_seed(vocab)) * 20
    logits[2, -3:], logits[3, :] = 100.0, 5.0
    logits[4, 7], logits[5, 9] = -math.inf, math.nan
    values, ids, normalizers = _best(logits, count)
    torch.testing.assert_close(values, logits.topk(count).values, equal_nan=True)
    torch.testing.assert_close(logits.gather(1, ids), values, equal_nan=True)
    assert all(len(set(row)) == count for row in ids.tolist())
    torch.testing.assert_close(normalizers, logits.logsumexp(-1, keepdim=True), equal_nan=True)
