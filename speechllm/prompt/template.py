r"""Prompts: templates with slots that utterances fill, and how learned parts of the prompt are configured.

The default is RWKV's chat form, as its official chat checkpoints were trained: `User: ... \n\nAssistant: ...`.
Training and decoding lay out and embed prompts with the same functions, and a model is saved with the templates
written out: what is decoded with is what was trained with.
"""

from __future__ import annotations

import dataclasses
import re
import string
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from speechllm.config import check_limits, setting
from speechllm.errors import UserError
from speechllm.prompt.request import Request
from speechllm.text.languages import NAMES_IN, language_name
from speechllm.text.tokenizer import Tokenizer

PRESETS = {
    # BlinkDL/RWKV-LM, the chat form of its World models; the tags are those of Whisper (arXiv 2212.04356).
    "rwkv": {
        "asr": "User: {audio}<|{lang}|>\n\nAssistant:",
        "ast": "User: {audio}<|{lang}|><|{target_lang}|>\n\nAssistant:",
        "streaming": "User: <|{lang}|>{chunk_seconds} s: {audio}\n\nAssistant:",
        "before_label": " ",
    },
    # ChatML as Qwen's chat models have it, the instruction after the audio as in icefall's ASR_LLM recipe.
    "qwen": {
        "asr": "<|im_start|>user\n{audio}{instruction}<|im_end|>\n<|im_start|>assistant\n",
        "ast": "<|im_start|>user\n{audio}{instruction}<|im_end|>\n<|im_start|>assistant\n",
        "streaming": "<|im_start|>user\nTranscribe the {language} speech as you hear it, {chunk_seconds} s at a time."
        "{audio}<|im_end|>\n<|im_start|>assistant\n",
        "before_label": "",
    },
    "tags": {
        "asr": "{audio}<|{lang}|>",
        "ast": "{audio}<|{lang}|><|{target_lang}|>",
        "streaming": "<|{lang}|>{chunk_seconds} s: {audio}<|{lang}|>",
        "before_label": "",
    },
}

# Decoding takes the first.
INSTRUCTIONS = {
    "en": {
        "asr": [
            "Transcribe the {language} speech.",
            "Transcribe this {language} speech to text.",
            "Write down what is said in {language}.",
            "What does the {language} speaker say?",
        ],
        "ast": [
            "Translate the {language} speech into {target_language}.",
            "Translate this {language} speech to {target_language} text.",
            "Write down in {target_language} what is said in {language}.",
            "What does the {language} speaker say, in {target_language}?",
        ],
    },
    "zh": {
        "asr": [
            "请转录这段{language:zh}语音",
            "请将这段{language:zh}语音转写为文字",
            "请写下这段{language:zh}录音的内容",
            "这段{language:zh}语音说了什么？",
        ],
        "ast": [
            "请将这段{language:zh}语音翻译成{target_language:zh}",
            "请用{target_language:zh}写下这段{language:zh}语音的内容",
            "这段{language:zh}语音用{target_language:zh}怎么说？",
        ],
    },
    "zh-hant": {
        "asr": [
            "請轉錄這段{language:zh-hant}語音",
            "請將這段{language:zh-hant}語音轉寫為文字",
            "請寫下這段{language:zh-hant}錄音的內容",
            "這段{language:zh-hant}語音說了什麼？",
        ],
        "ast": [
            "請將這段{language:zh-hant}語音翻譯成{target_language:zh-hant}",
            "請用{target_language:zh-hant}寫下這段{language:zh-hant}語音的內容",
            "這段{language:zh-hant}語音用{target_language:zh-hant}怎麼說？",
        ],
    },
}

