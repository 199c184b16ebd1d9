"""A stream read step by step, as `speechllm.prompt.interleave` says: slow and plain, to hold recognizers against."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from speechllm.llm.interface import LanguageModelState
from speechllm.model.speech_llm import SpeechLLM
from speechllm.prompt.interleave import interleave
from speechllm.prompt.request import Request


def pieces(
    model: SpeechLLM,
    features: Tensor,
    chunk_seconds: float,
    request: Request,
) -> Iterator[Tensor]:
    """What is read of features (T, F) before each text, (L, D): [prompt | audio 1], [next | audio 2], ..., and what is
    read before the rest of the text."""
    chunk = model.chunks[chunk_seconds]
    lens = torch.tensor([len(features)])
    _, _, audio_embeds, audio_lens = model.encode(features[None], lens, chunk)
    count = int(chunk.count(lens))
    without_text = [[[] for _ in range(count + 1)]]
    prompt = model.config.prompt
    row = interleave(
        prompt, model.tokenizer, audio_lens.tolist(), [request], without_text, chunk_seconds, chunk.positions
    )
    embeds = model.embed(row, audio_embeds, audio_lens)[0]
    ends = [int(row.audio_starts) + k * (chunk.positions + 1) + chunk.positions for k in range(count)]
    for start, end in zip([0, *ends], [*ends, len(embeds)], strict=True):
        yield embeds[start:end]


@torch.no_grad()
def greedy(
    model: SpeechLLM,
    features: Tensor,
    chunk_seconds: float,
    request: Request,
    max_tokens: int = 50,
) -> list[list[int]]:
    """The tokens that are written after each chunk of features (T, F), and after all of the audio."""
    state: LanguageModelState | None = None
    texts = []
    for embeds in pieces(model, features, chunk_seconds, request):
        logits, state = model.llm(inputs_embeds=embeds[None], state=state)
        logits = logits[:, -1]
        text: list[int] = []
        while (token := logits.argmax(-1)).item() != model.tokenizer.eos_id and len(text) < max_tokens:
            text.append(token.item())
            logits, state = model.llm.step(token, state)
        texts.append(text)
    return texts
