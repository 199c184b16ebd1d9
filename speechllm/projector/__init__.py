"""Projectors: encoder frames, 25 a second, to language-model embeddings, 25 / k a second.

One interface for all: `projector(encoder_out, encoder_out_lens) -> audio_embeds, audio_lens`, `output_lens`,
`downsample`, and one rule of length, T' = ceil(T / k): the last position stands for what is left of the frames, so none
is lost. Only `ctc`, which reads a CTC head, makes as many positions as it hears pieces, T at most. An utterance gets in
a padded batch what it gets alone.
"""

from speechllm.projector.base import Projector
from speechllm.projector.build import build_projector
from speechllm.projector.config import ProjectorConfig
from speechllm.projector.ctc import CTCProjector
from speechllm.projector.frames import one_after_another
from speechllm.projector.stacks import WeightedStacks

__all__ = ["CTCProjector", "Projector", "ProjectorConfig", "WeightedStacks", "build_projector", "one_after_another"]