_POOLS = {"asr": "instructions", "ast": "ast_instructions", "streaming": "instructions"}
_TRANSCRIPTION_SLOTS = ("lang", "language", "previous", "hotwords")
_TRANSLATION_SLOTS = (*_TRANSCRIPTION_SLOTS, "target_lang", "target_language")
_STREAMING_SLOTS = (*_TRANSCRIPTION_SLOTS, "chunk_seconds")
_NAME_SLOTS = ("language", "target_language")
# May be filled with no text at all.
_CONTEXT_SLOTS = ("previous", "hotwords")
# What an utterance lacks that cannot fill a slot, and where it is given.
_LANGUAGE = ("language", "`lang` in its manifest line or data source (or --language)")
_TARGET = ("target language", "`target_lang` in its manifest line or data source (or --target-language)")
_LACKING = {
    "lang": _LANGUAGE,
    "language": _LANGUAGE,
    "target_lang": _TARGET,
    "target_language": _TARGET,
    "previous": ("previous text", "`previous` in its manifest line (or --previous)"),
    "hotwords": ("hotwords", "`hotwords` in its manifest line (or --prompt-hotwords)"),
}
_TAG = re.compile(r"<\|[^<>{}|]+\|>")
# ChatML's: in pieces they are not what a chat model was trained with.
_ALWAYS_WHOLE = ("<|im_start|>", "<|im_end|>")


PromptContext = Request  # its name in 0.1


@dataclass
class PromptProjectorConfig:
    """`hidden`: the width between the two layers."""

    hidden: int = setting(64, at_least=1)

    def __post_init__(self) -> None:
        check_limits(self)


