"""Whisper's encoder: log-mel features at 100 frames a second in, embeddings at 50 out.

"Robust speech recognition via large-scale weak supervision" (Radford et al., arXiv 2212.04356); its layers are those of
transformers, and the names of the parameters too. Whisper was trained on audio padded to 30 seconds with silence, all
of which attention sees. Here by default an utterance is as long as it is, and the padding of a batch is masked: that
costs less, and is a little different from what released weights have seen. As the encoder of a language model Whisper
is used both ways: without padding in SLAM-LLM (arXiv 2402.08846) and icefall's speech_llm/ASR_LLM, padded to 30 seconds
in SALMONN (arXiv 2310.13289); here the latter is `pad_to_max_seconds`.
"""

import dataclasses
import inspect
import itertools
import re
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from speechllm.encoder.zipformer import run, shortest_and_longest
from speechllm.errors import UserError
from speechllm.linear import use_own_products
from speechllm.quiet import quiet

# What training programs put in front of the names of a model that they wrap.
WRAPPERS = re.compile(r"^((module|model|_orig_mod|_forward_module)\.)*")
# Where the encoder's weights are in a file: of the model with its head, of the model without, of Auden's models and
# rwkv_asr's; or of the encoder alone.
_PREFIX = re.compile(
    WRAPPERS.pattern + r"((audio_|speech_|whisper_)?encoder\.)+|(?=(conv\d|embed_positions|layers|layer_norm)\.)"
)
_SIZES = (
    "num_mel_bins",
    "d_model",
    "encoder_layers",
    "encoder_attention_heads",
    "encoder_ffn_dim",
    "max_source_positions",
)
_DROPOUTS = ("dropout", "attention_dropout", "activation_dropout")
_FEATURE_KINDS = {80: "whisper80", 128: "whisper128"}


@dataclass
class WhisperEncoderConfig:
    """The encoder's part of a released Whisper's config.json, named as there; the defaults are those of whisper-small.

    Args:
        num_mel_bins: 80, or 128 as of large-v3.
        max_source_positions: the most frames it can give, 50 a second.

    Raises:
        ValueError: naming the key, its value and what is allowed.
    """

    num_mel_bins: int = 80
    d_model: int = 768
    encoder_layers: int = 12
    encoder_attention_heads: int = 12
    encoder_ffn_dim: int = 3072
    max_source_positions: int = 1500
    dropout: float = 0.0
    attention_dropout: float = 0.0
    activation_dropout: float = 0.0

    def __post_init__(self) -> None:
        def check(ok: bool, key: str, allowed: str) -> None:
            if not ok:
                raise ValueError(f"Whisper configuration: {key} is {getattr(self, key)!r}, but must be {allowed}")

        for key in _SIZES:
            check(type(getattr(self, key)) is int, key, "a whole number")
        for key in _DROPOUTS:
            check(type(getattr(self, key)) in (int, float), key, "a number")
        check(self.num_mel_bins in _FEATURE_KINDS, "num_mel_bins", "80 or 128")
        for key in ("encoder_layers", "encoder_attention_heads", "encoder_ffn_dim", "max_source_positions"):
            check(getattr(self, key) > 0, key, "positive")
        heads = self.encoder_attention_heads
        check(self.d_model > 2 and self.d_model % 2 == 0, "d_model", "even, and more than 2")
        check(self.d_model % heads == 0, "d_model", f"a multiple of encoder_attention_heads, {heads}")
        for key in _DROPOUTS:
            check(0 <= getattr(self, key) < 1, key, "from 0 to below 1")

    @classmethod
    def from_released(cls, values: dict[str, Any]) -> "WhisperEncoderConfig":
        """Out of the contents of a config.json, which has the decoder's sizes and more as well.

        Raises:
            ValueError: for sizes that are missing, and as the constructor does.
        """
        if missing := [name for name in _SIZES if name not in values]:
            raise ValueError(f"Whisper configuration: {', '.join(missing)} missing")
        return cls(**{name: values[name] for name in (*_SIZES, *_DROPOUTS) if name in values})

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


