"""How a language model is tuned on text. Imports nothing slow: `speechllm tune` makes its options of this."""

from __future__ import annotations

from dataclasses import dataclass

from speechllm.config import check_limits, setting


@dataclass
class TextTuning:
    """`steps` optimizer steps over documents of `tokens_per_step` tokens together, at a peak learning rate of `lr`.

    A document longer than `segment` tokens is read a segment at a time, the state carried from one to the next (without
    its gradient, but in state tuning); shorter ones are packed without padding.

    Raises:
      UserError: a value is out of range.
    """

    steps: int = setting(1000, at_least=1, help="optimizer steps")
    tokens_per_step: int = setting(4096, at_least=1, help="tokens of the documents of a step, together")
    segment: int = setting(
        1024, at_least=1, help="longer documents are read in segments of this many tokens, the state carried on"
    )
    lr: float = setting(1e-4, above=0, help="peak learning rate")
    warmup_steps: int = setting(50, at_least=0)
    valid_every_n: int = setting(200, at_least=1, help="steps between validations, each of which saves")
    bf16: bool = setting(False, help="bfloat16 autocast")
    seed: int = setting(42, help="seed of the order of the documents, and of what begins with random values")

    def __post_init__(self) -> None:
        check_limits(self)
