"""Words in a text that goes on: which tokens each one is of, and whether white space is before it."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

from speechllm.text.tokenizer import Tokenizer
from speechllm.text.words import word_spans


class WordPieces(NamedTuple):
    """A word of a text in pieces.

    Attributes:
      joined: nothing is between it and what is before it, in this text or in the one that this goes on with.
      first, last: the numbers of the pieces that it begins and ends in.
      end_in_piece: how many characters of the last one are up to its end; all of them if it `ends_piece`.
    """

    text: str
    joined: bool
    first: int
    last: int
    end_in_piece: int
    ends_piece: bool


def text_pieces(token_ids: Sequence[int], tokenizer: Tokenizer) -> list[str]:
    """The text of each token, in the middle of a text; that of a character in several tokens is in the last of them."""
    stream = tokenizer.stream(continued=True)
    pieces = [stream.push(token) for token in token_ids]
    if rest := stream.finish():
        pieces[-1] += rest
    return pieces


def word_pieces(pieces: Sequence[str]) -> list[WordPieces]:
    """The words (see `speechllm.text.words.word_spans`) of the text that `pieces` are, joined."""
    ends = list(accumulate(map(len, pieces)))
    piece_of = [i for i, piece in enumerate(pieces) for _ in piece]  # of each character
    text = "".join(pieces)
    words, before = [], 0
    for start, end in word_spans(text):
        first, last = piece_of[start], piece_of[end - 1]
        end_in_piece = end - ends[last] + len(pieces[last])
        words.append(WordPieces(text[start:end], start == before, first, last, end_in_piece, end == ends[last]))
        before = end
    return words
