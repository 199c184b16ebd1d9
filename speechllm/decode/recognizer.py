"""From features to text: encoder, prompt, search, guards, word times.

What is before the audio in the prompt is read once; its state is where all utterances with that text go on from.
Batches are encoded as the search has places for their utterances, so that it never waits for the slowest of a batch.
"""

from __future__ import annotations

import hashlib
import itertools
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal, cast

import torch
from torch import Tensor

from speechllm.decode.ctc import CTCScorer, ctc_greedy, ctc_prefix_beam_search, forced_align
from speechllm.decode.ctc_words import CTCWords
from speechllm.decode.hotwords import Hotwords
from speechllm.decode.interface import RecognizableSpeechLLM, RecognizeOptions, Speech, check_length
from speechllm.decode.ngram import load_ngram
from speechllm.decode.result import Hypothesis, Recognition, Word, without_sound
from speechllm.decode.search import Prompt, RunningSearch, Scorer, search
from speechllm.decode.timestamps import words_from_alignment, words_from_label
from speechllm.decode.word_scorer import WordScorer
from speechllm.errors import UserError
from speechllm.llm.interface import LanguageModelState
from speechllm.prompt.request import Request
from speechllm.rwkv7.initial_state import load_state
from speechllm.text.words import word_spans

# States that are kept. Where utterances have texts of their own before the audio, none would be used again.
_MAX_STATES = 32


@dataclass
class _Utterance:
    """What is needed of an utterance once its search has ended."""

    ctc_tokens: Sequence[int] | None
    ctc_log_probs: Tensor | None  # (T, V)


