"""Minimum word error rate training: the expected number of errors over an n-best list, in place of the likelihood.

Prabhavalkar et al., "Minimum word error rate training for attention-based sequence-to-sequence models", arXiv
1712.01818, with the n-best lists of this library's beam search.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from accelerate import Accelerator
from torch import Tensor

from speechllm.data import Batch
from speechllm.decode.options import SearchOptions
from speechllm.model.base import Losses
from speechllm.train.config import MWERConfig
from speechllm.train.hypotheses import find_hypotheses


def mwer_losses(
    accelerator: Accelerator, model: torch.nn.Module, batch: Batch, config: MWERConfig, text_steps: Sequence[str]
) -> Losses:
    """The losses of the model's `forward`, with another `loss` to train with: over the utterances, the sum of

        sum_i P(y_i) (W(y_i) - mean W) + `config.cross_entropy` * the usual loss

    where y_i are the hypotheses of the utterance, P their probabilities, of which the sum over the list is 1, and W
    their errors. The mean changes no gradient, and makes it plain: what has fewer errors than the list has on average
    becomes more probable. `errors` is the expected number of errors.

    A text that a guard has cut (`speechllm.decode.search`) is in the list as one that ends there.

    Args:
      model: a `SpeechLLM`, perhaps wrapped for several processes.
      batch: of whole utterances, on the model's device.
      text_steps: the configuration's `data.text`.
    """
    # Without a length penalty: the list is that of the most probable texts.
    search = SearchOptions(method="beam", beam=config.beam, nbest=config.beam, length_penalty=0.0)
    found, errors = find_hypotheses(accelerator, model, batch, search, text_steps, config.unit)
    eos_id = accelerator.unwrap_model(model).tokenizer.eos_id
    labels = [[[*h.tokens, eos_id] for h in result.nbest] for result in found]
    with accelerator.autocast():
        out = model(*batch.inputs, hypotheses=labels)
    log_probs = out.pop("hypothesis_log_probs").split([len(several) for several in labels])
    risk = torch.stack([expected_errors(*row) for row in zip(log_probs, errors, strict=True)]).sum()
    means = torch.stack([counts.mean() for counts in errors]).sum()
    return out | {"loss": risk - means + config.cross_entropy * out["loss"], "errors": risk.detach()}


def expected_errors(log_probs: Tensor, errors: Tensor) -> Tensor:
    """The mean of errors (K,) of an n-best list, weighted by the probabilities that log_probs (K,) stand for."""
    return (log_probs.softmax(0) * errors).sum()
