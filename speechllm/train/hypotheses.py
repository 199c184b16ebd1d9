"""What a model writes of a batch while it trains, and how many errors that has: what losses on errors begin with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import cast

import torch
from accelerate import Accelerator
from torch import Tensor

from speechllm.data import Batch
from speechllm.decode.options import RecognizeOptions, SearchOptions
from speechllm.decode.result import Recognition
from speechllm.model.speech_llm import SpeechLLM
from speechllm.scoring import UNITS, Transcript, count_errors
from speechllm.text.normalize import normalize_text
from speechllm.train.config import CountedUnit


def find_hypotheses(
    accelerator: Accelerator,
    model: torch.nn.Module,
    batch: Batch,
    search: SearchOptions,
    text_steps: Sequence[str],
    unit: CountedUnit,
) -> tuple[list[Recognition], list[Tensor]]:
    """Search with the model as it is now, all of the batch at once, without gradients and without dropout.

    Args:
      model: a `SpeechLLM`, perhaps wrapped for several processes.
      batch: of whole utterances, on the model's device.
      search: with as many results as there are to be hypotheses.
      text_steps: the configuration's `data.text`, applied to reference and hypotheses.
      unit: what is counted.

    Returns:
      the results for the N utterances, each with at least one hypothesis; and N tensors with the errors of each
      hypothesis against the reference, both normalized as in validation.
    """
    bare = cast(SpeechLLM, accelerator.unwrap_model(model))
    options = RecognizeOptions(replace(search, max_rows=len(batch) * search.width))
    was_training = bare.training
    bare.eval()
    try:
        # An autocast of its own: one keeps the weights that it has converted, and those of here have no gradient.
        with torch.no_grad(), accelerator.autocast():
            found = bare.recognize(batch.features, batch.feature_lens, batch.requests, options)
    finally:  # also where memory ran out, and a smaller batch is tried next
        bare.train(was_training)
    errors = [
        torch.tensor(counts, dtype=torch.float32, device=batch.features.device)
        for counts in _errors(batch, found, text_steps, unit)
    ]
    return found, errors


def _errors(
    batch: Batch, found: Sequence[Recognition], text_steps: Sequence[str], unit: CountedUnit
) -> list[list[int]]:
    counts: list[list[int]] = []
    for request, reference, result in zip(batch.requests, batch.texts, found, strict=True):
        language = request.target_language or request.language
        ref, *texts = (normalize_text(text, text_steps, language) for text in (reference, *result.texts))
        pairs = [Transcript(request.id or "", ref, text) for text in texts]
        counts.append([report.errors for report in count_errors(pairs, UNITS[unit].split)])
    return counts
