"""A transducer (arXiv 1211.3711) on an encoder: stateless decoder (arXiv 2109.07513), joiner and loss.

Decoder and joiner are those of icefall's zipformer recipe: an embedding and a convolution over the last tokens; a sum
of projections of encoder and decoder, tanh, and a linear layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint

from speechllm.config import check_limits, setting
from speechllm.torchaudio_import import import_torchaudio

# The joiner's logits that are in memory at once: 64 MiB in float32.
_LOGITS_AT_ONCE = 2**24
_CONV_GROUP = 4  # channels, as in icefall


@dataclass
class TransducerConfig:
    """`decoder_dim`: of the token embeddings; `joiner_dim`: in which encoder and decoder are added up;
    `context_size`: how many tokens the decoder sees; `weight` of the loss. The sizes are icefall's."""

    decoder_dim: int = setting(512, at_least=1)
    joiner_dim: int = setting(512, at_least=1)
    context_size: int = setting(2, at_least=1)
    weight: float = setting(1.0, "leave transducer out to train without it", above=0)

    def __post_init__(self) -> None:
        check_limits(self)
        if self.decoder_dim % _CONV_GROUP:
            raise ValueError(f"decoder_dim must be a multiple of {_CONV_GROUP}, got {self.decoder_dim}")


class Transducer(nn.Module):
    """Decoder and joiner.

    Args:
      encoder_dim: width of the encoder's output.
      num_tokens: token ids are in [0, num_tokens); blank is the class behind them, and what stands before a text.
    """

    def __init__(self, config: TransducerConfig, encoder_dim: int, num_tokens: int) -> None:
        super().__init__()
        self.blank_id = num_tokens
        self.context_size = config.context_size
        self.embedding = nn.Embedding(num_tokens + 1, config.decoder_dim)
        groups = config.decoder_dim // _CONV_GROUP
        self.conv = nn.Conv1d(config.decoder_dim, config.decoder_dim, config.context_size, groups=groups, bias=False)
        self.encoder_proj = nn.Linear(encoder_dim, config.joiner_dim)
        self.decoder_proj = nn.Linear(config.decoder_dim, config.joiner_dim)
        self.output = nn.Linear(config.joiner_dim, num_tokens + 1)

    def read(self, tokens: Tensor) -> Tensor:
        """The decoder, projected for the joiner: tokens (N, context_size - 1 + P) -> (N, P, joiner_dim).

        Position p has seen the tokens p to p + context_size - 1.
        """
        embeds = self.embedding(tokens).transpose(1, 2)
        return self.decoder_proj(self.conv(embeds).transpose(1, 2).relu())

    def join(self, audio: Tensor, text: Tensor) -> Tensor:
        """Both (..., joiner_dim), `audio` from `encoder_proj`, `text` from `read` -> logits (..., num_tokens + 1)."""
        return self.output((audio + text).tanh())

    def forward(self, encoder_out: Tensor, encoder_out_lens: Tensor, label_ids: Sequence[Sequence[int]]) -> Tensor:
        """Losses (N,), float32: -log p(label | audio), summed over all alignments; a frame may have any number
        of tokens.

        The logits of so many frames as `_LOGITS_AT_ONCE` allows are held at a time, and computed again in the backward
        pass: memory does not grow with T * U * V.

        Args:
          encoder_out: (N, T, D); encoder_out_lens: (N,); label_ids: N token lists.
        """
        n, frames, _ = encoder_out.shape
        device = encoder_out.device
        rows = [torch.tensor([self.blank_id] * self.context_size + list(ids)) for ids in label_ids]
        tokens = pad_sequence(rows, batch_first=True, padding_value=self.blank_id).to(device)
        labels = tokens[:, self.context_size :]  # (N, U)
        audio, text = self.encoder_proj(encoder_out), self.read(tokens)
        widest = max(audio.shape[-1], self.blank_id + 1)  # of the joiner's two layers
        step = max(1, _LOGITS_AT_ONCE // (n * text.shape[1] * widest))
        slices = [
            checkpoint(self._scores, part, text, labels, use_reentrant=False, preserve_rng_state=False)
            for part in audio.split(step, dim=1)
        ]
        blank_scores, label_scores = (torch.cat(parts, dim=1) for parts in zip(*slices, strict=True))
        label_lens = torch.tensor([len(ids) for ids in label_ids], device=device)
        return -alignments_log_prob(blank_scores, label_scores, encoder_out_lens.to(device), label_lens)

    def _scores(self, audio: Tensor, text: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Log probabilities of blank (N, T, U + 1) and of the label's next token (N, T, U)."""
        logits = self.join(audio[:, :, None], text[:, None]).float()
        scale = logits.logsumexp(-1)
        next_tokens = labels[:, None, :, None].expand(-1, logits.shape[1], -1, -1)
        label_scores = logits[:, :, :-1].gather(-1, next_tokens)[..., 0] - scale[:, :, :-1]
        return logits[..., self.blank_id] - scale, label_scores


def alignments_log_prob(blank_scores: Tensor, label_scores: Tensor, lens: Tensor, label_lens: Tensor) -> Tensor:
    """log of the summed probabilities of all alignments: (N,), float32, by torchaudio's transducer loss.

    With u tokens said at frame t, an alignment goes on with token u + 1 (at the same frame), or with blank to frame
    t + 1; it ends with the blank of the last frame (arXiv 1211.3711, section 2.4). torchaudio would take the logits of
    all classes; of these it needs but two at each place, and so gets no more.

    Args:
      blank_scores: (N, T, U + 1), log probability of blank at frame t once u tokens are said.
      label_scores: (N, T, U), that of token u + 1.
      lens: (N,) frames; label_lens: (N,). What lies beyond them has no influence.

    Raises:
      UserError: torchaudio does not import.
    """
    lens, label_lens = (x.to(blank_scores.device, torch.int32) for x in (lens, label_lens))
    frames, tokens = int(lens.max()), int(label_lens.max())  # torchaudio wants no more than these
    no_token_left = label_scores.new_zeros(*label_scores.shape[:2], 1)
    scores = torch.stack([blank_scores, torch.cat([label_scores, no_token_left], dim=2)], dim=-1)
    scores = scores[:, :frames, : tokens + 1].float()
    # It sums in float32, over thousands of places. Every alignment takes one score for each frame and each token: less
    # by what the whole has on average, sums stay near 0, where their differences are not lost.
    with torch.no_grad():
        steps = (lens + label_lens).double()
        average = _rnnt_log_prob(scores, lens, label_lens) / steps
    rest = _rnnt_log_prob(scores - average.float()[:, None, None, None], lens, label_lens)
    return rest + (average.float().double() * steps).float()


def _rnnt_log_prob(scores: Tensor, lens: Tensor, label_lens: Tensor) -> Tensor:
    """torchaudio's transducer loss, negated, of scores (N, T, U + 1, 2): of blank, and of the next token."""
    targets = torch.ones(len(scores), scores.shape[2] - 1, dtype=torch.int32, device=scores.device)
    options = {"blank": 0, "reduction": "none", "fused_log_softmax": False}
    return -import_torchaudio().functional.rnnt_loss(scores, targets, lens, label_lens, **options)
