"""From features to text without a language model: encoder, CTC or transducer, word times."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import fields, replace
from itertools import count, islice

import torch
from torch import Tensor

from speechllm.decode.ctc import TokenSpan, ctc_greedy, ctc_prefix_beam_search, forced_align
from speechllm.decode.interface import RecognizableEncoder, RecognizeOptions, Speech, check_length
from speechllm.decode.result import Hypothesis, Recognition, without_sound
from speechllm.decode.timestamps import words_from_alignment
from speechllm.decode.transducer import transducer_greedy
from speechllm.errors import UserError
from speechllm.prompt.request import Request


class EncoderRecognizer:
    """Recognizes batches of speech, one after the other; built once, for any number of them.

    The text is that of the transducer's greedy search if there is a transducer, else that of CTC's greedy or, with
    `ctc_beam`, prefix beam search. A token's log probability is the transducer's, or CTC's mean over its frames.

    Args:
      model: in evaluation mode.
      options: `ctc_beam` and `timestamps` need a CTC head; `fallback` never happens, as no search is stopped.

    Raises:
      UserError: the options ask for what the model does not have.
    """

    def __init__(self, model: RecognizableEncoder, options: RecognizeOptions | None = None) -> None:
        self.model, self.options = model, options or RecognizeOptions()
        given = self.options
        without = RecognizeOptions(ctc_beam=given.ctc_beam, timestamps=given.timestamps, fallback=given.fallback)
        pairs = ((given.search, without.search), (replace(given, search=without.search), without))
        for ours, default in pairs:
            for field in fields(ours):
                if (value := getattr(ours, field.name)) != getattr(default, field.name):
                    raise UserError(
                        f"{field.name}: {value} is for a language model, and this model is an encoder alone (it was "
                        "trained with model.llm: null): leave it out"
                    )
        for name, asked in (("ctc_beam", given.ctc_beam > 1), ("timestamps", given.timestamps)):
            if asked and model.ctc_head is None:
                raise UserError(f"{name}: the model has no CTC head (it was trained with model.ctc_weight: 0)")
        self._numbers = count()  # of utterances that join
        self._done: list[tuple[int, Recognition]] = []

    @torch.no_grad()
    def __call__(self, batches: Iterable[Speech]) -> Iterator[list[Recognition]]:
        """The results of each batch, in order. One that is too short for the encoder to hear anything in has no text.

        Raises:
          UserError: something is to be translated.
        """
        has_both = self.model.ctc_head is not None and self.model.transducer is not None
        for speech in batches:
            for request in speech.requests:
                self.check(request)
            nothing = without_sound("" if has_both else None, self.options.timestamps)
            results = [nothing] * len(speech.feature_lens)
            heard = [i for i, frames in enumerate(speech.feature_lens.tolist()) if frames >= self.model.min_frames]
            for i, result in zip(heard, self._recognize(speech.rows(heard)) if heard else [], strict=True):
                results[i] = result
            yield results

    @property
    def free(self) -> int:
        """How many utterances may `join` now."""
        return self.options.search.max_rows - len(self._done)

    def join(self, speech: Speech) -> list[int]:
        """Recognize utterances; `step` gives their results, by the numbers that are returned.

        Raises:
          UserError: something is to be translated.
        """
        found = next(self([speech]))
        numbers = list(islice(self._numbers, len(found)))
        self._done += zip(numbers, found, strict=True)
        return numbers

    def step(self) -> list[tuple[int, Recognition]]:
        """The results of the utterances that have joined since."""
        done, self._done = self._done, []
        return done

    def leave(self, numbers: Iterable[int]) -> None:
        """Nobody waits for the results of these any more."""
        gone = set(numbers)
        self._done = [(number, result) for number, result in self._done if number not in gone]

    def check(self, request: Request, frames: int | None = None) -> None:
        """Whether an utterance can be recognized; `frames`: of its features, where they are known.

        Raises:
          UserError: it is to be translated, or too long for the encoder.
        """
        check_length(self.model, frames)
        if (language := request.target_language) is not None:
            raise UserError(f"{language} is asked for, but an encoder alone (model.llm: null) cannot translate")

    def _recognize(self, speech: Speech) -> list[Recognition]:
        model = self.model
        encoder_out, lens = model.encode(speech.features.to(model.device), speech.feature_lens.to(model.device))
        log_probs, ctc = None, None
        if model.ctc_head is not None:
            log_probs = model.ctc_head(encoder_out).float().log_softmax(-1)
            ctc = self._ctc_tokens(log_probs, lens)
        spans: Sequence[tuple[TokenSpan, ...] | None]
        if model.transducer is None:
            assert log_probs is not None and ctc is not None  # it has one of the two
            spans = forced_align(log_probs, lens, [tokens for tokens, _ in ctc], model.blank_id)
            found = [
                Hypothesis(tokens, tuple(span.score for span in row or ()), score, "end")
                for (tokens, score), row in zip(ctc, spans, strict=True)
            ]
        else:
            said = transducer_greedy(model.transducer, encoder_out, lens)
            found = [Hypothesis(hyp.tokens, hyp.log_probs, hyp.log_prob, "end") for hyp in said]
            spans = [None] * len(found)
            if self.options.timestamps and log_probs is not None:
                spans = forced_align(log_probs, lens, [hyp.tokens for hyp in found], model.blank_id)
        results = []
        for i, (hypothesis, row) in enumerate(zip(found, spans, strict=True)):
            text = model.text(hypothesis.tokens)
            ctc_text = model.text(ctc[i][0]) if ctc is not None and model.transducer is not None else None
            words = None
            if self.options.timestamps and row is not None:  # None: the transducer says more than there are frames
                words = words_from_alignment(row, model.tokenizer, model.seconds_per_position, int(lens[i]))
            results.append(Recognition(text, (hypothesis,), (text,), None, ctc_text, words))
        return results

    def _ctc_tokens(self, log_probs: Tensor, lens: Tensor) -> list[tuple[tuple[int, ...], float]]:
        """Tokens, and the log probability that the search ranks them by, of each row."""
        blank = self.model.blank_id
        if self.options.ctc_beam > 1:
            best = ctc_prefix_beam_search(log_probs, lens, blank, self.options.ctc_beam)
            return [(nbest[0].tokens, nbest[0].log_prob) for nbest in best]
        is_frame = torch.arange(log_probs.shape[1], device=lens.device) < lens[:, None]
        scores = (log_probs.amax(-1) * is_frame).sum(1).tolist()
        return [(tuple(ids), s) for ids, s in zip(ctc_greedy(log_probs, lens, blank), scores, strict=True)]


EncoderRecogniser = EncoderRecognizer  # its name in 0.1