@dataclass
class PromptConfig:
    """What the language model reads around the audio.

    `preset` (rwkv, qwen, tags) gives the texts that are null: `asr` asks for a transcript, `ast` for a translation,
    in the rows that have a target language, `streaming` for a transcript that is written while the audio is heard
    (`speechllm.prompt.interleave`); `before_label` becomes part of the label.

    Slots of the templates: `{audio}`, exactly once; `{lang}`, `{target_lang}`, the tags of the languages as the data
    has them; `{language}`, `{target_language}`, their names, `{language:zh}` and `{language:zh-hant}` those in
    simplified and traditional Chinese; `{instruction}`; `{previous}` and `{hotwords}`, of the same fields of the
    manifest line. The slots of a translation's target are in `ast` only, and in `streaming` only is `{chunk_seconds}`,
    how much audio comes between one text and the next.

    `instructions`, `ast_instructions`: what `{instruction}` stands for, the name of a shipped pool (en, zh, zh-hant) or
    a list of templates; null for en. Training draws one for each utterance, decoding takes the first.

    `end_of_text_first`: before everything else comes the token that ends texts, as a document begins in RWKV's
    pre-training and in `speechllm tune`; a small model that has always read so is at a loss without.

    `whole_tags`: every <|...|> must be one token of the tokenizer; <|im_start|> and <|im_end|> must always.

    Learned parts: `boundary`, an embedding before and one after the audio; `soft_tokens`, so many embeddings before
    everything else (arXiv 2104.08691); `projector`, a small network on the embeddings of the prompt's text
    (`PromptProjector`).
    """

    preset: Literal["rwkv", "qwen", "tags"] = "rwkv"
    asr: str | None = None
    ast: str | None = None
    streaming: str | None = None
    before_label: str | None = None
    instructions: list[str] | str | None = None
    ast_instructions: list[str] | str | None = None
    end_of_text_first: bool = False
    whole_tags: bool = False
    boundary: bool = False
    soft_tokens: int = setting(0, at_least=0)
    projector: PromptProjectorConfig | None = None

    def __post_init__(self) -> None:
        if self.preset not in PRESETS:
            raise UserError(f"preset: unknown {self.preset!r}, choose from {', '.join(PRESETS)}")
        check_limits(self)
        for name, slots in (
            ("asr", _TRANSCRIPTION_SLOTS), ("ast", _TRANSLATION_SLOTS), ("streaming", _STREAMING_SLOTS)
        ):  # fmt: skip
            template = self._text(name)
            found = _checked_slots(name, template, ("audio", "instruction", *slots))
            if found.count("audio") != 1:
                raise UserError(f"{name}: the slot {{audio}} must be there once, it is {found.count('audio')} times")
            is_audio_alone = not any(text for text, *_ in _parsed(template)) and {*found} <= {"audio", *_CONTEXT_SLOTS}
            if is_audio_alone and not (self.boundary or self.soft_tokens or self.end_of_text_first):
                raise UserError(
                    f"{name}: a prompt needs more than audio: text that is always there, soft_tokens, or "
                    "end_of_text_first"
                )
            pool = _POOLS[name]
            if "instruction" in found:
                for number, instruction in enumerate(self._pool(name)):
                    _checked_slots(f"{pool}[{number}]", instruction, slots)
            elif getattr(self, pool) is not None and not self._uses(pool):
                raise UserError(f"{pool}: {name} has no {{instruction}} slot to put them in: {template!r}")

    def tells_language(self) -> str | None:
        """A text of the prompt that has the language of the speech in it, as a tag or by name."""
        full = self.written_out()
        texts = [full.asr, full.ast, *(full.instructions or ()), *(full.ast_instructions or ())]
        slots = {"lang", "language"}
        return next((text for text in texts if any(slot in slots for _, slot, _ in _parsed(text))), None)

    def tells_end_of_stream(self) -> bool:
        """Whether something stands after the audio of a stream that is always there."""
        parts = _parsed(self._text("streaming"))
        audio = next(i for i, (_, slot, _) in enumerate(parts) if slot == "audio")
        after = parts[audio + 1 :]
        return self.boundary or any(text or slot not in (None, *_CONTEXT_SLOTS) for text, slot, _ in after)

    def slots(self, target_language: str | None = None) -> set[str]:
        """The slots that utterances fill: of the prompt for translations, with a target language, else of both."""
        names = ("ast",) if target_language is not None else ("asr", "ast")
        slots = {slot for name in names for _, slot, _ in _parsed(self._text(name)) if slot is not None}
        pools = [self._pool(name) for name in names if "instruction" in slots]
        slots |= {slot for pool in pools for text in pool for _, slot, _ in _parsed(text) if slot is not None}
        return slots - {"audio", "instruction"}

    @property
    def label_prefix(self) -> str:
        """`before_label`, or what the preset has."""
        return self._text("before_label")

    def written_out(self) -> PromptConfig:
        """The same prompt with nothing left to a preset or a shipped pool, as it is saved with a model."""
        texts = {name: self._text(name) for name in ("asr", "ast", "streaming", "before_label")}
        pools = {pool: self._pool(name) if self._uses(pool) else None for name, pool in _POOLS.items()}
        written: dict[str, Any] = {**texts, **pools}
        return dataclasses.replace(self, **written)

    def fill(self, request: Request, chunk_seconds: float | None = None) -> tuple[str, str]:
        """The text before and after the audio of an utterance.

        With a target language the prompt is that for a translation into it, else with `chunk_seconds` that of a stream
        in chunks of so much audio.

        Raises:
          UserError: the prompt has a slot for what the utterance does not have.
        """
        name = "ast" if request.target_language is not None else "asr" if chunk_seconds is None else "streaming"
        values = {
            "chunk_seconds": None if chunk_seconds is None else f"{chunk_seconds:g}",
            "lang": request.language,
            "target_lang": request.target_language,
            "language": request.language,
            "target_language": request.target_language,
            "previous": request.previous,
            "hotwords": None if request.hotwords is None else ", ".join(request.hotwords),
        }

        def value(slot: str, name_in: str) -> str:
            if slot == "instruction":
                pool = self._pool(name)
                return "".join(part or "" for part in filled(pool[int(request.draw * len(pool))]))
            found = values[slot]
            if found is None or (not found and slot not in _CONTEXT_SLOTS):
                who = "the utterance" if request.id is None else f"utterance {request.id}"
                kind, where = _LACKING[slot]
                raise UserError(
                    f"the prompt has a {{{slot}}} slot but {who} has no {kind}: give {where}, or take the slot out of "
                    f"prompt.{name}"
                )
            return language_name(found, name_in or "en") if slot in _NAME_SLOTS else found

        def filled(template: str) -> list[str | None]:
            """Texts and values in order; the audio is None."""
            parts: list[str | None] = []
            for text, slot, name_in in _parsed(template):
                parts += [text, None if slot == "audio" else value(slot, name_in)] if slot is not None else [text]
            return parts

        parts = filled(self._text(name))
        audio = parts.index(None)
        before, after = ("".join(part or "" for part in side) for side in (parts[:audio], parts[audio + 1 :]))
        return before, after

    def encoded(
        self, tokenizer: Tokenizer, request: Request, chunk_seconds: float | None = None
    ) -> tuple[list[int], list[int]]:
        """The tokens of what `fill` gives.

        Raises:
          UserError: as `fill`; there is a tag that the tokenizer must not split.
        """
        texts = self.fill(request, chunk_seconds)
        for text in texts if self.whole_tags else ():
            check_whole_tags("prompt", text, tokenizer, tokenizer.identity().split()[0], whole_tags=True)
        before, after = (tokenizer.encode(text) if text else [] for text in texts)
        return [tokenizer.eos_id] * self.end_of_text_first + before, after

    def check_tags(self, tokenizer: Tokenizer, name: str) -> None:
        """Raise a `UserError` where the templates have a tag that must be one token, and `name`'s tokenizer splits it.

        Tags that have slots are checked when they are filled.
        """
        for template in ("asr", "ast", "streaming"):
            check_whole_tags(f"prompt.{template}", self._text(template), tokenizer, name, self.whole_tags)

    def _text(self, name: str) -> str:
        given = getattr(self, name)
        return PRESETS[self.preset][name] if given is None else given

    def _uses(self, pool: str) -> bool:
        """Whether a template takes its instructions from there."""
        texts = [self._text(name) for name, used in _POOLS.items() if used == pool]
        return any(slot == "instruction" for text in texts for _, slot, _ in _parsed(text))

    def _pool(self, name: str) -> list[str]:
        key = _POOLS[name]
        given = getattr(self, key)
        if isinstance(given, list):
            if not given:
                raise UserError(f"{key}: an empty list; give instructions, or null for those in English")
            return given
        if given is not None and given not in INSTRUCTIONS:
            raise UserError(f"{key}: no pool {given!r}; shipped are {', '.join(INSTRUCTIONS)}, or give a list of texts")
        return INSTRUCTIONS[given or "en"]["ast" if name == "ast" else "asr"]


