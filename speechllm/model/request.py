"""What is asked of a model for all inputs at once, held against what it was trained for."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from speechllm.errors import UserError
from speechllm.model.config import ModelConfig
from speechllm.prompt.request import Request
from speechllm.text.languages import language_tag


def checked_request(config: ModelConfig, request: Request) -> Request:
    """The request with languages, given by tag or by name (`English`), as tags.

    Args:
      config: of the model.
      request: what all inputs have in common.

    Raises:
      UserError: the model takes no notice of something that is asked for, or was not trained for it.
    """
    language, target_language = request.language, request.target_language
    sources = targets = None
    if config.languages is not None:
        sources = {name.partition(">")[0] for name in config.languages} - {"-"}
        targets = {name.partition(">")[2] for name in config.languages} - {""}
    if target_language is not None:
        target_language = _tag(target_language, targets)
        if config.llm is None:
            raise UserError(
                f"target language {target_language}: the model is an encoder alone (it was trained with model.llm: "
                "null), and cannot translate"
            )
        if targets is not None and target_language not in targets:
            into = f"to translate into {_listed(targets)}" if targets else f"on transcripts alone, {_listed(sources)}"
            raise UserError(f"target language {target_language}: the model was trained {into}")
    slots = set() if config.llm is None else config.prompt.slots(target_language)
    for what, value, names in (
        ("language", language, ("lang", "language")),
        ("previous text", request.previous, ("previous",)),
        ("hotwords for the prompt", request.hotwords, ("hotwords",)),
    ):
        if value is not None and not slots.intersection(names):
            why = "it is an encoder alone" if config.llm is None else f"its prompt has no {{{names[0]}}} slot"
            raise UserError(f"{what} {value!r}: the model takes no notice of it, as {why}: leave it out")
    if language is not None:
        language = _tag(language, sources)
        if sources and language not in sources:
            raise UserError(f"language {language}: the model was trained with {_listed(sources)}")
    return replace(request, language=language, target_language=target_language)


def _tag(name: str, known: set[str] | None) -> str:
    """The model's own name for a language, if it has been trained with it."""
    return name if known and name in known else language_tag(name)


def _listed(languages: Iterable[str] | None) -> str:
    return ", ".join(sorted(languages or ())) or "of languages that its data did not name"
