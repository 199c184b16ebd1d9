"""What is to be written of an utterance by its line's fields: its transcript, or its translation into which language.

| the line has | `text` is |
|---|---|
| `task: asr` | the transcript |
| `task: ast` and a translation: `ast_text`, `translation`, or `answer` as Canary's lines have it | the transcript |
| `task: ast` and none of these, as Canary 1's lines | the translation |
| no `task`, and a `target_lang` of another language than the speech, as the lines of Canary Flash and 2 | the translation |
| no `task`, but `ast_text`; or no `target_lang`, or that of the speech | the transcript |

The task is that of the line, else that of the source, else it follows from the languages; of a line that has `text` and
`ast_text` it is asr. What the line has no text for is empty: with `task: asr` for the source, a line that has only a
translation has an empty transcript.
"""  # noqa: E501

from __future__ import annotations

from dataclasses import dataclass

from speechllm.data.manifests.source import SourceConfig, string_of, task_of
from speechllm.text.languages import same_language
from speechllm.text.normalize import normalize_text

# Fields that are never a transcript.
TRANSLATIONS = ("ast_text", "translation")
# With one of these, NeMo's lines for language models with audio are a prompt and its `answer`.
_PROMPTS = ("context", "question")
# Canary's model cards put it where an answer is not known.
_NO_ANSWER = ("", "na", "n/a")


@dataclass(frozen=True)
class Writing:
    """`text` is the transcript, `ast_text` the translation; "" where they are not known."""

    text: str
    lang: str | None
    task: str
    ast_text: str
    target_lang: str | None


def what_to_write(fields: dict, text: str | None, lang: str | None, source: SourceConfig | None) -> Writing:
    """What the fields of a line say.

    Args:
        fields: `task`, `target_lang`, `ast_text`, ... of the line, or of the custom fields of a cut.
        text: what the line has as its text.
        lang: the language of the speech, as the line names it.
        source: gives what the line does not say; None for cuts that have been through this already.

    Raises:
        ValueError: it cannot be told whether the text is a translation, or the line is a prompt and its answer; a field
            has a wrong type or value.
    """
    own_task, target_lang = task_of(fields), string_of(fields, "target_lang")
    task, text_field, own_target = own_task, None, target_lang
    if source is not None:
        task, text_field = own_task or source.task, source.text_field
        lang = source.language(lang) or source.stated_lang
        own_target = source.language(target_lang)
        target_lang = own_target or source.stated_target_lang
    has_both = text is not None and text_field != "ast_text" and fields.get("ast_text") is not None
    if task is None and target_lang is not None and lang is None and not has_both:
        raise ValueError(
            f"target_lang: {target_lang!r}, but neither the task nor the language of the speech is known, so that it "
            "cannot be told whether the text is a translation: give source_lang or task in the line, or lang or task "
            "for the source"
        )
    # Whether the line itself says that it is a translation.
    is_translation = own_task == "ast" or (own_task is None and _differ(lang, own_target) and not has_both)
    translation = string_of(fields, *(name for name in TRANSLATIONS if name != text_field))
    transcript = string_of(fields, "asr_text")
    answer = None
    if text_field != "answer":
        answer = _answer(fields, own_task is not None, text or transcript or translation)
    if answer is not None:
        if is_translation or task == "ast":
            translation = answer if translation is None else translation
        elif text is None and transcript is None and task is None:
            raise ValueError(
                "answer: without a task it cannot be told whether it is a transcript: give task: asr or ast in the "
                "line or for the source"
            )
        elif transcript is None:
            transcript = answer
    # A field that is named for a source of translations is theirs.
    if translation is None and (is_translation or (task == "ast" and text_field is not None)):
        translation, text = text, None
    if text is None:
        text = transcript
    if task is None:
        task = "ast" if _differ(lang, target_lang) and not has_both else "asr"
    return Writing(
        _normalized(text, lang, source), lang, task, _normalized(translation, target_lang, source), target_lang
    )


def _differ(lang: str | None, target_lang: str | None) -> bool:
    return lang is not None and target_lang is not None and not same_language(lang, target_lang)


def _answer(fields: dict, has_task: bool, other_text: str | None) -> str | None:
    """The field `answer`, unless it answers a prompt that may ask for anything.

    Raises:
        ValueError: it does, and there is no other text.
    """
    answer = string_of(fields, "answer")
    if answer is not None and answer.strip().lower() in _NO_ANSWER:
        answer = None
    prompt = next((name for name in _PROMPTS if fields.get(name) is not None), None)
    if prompt is None or has_task:
        return answer
    if not other_text:
        raise ValueError(
            f"{prompt}: a prompt and its answer (NeMo's SALM) are not used, as the answer may be anything; if the "
            "answer is what is said, name it for the source: text_field: answer"
        )
    return None


def _normalized(text: str | None, lang: str | None, source: SourceConfig | None) -> str:
    if source is None or not source.text:
        return (text or "").strip()
    return normalize_text(text or "", source.text, lang)
