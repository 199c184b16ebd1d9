"""Group relative policy optimization (GRPO, arXiv 2402.03300) with the number of errors as reward: texts are drawn at
random, and those that have fewer errors than others of the same utterance become more probable.

For speech recognition: "Group relative policy optimization for speech recognition", arXiv 2509.01939.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from accelerate import Accelerator
from torch import Tensor

from speechllm.data import Batch
from speechllm.decode.options import SearchOptions
from speechllm.model.base import Losses
from speechllm.train.config import GRPOConfig
from speechllm.train.hypotheses import find_hypotheses


def grpo_losses(
    accelerator: Accelerator, model: torch.nn.Module, batch: Batch, config: GRPOConfig, text_steps: Sequence[str]
) -> Losses:
    """The losses of the model's `forward`, with another `loss` to train with: over the utterances, the sum of

        - mean_i A(y_i) log p(y_i) + `config.cross_entropy` * the usual loss

    where y_i are the samples of the utterance, p their probabilities at `config.temperature`, and A their advantages
    (`advantages`). `errors` is the mean number of errors of an utterance's samples, summed.

    Each sample is used for one step, so that the ratio of the new policy to that which has drawn it is 1, and clipping
    it would do nothing. The log probability of a sample is the sum over its tokens, as arXiv 2503.20783 has it: divided
    by the length, long wrong texts would cost less. There is no divergence from the model at the start: what GRPO needs
    it for elsewhere, the transcripts do here, by the usual loss, without a second model. A sample that a guard has cut
    (`speechllm.decode.search`) has no end of text.

    Args:
      model: a `SpeechLLM`, perhaps wrapped for several processes.
      batch: of whole utterances, on the model's device.
      text_steps: the configuration's `data.text`.
    """
    # Of PyTorch's random numbers, which a checkpoint holds: a run that was stopped draws the same samples.
    seed = int(torch.randint(2**31, ()))
    search = SearchOptions(method="sample", nbest=config.samples, temperature=config.temperature, seed=seed)
    found, errors = find_hypotheses(accelerator, model, batch, search, text_steps, config.unit)
    end = [accelerator.unwrap_model(model).tokenizer.eos_id]
    labels = [[[*h.tokens, *(end if h.stopped == "end" else [])] for h in result.nbest] for result in found]
    with accelerator.autocast():
        out = model(*batch.inputs, hypotheses=labels, temperature=config.temperature)
    log_probs = out.pop("hypothesis_log_probs").split([len(several) for several in labels])
    losses = [-(advantages(-counts) * scores).mean() for scores, counts in zip(log_probs, errors, strict=True)]
    loss = torch.stack(losses).sum() + config.cross_entropy * out["loss"]
    return out | {"loss": loss, "errors": torch.stack([counts.mean() for counts in errors]).sum()}


def advantages(rewards: Tensor) -> Tensor:
    """How far each of the rewards (G,) of a group is above their mean, in standard deviations; 0 where all are equal.

    Whether a group's rewards are numbers of errors or error rates makes no difference.
    """
    return (rewards - rewards.mean()) / rewards.std(correction=0).clamp(min=1e-6)
