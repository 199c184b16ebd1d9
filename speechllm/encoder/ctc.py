"""CTC as a training loss (Graves et al. 2006), and consistency regularization of it, CR-CTC (arXiv 2410.05101)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from speechllm.config import check_limits, setting


@dataclass
class CRCTCConfig:
    """CR-CTC: each utterance is heard in two views, masked differently by `data.augment.spec_augment`, and what CTC
    makes of one has to agree with what it makes of the other.

    The paper masks 2.5 times as much time as without it (with lhotse's defaults `time_masks: 25` and
    `max_time_fraction: 0.375`), in batches of half as many utterances, and trains for half as many epochs.

    `weight` of the consistency loss: 0.2 in the paper.
    """

    weight: float = setting(0.2, "leave cr_ctc out to train without it", above=0)

    def __post_init__(self) -> None:
        check_limits(self)


def ctc_losses(logits: Tensor, lens: Tensor, label_ids: Sequence[Sequence[int]], blank: int) -> Tensor:
    """CTC losses (N,), float32; that of a label that has more tokens than its audio has frames is 0.

    Args:
      logits: (N, T, V), or log probabilities; lens: (N,) frames; label_ids: N token lists.
    """
    log_probs = logits.float().log_softmax(-1)
    targets = torch.tensor([t for ids in label_ids for t in ids], dtype=torch.long)
    target_lens = torch.tensor([len(ids) for ids in label_ids])
    return F.ctc_loss(
        log_probs.transpose(0, 1),
        targets.to(log_probs.device),
        lens,
        target_lens.to(log_probs.device),
        blank=blank,
        reduction="none",
        zero_infinity=True,
    )


def consistency_losses(logits: Tensor, lens: Tensor) -> Tensor:
    """How far the two views of each utterance disagree: (N,), float32 (arXiv 2410.05101, equation 4).

    The mean over both directions of the Kullback-Leibler divergence between the distributions of a frame, summed over
    the frames. The view that is compared with is held constant, so each learns from the other.

    Args:
      logits: (2 N, T, V), the second views behind all the first; lens: (2 N,) frames.
    """
    log_probs = logits.float().log_softmax(-1)
    other = log_probs.detach().roll(len(log_probs) // 2, dims=0)
    divergences = F.kl_div(log_probs, other, reduction="none", log_target=True).sum(-1)
    is_padding = torch.arange(log_probs.shape[1], device=lens.device) >= lens[:, None]
    return divergences.masked_fill(is_padding, 0.0).sum(1).view(2, -1).mean(0)
