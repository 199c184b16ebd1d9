"""What the language model reads, token by token, to be looked at: `speechllm prompt show`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, groupby, islice

import torch

from speechllm.data.dataset import instruction_draw
from speechllm.data.features import FRAME_SHIFT
from speechllm.data.manifests.manifest import SourceConfig, describe_cut, read_manifest
from speechllm.data.manifests.source import label_of, said_words
from speechllm.llm.interface import IGNORE
from speechllm.model.speech_llm import SpeechLLM
from speechllm.prompt.label import WordTime
from speechllm.prompt.request import Request
from speechllm.prompt.splice import Kind, Spliced
from speechllm.text.normalize import normalize_text
from speechllm.text.tokenizer import Tokenizer

# How runs of positions that are no tokens are shown.
_EMBEDDINGS = {Kind.SOFT: "soft", Kind.BOUNDARY: "boundary", Kind.AUDIO: "audio"}


@dataclass(frozen=True)
class MadeUp:
    """An utterance without audio."""

    text: str
    request: Request
    seconds: float = 5.0
    words: Sequence[WordTime] | None = None


def show_prompts(
    model: SpeechLLM,
    data: Sequence[SourceConfig] | MadeUp,
    *,
    count: int,
    seed: int,
    text_steps: Sequence[str],
    chunk_seconds: float | None = None,
) -> Iterator[str]:
    """The first `count` utterances of the manifests, or the one that is made up, as training reads them.

    No audio is opened: its length is that of the manifest, at its own speed.

    Args:
      seed: of the training run, whose first epoch draws the instructions.
      text_steps: normalization of the labels (`speechllm.text.normalize`).
      chunk_seconds: as streams of such chunks, one of the model's; None for all audio before the text.

    Raises:
      UserError: an utterance lacks what the prompt needs; a line of a manifest cannot be used.
    """
    for name, utterance, label in _utterances(model, data, count, seed, text_steps):
        frames = torch.tensor([round(utterance.seconds / FRAME_SHIFT)])
        audio_lens = model.audio_lens(frames)
        asked, label_ids = [utterance.request], [model.label_ids(label)]
        if chunk_seconds is None:
            spliced = model.spliced(audio_lens, asked, label_ids)
        else:
            words = [utterance.words or _spread(label, utterance.seconds)]
            spliced = model.streamed(model.chunks[chunk_seconds], frames, audio_lens, asked, label_ids, words)
        lines = [
            f"{name}: {utterance.seconds:.2f} s, {int(spliced.lens)} positions",
            *positions(spliced, model.tokenizer),
        ]
        yield "\n".join(lines) + "\n"


def _utterances(
    model: SpeechLLM, data: Sequence[SourceConfig] | MadeUp, count: int, seed: int, text_steps: Sequence[str]
) -> Iterator[tuple[str, MadeUp, str]]:
    """Name, utterance and label."""
    template = model.label_template
    if isinstance(data, MadeUp):
        text = normalize_text(data.text, text_steps, data.request.target_language or data.request.language)
        yield "made up", data, template.fill(text, data.request)
        return
    for cut in islice(chain.from_iterable(map(read_manifest, data)), count):
        entry = describe_cut(cut)
        draw = instruction_draw(seed, epoch=1, times=0, id=cut.id)
        label = label_of(entry, template, text_steps)
        words = said_words(entry, text_steps) if entry.task == "asr" else None
        yield cut.id, MadeUp(entry.target, replace(entry.request, draw=draw), cut.duration, words), label


def _spread(text: str, seconds: float) -> list[WordTime]:
    """The words of a text, evenly over the audio."""
    words = text.split()
    step = seconds / max(len(words), 1)
    return [WordTime(word, i * step, (i + 1) * step) for i, word in enumerate(words)]


def positions(spliced: Spliced, tokenizer: Tokenizer) -> Iterator[str]:
    """A line for each token of the only row, and for each run of embeddings that stand for none: where, id, text, and
    behind an arrow the token whose prediction counts in the loss."""

    def counted(label: int) -> str:
        if label == IGNORE:
            return ""
        return f"  -> {label} {'end of text' if label == tokenizer.eos_id else repr(tokenizer.piece(label))}"

    kinds, ids, labels = (t[0].tolist() for t in (spliced.kinds, spliced.token_ids, spliced.labels))
    for kind, run in groupby(range(len(ids)), key=kinds.__getitem__):
        places = list(run)
        if kind in _EMBEDDINGS:
            where = str(places[0]) if len(places) == 1 else f"{places[0]}-{places[-1]}"
            yield f"{where:>9}         [{_EMBEDDINGS[kind]} x {len(places)}]{counted(labels[places[-1]])}"
            continue
        for i in places:
            yield f"{i:>9}  {ids[i]:>6} {tokenizer.piece(ids[i])!r}{counted(labels[i])}"
