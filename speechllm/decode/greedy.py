"""Greedy search over the language-model seam."""

from __future__ import annotations

import torch
from torch import Tensor

from speechllm.llm import LanguageModel


@torch.no_grad()
def greedy_search(
    llm: LanguageModel, inputs_embeds: Tensor, lens: Tensor, eos_id: int, max_tokens: Tensor
) -> list[list[int]]:
    """The most probable token, one at a time, until `eos_id` or a row's `max_tokens`.

    The prompt is read once, in parallel; then each step costs one token per unfinished row: finished rows
    leave the batch. Each row gets what it would get alone.

    Args:
      inputs_embeds: (N, L, D) prompts with audio, right-padded; lens: (N,); max_tokens: (N,) per row.

    Returns:
      N token lists, without `eos_id`.
    """
    n, length, _ = inputs_embeds.shape
    last = torch.arange(length, device=lens.device)[None, :] == lens[:, None] - 1
    logits, state = llm(inputs_embeds=inputs_embeds, lens=lens, logits_mask=last)  # (N, V)
    tokens: list[list[int]] = [[] for _ in range(n)]
    rows = torch.arange(n, device=lens.device)  # the utterance of each row still in the batch
    limits = max_tokens.tolist()
    while True:
        best = logits.argmax(-1)
        unfinished = []
        for i, (row, token) in enumerate(zip(rows.tolist(), best.tolist(), strict=True)):
            if token != eos_id and len(tokens[row]) < limits[row]:
                tokens[row].append(token)
                unfinished.append(i)
        if not unfinished:
            return tokens
        if len(unfinished) < len(rows):
            keep = torch.tensor(unfinished, device=rows.device)
            rows, best, state = rows[keep], best[keep], state.select(keep)
        logits, state = llm.step(best, state, overwrite=True)
