"""What a language model writes in streams, after each chunk of audio: greedy and beam search over copies of its state.

The row that it reads is that of `speechllm.prompt.interleave`. After a chunk it writes until `next`, which says that
there is no more to write yet; `next` itself is read together with the audio of the next chunk. A hypothesis of a beam
has the state of its own text, and may write a word a chunk later than another one. Words that all have are written for
good, so that none is ever taken back.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import accumulate
from operator import itemgetter
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from speechllm.decode.ctc import forced_align
from speechllm.decode.hotwords import Hotwords, HotwordState
from speechllm.decode.interface import StreamableSpeechLLM, StreamChunk
from speechllm.decode.options import StreamingOptions
from speechllm.decode.result import StreamedWord, Word
from speechllm.decode.search import SCORED_CANDIDATES, Prompt, read_prompts
from speechllm.decode.streaming_words import WordPieces, text_pieces, word_pieces
from speechllm.decode.timestamps import words_from_alignment
from speechllm.errors import UserError
from speechllm.llm.interface import LanguageModelState
from speechllm.llm.transformers_cache import TransformersState
from speechllm.prompt.interleave import StreamingConfig, interleave
from speechllm.prompt.request import Request
from speechllm.rwkv7 import RWKV7State

# However short a chunk, a word that the tokenizer spells in bytes has room.
_FEWEST_TOKENS = 8
# Times of words are looked for in this much audio before the chunk that they are written in.
_ALIGNED_SECONDS = 2.0

_STATES = {kind.__name__: kind for kind in (RWKV7State, TransformersState)}


@dataclass(frozen=True)
class _Piece:
    """A token that is not written for good: what is left of its text, and the number of the chunk that it is of."""

    text: str
    log_prob: float
    chunk: int


@dataclass(frozen=True)
class _Hypothesis:
    """A text of a stream, as far as it is not written for good.

    Attributes:
      score: of all its tokens, what was written for good aside; larger is better.
      hotwords: where it is in the phrases.
      remembered: the tokens of each of the chunks that are remembered, written for good or not.
    """

    score: float = 0.0
    pieces: tuple[_Piece, ...] = ()
    hotwords: HotwordState | None = None
    remembered: tuple[tuple[int, ...], ...] = ()

    @property
    def text(self) -> str:
        return "".join(piece.text for piece in self.pieces)


@dataclass
class StreamText:
    """Of one stream: what the language model has read, and what is not written for good.

    Attributes:
      language, context: of its prompt.
      llm: a row for each hypothesis; None before anything is read.
      hypotheses: best first.
      has_next: `next` is still to be read.
      chunks: how many have been heard; frames: of the encoder's output.
      heard: (T, D) the last of these frames, in which words are looked for that come; (T, 0) without a CTC head.
      remembered: (C, P, D_llm) the positions of the last chunks, from which the language model may begin again.
    """

    language: str | None
    context: Request | None
    llm: LanguageModelState | None
    hypotheses: list[_Hypothesis]
    heard: Tensor
    remembered: Tensor
    has_next: bool = False
    chunks: int = 0
    frames: int = 0

    @property
    def unstable(self) -> str:
        """The text of the best hypothesis that is not written for good."""
        return self.hypotheses[0].text

    def tensors(self) -> dict[str, Tensor]:
        llm = {} if self.llm is None else {f"llm.{name}": x for name, x in self.llm.tensors().items()}
        return {"heard": self.heard, "remembered": self.remembered} | llm

    def counts(self) -> dict[str, Any]:
        return {
            "language": self.language,
            "context": None if self.context is None else asdict(self.context),
            "llm": None if self.llm is None else type(self.llm).__name__,
            "hypotheses": [asdict(hypothesis) for hypothesis in self.hypotheses],
            "has_next": self.has_next,
            "chunks": self.chunks,
            "frames": self.frames,
        }


class _Running(NamedTuple):
    """A hypothesis that goes on writing in this chunk; `stream` is its number."""

    stream: int
    score: float
    before: _Hypothesis
    hotwords: HotwordState | None
    tokens: tuple[int, ...] = ()
    log_probs: tuple[float, ...] = ()


class _Ended(NamedTuple):
    """A hypothesis that has written `next`, and its state before that."""

    hypothesis: _Running
    state: LanguageModelState


class TextDecoder:
    """Writes the texts of streams, chunk by chunk; built once, for any number of them.

    Args:
      model: in evaluation mode.
      encoder_dim: the width of its encoder's output.
      chunk: one of the model's.

    Raises:
      UserError: the hotwords cannot be read.
    """

    def __init__(
        self, model: StreamableSpeechLLM, encoder_dim: int, chunk: StreamChunk, options: StreamingOptions
    ) -> None:
        self.model, self.chunk, self.options = model, chunk, options
        self._heard_dim = encoder_dim if model.ctc_head is not None else 0
        self.hotwords = None
        if options.hotwords is not None:
            self.hotwords = Hotwords.from_file(options.hotwords, model.tokenizer, options.hotword_weight)
        self._eos = model.tokenizer.eos_id
        self._max_tokens = max(_FEWEST_TOKENS, math.ceil(chunk.seconds * options.tokens_per_second))
        seconds = chunk.seconds + _ALIGNED_SECONDS + (options.stable_seconds if options.beam > 1 else 0.0)
        self._most_heard = math.ceil(seconds / model.frame_seconds)
        memory_seconds = options.memory_seconds or cast(StreamingConfig, model.config.streaming).memory_seconds
        self._memory = None if math.isinf(memory_seconds) else math.ceil(memory_seconds / chunk.seconds)
        # Of the prompt of each language and context: embeddings after the audio, and the state before it.
        self._prompts: dict[Request, tuple[Tensor, LanguageModelState | None]] = {}

    def start(self, language: str | None, context: Request | None) -> StreamText:
        """A stream that has not begun.

        Raises:
          UserError: the prompt has a slot for what is not given.
        """
        _, llm = self._prompt(language, context)
        device = self.model.device
        heard = torch.empty(0, self._heard_dim, device=device)
        remembered = torch.empty(0, self.chunk.positions, self.model.llm.hidden_size, device=device)
        return StreamText(language, context, llm, [self._empty()], heard, remembered)

    def load(self, tensors: Mapping[str, Tensor], counts: dict[str, Any]) -> StreamText:
        """From what `StreamText.tensors` and `counts` gave."""
        parts = {name.removeprefix("llm."): x for name, x in tensors.items() if name.startswith("llm.")}
        hypotheses = [
            _Hypothesis(
                found["score"],
                tuple(_Piece(**piece) for piece in found["pieces"]),
                found["hotwords"] and HotwordState(*found["hotwords"]),
                tuple(map(tuple, found["remembered"])),
            )
            for found in counts["hypotheses"]
        ]
        context = counts["context"]
        if context is not None:
            hotwords = context["hotwords"]
            context = Request(**context | {"hotwords": None if hotwords is None else tuple(hotwords)})
        llm = None if counts["llm"] is None else _STATES[counts["llm"]].from_tensors(parts)
        kept = {name: tensors[name] for name in ("heard", "remembered")}
        return StreamText(**counts | {"context": context, "hypotheses": hypotheses, "llm": llm} | kept)

    def restart(self, text: StreamText) -> list[StreamedWord]:
        """Begin with the prompt again; the words that were not written for good."""
        words = self._write(text, is_end=True)
        _, text.llm = self._prompt(text.language, text.context)
        text.hypotheses, text.has_next, text.remembered = [self._empty()], False, text.remembered[:0]
        return words

    def decode(
        self, texts: Sequence[StreamText], encoder_out: Tensor, lens: Tensor, is_end: bool
    ) -> list[list[StreamedWord]]:
        """The new words of N streams, `written` left at 0.

        Args:
          encoder_out: (N, T, D), lens (N,): a whole chunk of each; at the end what is left of each, perhaps nothing.
        """
        audio = self._projected(encoder_out, lens)
        for text, frames, length in zip(texts, encoder_out, lens.tolist(), strict=True):
            text.frames += length
            text.chunks += 1
            text.heard = torch.cat([text.heard, frames[:length, : self._heard_dim]])[-self._most_heard :]
        at_once = max(1, self.options.max_rows // self.options.beam)
        words: list[list[StreamedWord]] = []
        for first in range(0, len(texts), at_once):
            some = texts[first : first + at_once]
            self._search(some, audio[first : first + at_once], is_end)
            words += [self._write(text, is_end) for text in some]
            if self._memory is not None and not is_end:
                for text, positions in zip(some, audio[first : first + at_once], strict=True):
                    text.remembered = torch.cat([text.remembered, positions[None]])
                self._forget([text for text in some if len(text.remembered) >= 2 * self._memory], self._memory)
        return words

    def _empty(self) -> _Hypothesis:
        return _Hypothesis(hotwords=None if self.hotwords is None else self.hotwords.start(0))

    def _prompt(self, language: str | None, context: Request | None) -> tuple[Tensor, LanguageModelState | None]:
        """Embeddings (L, D) of what follows the audio, and the state after what is before it."""
        request = replace(context or Request(), language=language)
        key = replace(request, id=None, key=None)  # what the prompt does not tell
        if key not in self._prompts:
            model = self.model
            spliced = interleave(
                model.config.prompt, model.tokenizer, [0], [request], [[[]]], self.chunk.seconds, 1
            ).to(model.device)
            start = int(spliced.audio_starts[0])
            nothing = torch.zeros(1, 0, model.llm.hidden_size, device=model.device)
            embeds = model.embed(spliced, nothing, torch.zeros(1, dtype=torch.long, device=model.device))[0]
            state = None
            if start:
                is_last = torch.arange(start, device=model.device)[None] == start - 1
                _, state = model.llm(inputs_embeds=embeds[None, :start], logits_mask=is_last)
            self._prompts[key] = embeds[start:], state
        return self._prompts[key]

    def _projected(self, encoder_out: Tensor, lens: Tensor) -> list[Tensor]:
        """Positions of the language model (T'', D_llm) of each row."""
        if not encoder_out.shape[1]:
            return [encoder_out.new_empty(0, self.model.llm.hidden_size)] * len(lens)
        with self.model.encoding():
            audio, audio_lens = self.model.projector(encoder_out, lens)
        return [row[:length] for row, length in zip(audio, audio_lens.tolist(), strict=True)]

    def _forget(self, texts: Sequence[StreamText], chunks: int) -> None:
        """Begin again with the prompt and the last `chunks`, read with what was written after each."""
        prompts, llm = [], self.model.llm
        for text in texts:
            text.remembered = text.remembered[-chunks:]
            text.hypotheses = [replace(h, remembered=h.remembered[-chunks:]) for h in text.hypotheses]
            _, state = self._prompt(text.language, text.context)
            for hypothesis in text.hypotheses:
                parts = []
                for audio, tokens in zip(text.remembered, hypothesis.remembered, strict=True):
                    written = llm.embed(torch.tensor([*tokens, self._eos], device=audio.device))
                    parts += [audio.to(written.dtype), written]
                # the last `next` is read together with the audio that follows
                prompts.append(Prompt(torch.cat(parts)[:-1], self._max_tokens, state))
        if prompts:
            _, states = read_prompts(llm, prompts)
            rows = torch.arange(len(prompts)).split([len(text.hypotheses) for text in texts])
            for text, own in zip(texts, rows, strict=True):
                text.llm = states.select(own)

    # ------------------------------------------------------------------------------------------------------------
    # Search in one chunk

    def _search(self, texts: Sequence[StreamText], audio: Sequence[Tensor], is_end: bool) -> None:
        """Extend the hypotheses of streams by what follows their audio; their states are then before `next`."""
        next_embed = self.model.llm.embed(torch.tensor([self._eos], device=self.model.device))
        prompts, running = [], []
        for number, (text, positions) in enumerate(zip(texts, audio, strict=True)):
            parts = [next_embed] * text.has_next + [positions.to(next_embed.dtype)]
            if is_end:
                parts.append(self._prompt(text.language, text.context)[0].to(next_embed.dtype))
            read = torch.cat(parts)
            for row, hypothesis in enumerate(text.hypotheses):
                state = None if text.llm is None else text.llm.select(torch.tensor([row]))
                prompts.append(Prompt(read, self._max_tokens, state))
                running.append(_Running(number, hypothesis.score, hypothesis, hypothesis.hotwords))
        logits, state = read_prompts(self.model.llm, prompts)
        ended: list[list[_Ended]] = [[] for _ in texts]
        for count in range(1, self._max_tokens + 1):
            candidates = self._candidates(logits, running, is_end, only_end=count == self._max_tokens)
            following: list[tuple[int, _Running]] = []  # with the row that each stems from
            for number in sorted({hypothesis.stream for hypothesis in running}):
                rows = [row for row, hypothesis in enumerate(running) if hypothesis.stream == number]
                extended, stopped = _extended(
                    running, rows, candidates, self._eos, self.options.beam, [e.hypothesis.score for e in ended[number]]
                )
                ended[number] += [_Ended(hyp, state.select(torch.tensor([row]))) for row, hyp in stopped]
                following += extended
            if not following:
                break
            parents = [row for row, _ in following]
            if parents != list(range(len(running))):
                state = state.select(torch.tensor(parents), overwrite=True)
            running = self._with_hotwords([hypothesis for _, hypothesis in following])
            tokens = torch.tensor([hypothesis.tokens[-1] for hypothesis in running], device=logits.device)
            logits, state = self.model.llm.step(tokens, state, overwrite=True)
        for text, found in zip(texts, ended, strict=True):
            self._take(text, found)

    def _candidates(
        self, logits: Tensor, running: Sequence[_Running], is_end: bool, only_end: bool
    ) -> list[list[tuple[int, float, float]]]:
        """Of each row the tokens that it may go on with, their log probabilities and scores."""
        log_probs = logits.float().log_softmax(-1)
        if only_end:
            ids = torch.full((len(running), 1), self._eos, device=logits.device)
        else:
            count = self.options.beam + 1 if self.options.beam > 1 else 1
            count = max(2 * self.options.beam, SCORED_CANDIDATES) if self.hotwords is not None else count
            ids = log_probs.topk(min(count, log_probs.shape[1])).indices
        log_probs = log_probs.gather(1, ids)
        scores = log_probs
        if self.hotwords is not None:
            boosts = self.hotwords.weight * self.hotwords.score(_states(running), ids)
            if not is_end:  # a phrase that has begun may go on in the next chunk
                boosts = boosts.masked_fill(ids == self._eos, 0.0)
            scores = scores + boosts
        rows = torch.stack([ids.double(), log_probs.double(), scores.double()], dim=-1).tolist()
        return [[(int(token), log_prob, score) for token, log_prob, score in row] for row in rows]

    def _with_hotwords(self, running: list[_Running]) -> list[_Running]:
        """The hypotheses with their last tokens read by the phrases."""
        if self.hotwords is None:
            return running
        states = self.hotwords.advance(_states(running), [hypothesis.tokens[-1] for hypothesis in running])
        return [hypothesis._replace(hotwords=state) for hypothesis, state in zip(running, states, strict=True)]

    def _take(self, text: StreamText, ended: list[_Ended]) -> None:
        """Go on with the best texts that have ended, each once, whichever chunks its words were written in."""
        taken: dict[str, tuple[_Hypothesis, LanguageModelState]] = {}
        for found, state in sorted(ended, key=lambda e: -e.hypothesis.score):
            texts = text_pieces(found.tokens, self.model.tokenizer)
            pieces = tuple(map(_Piece, texts, found.log_probs, [text.chunks] * len(texts)))
            remembered = () if self._memory is None else (*found.before.remembered, found.tokens)
            hypothesis = _Hypothesis(found.score, found.before.pieces + pieces, found.hotwords, remembered)
            taken.setdefault(hypothesis.text, (hypothesis, state))
        best = list(taken.values())[: self.options.beam]
        top = best[0][0].score
        text.hypotheses = [replace(hypothesis, score=hypothesis.score - top) for hypothesis, _ in best]
        text.llm = type(best[0][1]).cat([state for _, state in best])
        text.has_next = True

    # ------------------------------------------------------------------------------------------------------------
    # What is written for good

    def _write(self, text: StreamText, is_end: bool) -> list[StreamedWord]:
        """The words that are certain now; they are taken off the hypotheses."""
        words = [word_pieces([piece.text for piece in hypothesis.pieces]) for hypothesis in text.hypotheses]
        certain = len(words[0]) if is_end else self._certain(text, words)
        if not certain:
            return []
        said = [(word.text, word.joined) for word in words[0][:certain]]
        agree = [i for i, found in enumerate(words) if [(w.text, w.joined) for w in found[:certain]] == said]
        best = text.hypotheses[0]
        found = [
            StreamedWord(timed.text, timed.start, timed.end, _confidence(best.pieces, word), 0.0, joined=word.joined)
            for timed, word in zip(self._timed(text, words[0], certain), words[0][:certain], strict=True)
        ]
        text.hypotheses = [_without(text.hypotheses[i], words[i][certain - 1]) for i in agree]
        if len(agree) < len(words) and text.llm is not None:
            text.llm = text.llm.select(torch.tensor(agree))
        return found

    def _certain(self, text: StreamText, words: Sequence[Sequence[WordPieces]]) -> int:
        """How many words all hypotheses begin with, or the best one has had for `stable_seconds`."""
        shared = 0
        for same in zip(*words, strict=False):  # as far as the shortest has words
            if len({(word.text, word.joined) for word in same}) > 1:
                break
            shared += 1
        newest = text.chunks - math.ceil(self.options.stable_seconds / self.chunk.seconds)
        waited = sum(text.hypotheses[0].pieces[word.last].chunk <= newest for word in words[0])
        return max(shared, waited)

    def _timed(self, text: StreamText, words: Sequence[WordPieces], certain: int) -> list[Word]:
        """The first `certain` words with the times at which the CTC head hears them; without, they share the time."""
        model, frames = self.model, len(text.heard)
        start = text.frames - frames
        spans = None
        if model.ctc_head is not None and frames:
            said = "".join(word.text if word.joined else f" {word.text}" for word in words).removeprefix(" ")
            log_probs = model.ctc_head(text.heard[None]).float().log_softmax(-1)
            lens = torch.tensor([frames], device=log_probs.device)
            (spans,) = forced_align(log_probs, lens, [model.ctc_label_ids(said)], model.blank_id)
        timed = list(words_from_alignment(spans, model.ctc_tokenizer, model.frame_seconds, frames)) if spans else []
        if spans and len(timed) == len(words):
            letters = sum(len(word.text) for word in timed[:certain])
            said_letters = accumulate(
                len(piece.strip()) for piece in text_pieces([span.token for span in spans], model.ctc_tokenizer)
            )
            kept = next((span.end for span, done in zip(spans, said_letters, strict=True) if done >= letters), frames)
            # of words that sound alike a lexicon knows one
            timed = [replace(word, text=heard.text) for word, heard in zip(timed, words, strict=True)]
        else:
            kept, share = frames, frames / certain * model.frame_seconds
            timed = [Word(word.text, i * share, (i + 1) * share, 0.0) for i, word in enumerate(words)]
        text.heard = text.heard[kept:]
        shift = start * model.frame_seconds
        return [replace(word, start=word.start + shift, end=word.end + shift) for word in timed[:certain]]


def _extended(
    running: Sequence[_Running],
    rows: Sequence[int],
    candidates: Sequence[Sequence[tuple[int, float, float]]],
    eos: int,
    beam: int,
    ended: Sequence[float],
) -> tuple[list[tuple[int, _Running]], list[tuple[int, _Running]]]:
    """One step of the beam of one stream: the hypotheses that go on, and those that end, each with its row.

    As in `search.search`, but scores are not divided by lengths: all hypotheses are of the same audio.

    Args:
      rows: of the stream; ended: the scores of its hypotheses that have ended before.
    """
    pool = [
        (running[row].score + score, row, token, log_prob) for row in rows for token, log_prob, score in candidates[row]
    ]
    if any(math.isnan(total) for total, *_ in pool):
        raise UserError(
            "scores are NaN: the language model has overflowed; use float32 or bfloat16, and check its weights"
        )
    extended: list[tuple[int, _Running]] = []
    stopped: list[tuple[int, _Running]] = []
    for total, row, token, log_prob in heapq.nlargest(beam + len(rows), pool, key=itemgetter(0)):
        hypothesis = running[row]._replace(score=total)
        if token == eos:
            stopped.append((row, hypothesis))
            continue
        tokens, log_probs = (*hypothesis.tokens, token), (*hypothesis.log_probs, log_prob)
        extended.append((row, hypothesis._replace(tokens=tokens, log_probs=log_probs)))
        if len(extended) == beam:
            break
    scores = heapq.nlargest(beam, [*ended, *(hypothesis.score for _, hypothesis in stopped)])
    if extended and len(scores) == beam and extended[0][1].score <= scores[-1]:
        extended = []
    return sorted(extended, key=itemgetter(0)), stopped


def _states(running: Sequence[_Running]) -> list[HotwordState]:
    """Where hypotheses are in the phrases, of which there are some."""
    return [hypothesis.hotwords for hypothesis in running if hypothesis.hotwords is not None]


def _confidence(pieces: Sequence[_Piece], word: WordPieces) -> float:
    """The geometric mean of the probabilities of a word's tokens."""
    log_probs = [piece.log_prob for piece in pieces[word.first : word.last + 1]]
    return math.exp(sum(log_probs) / len(log_probs))


def _without(hypothesis: _Hypothesis, word: WordPieces) -> _Hypothesis:
    """What is left of a hypothesis after its words up to this one."""
    last = hypothesis.pieces[word.last]
    rest = () if word.ends_piece else (replace(last, text=last.text[word.end_in_piece :]),)
    return replace(hypothesis, pieces=rest + hypothesis.pieces[word.last + 1 :])