def _parsed(template: str) -> list[tuple[str, str | None, str]]:
    """Text, the slot behind it (None at the end), and what stands behind the slot's colon."""
    return [(text, slot, spec or "") for text, slot, spec, _ in string.Formatter().parse(template)]


def _checked_slots(name: str, template: str, allowed: Sequence[str]) -> list[str]:
    """The slots of a template."""
    try:
        parsed = [part for part in string.Formatter().parse(template) if part[1] is not None]
    except ValueError as error:
        raise UserError(f"{name}: {error}; write {{{{ and }}}} for braces that are no slot") from error
    for _, slot, spec, conversion in parsed:
        if slot in ("target_lang", "target_language") and slot not in allowed:
            raise UserError(f"{name}: the slot {{{slot}}} is for translation: use it in ast or ast_instructions")
        if slot not in allowed:
            raise UserError(
                f"{name}: unknown slot {{{slot}}}; allowed: {', '.join(f'{{{slot}}}' for slot in allowed)}; "
                "write {{ and }} for braces that are no slot"
            )
        if conversion or (spec and (slot not in _NAME_SLOTS or spec not in NAMES_IN)):
            raise UserError(
                f"{name}: {{{slot}}} is not to be formatted; only names of languages are, with {', '.join(NAMES_IN)}, "
                "as in {language:zh}"
            )
    return [slot for _, slot, _, _ in parsed if slot is not None]


def check_whole_tags(where: str, text: str, tokenizer: Tokenizer, name: str, whole_tags: bool) -> None:
    """Raise a `UserError` where a text has a tag that must be one token, and the tokenizer called `name` splits it."""
    for tag in _TAG.findall(text):
        if not (whole_tags or tag in _ALWAYS_WHOLE):
            continue
        ids = tokenizer.encode(tag)
        if len(ids) != 1:
            pieces = " ".join(repr(tokenizer.piece(i)) for i in ids)
            raise UserError(
                f"{where}: {tag} must be one token, but the tokenizer {name} splits it into {len(ids)}: {pieces}; take "
                "a tokenizer that has it, or another prompt (prompt.preset, prompt.whole_tags)"
            )
