"""Searches over the language-model seam (`speechllm.llm.interface`): greedy, beam and sampling.

All three are one loop over a batch of running hypotheses, one row each; they differ in which tokens are candidates.
Prompts are read in parallel and each further token costs one row of a step. Rows leave the batch as they finish and the
next utterances take their places. What is found for an utterance does not depend on what else is in the batch.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Container, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from math import inf, isnan
from operator import itemgetter
from typing import Any, Protocol, cast

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from speechllm.decode.options import SearchOptions
from speechllm.decode.result import Hypothesis, Stopped
from speechllm.errors import UserError
from speechllm.llm.interface import LanguageModel, LanguageModelState

# With scorers so many of the language model's best tokens are candidates at least. Each one left out has a probability
# below 1/32: only a scorer that outweighs that could want it.
SCORED_CANDIDATES = 32

# Prompts are read when this share of the places is free: reading one takes as long as several steps, reading several
# together hardly longer.
_REFILL = 0.25

# Of a large vocabulary the highest logits are looked for among the maxima of groups of so many.
_GROUP = 128
_LOGITS_AT_ONCE = 2**18

# A spoken digit has at most so many tokens, also in scripts that are spelled in bytes.
_WORD_TOKENS = 8
_LONG_REPEATS = 3

_RANK: dict[Stopped, int] = {"end": 0, "length": 1, "loop": 2}


@dataclass(frozen=True, eq=False)
class Prompt:
    """What a text is to follow.

    Attributes:
      inputs_embeds: (L, D), at least one position.
      max_tokens: the most tokens that may follow, the end among them.
      state: of one row, that this goes on from, such as the text before the audio, the same for many prompts. It stays
        as it is.
      key: what the random numbers of `sample` follow from, together with the seed; None for the prompt's number. With a
        key of its own, such as an id, an utterance is given the same text in whatever batch and place it comes.

    Raises:
      ValueError: there is no position, no token is allowed, or the state has other than one row.
    """

    inputs_embeds: Tensor
    max_tokens: int
    state: LanguageModelState | None = None
    key: str | None = None

    def __post_init__(self) -> None:
        if self.inputs_embeds.dim() != 2 or len(self.inputs_embeds) == 0:
            raise ValueError(
                f"inputs_embeds has shape {tuple(self.inputs_embeds.shape)}, expected (L, D) with at least one position"
            )
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1, got {self.max_tokens}")
        if self.state is not None and len(self.state) != 1:
            raise ValueError(f"the state of a prompt must have one row, it has {len(self.state)}")


class Scorer(Protocol):
    """Adds to the language model's log probabilities in greedy and beam search. Its states are its own affair."""

    weight: float

    def start(self, utterance: int) -> Any:
        """The state of the empty hypothesis of the prompt with this number."""
        ...

    def score(self, states: Sequence[Any], candidates: Tensor) -> Tensor:
        """Log scores (R, C) of appending each of `candidates` (R, C), the end of text perhaps among them, to the
        hypothesis of its row. The search multiplies with `weight`; -inf forbids.
        """
        ...

    def advance(self, states: Sequence[Any], tokens: Sequence[int]) -> list[Any]:
        """The states after one more token each; `states` may hold one several times. Never called with the end."""
        ...


