"""Phrases that are expected, as a scorer of the search."""

from __future__ import annotations

import unicodedata
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from math import inf
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from speechllm.errors import UserError
from speechllm.text.tokenizer import Tokenizer
from speechllm.text.words import TokenTexts, is_spaceless


class HotwordState(NamedTuple):
    """Of a hypothesis: the node of the longest beginning of a phrase that it ends with, and whether it ends with a
    letter."""

    node: int
    after_letter: bool


class Hotwords:
    """Boosts phrases in the search, token by token, wherever one is begun; what is not completed is taken back.

    Every token that goes on with a phrase adds the phrase's boost. A token that does not, and the end of text, take
    back what the phrase was given. So the scores of a whole text add up to its occurrences of phrases, each one's boost
    times its tokens. Every occurrence counts, also one that overlaps with another or lies inside it.

    A phrase is found as whole words: there is no letter, digit or combining mark directly before its first one or
    behind its last one: "art" is neither in "party" nor in "artist", but in "art's". Since only the next token tells,
    a complete phrase is taken back as well, when that token goes on with the word. Characters of scripts without spaces
    (see `word_spans`) are words by themselves. One that is spelled in several tokens is not taken for a letter. Case
    counts.

    A phrase is looked for in the tokens that the tokenizer makes of it at the start of a text, behind a space, and
    behind a bracket; in other spellings it is not found.

    All phrases are followed at once with the automaton of Aho and Corasick (Communications of the ACM 18(6), 1975), as
    in the ContextGraph of icefall and sherpa, so that one that begins inside another is not missed.

    Args:
      phrases: with the boost of each, above 0, in natural logarithms per token.
      tokenizer: that of the language model.
      weight: the search multiplies all boosts with it.

    Raises:
      UserError: there is no phrase, or one is empty, cannot be written in tokens, or has a boost out of range.
    """

    def __init__(self, phrases: Mapping[str, float], tokenizer: Tokenizer, weight: float = 1.0) -> None:
        self.weight = weight
        if not phrases:
            raise UserError("hotwords: there is no phrase")
        texts = TokenTexts(tokenizer)
        # One entry more, for ids of the language model that the tokenizer does not have.
        self._unknown = tokenizer.vocab_size
        edges = [texts.of((token,))[0] or " " for token in range(self._unknown)] + [" "]
        self._begins_with_letter = [_is_letter(text[0]) for text in edges]
        self._ends_with_letter = [_is_letter(text[-1]) for text in edges]

        trie = _Trie()
        for phrase, boost in phrases.items():
            if not 0 < boost < inf:
                raise _PhraseError(phrase, f"the boost must be above 0 and finite, got {boost}")
            for tokens in self._spellings(phrase, tokenizer, texts):
                trie.add(self._symbols(tokens), boost)
        # By node * symbols + symbol. Those of node 0, the root, are those of all nodes that have no other.
        self._arcs = {
            node * self._symbol_count + symbol: target
            for node, arcs in enumerate(trie.link())
            for symbol, target in arcs.items()
        }
        keys = sorted(self._arcs)
        self._tables = _Tables(
            torch.tensor(keys),
            torch.tensor([self._arcs[key] for key in keys]),
            torch.tensor(trie.completed),
            torch.tensor(trie.completed) + torch.tensor(trie.begun),
            torch.tensor(self._begins_with_letter),
        )

    @classmethod
    def from_file(cls, path: str | Path, tokenizer: Tokenizer, weight: float = 1.0) -> Hotwords:
        """Read a text file: a phrase on each line, after it perhaps a tab and its boost (else 1.0).

        Empty lines and those that begin with # are left out.

        Raises:
          FileNotFoundError: there is no such file.
          UserError: it is not UTF-8, or a line is wrong; the message names the line.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file of hotwords")
        phrases: dict[str, float] = {}
        lines: dict[str, int] = {}
        for number, raw in enumerate(path.read_bytes().split(b"\n"), 1):
            try:
                line = raw.decode("utf-8-sig")
            except UnicodeDecodeError as error:
                raise UserError(f"{path}:{number}: not UTF-8; save the file as UTF-8") from error
            if not line.strip() or line.startswith("#"):
                continue
            phrase, _, boost = (part.strip() for part in line.partition("\t"))
            if phrase in lines:
                raise UserError(f"{path}:{number}: {phrase!r} is already on line {lines[phrase]}; leave out one")
            lines[phrase] = number
            try:
                phrases[phrase] = float(boost or 1.0)
            except ValueError as error:
                raise UserError(
                    f"{path}:{number}: {boost!r} is not a number; expected a phrase, or a phrase, a tab and its boost"
                ) from error
        if not phrases:
            raise UserError(f"{path}: there is no phrase in it; write one a line")
        try:
            return cls(phrases, tokenizer, weight)
        except _PhraseError as error:
            raise UserError(f"{path}:{lines[error.phrase]}: {error}") from error

    def start(self, utterance: int) -> HotwordState:
        """The same for all utterances."""
        return HotwordState(0, False)

    def score(self, states: Sequence[HotwordState], candidates: Tensor) -> Tensor:
        """The boosts (R, C), float32, that appending each of `candidates` (R, C) gives or takes back."""
        if self._tables.keys.device != candidates.device:
            self._tables = _Tables(*(table.to(candidates.device) for table in self._tables))
        tables = self._tables
        node, after_letter = torch.tensor(states, device=candidates.device)[..., None].unbind(1)  # (R, 1) each
        tokens = candidates.clamp(max=self._unknown)
        # The end of text begins with no letter and is in no phrase, so it needs no case of its own.
        in_word = after_letter.bool() & tables.begins_with_letter[tokens]
        symbols = tokens + in_word * (self._unknown + 1)
        target = tables.targets_of(node * self._symbol_count + symbols)
        target = target.where(target > 0, tables.targets_of(symbols))
        return tables.given[target] - tables.given[node] + tables.completed[node].masked_fill(in_word, 0.0)

    def advance(self, states: Sequence[HotwordState], tokens: Sequence[int]) -> list[HotwordState]:
        """The hypotheses with one token more each."""
        following = []
        for (node, after_letter), token in zip(states, tokens, strict=True):
            symbol, after_letter = self._symbol(token, after_letter)
            target = self._arcs.get(node * self._symbol_count + symbol) or self._arcs.get(symbol, 0)
            following.append(HotwordState(target, after_letter))
        return following

    @property
    def _symbol_count(self) -> int:
        return 2 * (self._unknown + 1)

    def _symbol(self, token: int, after_letter: bool) -> tuple[int, bool]:
        """What the automaton reads for a token, and whether the text then ends with a letter.

        A token that goes on with a word is another symbol than the same token where a word may begin. In this alphabet
        a phrase that begins or goes on in the middle of a word is not the phrase.
        """
        token = min(token, self._unknown)
        in_word = after_letter and self._begins_with_letter[token]
        return token + in_word * (self._unknown + 1), self._ends_with_letter[token]

    def _symbols(self, tokens: Iterable[int]) -> list[int]:
        symbols, after_letter = [], False
        for token in tokens:
            symbol, after_letter = self._symbol(token, after_letter)
            symbols.append(symbol)
        return symbols

    @staticmethod
    def _spellings(phrase: str, tokenizer: Tokenizer, texts: TokenTexts) -> list[tuple[int, ...]]:
        if not phrase.strip():
            raise _PhraseError(phrase, "is empty")
        phrase = phrase.strip()
        spellings = {tuple(tokenizer.encode(phrase)), tuple(tokenizer.encode(" " + phrase))}
        # Some sentencepiece models put a space before every text: how the phrase is written without one is seen here.
        bracket, behind_bracket = tokenizer.encode("("), tokenizer.encode("(" + phrase)
        if behind_bracket[: len(bracket)] == bracket:
            spellings.add(tuple(behind_bracket[len(bracket) :]))
        # What the tokenizer cannot write becomes a token without text, or nothing.
        spellings = {ids for ids in spellings if ids and all(texts.of((token,))[0] for token in ids)}
        if not spellings:
            raise _PhraseError(phrase, "has characters that the tokenizer cannot write")
        # One that ends with another would count twice where it occurs.
        return sorted(
            spelling
            for spelling in spellings
            if not any(spelling != other and spelling[-len(other) :] == other for other in spellings)
        )


class _PhraseError(UserError):
    def __init__(self, phrase: str, problem: str) -> None:
        super().__init__(f"hotword {phrase!r}: {problem}")
        self.phrase = phrase


class _Tables(NamedTuple):
    """The automaton, on the device of the candidates; K arcs, M nodes, V tokens.

    Attributes:
      keys: (K,) ascending; targets: (K,), never 0.
      completed: (M,) boosts of the phrases that end here, if no letter goes on with their last word.
      given: (M,) all boosts that may have to be taken back.
      begins_with_letter: (V + 1,) bool.
    """

    keys: Tensor
    targets: Tensor
    completed: Tensor
    given: Tensor
    begins_with_letter: Tensor

    def targets_of(self, keys: Tensor) -> Tensor:
        """Where the arcs with these keys lead; 0 where there is none."""
        at = torch.searchsorted(self.keys, keys).clamp(max=len(self.keys) - 1)
        return self.targets[at].where(self.keys[at] == keys, 0)


class _Trie:
    """A prefix trie over symbols. Node 0 is the root; the lists hold a value for each node.

    Attributes:
      completed: boosts of the sequences that end here, and, once linked, of their ends that are sequences too.
      begun: boost of the longer sequences that begin like this, the largest if there are several.
    """

    def __init__(self) -> None:
        self._children: list[dict[int, int]] = [{}]
        self.completed = [0.0]
        self.begun = [0.0]

    def add(self, symbols: Sequence[int], boost: float) -> None:
        node = 0
        for depth, symbol in enumerate(symbols):
            if depth > 0:
                self.begun[node] = max(self.begun[node], depth * boost)
            if symbol not in self._children[node]:
                self._children[node][symbol] = len(self._children)
                self._children.append({})
                self.completed.append(0.0)
                self.begun.append(0.0)
            node = self._children[node][symbol]
        self.completed[node] += len(symbols) * boost

    def link(self) -> list[dict[int, int]]:
        """Follow the failure links once and for all: where each symbol leads from each node, unless that is where it
        leads from the root too."""
        arcs: list[dict[int, int]] = [self._children[0]] + [{}] * (len(self._children) - 1)
        # With each node its failure link: the longest proper end of what leads to it that is in the trie.
        nodes = deque((child, 0) for child in self._children[0].values())
        while nodes:
            node, suffix = nodes.popleft()
            self.completed[node] += self.completed[suffix]
            self.begun[node] = max(self.begun[node], self.begun[suffix])
            inherited = arcs[suffix] if suffix else {}
            arcs[node] = inherited | self._children[node]
            nodes.extend(
                (child, inherited.get(symbol) or arcs[0].get(symbol, 0))
                for symbol, child in self._children[node].items()
            )
        return arcs


@cache
def _is_letter(character: str) -> bool:
    """Whether a word may go on with it: a letter, digit or mark of a script with spaces."""
    return unicodedata.category(character)[0] in "LNM" and not is_spaceless(character)
