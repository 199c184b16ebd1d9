"""Losses and error rates of the validation set, while a model trains."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from speechllm.data import Batch, WaveformBatch
from speechllm.decode.ctc import ctc_greedy
from speechllm.model.speech_llm import SpeechLLM
from speechllm.scoring import Transcript, characters, score, transcripts
from speechllm.train.monitor import Averages
from speechllm.train.sharding import gathered


def validate(
    accelerator: Accelerator,
    model: torch.nn.Module,
    loader: Iterable[Batch | WaveformBatch],
    text_steps: Sequence[str],
    ctc_only: bool = False,
) -> tuple[dict[str, float], str]:
    """Loss, WER and CER (percent) of the validation set, and five transcripts beside their references; each process has
    its share of the batches.

    Args:
      ctc_only: the language model has not begun to learn: it would write to the length limit whatever it hears, which
        takes long and says nothing. The texts are those of the CTC head, and there is no `wer` and no `cer`.
    """
    bare = accelerator.unwrap_model(model)
    model.eval()
    averages = Averages()
    results: list[Transcript] = []
    ctc_results: list[Transcript] = []
    with torch.no_grad(), accelerator.autocast(), gathered(bare):
        for batch in loader:
            batch = batch.to(accelerator.device)
            averages.add(Averages.of(bare(*batch.inputs)))
            if ctc_only:
                ctc_texts: Sequence[str | None] = _ctc_texts(bare, batch)
            else:
                found = bare.recognize(batch.features, batch.feature_lens, batch.requests)
                results += transcripts(batch, [r.text for r in found], text_steps)
                ctc_texts = [r.ctc_text for r in found]
            ctc_results += transcripts(batch, ctc_texts, text_steps)
    model.train()
    averages = Averages(accelerator.reduce(averages.values.float().to(accelerator.device)).double().cpu())
    results, ctc_results = gather_object(results), gather_object(ctc_results)
    scalars = averages.items()
    if not ctc_only:
        scalars |= {"wer": 100 * score(results).rate, "cer": 100 * score(results, characters).rate}
    if ctc_results:
        scalars["ctc_wer"] = 100 * score(ctc_results).rate
    shown = sorted(ctc_results if ctc_only else results, key=lambda result: result.id)
    shown = shown[:: max(1, len(shown) // 5)][:5]
    return scalars, "\n".join(f"{result.id}:\n  ref: {result.ref}\n  hyp: {result.hyp}" for result in shown)


def _ctc_texts(model: SpeechLLM, batch: Batch) -> list[str | None]:
    """What the CTC head alone hears in each utterance; None of those that are to be translated."""
    assert model.ctc_head is not None  # `Experiment` sees to it
    encoder_out, lens, *_ = model.encode(batch.features, batch.feature_lens)
    tokens = ctc_greedy(model.ctc_head(encoder_out).float(), lens, model.blank_id)
    return [
        model.ctc_text(ids) if request.target_language is None else None
        for ids, request in zip(tokens, batch.requests, strict=True)
    ]
