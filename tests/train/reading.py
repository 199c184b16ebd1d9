"""A tiny model whose texts end, a batch for it, and what losses on errors ask of accelerate."""

from functools import cache
from types import SimpleNamespace

import torch
from torch import nn

from speechllm.data import Batch
from speechllm.model.speech_llm import SpeechLLM

TEXTS = ["one two three", "tres", ""]


def reading(model: SpeechLLM, words: float = 5.0) -> SpeechLLM:
    """The model without dropout, writing few words, more or less of these by what it hears.

    A new one writes bytes, and its blocks add nothing to what they read.
    """
    generator = torch.Generator().manual_seed(3)
    head = nn.Linear(*model.llm.head.weight.T.shape)
    with torch.no_grad():
        for p in model.llm.parameters():
            if p.ndim == 2 and not p.any():
                p.normal_(0, 0.3, generator=generator)
        head.weight.copy_(2 * model.llm.head.weight)
        head.bias.zero_()[model.label_ids("one two three tres")] = words
        head.bias[model.tokenizer.eos_id] = words
    model.llm.head = head
    return model.eval()


def batch_of(batch, rows=slice(None), texts=TEXTS) -> Batch:
    """Some rows of the fixture `batch`, with these texts."""
    features, lens, _, requests = batch
    lens, texts, requests = lens[rows], texts[rows], requests[rows]
    durations = (lens / 100).tolist()
    return Batch(list(texts), list(texts), list(requests), durations, features=features[rows, : max(lens)],
                 feature_lens=lens)  # fmt: skip


def accelerator(dtype: torch.dtype | None = None):
    """One process, in autocast if a type is given."""
    enabled = dtype is not None
    return SimpleNamespace(
        unwrap_model=lambda model: model,
        autocast=lambda: torch.autocast("cpu", dtype or torch.bfloat16, enabled=enabled),
    )


@cache
def distance(ref: tuple[str, ...], hyp: tuple[str, ...]) -> int:
    """The fewest insertions, deletions and substitutions, by the recursion that defines them."""
    if not ref or not hyp:
        return len(ref) + len(hyp)
    substituted = distance(ref[1:], hyp[1:]) + (ref[0] != hyp[0])
    return min(substituted, distance(ref[1:], hyp) + 1, distance(ref, hyp[1:]) + 1)


def errors_of(reference: str, text: str) -> int:
    """Words that are wrong."""
    return distance(tuple(reference.split()), tuple(text.split()))