class WhisperEncoder(nn.Module):
    """The encoder, front end included. Call it as `encoder(features, feature_lens)`.

    Attributes:
        config: its WhisperEncoderConfig.
        output_dim, frame_seconds, feature_kind, feature_dim, min_frames, max_seconds, num_stacks, checkpoint_layers: as
            Zipformer has them; a stack is one layer.
        stored_stacks: what is read is not features but stored outputs of so many of the lowest layers (see
            `read_stored`); None: features.
        pad_to_max_seconds: silence is put after each utterance, up to `max_seconds`, and attention sees it, as in
            Whisper's own training. The output has the utterance's length all the same.
    """

    frame_seconds = 0.02
    min_frames = 1

    @quiet()
    def __init__(self, config: WhisperEncoderConfig):
        from transformers.models.whisper.configuration_whisper import WhisperConfig  # slow, and not everyone's
        from transformers.models.whisper.modeling_whisper import WhisperEncoderLayer, sinusoids

        super().__init__()
        self.config = config
        self.checkpoint_layers = False
        self.pad_to_max_seconds = False
        self.stored_stacks: int | None = None
        self.output_dim = config.d_model
        self.feature_dim = config.num_mel_bins
        self.feature_kind = _FEATURE_KINDS[config.num_mel_bins]
        self.max_seconds = config.max_source_positions * self.frame_seconds
        self.num_stacks = config.encoder_layers
        self.conv1 = nn.Conv1d(config.num_mel_bins, config.d_model, 3, padding=1)
        self.conv2 = nn.Conv1d(config.d_model, config.d_model, 3, stride=2, padding=1)
        self.embed_positions: Tensor
        self.register_buffer("embed_positions", sinusoids(config.max_source_positions, config.d_model))
        layer_config = WhisperConfig(**dataclasses.asdict(config))
        layer_config._attn_implementation = "sdpa"
        self.layers = nn.ModuleList([WhisperEncoderLayer(layer_config) for _ in range(config.encoder_layers)])
        use_own_products(self.layers)
        self.layer_norm = nn.LayerNorm(config.d_model)

    @staticmethod
    def is_in_released(name: str) -> bool:
        """Whether a weight of a released Whisper is the encoder's."""
        return _PREFIX.match(name) is not None

    @staticmethod
    def state_dict_of(weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """The weights of a released Whisper's encoder under the names that they have here."""
        names = {name: _PREFIX.sub("", name, count=1) for name in weights}
        return {own.removesuffix(".weight") if "positions" in own else own: weights[n] for n, own in names.items()}

    @property
    def frozen_stacks(self) -> int:
        """How many of the lowest layers are not trained, the front end included; all of them: nor is `layer_norm`."""

        def frozen(module: nn.Module) -> bool:
            return not any(p.requires_grad for p in module.parameters())

        if not (frozen(self.conv1) and frozen(self.conv2)):
            return 0
        count = len(list(itertools.takewhile(frozen, self.layers)))
        return count if count < len(self.layers) or frozen(self.layer_norm) else count - 1

    def read_stored(self, num_stacks: int, kind: str) -> None:
        """From now on `forward` takes outputs of the lowest layers, as `rows_of` makes them, in place of features.

        Args:
            num_stacks: how many layers they have been through; of all, `layer_norm` too.
            kind: the name of such features, which is `feature_kind` from now on.
        """
        self.stored_stacks, self.feature_kind, self.feature_dim = num_stacks, kind, self.output_dim // 2

    def lower(self, features: Tensor, num_stacks: int) -> Tensor:
        """What the lowest layers make of one utterance, (T, num_mel_bins) -> (2 T', D / 2), to be stored.

        A frame of D values every 20 ms is two rows of half as many, so that a row is 10 ms as of other features.
        """
        lens = torch.tensor([len(features)])
        out, _, stacks = self(features[None], lens, return_stacks=True)
        frames = out if num_stacks == self.num_stacks else stacks[num_stacks - 1]
        return frames[0].reshape(-1, self.output_dim // 2)

    def bottom(self, num_stacks: int) -> list[nn.Module]:
        """The front end and the lowest layers."""
        return [self.conv1, self.conv2, *self.layers[:num_stacks]]

    def output_lens(self, feature_lens: Tensor) -> Tensor:
        """How many output frames utterances of these many feature frames give; (N,) -> (N,)"""
        return (feature_lens + 1) // 2

    def forward(self, features: Tensor, feature_lens: Tensor, return_stacks: bool = False) -> tuple[Tensor, ...]:
        """Features to frames of 20 ms.

        Args:
            features: of its `feature_kind`, 100 frames a second, (N, T, num_mel_bins); anything may lie beyond the
                lengths.
            feature_lens: (N,), in frames, each from 1 to T.
            return_stacks: give the outputs of all layers too.

        Returns:
            encoder_out (N, T', D), encoder_out_lens (N,); with `return_stacks` also (S, N, T', D), the outputs of the S
            layers, of which the last is encoder_out.

        Raises:
            ValueError: if shapes or lengths do not fit.
            UserError: if an utterance is longer than `max_seconds`.
        """
        config = self.config
        shortest, longest = shortest_and_longest(features, feature_lens, self.feature_dim, self.min_frames)
        if longest > 2 * config.max_source_positions:
            raise UserError(
                f"an utterance has {longest / 100:.2f} s, but this Whisper encoder's position embeddings end at "
                f"{self.max_seconds:g} s: lower data.max_seconds, or leave such long ones out of the data to evaluate "
                "(transcribe cuts them at pauses, see --max-segment)"
            )
        feature_lens = feature_lens.to(features.device)
        return self.encode(features[:, :longest], feature_lens, shortest < longest, return_stacks)

    def encode(
        self, features: Tensor, feature_lens: Tensor, padded: bool, return_stacks: bool = False
    ) -> tuple[Tensor, ...]:
        """`forward` without looking at the lengths, which an exporter does not know.

        Args:
            padded: whether one of the lengths may be below T.
        """
        config = self.config
        lens = self.output_lens(feature_lens)
        t = features.shape[1]
        t_out = (t + 1) // 2
        valid = attended = None
        if self.pad_to_max_seconds:
            features = with_silence(features, feature_lens, 2 * config.max_source_positions)
        elif padded:
            valid = (torch.arange(t, device=features.device) < feature_lens[:, None]).unsqueeze(-1)
            attended = torch.arange(t_out, device=features.device) < lens[:, None]
            attended = attended[:, None, None]  # (N, heads, queries, keys)
        checkpointed = self.checkpoint_layers and torch.is_grad_enabled()
        if self.stored_stacks is None:
            x = run(self.front_end, features, valid, checkpointed=checkpointed)
            x = F.dropout(x + self.embed_positions[: x.shape[1]], config.dropout, self.training)
        else:
            x = F.pad(features, (0, 0, 0, features.shape[1] % 2)).reshape(len(features), -1, self.output_dim)
            if self.stored_stacks == self.num_stacks:
                return x, lens
        outputs = []
        for layer in self.layers[self.stored_stacks or 0 :]:
            x = run(partial(_layer_output, layer), x, attended, checkpointed=checkpointed)
            outputs.append(x[:, :t_out])
        outputs[-1] = self.layer_norm(outputs[-1])
        return (outputs[-1], lens, torch.stack(outputs)) if return_stacks else (outputs[-1], lens)

    def front_end(self, features: Tensor, valid: Tensor | None) -> Tensor:
        """(N, T, num_mel_bins) -> (N, (T + 1) // 2, D); `valid` (N, T, 1) is False on padding, None without any."""

        def unpadded(x: Tensor) -> Tensor:
            return x if valid is None else x.masked_fill(~valid, 0.0)

        x = F.gelu(self.conv1(unpadded(features).transpose(1, 2))).transpose(1, 2)
        return F.gelu(self.conv2(unpadded(x).transpose(1, 2))).transpose(1, 2)


def _layer_output(layer: nn.Module, x: Tensor, attended: Tensor | None) -> Tensor:
    """(N, T, D) -> (N, T, D) by a layer of transformers; before 5.1 or so it took and gave more than that."""
    more = {"layer_head_mask": None} if "layer_head_mask" in inspect.signature(layer.forward).parameters else {}
    output = layer(x, attention_mask=attended, **more)
    return output[0] if isinstance(output, tuple) else output


def with_silence(features: Tensor, feature_lens: Tensor, length: int) -> Tensor:
    """Whisper's features (N, T, F), zero-padded, with what silence after each utterance gives: (N, length, F).

    Features are (max(log10(energy), loudest - 8) + 4) / 4: so silence is 2 below the loudest, or what the least energy
    of 1e-10 gives.
    """
    beyond = (torch.arange(length, device=features.device) >= feature_lens[:, None]).unsqueeze(-1)
    features = F.pad(features, (0, 0, 0, length - features.shape[1]))
    loudest = features.masked_fill(beyond, -torch.inf).amax((1, 2), keepdim=True)
    return torch.where(beyond, (loudest - 2.0).clamp(min=-1.5), features)