class SpeechLLMRecognizer:
    """Recognizes batches of speech; built once, for any number of them.

    Args:
      model: in evaluation mode.

    Raises:
      UserError: the options ask for what the model does not have; a file cannot be read.
    """

    def __init__(self, model: RecognizableSpeechLLM, options: RecognizeOptions | None = None) -> None:
        self.model, self.options = model, options or RecognizeOptions()
        label = model.label_template
        uses_ctc = {"ctc_weight": self.options.ctc_weight > 0, "timestamps": self.options.timestamps}
        for name, used in (*uses_ctc.items(), ("ctc_beam", self.options.ctc_beam > 1)):
            if used and model.ctc_head is None and not (name == "timestamps" and label.has_times):
                raise UserError(f"{name}: the model has no CTC head (it was trained with model.ctc_weight: 0)")
        for name in ("ctc_weight", "hotwords", "ngram"):
            if getattr(self.options, name) and not label.is_plain:
                raise UserError(
                    f"{name}: knows texts alone, but the model writes more: it was trained with model.label: "
                    f"{label.template!r}"
                )
        self._keeps_log_probs = model.ctc_head is not None and any(uses_ctc.values())
        self._utterances: dict[int, _Utterance] = {}
        self._scorers = self._build_scorers()
        self._initial_state = None
        if self.options.initial_state is not None:
            self._initial_state = load_state(self.options.initial_state, model.llm)
        # Of the longest label: any token of its text may be a word, with a time before and behind it.
        encode, label = model.tokenizer.encode, model.label_template
        self._tag_tokens = len(encode(label.fill("", Request(language="xx", target_language="xx"))))
        self._label_growth = 1 + 2 * len(encode("<88.88>")) if label.has_times else 1
        self._states: dict[tuple[int, ...], LanguageModelState | None] = {}  # by the tokens before the audio
        # of utterances that join
        self._running = RunningSearch(model.llm, self.options.search, model.tokenizer.eos_id, self._scorers)
        self._numbers = itertools.count()
        self._done: list[tuple[int, Recognition]] = []

    def _build_scorers(self) -> list[Scorer]:
        options, model = self.options, self.model
        scorers: list[Scorer] = []
        if options.ctc_weight > 0:
            scorers.append(self._ctc_scorer())
        if options.hotwords is not None:
            scorers.append(Hotwords.from_file(options.hotwords, model.tokenizer, options.hotword_weight))
        if options.ngram is not None:
            scorers.append(WordScorer(load_ngram(options.ngram), model.tokenizer, options.ngram_weight))
        return scorers

    def _ctc_scorer(self) -> Scorer:
        model, weight = self.model, self.options.ctc_weight

        def log_probs_of(number: int) -> Tensor:
            return cast(Tensor, self._utterances[number].ctc_log_probs)

        if model.ctc_tokenizer is model.tokenizer:
            return CTCScorer(weight, log_probs_of, model.blank_id, model.tokenizer.eos_id)
        words = CTCWords(log_probs_of, model.ctc_label_ids, model.ctc_beginnings, model.blank_id)
        return WordScorer(words, model.tokenizer, weight)

    @torch.no_grad()
    def __call__(self, batches: Iterable[Speech]) -> Iterator[list[Recognition]]:
        """The results of each batch, in order; batches are drawn when there is room for them.

        An utterance that is too short for the encoder to hear anything in has no text.

        Raises:
          UserError: an utterance that `check` refuses.
        """
        results: deque[list[Recognition | None]] = deque()  # of the batches that were drawn and not given out
        places: dict[int, tuple[list[Recognition | None], int]] = {}  # in `results`, by the number of the prompt
        numbers = itertools.count()

        def prompts() -> Iterator[Prompt]:
            for speech in batches:
                result: list[Recognition | None] = [*self._unheard(speech)]
                results.append(result)
                for i, number, prompt in self._entering(speech, result, numbers):
                    places[number] = result, i
                    yield prompt

        def finished() -> Iterator[list[Recognition]]:
            while results and None not in results[0]:
                yield [result for result in results.popleft() if result is not None]

        eos_id = self.model.tokenizer.eos_id
        for number, nbest in search(self.model.llm, prompts(), self.options.search, eos_id, self._scorers):
            result, i = places.pop(number)
            result[i] = self._finished(number, nbest)
            yield from finished()
        yield from finished()

    @property
    def free(self) -> int:
        """How many utterances may `join` now."""
        return self._running.free

    @torch.no_grad()
    def join(self, speech: Speech) -> list[int]:
        """Take utterances into the search that `step` goes on with, whatever else is in it; not while batches are
        recognized by calling this.

        Returns:
          a number for each, which `step` gives its result with.

        Raises:
          UserError: an utterance that `check` refuses.
        """
        unheard = self._unheard(speech)
        found = list(self._entering(speech, unheard, self._numbers))
        self._running.join([(number, prompt) for _, number, prompt in found])
        numbers = {row: number for row, number, _ in found}
        for row, result in enumerate(unheard):
            if result is not None:
                numbers[row] = next(self._numbers)
                self._done.append((numbers[row], result))
        return [numbers[row] for row in range(len(unheard))]

    @torch.no_grad()
    def step(self) -> list[tuple[int, Recognition]]:
        """One token more for each utterance that has joined; the results of those that are finished by that."""
        done, self._done = self._done, []
        for number, nbest in self._running.step():
            done.append((number, self._finished(number, nbest)))
        return done

    def leave(self, numbers: Iterable[int]) -> None:
        """Nobody waits for the results of these any more; others may have their places."""
        gone = set(numbers)
        self._running.leave(gone)
        self._done = [(number, result) for number, result in self._done if number not in gone]
        for number in gone:
            self._utterances.pop(number, None)

    def _unheard(self, speech: Speech) -> list[Recognition | None]:
        """The results of utterances that are too short for the encoder to hear anything in; None for the others."""
        return [
            None if frames >= self.model.min_frames else self._without_sound(request)
            for frames, request in zip(speech.feature_lens.tolist(), speech.requests, strict=True)
        ]

    def _entering(
        self, speech: Speech, unheard: Sequence[Recognition | None], numbers: Iterator[int]
    ) -> Iterator[tuple[int, int, Prompt]]:
        """Row, number and prompt of each of the others."""
        rows = [row for row, result in enumerate(unheard) if result is None]
        for row, (utterance, prompt) in zip(rows, self._prompts(speech.rows(rows)) if rows else (), strict=True):
            number = next(numbers)
            self._utterances[number] = utterance
            yield row, number, prompt

    def check(self, request: Request, frames: int | None = None) -> None:
        """Whether an utterance can be recognized; `frames`: of its features, where they are known.

        Raises:
          UserError: the prompt has a slot for what it does not have, or a tag that the tokenizer must not split; it is
            to be translated with the scores of the CTC head; it is too long for the encoder.
        """
        check_length(self.model, frames)
        self._check_scores(request)
        self.model.spliced(torch.ones(1, dtype=torch.long), [request])

    def _check_scores(self, request: Request) -> None:
        if self.options.ctc_weight > 0 and request.target_language is not None:
            raise UserError(
                f"ctc_weight: the CTC head knows transcripts only, but {request.target_language} is asked for"
            )

    def _without_sound(self, request: Request) -> Recognition:
        ctc_text = "" if self.model.ctc_head is not None and request.target_language is None else None
        has_words = self.options.timestamps or self.model.label_template.has_times
        return without_sound(ctc_text, has_words)

    def _prompts(self, speech: Speech) -> Iterator[tuple[_Utterance, Prompt]]:
        model = self.model
        features, feature_lens = speech.features.to(model.device), speech.feature_lens.to(model.device)
        encoder_out, encoder_out_lens, audio_embeds, audio_lens = model.encode(features, feature_lens)
        ctc_tokens, ctc_log_probs = self._ctc(encoder_out, encoder_out_lens)
        spliced = model.spliced(audio_lens, speech.requests)
        inputs_embeds = model.embed(spliced, audio_embeds, audio_lens)
        # Each utterance is read after what is before its audio, of which there are few, if more than one.
        for i, request in enumerate(speech.requests):
            self._check_scores(request)
            is_transcript = request.target_language is None
            utterance = _Utterance(
                ctc_tokens[i] if ctc_tokens is not None and is_transcript else None,
                ctc_log_probs[i, : encoder_out_lens[i]].clone() if ctc_log_probs is not None else None,
            )
            embeds, start = inputs_embeds[i, : spliced.lens[i]], int(spliced.audio_starts[i])
            read, state = self._state_before_audio(tuple(spliced.token_ids[i, :start].tolist()), embeds[:start])
            seconds = int(encoder_out_lens[i]) * model.frame_seconds
            max_tokens = self.options.search.max_tokens(seconds) * self._label_growth + self._tag_tokens
            yield utterance, Prompt(embeds[read:], max_tokens, state, self._key(speech, i))

    def _key(self, speech: Speech, row: int) -> str | None:
        if self.options.search.method != "sample":
            return None
        request = speech.requests[row]
        if (key := request.key or request.id) is not None:
            return key
        features = speech.features[row, : speech.feature_lens[row]].float().cpu().contiguous()
        return hashlib.sha256(features.numpy().tobytes()).hexdigest()

    def _ctc(self, encoder_out: Tensor, lens: Tensor) -> tuple[list[list[int]] | None, Tensor | None]:
        """The CTC head's own result, and its log probabilities (N, T, V) where they are needed later."""
        if self.model.ctc_head is None:
            return None, None
        scores = self.model.ctc_head(encoder_out).float()
        blank = self.model.blank_id
        log_probs = scores.log_softmax(-1) if self._keeps_log_probs or self.options.ctc_beam > 1 else None
        if log_probs is not None and self.options.ctc_beam > 1:
            best = ctc_prefix_beam_search(log_probs, lens, blank, self.options.ctc_beam)
            tokens = [list(nbest[0].tokens) for nbest in best]
        else:
            tokens = ctc_greedy(scores, lens, blank)
        return tokens, log_probs if self._keeps_log_probs else None

    def _state_before_audio(self, token_ids: tuple[int, ...], embeds: Tensor) -> tuple[int, LanguageModelState | None]:
        """How many of `embeds` (L, D), what is before the audio, have been read already, and the state behind them."""
        if not token_ids or (token_ids not in self._states and len(self._states) == _MAX_STATES):
            return 0, self._initial_state
        if token_ids not in self._states:
            is_last = torch.arange(len(token_ids), device=embeds.device)[None] == len(token_ids) - 1
            _, self._states[token_ids] = self.model.llm(
                inputs_embeds=embeds[None], state=self._initial_state, logits_mask=is_last
            )
        return len(token_ids), self._states[token_ids]

    def _finished(self, number: int, nbest: tuple[Hypothesis, ...]) -> Recognition:
        """The result of an utterance whose search has ended."""
        return self._recognition(self._utterances.pop(number), nbest)

    def _recognition(self, utterance: _Utterance, nbest: tuple[Hypothesis, ...]) -> Recognition:
        model = self.model
        labels = [model.read_label(hypothesis.tokens) for hypothesis in nbest]
        ctc_text = None if utterance.ctc_tokens is None else model.ctc_text(utterance.ctc_tokens)
        best, text = labels[0], labels[0].text
        fallback: Literal["cut", "ctc"] | None = None
        if nbest[0].stopped != "end":
            fallback = "cut"
            if self.options.fallback == "ctc" and ctc_text is not None:
                text, fallback = ctc_text, "ctc"
        words: tuple[Word, ...] | None
        if best.words is not None and fallback != "ctc":
            words = words_from_label(best, nbest[0].tokens, nbest[0].log_probs, model.tokenizer)
        else:
            words = self._words(utterance, text)
        texts = tuple(label.text for label in labels)
        return Recognition(text, nbest, texts, fallback, ctc_text, words, best.language)

    def _words(self, utterance: _Utterance, text: str) -> tuple[Word, ...] | None:
        """The words of a transcript, where the CTC head hears them."""
        if utterance.ctc_log_probs is None or not self.options.timestamps or utterance.ctc_tokens is None:
            return None  # of a translation there are no times
        log_probs = utterance.ctc_log_probs
        lens = torch.tensor([len(log_probs)], device=log_probs.device)
        (spans,) = forced_align(log_probs[None], lens, [self.model.ctc_label_ids(text)], self.model.blank_id)
        if spans is None:  # more tokens than frames: whatever it is, it was not said
            return None
        words = words_from_alignment(spans, self.model.ctc_tokenizer, self.model.frame_seconds, len(log_probs))
        said = [text[start:end] for start, end in word_spans(text)]
        if len(words) != len(said):
            return words
        # of words that sound alike a lexicon knows one
        return tuple(replace(word, text=spelling) for word, spelling in zip(words, said, strict=True))


Recogniser = SpeechLLMRecognizer  # its name in 0.1
