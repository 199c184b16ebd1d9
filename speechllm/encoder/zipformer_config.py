"""The sizes of a Zipformer and the rest of its configuration, in the keys of icefall's and Auden's config.json."""

import dataclasses
import difflib
import math
from dataclasses import dataclass, field

PER_STACK = (
    "downsampling_factor",
    "num_encoder_layers",
    "encoder_dim",
    "encoder_unmasked_dim",
    "feedforward_dim",
    "num_heads",
    "query_head_dim",
    "value_head_dim",
    "pos_head_dim",
    "cnn_module_kernel",
)

# What Auden means where its config.json lacks a key and icefall's default is another.
AUDEN_DEFAULTS = {"feedforward_dim": [576, 768, 1152, 1536, 1152, 768]}

# Keys of icefall, its relatives and transformers for what is beside the encoder, near to keys of the encoder.
_NOT_OF_THE_ENCODER = {
    "num_beams",
    "decoder_dim",
    "num_decoder_layers",
    "encoder_out_dim",
    "encoder_output_dim",
    "subsampling_factor",
}
# From this share of common letters on, an unknown key is taken for a mistyped one. transformers' own keys are below.
_SIMILAR = 0.72


def _mistyped(key: str, known: list[str]) -> str | None:
    """The known key that `key` looks like, whatever its capitals, hyphens and underscores; None if there is none."""

    def letters(text: str) -> str:
        return text.lower().replace("_", "").replace("-", "")

    if key.startswith("_") or key in _NOT_OF_THE_ENCODER:
        return None
    names = {letters(name): name for name in known}
    nearest = difflib.get_close_matches(letters(key), names, n=1, cutoff=_SIMILAR)
    return names[nearest[0]] if nearest else None


