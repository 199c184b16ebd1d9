"""CTC posteriors as the projector: LegoSLM (arXiv 2505.11352). The encoder's CTC head says which pieces of text it
hears, and the language model reads their embeddings, weighted by how sure the head is.

What is this module's own: frames that are surely blank are left out and a piece is one position however long it lasts,
so that the language model reads about as many positions as the text has pieces; blank has an embedding, which tells a
doubtful position from a sure one also to a language model that begins with a layer norm, as RWKV-7 does.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from speechllm.projector import frames
from speechllm.projector.base import Projector

# A frame in which blank is more probable than this is left out. Not 0.5: what the head half heard, and would not write,
# the language model may make a word of.
_SURELY_BLANK = 0.9


class CTCProjector(Projector):
    """Logits of a CTC head -> one position for each run of frames with the same best piece. T' is at most T.

    The frame of the run in which blank is least probable stands for it: its embedding is the sum of the embeddings of
    all pieces and of blank, weighted by their probabilities. Of an utterance in which every frame is surely blank the
    least blank frame is left, so that there always is a position.

    Args:
      output_dim: D_llm.
      table: (V, D_llm), where the embeddings of the head's V pieces start that are learned here; None where the pieces
        are the language model's own tokens, whose embeddings are given to `forward`.
    """

    downsample = 1

    def __init__(self, output_dim: int, table: Tensor | None = None) -> None:
        super().__init__()
        self.table = None if table is None else nn.Parameter(table.clone())
        self.blank = nn.Parameter(torch.zeros(output_dim))

    def no_weight_decay(self) -> set[str]:
        """Embeddings would go to zero where they are seldom used (see `optim.parameter_groups`)."""
        return set() if self.table is None else {"table"}

    def output_lens(self, lens: Tensor) -> Tensor:
        """The most audio positions (N,) that `lens` (N,) encoder frames can make; `forward` returns how many they
        are."""
        return lens

    def forward(self, logits: Tensor, lens: Tensor, llm_embeds: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Logits (N, T, V + 1) with blank last, (N,) -> `audio_embeds` (N, T', D_llm) and their lengths (N,).

        Args:
          llm_embeds: (V, D_llm), where there is no table.
        """
        probs = frames.masked(logits, lens).float().softmax(-1)
        positions, position_lens = representative_frames(probs, lens)
        probs = probs.gather(1, positions[..., None].expand(-1, -1, probs.shape[2]))
        embeds = self.table if self.table is not None else llm_embeds
        if embeds is None:
            raise ValueError("CTCProjector: without a table it needs llm_embeds")
        embeds = torch.cat((embeds, self.blank[None].to(embeds.dtype)))
        return F.linear(probs.to(embeds.dtype), embeds.T), position_lens


def representative_frames(probs: Tensor, lens: Tensor) -> tuple[Tensor, Tensor]:
    """The frame that stands for each run, (N, R), padded with frame 0, and how many runs there are, (N,).

    Args:
      probs: (N, T, V + 1), blank last; lens: (N,).
    """
    n, t, _ = probs.shape
    is_frame = frames.within(lens, t)
    blank = probs[..., -1].detach().masked_fill(~is_frame, 2.0)  # beyond a length worse than any frame
    best = probs[..., :-1].argmax(-1)
    least = blank.argmin(1, keepdim=True)
    is_heard = (blank <= _SURELY_BLANK).scatter(1, least, True) & is_frame
    before = F.pad(is_heard, (1, 0))[:, :-1] & (best == F.pad(best, (1, 0))[:, :-1])
    run = (is_heard & ~before).cumsum(1).masked_fill(~is_heard, 0)  # from 1; 0 is for what is in no run
    run_lens = run.amax(1)
    num_runs = int(run_lens.max())
    lowest = blank.new_full((n, num_runs + 1), 2.0).scatter_reduce(1, run, blank, "amin")
    is_lowest = is_heard & (blank == lowest.gather(1, run))
    # of equals the first; what is no such frame is sent to the first column, which goes
    frame = torch.arange(t, device=probs.device).expand(n, t)
    column = run.masked_fill(~is_lowest, 0)
    first = frame.new_full((n, num_runs + 1), t).scatter_reduce(1, column, frame, "amin")[:, 1:]
    return first.masked_fill(~frames.within(run_lens, num_runs), 0), run_lens
