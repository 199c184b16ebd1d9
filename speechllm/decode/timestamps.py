"""Words, and when they are said, from aligned tokens and from labels with times."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from speechllm.decode.ctc import TokenSpan
from speechllm.decode.result import Word
from speechllm.prompt.label import ReadLabel
from speechllm.text.tokenizer import Tokenizer
from speechllm.text.words import word_spans

# CTC emits a token in one frame or two and blank in the rest of it; a syllable lasts about so long.
TOKEN_SECONDS = 0.2


def words_from_alignment(
    spans: Sequence[TokenSpan], tokenizer: Tokenizer, seconds_per_frame: float, frames: int | None = None
) -> tuple[Word, ...]:
    """The words (see `word_spans`) of the text of aligned tokens.

    A token goes on for 0.2 s after its last frame, or until the next one begins if that is earlier. A word has the time
    of its tokens, and the geometric mean of their probabilities as its confidence. Characters that share a token share
    its time out evenly; a character that is spelled in several tokens has the time of all of them.

    Args:
      spans: from `forced_align`.
      seconds_per_frame: frame k is the audio from k to k + 1 times this.
      frames: how many the audio has; without it, it is taken to end with the last token's last frame.
    """
    nexts = [span.start for span in spans[1:]] + [spans[-1].end if frames is None else frames] if spans else []
    longest = round(TOKEN_SECONDS / seconds_per_frame)
    spans = [span._replace(end=min(span.end + longest, end)) for span, end in zip(spans, nexts, strict=True)]
    stream = tokenizer.stream()
    characters: list[_Character] = []
    pending: list[TokenSpan] = []  # of a character that is not complete
    for span in spans:
        piece = stream.push(span.token)
        # not one of those that are left out of a text, such as tags, nor the border that ends a word of phones
        if tokenizer.decode([span.token]) or (piece and not pending):
            pending.append(span)
        if piece:
            characters += _characters(piece, pending)
            pending = []
    characters += _characters(stream.finish(), pending)

    words = []
    for start, end in word_spans("".join(character.text for character in characters)):
        word = characters[start:end]
        # By its start: no two tokens share a frame.
        scores = {span.start: span.score for character in word for span in character.spans}.values()
        words.append(
            Word(
                "".join(character.text for character in word),
                word[0].start * seconds_per_frame,
                word[-1].end * seconds_per_frame,
                math.exp(sum(scores) / len(scores)),
            )
        )
    return tuple(words)


def words_from_label(
    label: ReadLabel, tokens: Sequence[int], log_probs: Sequence[float], tokenizer: Tokenizer
) -> tuple[Word, ...]:
    """The words that were read from a label with times.

    The confidence of a word is the geometric mean of the probabilities of its tokens, those of its times aside.

    Args:
      tokens, log_probs: those that `label` was read from; there may be one probability more, that of the end.
    """
    stream = tokenizer.stream(keep_tags=True)
    token_of: list[int] = []  # the number of the token that each character of the label ends in
    for number, token in enumerate(tokens):
        token_of += [number] * len(stream.push(token))
    token_of += [len(tokens) - 1] * len(stream.finish())
    words = []
    for word in label.words or ():
        scores = [log_probs[number] for number in sorted(set(token_of[word.first : word.last]))]
        words.append(Word(word.word, word.start, word.end, math.exp(sum(scores) / len(scores))))
    return tuple(words)


class _Character(NamedTuple):
    text: str
    start: float  # in frames
    end: float
    spans: Sequence[TokenSpan]


def _characters(piece: str, spans: Sequence[TokenSpan]) -> list[_Character]:
    """The characters that these tokens spell, with their share of the time; white space has none."""
    characters = []
    count, said = len("".join(piece.split())), 0
    for text in piece:
        start = said
        said += not text.isspace()
        from_, to = (spans[0].start + (spans[-1].end - spans[0].start) * i / max(count, 1) for i in (start, said))
        characters.append(_Character(text, from_, to, spans))
    return characters
