"""What is known before anything is heard, as scorers of the search: expected phrases, and an n-gram language model."""

from __future__ import annotations

import unicodedata
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from math import inf, log
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from speechllm.decode.timestamps import word_spans
from speechllm.errors import UserError
from speechllm.text.tokenizer import Tokenizer

# The log10 probability of a word is at least this: kenlm gives -100 to the words that a file without <unk> lacks, with
# which no text would ever have one.
LEAST_LOG10 = -10.0


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
      UserError: there is no phrase, or one is empty, cannot be written in tokens, or has a boost out of range; the
        weight is out of range.
    """

    def __init__(self, phrases: Mapping[str, float], tokenizer: Tokenizer, weight: float = 1.0) -> None:
        self.weight = _checked_weight("hotword_weight", weight)
        if not phrases:
            raise UserError("hotwords: there is no phrase")
        texts = _Texts(tokenizer)
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
    def _spellings(phrase: str, tokenizer: Tokenizer, texts: _Texts) -> list[tuple[int, ...]]:
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


class WordModel(Protocol):
    """What `NGram` asks of a language model over words."""

    def start(self) -> Any:
        """The state at the start of a sentence."""
        ...

    def score(self, state: Any, word: str) -> tuple[float, Any]:
        """The log10 probability of `word`, "</s>" for the end of the sentence, and the state after it; the one before
        stays as it is."""
        ...


class KenLM:
    """An n-gram language model that kenlm (Heafield, WMT 2011) reads: ARPA, or binary.

    Raises:
      FileNotFoundError: there is no such file.
      UserError: kenlm is not installed, or cannot read the file.
    """

    def __init__(self, path: str | Path) -> None:
        try:
            import kenlm
        except ImportError as error:
            raise UserError(
                "n-gram language models need kenlm: pip install kenlm (pip builds it, with a C++ compiler)"
            ) from error
        if not Path(path).is_file():
            raise FileNotFoundError(f"{path}: no such n-gram language model")
        config = kenlm.Config()
        config.show_progress = False
        try:
            self._model = kenlm.Model(str(path), config)
        except OSError as error:
            reason = str(error.__cause__ or error)
            raise UserError(f"{path}: kenlm cannot read it as an n-gram language model: {reason}") from error
        self._new_state = kenlm.State

    def start(self) -> Any:
        state = self._new_state()
        self._model.BeginSentenceWrite(state)
        return state

    def score(self, state: Any, word: str) -> tuple[float, Any]:
        following = self._new_state()
        return self._model.BaseScore(state, word, following), following


class NGramState(NamedTuple):
    """Of a hypothesis: the word model's state, the word that has not ended, the tokens behind it that end inside a
    character."""

    lm_state: Any
    word: str
    pending: tuple[int, ...]


class NGram:
    """Adds the log probabilities of an n-gram language model over words (shallow fusion).

    A word is what stands between white space, punctuation included; a character of a script without spaces (see
    `word_spans`), and what stands between two such, is one too. The file must have been made from text that is written
    like the texts of the model (case, punctuation) and separated like this. A word's score comes with the token that
    shows its end, such as the space of the next word; that of a character without spaces with the token that completes
    it; that of the last word, and of the end of the sentence, with the end of text. Over a whole text the scores add up
    to the natural logarithm of its probability, but no word costs more than `LEAST_LOG10`.

    Args:
      lm: over the words, such as `KenLM`.
      tokenizer: that of the language model whose search this takes part in.
      weight: of the scores in the search.

    Raises:
      UserError: the weight is out of range.
    """

    def __init__(self, lm: WordModel, tokenizer: Tokenizer, weight: float) -> None:
        self.weight = _checked_weight("ngram_weight", weight)
        self._lm = lm
        self._eos_id = tokenizer.eos_id
        self._texts = _Texts(tokenizer)
        self._pieces: dict[tuple[int, ...], _Piece | None] = {}

    @classmethod
    def from_file(cls, path: str | Path, tokenizer: Tokenizer, weight: float) -> NGram:
        """With the model in an ARPA or binary file; raises what `KenLM` does."""
        return cls(KenLM(path), tokenizer, weight)

    def start(self, utterance: int) -> NGramState:
        """The same for all utterances."""
        return NGramState(self._lm.start(), "", ())

    def score(self, states: Sequence[NGramState], candidates: Tensor) -> Tensor:
        """The log probabilities (R, C), float32, of the words that each of `candidates` (R, C) ends."""
        rows = []
        for state, tokens in zip(states, candidates.tolist(), strict=True):
            # Most candidates end the same word, or none.
            scores: dict[tuple[str, ...], float] = {(): 0.0}
            row = []
            for token in tokens:
                words = self._ended(state) if token == self._eos_id else self._append(state, token)[0]
                if words not in scores:
                    scores[words] = self._read(state.lm_state, words)[0]
                row.append(scores[words])
            rows.append(row)
        return torch.tensor(rows, dtype=torch.float32, device=candidates.device)

    def advance(self, states: Sequence[NGramState], tokens: Sequence[int]) -> list[NGramState]:
        """The hypotheses with one token more each."""
        following = []
        for state, token in zip(states, tokens, strict=True):
            words, word, pending = self._append(state, token)
            following.append(NGramState(self._read(state.lm_state, words)[1], word, pending))
        return following

    def _append(self, state: NGramState, token: int) -> tuple[tuple[str, ...], str, tuple[int, ...]]:
        """The words that end with `token`, the one that has begun then, and the tokens that end inside a character."""
        tokens = (*state.pending, token)
        if tokens not in self._pieces:
            text, is_whole = self._texts.of(tokens)
            self._pieces[tokens] = _split(text) if is_whole else None
        piece = self._pieces[tokens]
        if piece is None:
            return (), state.word, tokens
        if not piece.ends_word:
            return (), state.word + piece.head, ()
        word = state.word + piece.head
        return ((word,) if word else ()) + piece.words, piece.tail, ()

    def _ended(self, state: NGramState) -> tuple[str, ...]:
        """The words that end with the text."""
        piece = _split(state.word + self._texts.of(state.pending)[0])
        return (*(word for word in (piece.head, *piece.words, piece.tail) if word), "</s>")

    def _read(self, lm_state: Any, words: Iterable[str]) -> tuple[float, Any]:
        total = 0.0
        for word in words:
            log10, lm_state = self._lm.score(lm_state, word)
            total += max(log10, LEAST_LOG10) * log(10)
        return total, lm_state


class _Piece(NamedTuple):
    """A text in which words end.

    Attributes:
      head: goes on with the word before it.
      ends_word: that word ends here.
      words: whole ones.
      tail: begins a word; "" if none ends here.
    """

    head: str
    ends_word: bool
    words: tuple[str, ...]
    tail: str


def _split(text: str) -> _Piece:
    words = [""]
    for character in text:
        if character.isspace():
            words.append("")
        elif _is_spaceless(character):
            words += [character, ""]
        else:
            words[-1] += character
    if len(words) == 1:
        return _Piece(text, False, (), "")
    return _Piece(words[0], True, tuple(word for word in words[1:-1] if word), words[-1])


class _Texts:
    """What tokens say in the middle of a text; at its start some tokenizers leave out a space."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._before = tokenizer.encode("a")
        self._before_length = len(tokenizer.decode(self._before))

    def of(self, tokens: Sequence[int]) -> tuple[str, bool]:
        """The text, and whether its last character is complete: else it is U+FFFD."""
        stream = self._tokenizer.stream()
        text = "".join(stream.push(token) for token in (*self._before, *tokens))
        incomplete = stream.finish()
        return text[self._before_length :] + incomplete, not incomplete


@cache
def _is_spaceless(character: str) -> bool:
    """Whether it is a letter of a script without spaces, and so a word by itself; not white space."""
    return len(word_spans("a" + character)) == 2


@cache
def _is_letter(character: str) -> bool:
    """Whether a word may go on with it: a letter, digit or mark of a script with spaces."""
    return unicodedata.category(character)[0] in "LNM" and not _is_spaceless(character)


def _checked_weight(name: str, weight: float) -> float:
    if not 0 <= weight < inf:
        raise UserError(f"{name}: must be at least 0 and finite, got {weight}")
    return weight
