"""What the language model reads: [soft | before | audio | after | label] in positions, and their embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum
from typing import NamedTuple

import torch
from torch import Tensor, nn

from speechllm.llm.interface import IGNORE, LanguageModel
from speechllm.prompt.request import Request
from speechllm.prompt.template import PromptConfig, PromptProjectorConfig
from speechllm.text.tokenizer import Tokenizer


class Kind(IntEnum):
    """What is at a position of what the language model reads."""

    PADDING = 0
    SOFT = 1
    TEXT = 2  # of the prompt
    BOUNDARY = 3
    AUDIO = 4
    LABEL = 5


Segment = tuple[Kind, Sequence[int]]  # tokens of one kind, 0 where there are none


class Spliced(NamedTuple):
    """What the language model reads; L positions, right-padded."""

    token_ids: Tensor  # (N, L) int64, 0 where there is no token
    kinds: Tensor  # (N, L) uint8, of `Kind`
    lens: Tensor  # (N,) int64
    labels: Tensor  # (N, L) int64: the token to predict AT each position, IGNORE where there is no loss
    audio_starts: Tensor  # (N,) int64, the first position of the audio

    def to(self, device: torch.device) -> Spliced:
        return Spliced(*(t.to(device) for t in self))


def splice(
    prompt: PromptConfig,
    tokenizer: Tokenizer,
    audio_lens: Sequence[int],
    requests: Sequence[Request],
    label_ids: Sequence[Sequence[int]] | None = None,
) -> Spliced:
    """Lay out [soft | text | boundary | audio | boundary | text | label] for each row; built on the CPU.

    Rows with a target language have the prompt of a translation.

    With `label_ids` the last prompt position predicts the first label token and the last label token predicts
    the tokenizer's `eos_id`: loss on label and end of text only. Without, the rows end with the prompt, ready
    for decoding, and `labels` is IGNORE throughout.

    Raises:
      UserError: the prompt has a slot for what an utterance does not have, or a tag that the tokenizer must not split.
    """
    rows: list[list[Segment]] = []
    boundary = (Kind.BOUNDARY, [0] * int(prompt.boundary))
    for i, (audio_len, request) in enumerate(zip(audio_lens, requests, strict=True)):
        before, after = prompt.encoded(tokenizer, request)
        rows.append(
            [
                (Kind.SOFT, [0] * prompt.soft_tokens),
                (Kind.TEXT, before),
                boundary,
                (Kind.AUDIO, [0] * int(audio_len)),
                boundary,
                (Kind.TEXT, after),
                (Kind.LABEL, label_ids[i] if label_ids is not None else []),
            ]
        )
    return packed(rows, tokenizer.eos_id if label_ids is not None else IGNORE)


def packed(rows: Sequence[Sequence[Segment]], end: int) -> Spliced:
    """Rows of segments as one batch.

    Whatever is of a label is predicted by the position before it, and `end` by the last one: IGNORE for none. The first
    audio of a row comes after three segments.
    """
    lens = torch.tensor([sum(len(ids) for _, ids in row) for row in rows])
    shape = (len(rows), int(lens.max()))
    token_ids = torch.zeros(shape, dtype=torch.long)
    kinds = torch.full(shape, Kind.PADDING, dtype=torch.uint8)
    for i, row in enumerate(rows):
        token_ids[i, : lens[i]] = torch.tensor([token for _, ids in row for token in ids])
        kinds[i, : lens[i]] = torch.tensor([kind for kind, ids in row for _ in ids], dtype=torch.uint8)
    labels = torch.full(shape, IGNORE)
    labels[:, :-1] = token_ids[:, 1:].masked_fill(kinds[:, 1:] != Kind.LABEL, IGNORE)
    labels[torch.arange(len(rows)), lens - 1] = end
    audio_starts = torch.tensor([sum(len(ids) for _, ids in row[:3]) for row in rows])
    return Spliced(token_ids, kinds, lens, labels, audio_starts)


class PromptProjector(nn.Module):
    """A small network on the embeddings of the prompt's text, trained while the language model may be frozen.

    arXiv 2601.20898: which prompt is best differs from one data set to the next, and a learned projection of its
    embeddings does better than the best of them. Here it is residual and begins as the identity, so that training
    starts from the prompt as it is written.
    """

    def __init__(self, config: PromptProjectorConfig, dim: int) -> None:
        super().__init__()
        self.in_proj = nn.Linear(dim, config.hidden)
        self.out_proj = nn.Linear(config.hidden, dim)
        nn.init.zeros_(self.out_proj.weight)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, text_embeds: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        x = text_embeds.to(self.in_proj.weight.dtype)
        return x + self.out_proj(nn.functional.silu(self.in_proj(x)))


class PromptEmbedder(nn.Module):
    """Embeds what `splice` laid out; has the prompt's learned parts, and no parameters where they are off.

    Learned embeddings begin as those of tokens drawn at random, as the language model knows such (arXiv 2104.08691).
    """

    def __init__(self, config: PromptConfig, llm: LanguageModel) -> None:
        super().__init__()

        def embeddings(count: int) -> nn.Parameter | None:
            if not count:
                return None
            return nn.Parameter(llm.embed(torch.randint(llm.vocab_size, (count,))).detach().float().clone())

        self.soft = embeddings(config.soft_tokens)  # (n, D)
        self.boundary = embeddings(2 * config.boundary)  # (2, D): before and after the audio
        self.projector = PromptProjector(config.projector, llm.hidden_size) if config.projector is not None else None

    def no_weight_decay(self) -> set[str]:
        """Learned embeddings would go to zero where they are seldom used (see `optim.parameter_groups`)."""
        return {name for name in ("soft", "boundary") if getattr(self, name) is not None}

    def forward(self, spliced: Spliced, token_embeds: Tensor, audio_embeds: Tensor) -> Tensor:
        """Put everything that is no plain token in its place.

        Args:
          spliced: of N rows and L positions, on the device of the embeddings.
          token_embeds: (N, L, D), the language model's of `spliced.token_ids`.
          audio_embeds: (M, D), those of all rows one after the other.

        Returns:
          inputs_embeds (N, L, D), of the type of `token_embeds`.
        """
        rows = len(spliced.lens)
        parts = [(Kind.AUDIO, audio_embeds)]
        if self.soft is not None:
            parts.append((Kind.SOFT, self.soft.repeat(rows, 1)))
        if self.boundary is not None:
            parts.append((Kind.BOUNDARY, self.boundary.repeat(rows, 1)))
        if self.projector is not None:
            parts.append((Kind.TEXT, self.projector(token_embeds[spliced.kinds == Kind.TEXT])))
        embeds = token_embeds
        for kind, values in parts:
            embeds = embeds.masked_scatter((spliced.kinds == kind)[..., None], values.to(embeds.dtype))
        return embeds
