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

# The slots that each text of a prompt may have.
_SLOTS = {
    "before_audio": ("lang",),
    "after_audio": ("lang",),
    "after_audio_ast": ("lang", "target_lang"),
}


@dataclass
class PromptConfig:
    """Text before and after the audio, and before the label (which it becomes a part of).

    `after_audio` asks for a transcript, `after_audio_ast` for a translation: it stands in the rows that have a target
    language. The slot `{lang}` takes the language of the audio, `{target_lang}` that of the translation.
    """

    before_audio: str = "User: "
    after_audio: str = "<|{lang}|>\n\nAssistant:"
    after_audio_ast: str = "<|{lang}|><|{target_lang}|>\n\nAssistant:"
    before_label: str = " "

    def __post_init__(self) -> None:
        for name, allowed in _SLOTS.items():
            try:
                unknown = sorted(set(_slots_of(getattr(self, name))) - set(allowed))
            except ValueError as error:
                raise UserError(f"{name}: {error}; write {{{{ and }}}} for braces that are no slot") from error
            if unknown == ["target_lang"]:
                raise UserError(f"{name}: the slot {{target_lang}} is for translation: use it in after_audio_ast")
            if unknown:
                slots = " and ".join(f"{{{slot}}}" for slot in allowed)
                raise UserError(f"{name}: unknown slot {{{unknown[0]}}}; allowed: {slots}")
        if not self.before_audio and not (self.after_audio and self.after_audio_ast):
            raise UserError(
                "a prompt needs text before or after the audio: set before_audio, or after_audio and after_audio_ast"
            )

    def fill(self, language: str | None, target_language: str | None = None) -> tuple[str, str]:
        """The text before and after the audio of an utterance in `language`.

        With `target_language` the prompt is that for a translation into it.

        Raises:
          UserError: the prompt has a slot for a language that the utterance does not have.
        """
        texts = self.before_audio, self.after_audio if target_language is None else self.after_audio_ast
        values = {"lang": language, "target_lang": target_language}
        for slot in (slot for text in texts for slot in _slots_of(text)):
            if not values[slot]:
                kind = {"lang": "language", "target_lang": "target language"}[slot]
                raise UserError(
                    f"the prompt has a {{{slot}}} slot but the utterance has no {kind}: give `{slot}` in its manifest "
                    f"line or data source (or --{kind.replace(' ', '-')}), or take {{{slot}}} out of the prompt"
                )
        before, after = (text.format(**values) for text in texts)
        return before, after


def _slots_of(text: str) -> list[str]:
    return [slot for _, slot, _, _ in string.Formatter().parse(text) if slot is not None]


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
    target_languages: Sequence[str | None] | None = None,
) -> Spliced:
    """Lay out [before_audio | audio | after_audio | label] for each row; built on the CPU.

    Rows with a target language have `after_audio_ast`; without `target_languages` no row has one.

    With `label_ids` the last prompt position predicts the first label token and the last label token predicts
    the tokenizer's `eos_id`: loss on label and end of text only. Without, the rows end with the prompt, ready
    for decoding, and `labels` is IGNORE throughout.
    """
    if target_languages is None:
        target_languages = [None] * len(languages)
    rows = []
    for i, (audio_len, *tags) in enumerate(zip(audio_lens, languages, target_languages, strict=True)):
        before, after = (tokenizer.encode(text) if text else [] for text in prompt.fill(*tags))
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