def loop_length(tokens: Sequence[int], max_repeats: int) -> int:
    """How many tokens at the end repeat what stands before them, if that is a loop; else 0.

    It is one if an n-gram stands there more than min(`max_repeats`, max(3, 8 * `max_repeats` // n)) times in a row.
    With 10 that is: up to 8 tokens 10 times, 16 tokens 5 times, 27 and more 3 times. So a word may be said ten times,
    as in "zero zero zero zero", whatever the tokenizer makes of it, but a sentence may not. If this is asked after each
    token, tokens[:-loop_length] holds the n-gram once.
    """
    for n in range(1, len(tokens) // (min(max_repeats, _LONG_REPEATS) + 1) + 1):
        if tokens[-1 - n] == tokens[-1]:
            length = n * min(max_repeats, max(_LONG_REPEATS, _WORD_TOKENS * max_repeats // n))
            if length + n <= len(tokens) and tokens[-length:] == tokens[-length - n : -n]:
                return length
    return 0


@torch.no_grad()
def search(
    llm: LanguageModel,
    prompts: Iterable[Prompt],
    options: SearchOptions,
    eos_id: int,
    scorers: Sequence[Scorer] = (),
) -> Iterator[tuple[int, tuple[Hypothesis, ...]]]:
    """The texts that follow the prompts.

    Beam search: of all continuations of an utterance's running hypotheses, best first, those up to the `beam`-th that
    does not end go on, and those on the way that end have ended. An utterance is finished as soon as `beam` hypotheses
    have ended and the best one running, its score divided by its own length**length_penalty, is not above the `beam`-th
    best of them; or as nothing runs any more. A hypothesis stops as well when its tokens, the end not among them, are
    `max_tokens`, or at a loop (see `loop_length`), of which one occurrence remains; a loop takes its place in the beam
    with it, so that an utterance full of loops finishes. Results are ranked by how they have stopped (end, then length,
    then loop), then by score. Greedy search is a beam of 1.

    Args:
      prompts: drawn as places in the batch become free.
      scorers: their weighted scores are added to the log probabilities of the language model's best tokens. Not for
        `sample`.

    Yields:
      (number of the prompt, its n-best, best first, at least one), as they finish. Per-token `log_probs` are the
      language model's own, at temperature 1.

    Raises:
      UserError: scorers with `sample`; scorers that forbid all that an utterance could go on with; logits that are NaN.
    """
    running = RunningSearch(llm, options, eos_id, scorers)
    numbered = enumerate(prompts)
    while True:
        if running.free >= _REFILL * running.places:
            running.join(list(islice(numbered, running.free)))
        if not running.utterances:
            return
        yield from running.step()


class RunningSearch:
    """A search that prompts join and leave between any two steps; `search` has its arguments and says how it goes.

    Attributes:
      places: the most utterances that run at a time; free: how many more may join now.
      utterances: those that run.
    """

    def __init__(self, llm: LanguageModel, options: SearchOptions, eos_id: int, scorers: Sequence[Scorer] = ()) -> None:
        if options.method == "sample" and scorers:
            raise UserError("scorers have no part in sampling: search with method greedy or beam")
        self.llm, self.options, self.eos_id, self.scorers = llm, options, eos_id, scorers
        self.places = options.max_rows // options.width
        self.utterances: list[_Utterance] = []
        self._logits: Tensor | None = None  # of the running hypotheses of all utterances, one after the other
        self._state: LanguageModelState | None = None
        self._scorer_states: list[list[Any]] = [[] for _ in scorers]

    @property
    def free(self) -> int:
        return self.places - len(self.utterances)

    @torch.no_grad()
    def join(self, entering: Sequence[tuple[int, Prompt]]) -> None:
        """Read prompts, each with a number of its own."""
        if not entering:
            return
        entered = [
            _Utterance(number, prompt.max_tokens, self.options, self.eos_id, prompt.key) for number, prompt in entering
        ]
        logits, state = read_prompts(self.llm, [prompt for _, prompt in entering])
        rows = len(entered[0].running)
        if rows > 1:
            logits, state = logits.repeat_interleave(rows, dim=0), state.repeat(rows)
        if self.utterances and self._logits is not None and self._state is not None:
            logits, state = torch.cat([self._logits, logits]), type(state).cat([self._state, state])
        self._logits, self._state = logits, state
        self.utterances += entered
        for states, scorer in zip(self._scorer_states, self.scorers, strict=True):
            states += [scorer.start(utterance.number) for utterance in entered]

    @torch.no_grad()
    def step(self) -> list[tuple[int, tuple[Hypothesis, ...]]]:
        """One token more of each running hypothesis; the numbers and n-best of the utterances that are finished."""
        if self._logits is None or self._state is None:
            return []
        candidates = _candidates(self._logits, self.utterances, self.options, self.scorers, self._scorer_states)
        parents: list[int] = []  # of each hypothesis that goes on
        first = 0
        for utterance in self.utterances:
            rows = len(utterance.running)
            parents += [first + row for row in utterance.extend(candidates[first : first + rows])]
            first += rows
        finished = [(utterance.number, utterance.result()) for utterance in self.utterances if not utterance.running]
        self.utterances = [utterance for utterance in self.utterances if utterance.running]
        if not self.utterances:
            self._forget()
            return finished

        state = self._state if parents == list(range(first)) else self._selected(parents)
        tokens = [hypothesis.tokens[-1] for utterance in self.utterances for hypothesis in utterance.running]
        self._logits, self._state = self.llm.step(
            torch.tensor(tokens, device=self._logits.device), state, overwrite=True
        )
        self._scorer_states = [
            scorer.advance([states[parent] for parent in parents], tokens)
            for scorer, states in zip(self.scorers, self._scorer_states, strict=True)
        ]
        return finished

    def leave(self, numbers: Container[int]) -> None:
        """The utterances with these numbers run no longer; their places are free."""
        rows: list[int] = []
        first = 0
        for utterance in self.utterances:
            if utterance.number not in numbers:
                rows += range(first, first + len(utterance.running))
            first += len(utterance.running)
        self.utterances = [utterance for utterance in self.utterances if utterance.number not in numbers]
        if not self.utterances:
            self._forget()
        elif len(rows) < first and self._logits is not None:
            self._logits, self._state = self._logits[rows], self._selected(rows)
            self._scorer_states = [[states[row] for row in rows] for states in self._scorer_states]

    def _selected(self, rows: Sequence[int]) -> LanguageModelState:
        return cast(LanguageModelState, self._state).select(torch.tensor(rows), overwrite=True)

    def _forget(self) -> None:
        self._logits = self._state = None
        self._scorer_states = [[] for _ in self.scorers]


def read_prompts(llm: LanguageModel, prompts: Sequence[Prompt]) -> tuple[Tensor, LanguageModelState]:
    """Logits (N, V) behind the prompts, and the states."""
    from_start = [i for i, prompt in enumerate(prompts) if prompt.state is None]
    from_state = [i for i, prompt in enumerate(prompts) if prompt.state is not None]
    logits: list[Tensor] = []
    states: list[LanguageModelState] = []
    for group in (from_start, from_state):
        if not group:
            continue
        embeds = [prompts[i].inputs_embeds for i in group]
        before = [state for i in group if (state := prompts[i].state) is not None]
        lens = torch.tensor([len(x) for x in embeds], device=embeds[0].device)
        inputs_embeds = pad_sequence(embeds, batch_first=True)
        last = torch.arange(inputs_embeds.shape[1], device=lens.device) == lens[:, None] - 1
        group_logits, group_state = llm(
            inputs_embeds=inputs_embeds,
            lens=lens,
            state=type(before[0]).cat(before) if before else None,
            logits_mask=last,
        )
        logits.append(group_logits)
        states.append(group_state)
    if len(states) == 1:
        return logits[0], states[0]
    order = torch.tensor(from_start + from_state, device=logits[0].device).argsort()
    return torch.cat(logits)[order], type(states[0]).cat(states).select(order)


# Token, the language model's log probability of it, and what it adds to the hypothesis's score.
_Candidate = tuple[int, float, float]


def _candidates(
    logits: Tensor,
    utterances: Sequence[_Utterance],
    options: SearchOptions,
    scorers: Sequence[Scorer],
    scorer_states: Sequence[Sequence[Any]],
) -> list[list[_Candidate]]:
    """What each row of `logits` (R, V) may go on with."""
    logits = logits.float()
    if options.method == "sample":
        drawn = [
            cast(random.Random, hypothesis.random).random()
            for utterance in utterances
            for hypothesis in utterance.running
        ]
        ids = _sample(logits, torch.tensor(drawn, dtype=torch.float64, device=logits.device), options)
        values, normalizers = logits.gather(1, ids), logits.logsumexp(-1, keepdim=True)
    else:
        # Without scorers more than these cannot be chosen: one of them may be the end, and with a beam of 1 this is it.
        count = options.width + 1 if options.width > 1 else 1
        if scorers:
            count = max(2 * options.width, SCORED_CANDIDATES)
        values, ids, normalizers = _best(logits, min(count, logits.shape[1]))
    log_probs = values - normalizers
    scores = log_probs
    for scorer, states in zip(scorers, scorer_states, strict=True):
        scores = scores + scorer.weight * scorer.score(states, ids)
    # One transfer from the device; float64 holds all ids.
    rows = torch.stack([ids.double(), log_probs.double(), scores.double()], dim=-1).tolist()
    return [[(int(token), log_prob, score) for token, log_prob, score in row] for row in rows]


def _best(logits: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """The `count` highest of each row of `logits` (R, V), the highest first: (R, count) and their ids; and the
    logarithm (R, 1) of the sum of the exponentials of all.

    On the CPU a few rows at a time, which stay in its cache while they are read more than once.
    """
    rows = max(1, _LOGITS_AT_ONCE // logits.shape[1]) if logits.device.type == "cpu" else len(logits)
    values, ids, normalizers = zip(*(_best_of(part, count) for part in logits.split(rows)), strict=True)
    return torch.cat(values), torch.cat(ids), torch.cat(normalizers)


def _best_of(logits: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    vocab = logits.shape[1]
    groups = vocab // _GROUP
    if groups <= 2 * count:
        return *logits.topk(count), logits.logsumexp(-1, keepdim=True)
    # The highest are in the groups whose maxima are the highest: one pass over all, and few to sort.
    maxima = logits[:, : groups * _GROUP].unflatten(1, (groups, _GROUP)).amax(-1)
    most = maxima.amax(-1, keepdim=True)
    ids = (maxima.topk(count).indices[..., None] * _GROUP + torch.arange(_GROUP, device=logits.device)).flatten(1)
    if vocab % _GROUP:
        rest = torch.arange(groups * _GROUP, vocab, device=logits.device)
        ids = torch.cat([ids, rest.expand(len(ids), -1)], 1)
        most = torch.maximum(most, logits[:, groups * _GROUP :].amax(-1, keepdim=True))
    values, places = logits.gather(1, ids).topk(count)
    return values, ids.gather(1, places), (logits - most).exp_().sum(-1, keepdim=True).log_() + most


def _sample(logits: Tensor, drawn: Tensor, options: SearchOptions) -> Tensor:
    """Where `drawn` (R,), from [0, 1), falls in the distributions of `logits` (R, V): ids (R, 1)."""
    logits = (logits / options.temperature).nan_to_num()  # NaN is found by its log probability, not by a wrong index
    ids = None
    if options.top_k:
        logits, ids = logits.topk(min(options.top_k, logits.shape[1]))
    elif options.top_p < 1:
        logits, ids = logits.sort(descending=True)
    probs = logits.double().softmax(-1)
    cumulative = probs.cumsum(-1)
    total = cumulative[:, -1:]
    if options.top_p < 1:
        kept = (cumulative - probs < options.top_p * total).sum(-1, keepdim=True)
        total = cumulative.gather(1, kept - 1)
    places = torch.searchsorted(cumulative, drawn[:, None] * total, right=True)
    return places if ids is None else ids.gather(1, places)


@dataclass(frozen=True, slots=True)
class _Running:
    """A hypothesis that goes on."""

    tokens: tuple[int, ...] = ()
    log_probs: tuple[float, ...] = ()
    sums: tuple[float, ...] = (0.0,)  # of all scores, up to each token
    random: random.Random | None = None  # where `sample` draws from


def _in_place(extended: list[tuple[int, _Running]], rows: int) -> list[tuple[int, _Running]]:
    """Each hypothesis, as far as possible, in the row it stems from: the state of the others must be copied."""
    if len(extended) != rows:  # all that follow move anyway
        return sorted(extended, key=itemgetter(0))
    placed: dict[int, tuple[int, _Running]] = {}
    others = [entry for entry in extended if placed.setdefault(entry[0], entry) is not entry]
    return [placed[row] if row in placed else others.pop() for row in range(rows)]


@dataclass(eq=False)
class _Utterance:
    """An utterance in the batch."""

    number: int
    max_tokens: int
    options: SearchOptions
    eos_id: int
    key: str | None = None
    running: list[_Running] = field(init=False)
    stopped: list[Hypothesis] = field(default_factory=list)
    places: int = field(init=False)  # for running hypotheses

    def __post_init__(self) -> None:
        self.places = self.options.width
        self.running = [_Running()]
        if self.options.method == "sample":
            key = self.number if self.key is None else self.key
            seeds = [f"{self.options.seed} {key} {i}" for i in range(self.options.nbest)]
            self.running = [_Running(random=random.Random(seed.encode(errors="backslashreplace"))) for seed in seeds]

    def extend(self, candidates: Sequence[Sequence[_Candidate]]) -> list[int]:
        """Go on with the best candidates of the running hypotheses; which row each one then running stems from."""
        pool = [
            (parent.sums[-1] + score, row, token, log_prob)
            for row, (parent, ways) in enumerate(zip(self.running, candidates, strict=True))
            for token, log_prob, score in ways
            if score > -inf or isnan(score)
        ]
        if any(isnan(total) for total, *_ in pool):
            raise UserError(
                f"prompt {self.number}: scores are NaN at token {len(self.running[0].tokens) + 1}: the language model "
                "(or a scorer) has overflowed; use float32 or bfloat16, and check its weights and the prompt"
            )
        if not pool and not self.stopped:
            raise UserError(
                f"prompt {self.number}: the scorers forbid every candidate for token {len(self.running[0].tokens) + 1}"
            )
        extended: list[tuple[int, _Running]] = []
        places = self.places
        # Each row has one end at most, so that these hold as many others as there are places.
        for total, row, token, log_prob in heapq.nlargest(places + len(self.running), pool, key=itemgetter(0)):
            parent = self.running[row]
            log_probs, sums = (*parent.log_probs, log_prob), (*parent.sums, total)
            if token == self.eos_id:
                self._stop(parent.tokens, log_probs, sums, "end")
                continue
            tokens = (*parent.tokens, token)
            if repeated := loop_length(tokens, self.options.max_repeats):
                self._stop(tokens[:-repeated], log_probs[:-repeated], sums[:-repeated], "loop")
                self.places -= 1
            elif len(tokens) == self.max_tokens:
                self._stop(tokens, log_probs, sums, "length")
            else:
                extended.append((row, _Running(tokens, log_probs, sums, parent.random)))
            places -= 1
            if places == 0:
                break
        if extended and self._is_beaten(extended[0][1]):
            extended = []
        extended = _in_place(extended, len(self.running))
        self.running = [hypothesis for _, hypothesis in extended]
        return [row for row, _ in extended]

    def result(self) -> tuple[Hypothesis, ...]:
        """The n-best, best first."""
        ranked = sorted(self.stopped, key=lambda hypothesis: (_RANK[hypothesis.stopped], -hypothesis.score))
        if self.options.method != "sample":  # loops may have been cut to the same tokens
            distinct: dict[tuple[int, ...], Hypothesis] = {}
            for hypothesis in ranked:
                distinct.setdefault(hypothesis.tokens, hypothesis)
            ranked = list(distinct.values())
        return tuple(ranked[: self.options.nbest])

    def _is_beaten(self, best: _Running) -> bool:
        ended = [hypothesis.score for hypothesis in self.stopped if hypothesis.stopped == "end"]
        if len(ended) < self.places:
            return False
        return self._normalized(best.sums[-1], len(best.tokens)) <= heapq.nlargest(self.places, ended)[-1]

    def _stop(
        self, tokens: tuple[int, ...], log_probs: tuple[float, ...], sums: tuple[float, ...], stopped: Stopped
    ) -> None:
        self.stopped.append(Hypothesis(tokens, log_probs, self._normalized(sums[-1], len(log_probs)), stopped))

    def _normalized(self, total: float, length: int) -> float:
        return total / length**self.options.length_penalty