@dataclass
class ZipformerConfig:
    """What a released encoder's config.json holds. Lists have one entry per stack; one entry or a number
    serves all. The defaults are those of icefall's `zipformer/train.py`.

    Args:
        feature_dim: mel bins.
        downsampling_factor: each stack's, relative to the 50 frames a second of the front end.
        encoder_unmasked_dim: in training the dimensions above this are dropped for some utterances.
        feedforward_dim: of the second of the three feed-forward modules; the others are 3/4 and 5/4 as wide.
        pos_dim: width of the relative position encoding, even.
        output_downsampling_factor: of the final downsampling, 2 for an output of 25 frames a second.
        subsampling_channels: of the three convolutions in the front end, where a small model spends most of
            its time.
        dropout: None for icefall's schedule, 0.3 falling to 0.1 over 20,000 batches.
        warmup_batches: over how many batches the layers come into play, one stack after the other.
        causal: whether an output may depend on later chunks. The next two are for causal models only.
        chunk_size: in frames of 20 ms, a multiple of all downsampling factors; -1 is the whole utterance. One
            of the list is drawn for each training batch; in eval mode the largest is used, or what `forward`
            is told.
        left_context_frames: how many frames before its chunk attention sees, rounded down to whole chunks; -1
            is all.

    Raises:
        ValueError: naming the key, its value and what is allowed.
    """

    feature_dim: int = 80
    output_downsampling_factor: int = 2
    downsampling_factor: list[int] = field(default_factory=lambda: [1, 2, 4, 8, 4, 2])
    num_encoder_layers: list[int] = field(default_factory=lambda: [2, 2, 3, 4, 3, 2])
    encoder_dim: list[int] = field(default_factory=lambda: [192, 256, 384, 512, 384, 256])
    encoder_unmasked_dim: list[int] = field(default_factory=lambda: [192, 192, 256, 256, 256, 192])
    feedforward_dim: list[int] = field(default_factory=lambda: [512, 768, 1024, 1536, 1024, 768])
    num_heads: list[int] = field(default_factory=lambda: [4, 4, 4, 8, 4, 4])
    query_head_dim: list[int] = field(default_factory=lambda: [32])
    value_head_dim: list[int] = field(default_factory=lambda: [12])
    pos_head_dim: list[int] = field(default_factory=lambda: [4])
    pos_dim: int = 48
    cnn_module_kernel: list[int] = field(default_factory=lambda: [31, 31, 15, 15, 15, 31])
    subsampling_channels: list[int] = field(default_factory=lambda: [8, 32, 128])
    dropout: float | None = None
    warmup_batches: float = 4000.0
    causal: bool = False
    chunk_size: list[int] = field(default_factory=lambda: [16, 32, 64, -1])
    left_context_frames: list[int] = field(default_factory=lambda: [64, 128, 256, -1])

    def __post_init__(self) -> None:
        def check(ok: bool, key: str, allowed: str) -> None:
            if not ok:
                raise ValueError(f"Zipformer configuration: {key} is {getattr(self, key)!r}, but must be {allowed}")

        for key in ("feature_dim", "output_downsampling_factor", "pos_dim"):
            check(type(getattr(self, key)) is int, key, "a whole number")
        check(self.dropout is None or type(self.dropout) in (int, float), "dropout", "null or a number")
        check(type(self.warmup_batches) in (int, float), "warmup_batches", "a number")
        check(type(self.causal) is bool, "causal", "true or false")
        for key in (*PER_STACK, "chunk_size", "left_context_frames", "subsampling_channels"):
            value = getattr(self, key)
            value = list(value) if isinstance(value, (list, tuple)) else [value]
            setattr(self, key, value)
            check(bool(value) and all(type(v) is int for v in value), key, "a whole number or a list of such")
        num_stacks = len(self.downsampling_factor)
        for key in PER_STACK:
            value = getattr(self, key)
            check(
                len(value) in (1, num_stacks),
                key,
                f"1 or {num_stacks} numbers, as downsampling_factor has {num_stacks}",
            )
            check(min(value) > 0, key, "positive")
            setattr(self, key, value * num_stacks if len(value) == 1 else value)
        check(self.feature_dim >= 7, "feature_dim", "at least 7")
        check(self.output_downsampling_factor > 0, "output_downsampling_factor", "positive")
        check(self.pos_dim > 0 and self.pos_dim % 2 == 0, "pos_dim", "positive and even")
        check(all(k % 2 for k in self.cnn_module_kernel), "cnn_module_kernel", "odd")
        check(all(d % 4 == 0 for d in self.encoder_dim), "encoder_dim", "multiples of 4")
        check(all(d % 4 == 0 for d in self.feedforward_dim), "feedforward_dim", "multiples of 4")
        check(
            all(u <= d for u, d in zip(self.encoder_unmasked_dim, self.encoder_dim, strict=True)),
            "encoder_unmasked_dim",
            f"no larger than encoder_dim {self.encoder_dim} in any stack",
        )
        channels = self.subsampling_channels
        check(len(channels) == 3 and min(channels) > 0, "subsampling_channels", "3 positive numbers")
        check(self.dropout is None or 0 <= self.dropout < 1, "dropout", "null or from 0 to below 1")
        check(self.warmup_batches > 0, "warmup_batches", "positive")
        if self.causal:
            multiple = math.lcm(*self.downsampling_factor)
            check(
                all(c == -1 or (c > 0 and c % multiple == 0) for c in self.chunk_size),
                "chunk_size",
                f"-1 or multiples of {multiple}, which all of downsampling_factor divide",
            )
            check(
                all(c == -1 or c > 0 for c in self.left_context_frames),
                "left_context_frames",
                "-1 or positive",
            )

    @classmethod
    def from_dict(cls, values: dict) -> "ZipformerConfig":
        """From the contents of a config.json, which may have keys of the framework that wrote it.

        Where a key is absent, Auden's default counts if there is a "model_type", which Auden always writes, and else
        icefall's.

        Raises:
            ValueError: for keys that look like mistyped ones, and as the constructor does.
        """
        known = [f.name for f in dataclasses.fields(cls)]
        mistyped = {
            key: near
            for key, value in values.items()
            # no key of ours has a text: encoder_name is no mistyped encoder_dim
            if key not in known and not isinstance(value, str) and (near := _mistyped(key, known))
        }
        if mistyped:
            questions = "; ".join(f"unknown key {key}, did you mean {near}?" for key, near in mistyped.items())
            raise ValueError(f"Zipformer configuration: {questions} Known keys are {', '.join(known)}")
        defaults = AUDEN_DEFAULTS if "model_type" in values else {}
        return cls(**defaults | {key: value for key, value in values.items() if key in known})

    def to_dict(self) -> dict:
        """As config.json has it."""
        return {"model_type": "zipformer", **dataclasses.asdict(self)}
