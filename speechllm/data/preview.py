"""Utterances as they are and as training gets them, to hear and to see: `speechllm data preview`."""

from __future__ import annotations

import logging
import math
import random
import re
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from lhotse.cut import Cut
from torch import Tensor

from speechllm.data.audio import load_samples
from speechllm.data.audio_file import UtteranceError
from speechllm.data.augment.augmenter import AugmentConfig, Augmenter, SpeedConfig, VolumeConfig
from speechllm.data.augment.specaugment import SpecAugmentConfig
from speechllm.data.dataset import augmentation_rng
from speechllm.data.features import FRAME_SHIFT, NUM_MEL_BINS, SAMPLE_RATE, fbank
from speechllm.data.loader import DataConfig
from speechllm.data.manifests.manifest import (
    LINE_ERRORS,
    ManifestError,
    SourceConfig,
    describe_cut,
    explain,
    iter_objects,
    to_cut,
)
from speechllm.data.manifests.source import target_text
from speechllm.errors import UserError
from speechllm.files import replaced_file

DEFAULT_AUGMENT = AugmentConfig(speed=SpeedConfig(), volume=VolumeConfig(), spec_augment=SpecAugmentConfig())
"""Without a configuration: what most recipes for speech recognition have, as far as it needs no other recordings."""

_VOICES = 100
# matplotlib's own font has no Chinese, Japanese and Korean characters; the first of these that are installed have.
_FONTS = ("Noto Sans CJK SC", "Source Han Sans SC", "WenQuanYi Micro Hei", "Droid Sans Fallback", "PingFang SC")


@dataclass
class PreviewConfig:
    """What is needed of an experiment's configuration, which may have the data section alone."""

    data: DataConfig
    model: dict[str, Any] = field(default_factory=dict)
    optim: dict[str, Any] = field(default_factory=dict)
    train: dict[str, Any] = field(default_factory=dict)
    stages: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Preview:
    """One utterance as read and `augmented`: (num_samples,) float32 at 16 kHz and (T, 80) features of each. `speed` is
    the factor that was drawn; the files are called after `name`."""

    name: str
    id: str
    text: str
    speed: float
    samples: np.ndarray
    augmented_samples: np.ndarray
    features: Tensor
    augmented_features: Tensor

    def __str__(self) -> str:
        before, after = (
            f"{len(samples) / SAMPLE_RATE:6.2f} s {_level(samples):6.1f} dB"
            for samples in (self.samples, self.augmented_samples)
        )
        return f"{self.name}\t{before} -> {after}\tspeed {self.speed:g}\t{self.text}"


