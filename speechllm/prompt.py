"""Prompts, and the splice of text and audio: [before_audio | audio | after_audio | label].

The default is RWKV's chat form, as its official chat checkpoints were trained: `User: ... \\n\\nAssistant: ...`.
"""

from __future__ import annotations

import string
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from speechllm.errors import UserError
from speechllm.tokenizer import Tokenizer

IGNORE = -100  # no loss at this position; PyTorch's cross-entropy default


@dataclass
class PromptConfig:
    """Text before and after the audio, and before the label (which it becomes a part of).

    The slot `{lang}` takes the utterance's language tag.
    """

    before_audio: str = "User: "
    after_audio: str = "<|{lang}|>\n\nAssistant:"
    before_label: str = " "

    def __post_init__(self) -> None:
        for name in ("before_audio", "after_audio"):
            slots = {slot for _, slot, _, _ in string.Formatter().parse(getattr(self, name)) if slot is not None}
            if slots - {"lang"}:
                raise UserError(f"{name}: unknown slot {{{min(slots - {'lang'})}}}; allowed: {{lang}}")
        if not self.before_audio and not self.after_audio:
            raise UserError("a prompt needs text before or after the audio")

    @property
    def needs_language(self) -> bool:
        return "{lang}" in self.before_audio + self.after_audio

    def fill(self, language: str | None) -> tuple[str, str]:
        """The text before and after the audio of an utterance in `language`.

        Raises:
          UserError: the prompt has a `{lang}` slot and the utterance has no language.
        """
        if self.needs_language and not language:
            raise UserError(
                "the prompt has a {lang} slot but the utterance has no language: give `lang` in its manifest "
                "line or data source (or --language), or take {lang} out of the prompt"
            )
        return self.before_audio.format(lang=language), self.after_audio.format(lang=language)


class Spliced(NamedTuple):
    """What the language model reads; L positions, right-padded."""

    token_ids: Tensor  # (N, L) int64, 0 where there is audio or padding
    audio_mask: Tensor  # (N, L) bool, true where an audio embedding goes
    lens: Tensor  # (N,) int64
    labels: Tensor  # (N, L) int64: the token to predict AT each position, IGNORE where there is no loss


def splice(
    prompt: PromptConfig,
    tokenizer: Tokenizer,
    audio_lens: Sequence[int],
    languages: Sequence[str | None],
    label_ids: Sequence[Sequence[int]] | None = None,
) -> Spliced:
    """Lay out [before_audio | audio | after_audio | label] for each row; built on the CPU.

    With `label_ids` the last prompt position predicts the first label token and the last label token predicts
    the tokenizer's `eos_id`: loss on label and end of text only. Without, the rows end with the prompt, ready
    for decoding, and `labels` is IGNORE throughout.
    """
    rows = []
    for i, (audio_len, language) in enumerate(zip(audio_lens, languages, strict=True)):
        before, after = (tokenizer.encode(text) if text else [] for text in prompt.fill(language))
        rows.append((before, int(audio_len), after, list(label_ids[i]) if label_ids is not None else []))
    lens = torch.tensor([len(b) + a + len(c) + len(u) for b, a, c, u in rows])
    shape = (len(rows), int(lens.max()))
    token_ids = torch.zeros(shape, dtype=torch.long)
    audio_mask = torch.zeros(shape, dtype=torch.bool)
    labels = torch.full(shape, IGNORE)
    for i, (before, audio_len, after, label) in enumerate(rows):
        audio_end = len(before) + audio_len
        token_ids[i, : len(before)] = torch.tensor(before, dtype=torch.long)
        audio_mask[i, len(before) : audio_end] = True
        token_ids[i, audio_end : lens[i]] = torch.tensor(after + label, dtype=torch.long)
        if label_ids is not None:
            labels[i, lens[i] - len(label) - 1 : lens[i]] = torch.tensor([*label, tokenizer.eos_id])
    return Spliced(token_ids, audio_mask, lens, labels)
