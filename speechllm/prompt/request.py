"""What is asked for one utterance, from a manifest or the caller to the prompt, the model and the search."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Request:
    """What is asked for one utterance.

    Attributes:
      id: names the utterance in errors.
      previous: the text before this utterance, for the prompt's `{previous}`; "" at the beginning of a recording.
      hotwords: phrases that may be said, for the prompt's `{hotwords}`.
      draw: in [0, 1), which of the prompt's instructions; 0 is the first.
      key: what the random numbers of sampling follow from, besides the seed; None for the id, and without one the
        features themselves.
      language: of the speech, as a tag (`en`); None where it is not known.
      target_language: the language to translate into, as a tag; None to transcribe.
    """

    id: str | None = None
    previous: str | None = None
    hotwords: tuple[str, ...] | None = None
    draw: float = 0.0
    key: str | None = None
    language: str | None = None
    target_language: str | None = None


def requests_of(
    languages: Sequence[Request | str | None],
    target_languages: Sequence[str | None] | None = None,
    contexts: Sequence[Request] | None = None,
) -> list[Request]:
    """The requests of N utterances whose values are in lists of their own.

    Args:
      languages: N tags or None; a whole request stays as it is.
      target_languages: N tags, None where nothing is translated; None if nothing is.
      contexts: N requests without languages; None for empty ones.
    """
    columns = languages, target_languages or [None] * len(languages), contexts or [Request()] * len(languages)
    return [
        language
        if isinstance(language, Request)
        else replace(context, language=language, target_language=target_language)
        for language, target_language, context in zip(*columns, strict=True)
    ]