def write_previews(
    sources: Sequence[SourceConfig],
    output: Path,
    *,
    count: int,
    seed: int,
    augment: AugmentConfig = DEFAULT_AUGMENT,
    text_steps: Sequence[str] = (),
) -> Iterator[Preview]:
    """Draw `count` utterances from all lines of the manifests and write NAME.wav, NAME-augmented.wav and NAME.png of
    each into the folder `output`; what is written is yielded, what cannot be used is logged.

    The augmentation is that of the first epoch of a training run with this `seed`, with one exception: the voices of
    babble are other ones. The wavs have 32-bit floats, as the features are made of them.

    Raises:
        UserError: matplotlib is not installed; the manifests have no usable line.
        ManifestError: a manifest is missing.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise UserError("the pictures of a preview need matplotlib: pip install 'speechllm[plot]'") from error
    rng = random.Random(seed)
    chosen = _sample(_objects(sources), count, rng)
    if not chosen:
        raise UserError(
            f"{', '.join(source.path for source in sources)}: no usable line; `speechllm data check` says why"
        )
    voices = _cuts(_sample(_objects(sources), _VOICES, rng)) if augment.babble else ()
    augmenter = Augmenter(augment, [cut for _, cut in voices])
    for number, (location, cut) in enumerate(_cuts(chosen)):
        name = f"{number:03d}-" + re.sub(r"[^\w.-]+", "_", cut.id)[-80:]
        try:
            made = _preview(name, cut, augmenter, seed, text_steps)
        except UtteranceError as error:
            logging.warning("left out %s: %s", location, error)
            continue
        for suffix, samples in (("", made.samples), ("-augmented", made.augmented_samples)):
            with replaced_file(output / f"{name}{suffix}.wav") as tmp:
                soundfile.write(tmp, samples, SAMPLE_RATE, format="WAV", subtype="FLOAT")
        with replaced_file(output / f"{name}.png") as tmp:
            _plot(made, tmp)
        yield made


def _objects(sources: Iterable[SourceConfig]) -> Iterator[tuple[str, dict, SourceConfig]]:
    """The lines that are objects."""
    for source in sources:
        for location, obj in iter_objects(source):
            if not isinstance(obj, ManifestError):
                yield location, obj, source


def _sample(items: Iterable, count: int, rng: random.Random) -> list:
    """`count` of the items, each with the same probability, in one reading (reservoir sampling)."""
    chosen: list = []
    for seen, item in enumerate(items):
        if seen < count:
            chosen.append(item)
        elif (place := rng.randrange(seen + 1)) < count:
            chosen[place] = item
    return chosen


def _cuts(chosen: Iterable[tuple[str, dict, SourceConfig]]) -> Iterator[tuple[str, Cut]]:
    for location, obj, source in chosen:
        try:
            yield location, to_cut(obj, source)
        except LINE_ERRORS as error:
            logging.warning("left out %s: %s", location, explain(error))


def _preview(name: str, cut: Cut, augmenter: Augmenter, seed: int, text_steps: Sequence[str]) -> Preview:
    rng = augmentation_rng(seed, epoch=1, times=0, id=cut.id)
    samples = load_samples(cut)
    # a run draws speeds before it makes batches
    speed = float(augmenter.config.draw_speeds(1, augmentation_rng(seed, epoch=0, times=0, id=cut.id))[0])
    augmented = augmenter.samples(load_samples(cut, speed=speed), rng)
    features = augmenter.features(fbank(augmented), rng, "fbank")
    text = target_text(describe_cut(cut), text_steps)
    return Preview(name, cut.id, text, speed, samples, augmented, fbank(samples), features)


def _level(samples: np.ndarray) -> float:
    return 10 * math.log10(max(float(np.mean(np.square(samples, dtype=np.float64))), 1e-12))


def _plot(preview: Preview, path: Path) -> None:
    from matplotlib import font_manager
    from matplotlib.figure import Figure

    both = {"as read": preview.features, "as the model gets it": preview.augmented_features}
    seconds = max(len(features) for features in both.values()) * FRAME_SHIFT
    figure = Figure(figsize=(min(max(8.0, seconds), 30.0), 6.0), layout="constrained")
    axes = figure.subplots(2, 1, sharex=True)
    # one scale, that of the untouched features, so that volume and noise show
    low, high = float(preview.features.min()), float(preview.features.max())
    for axis, (name, features) in zip(axes, both.items(), strict=True):
        image = axis.imshow(
            features.T.numpy(),
            origin="lower",
            aspect="auto",
            interpolation="nearest",
            extent=(0, len(features) * FRAME_SHIFT, 0, NUM_MEL_BINS),
            vmin=low,
            vmax=high,
        )
        axis.set(title=name, ylabel="mel bin", xlim=(0, seconds))
    axes[-1].set_xlabel("seconds")
    figure.colorbar(image, ax=axes, label="log mel energy")
    installed = set(font_manager.get_font_names())
    fonts = ["DejaVu Sans", *(font for font in _FONTS if font in installed)]
    shown = textwrap.shorten(preview.text, 200, placeholder=" ...")
    title = figure.suptitle(f"{preview.id}\n{shown}", fontfamily=fonts, wrap=True)
    title.set_parse_math(False)  # a text with two dollar signs is no formula
    figure.savefig(path, format="png", dpi=100)
