"""Losses and error rates of the validation set, while a model trains."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from speechllm.data import Batch, WaveformBatch
from speechllm.scoring import Transcript, characters, score, transcripts
from speechllm.train.monitor import Averages
from speechllm.train.sharding import gathered


def validate(
    accelerator: Accelerator, model: torch.nn.Module, loader: Iterable[Batch | WaveformBatch], text_steps: Sequence[str]
) -> tuple[dict[str, float], str]:
    """Loss, WER and CER (percent) of the validation set, and five transcripts beside their references; each process has
    its share of the batches."""
    bare = accelerator.unwrap_model(model)
    model.eval()
    averages = Averages()
    results: list[Transcript] = []
    ctc_results: list[Transcript] = []
    with torch.no_grad(), accelerator.autocast(), gathered(bare):
        for batch in loader:
            batch = batch.to(accelerator.device)
            averages.add(Averages.of(bare(*batch.inputs)))
            found = bare.recognize(batch.features, batch.feature_lens, batch.requests)
            results += transcripts(batch, [r.text for r in found], text_steps)
            ctc_results += transcripts(batch, [r.ctc_text for r in found], text_steps)
    model.train()
    averages = Averages(accelerator.reduce(averages.values.float().to(accelerator.device)).double().cpu())
    results = sorted(gather_object(results), key=lambda result: result.id)
    scalars = {**averages.items(), "wer": 100 * score(results).rate, "cer": 100 * score(results, characters).rate}
    if ctc_results := gather_object(ctc_results):
        scalars["ctc_wer"] = 100 * score(ctc_results).rate
    shown = results[:: max(1, len(results) // 5)][:5]
    return scalars, "\n".join(f"{result.id}:\n  ref: {result.ref}\n  hyp: {result.hyp}" for result in shown)
