"""Text to token ids and back: one interface, four tokenizers.

`RWKVTokenizer` is the "World" vocabulary that the released RWKV-7 models were trained with (BlinkDL/RWKV-LM);
it encodes with pyrwkv-tokenizer. `SentencePieceTokenizer` is for small models that are trained from scratch
(Kudo and Richardson, arXiv 1808.06226). `HFTokenizer` is the tokenizer.json of a Hugging Face model (Qwen, Llama, ...),
by their `tokenizers` library. `LexiconTokenizer` has phones for tokens, as a CTC head may write for a language model
that reads them (`model.ctc_tokenizer`); what is said of all others does not hold of it.

All keep every character: decode(encode(text)) == text, spaces and newlines included, except that `decode`
leaves out the end of text and, for sentencepiece, pieces of the form <|...|> such as language tags, unless it is told
to keep these; of a Hugging Face model it leaves out all special tokens, and its normalization of characters (NFC for
Qwen) remains.

A token may end inside a character. Text is shown while it is written with a `StreamDecoder`, which waits for the
rest of the character; `decode` is the same over all ids at once.
"""

from __future__ import annotations

import ast
import codecs
import hashlib
import importlib.metadata
import importlib.util
import io
import json
import re
import sys
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from speechllm.errors import UserError
from speechllm.files import replaced_file
from speechllm.hub import local_path

MODEL_FILE = "tokenizer.model"
LEXICON_FILE = "lexicon.txt"
KIND_FILE = "tokenizer.json"
GGUF_SUFFIX = ".gguf"
_TAG = re.compile(r"<\|.*\|>")
_SPACE = "\u2581"  # how sentencepiece writes a space
_BROKEN_BYTE = re.compile("[\udc80-\udcff]")  # as errors="surrogateescape" marks it


class StreamDecoder:
    """Text from token ids one at a time, whole characters only; made by `Tokenizer.stream`.

    What all calls of `push` and the `finish` after them return is, joined, what `Tokenizer.decode` makes of the ids:
    nothing that was returned is ever taken back. Each byte that is no part of a whole UTF-8 character becomes one
    U+FFFD, as in sentencepiece.

        stream = tokenizer.stream()
        for token_id in generated:
            print(stream.push(token_id), end="", flush=True)
        print(stream.finish())

    Args:
        first: the bytes of each id at the start of a text. Ids that are not in it are left out.
        rest: the same after the first id that was not left out.
    """

    def __init__(self, first: Mapping[int, bytes], rest: Mapping[int, bytes]) -> None:
        self._bytes_of, self._rest = first, rest
        # errors="replace" makes one U+FFFD of several bytes
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="surrogateescape")

    def push(self, token_id: int) -> str:
        """The text that is certain now and was not before; "" while a character is incomplete."""
        piece = self._bytes_of.get(int(token_id))
        if piece is None:
            return ""
        self._bytes_of = self._rest
        return _BROKEN_BYTE.sub("\ufffd", self._utf8.decode(piece))

    def finish(self) -> str:
        """What is left when no more ids come: U+FFFD for each byte of an incomplete character, else ""."""
        return _BROKEN_BYTE.sub("\ufffd", self._utf8.decode(b"", final=True))


class Beginnings(NamedTuple):
    """What the ids of a text and a word that has only begun may begin with.

    Attributes:
      common: with these in any case.
      rests: for each word what may follow, one or the other; nothing if no word begins like this.
    """

    common: tuple[int, ...]
    rests: Sequence[Sequence[tuple[int, ...]]]


class Tokenizer(Protocol):
    """What the model, the recipes and the searches ask of a tokenizer."""

    vocab_size: int
    """Ids are in [0, vocab_size): the rows of the embedding and of the output layer."""
    eos_id: int
    """The id that ends a text."""

    def encode(self, text: str) -> list[int]:
        """The ids of `text`, without the end of text."""
        ...

    def beginnings(self, text: str, words: Sequence[str]) -> Beginnings:
        """What the ids of `text` and a word behind it may begin with, for each beginning of one that `words` holds."""
        return Beginnings((), [[tuple(self.encode(text + word))] for word in words])

    def stream(self, keep_tags: bool = False, continued: bool = False) -> StreamDecoder:
        """A decoder for the ids of one text, given one at a time; `continued`: of its rest, after some ids."""
        ...

    def decode(self, ids: Iterable[int], keep_tags: bool = False) -> str:
        """The text of any ids whatsoever; bytes that are not whole UTF-8 become U+FFFD. Never raises for an
        int. `keep_tags`: with the tags that are otherwise left out."""
        stream = self.stream(keep_tags)
        return "".join(map(stream.push, ids)) + stream.finish()

    def piece(self, index: int) -> str:
        """The token with this id as a person reads it, for logs and reports."""
        return self.decode([index])

    def piece_text(self, index: int) -> str:
        """The text that this token has behind another: at the start of a text some tokenizers leave out a space."""
        return self.decode([index, index]).removeprefix(self.decode([index]))

    def identity(self) -> str:
        """The kind and a hash of the vocabulary: differs between tokenizers that encode some text differently."""
        ...

    def save(self, folder: str | Path) -> None:
        """Write what `load_tokenizer(folder)` needs into `folder`, which is created."""
        ...


class RWKVTokenizer(Tokenizer):
    """The RWKV "World" vocabulary: 65,529 byte strings, greedy longest match; id 0 ends a text.

    The models have 65,536 rows, so that is `vocab_size`; ids without a byte string decode to nothing.
    """

    vocab_size = 65536
    eos_id = 0

    def __init__(self) -> None:
        try:
            import pyrwkv_tokenizer
        except ImportError as error:
            raise ImportError(
                "the RWKV tokenizer needs pyrwkv-tokenizer: pip install 'pyrwkv-tokenizer>=0.9'"
            ) from error
        self._encoder = pyrwkv_tokenizer.RWKVTokenizer()

    @cached_property
    def _bytes_of(self) -> dict[int, bytes]:
        # Lines are `id 'python literal' byte_length`. pyrwkv's own decode aborts the thread on ids that are not whole
        # UTF-8, which a model in training emits.
        table = {}
        with open(self._encoder.vocab_filepath, encoding="utf-8") as file:
            for line in file:
                index, rest = line.split(" ", 1)
                table[int(index)] = _literal_bytes(rest[: rest.rindex(" ")])
        return table

    @cached_property
    def _ids_of(self) -> dict[bytes, int]:
        return {piece: index for index, piece in self._bytes_of.items()}

    @cached_property
    def _lengths(self) -> dict[bytes, list[int]]:
        """How long the byte strings are that begin with these two bytes, the longest first."""
        lengths = defaultdict(set)
        for piece in self._ids_of:
            lengths[piece[:2]].add(len(piece))
        return {start: sorted(found, reverse=True) for start, found in lengths.items()}

    def encode(self, text: str) -> list[int]:
        return list(self._encoder.encode(text))

    def encode_bytes(self, data: bytes) -> list[int]:
        """The ids of any bytes, whether or not they are UTF-8: of a text's, those that `encode` gives.

        For data in which a byte that is no UTF-8 must stay what it is. It is plain Python: `encode` is the fast way
        for text.
        """
        ids, start = [], 0
        while start < len(data):
            for length in (*self._lengths.get(data[start : start + 2], ()), 1):
                piece = data[start : start + length]
                if piece in self._ids_of:
                    break
            ids.append(self._ids_of[piece])
            start += len(piece)
        return ids

    def stream(self, keep_tags: bool = False, continued: bool = False) -> StreamDecoder:
        return StreamDecoder(self._bytes_of, self._bytes_of)  # its tags are text

    def identity(self) -> str:
        return f"rwkv {hashlib.sha256(Path(self._encoder.vocab_filepath).read_bytes()).hexdigest()}"

    def save(self, folder: str | Path) -> None:
        with replaced_file(Path(folder) / KIND_FILE) as tmp:
            tmp.write_text(json.dumps({"kind": "rwkv"}) + "\n", encoding="utf-8")


def _literal_bytes(literal: str) -> bytes:
    """Of a string or bytes literal of Python. One without escapes is what is between its quotes: evaluating each takes
    ten times as long, half a second for the vocabulary."""
    if literal[0] in "'\"" and "\\" not in literal:
        return literal[1:-1].encode("utf-8")
    piece = ast.literal_eval(literal)
    return piece if isinstance(piece, bytes) else piece.encode("utf-8")


class SentencePieceTokenizer(Tokenizer):
    """A sentencepiece model file.

    Args:
        path: a `.model` file. It must define an end of sentence.

    Raises:
        FileNotFoundError: there is no such file.
        UserError: it is not a sentencepiece model, or has no end of sentence.
    """

    def __init__(self, path: str | Path) -> None:
        import sentencepiece

        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such tokenizer model; train one with train_sentencepiece")
        self._model = path.read_bytes()
        try:
            self._sp = sentencepiece.SentencePieceProcessor(model_proto=self._model)
        except RuntimeError as error:
            raise UserError(f"{path}: not a sentencepiece model ({error})") from error
        self.vocab_size: int = self._sp.get_piece_size()
        self.eos_id: int = self._sp.eos_id()
        if not 0 <= self.eos_id < self.vocab_size:
            raise UserError(f"{path}: this sentencepiece model has no end of sentence piece; train it with eos_id >= 0")

    @cached_property
    def _bytes_of(self) -> dict[int, bytes]:
        table = {}
        for i in range(self.vocab_size):
            piece = self._sp.id_to_piece(i)
            if self._sp.is_byte(i):
                table[i] = bytes([int(piece[3:5], 16)])  # <0xE4>
            elif not (self._sp.is_control(i) or self._sp.is_unknown(i) or _TAG.fullmatch(piece)):
                table[i] = piece.replace(_SPACE, " ").encode("utf-8")
        return table

    @cached_property
    def _tags(self) -> dict[int, bytes]:
        pieces = {i: self._sp.id_to_piece(i) for i in range(self.vocab_size) if not self._sp.is_control(i)}
        return {i: piece.encode("utf-8") for i, piece in pieces.items() if _TAG.fullmatch(piece)}

    @cached_property
    def _first_bytes_of(self) -> dict[int, bytes]:
        # A model that adds a space in front of a text (add_dummy_prefix) takes it away here; one that removes extra
        # spaces takes away all of them, so that a lone space does not begin the text.
        table = self._bytes_of | {
            i: self._sp.decode([i]).encode("utf-8") for i in self._bytes_of if not self._sp.is_byte(i)
        }
        space = self._sp.piece_to_id(_SPACE)
        if space in table and self._sp.decode([space, space]) == "":
            del table[space]
        return table

    def encode(self, text: str) -> list[int]:
        return self._sp.encode(text)

    def stream(self, keep_tags: bool = False, continued: bool = False) -> StreamDecoder:
        tags = self._tags if keep_tags else {}
        first = self._bytes_of if continued else self._first_bytes_of
        return StreamDecoder(first | tags, self._bytes_of | tags)

    def piece(self, index: int) -> str:
        """The piece with this id as sentencepiece shows it (U+2581 for a space), for logs and reports."""
        return self._sp.id_to_piece(index)

    def identity(self) -> str:
        return f"sentencepiece {hashlib.sha256(self._model).hexdigest()}"

    def save(self, folder: str | Path) -> None:
        with replaced_file(Path(folder) / MODEL_FILE) as tmp:
            tmp.write_bytes(self._model)


class HFTokenizer(Tokenizer):
    """The tokenizer of a Hugging Face model: `tokenizer.json`, with `tokenizer_config.json` beside it.

    Nothing is put around a text when it is encoded, but special tokens in it, such as <|im_start|>, are one id each.

    The end of text is the `eos_token` of tokenizer_config.json, what the model was trained to end its turn with: of a
    chat model of Qwen <|im_end|>, of a base model <|endoftext|>. Without one it is the (first) `eos_token_id` of
    generation_config.json, then of config.json.

    Args:
        path: folder of the model, or what `save` wrote; or a GGUF file, from which transformers makes such a tokenizer.

    Raises:
        FileNotFoundError: there is no tokenizer.json.
        UserError: it cannot be read, its tokens are neither byte-level nor sentencepiece's, or no file names an end of
            text that it has.
    """

    def __init__(self, path: str | Path) -> None:
        import tokenizers

        path = Path(path)
        if path.suffix.lower() == GGUF_SUFFIX:
            self._json, eos_token = _read_gguf_tokenizer(path)
        else:
            path, folder, eos_token = path / KIND_FILE, path, None
            if not path.is_file():
                raise FileNotFoundError(f"{path}: no such file; a Hugging Face model has its tokenizer there")
            self._json = path.read_bytes()
        try:
            self._tokenizer = tokenizers.Tokenizer.from_buffer(self._json)
        except Exception as error:  # the library raises no narrower kind
            raise UserError(f"{path}: not a tokenizer of the tokenizers library ({error})") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._ids_of: dict[str, int] = self._tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size: int = max(self._ids_of.values()) + 1
        self.eos_id = _hf_eos(folder, self._ids_of) if eos_token is None else self._ids_of[eos_token]
        self._decoder = _hf_decoder(json.loads(self._json).get("decoder"), path)

    @cached_property
    def _bytes_of(self) -> dict[int, bytes]:
        as_bytes = _byte_level if self._decoder == "byte-level" else _sentencepiece_bytes
        table = {index: as_bytes(piece) for piece, index in self._ids_of.items()}
        for index, token in self._tokenizer.get_added_tokens_decoder().items():
            table[index] = token.content.encode("utf-8")
            if token.special:
                del table[index]
        table.pop(self.eos_id, None)
        return table

    @cached_property
    def _first_bytes_of(self) -> dict[int, bytes]:
        if self._decoder != "sentencepiece, space in front":
            return self._bytes_of
        return {index: piece.removeprefix(b" ") for index, piece in self._bytes_of.items()}

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    @cached_property
    def _tags(self) -> dict[int, bytes]:
        added = self._tokenizer.get_added_tokens_decoder()
        return {i: token.content.encode("utf-8") for i, token in added.items() if token.special and i != self.eos_id}

    def stream(self, keep_tags: bool = False, continued: bool = False) -> StreamDecoder:
        tags = self._tags if keep_tags else {}
        first = self._bytes_of if continued else self._first_bytes_of
        return StreamDecoder(first | tags, self._bytes_of | tags)

    def piece(self, index: int) -> str:
        special = self._tokenizer.get_added_tokens_decoder().get(index)
        return self.decode([index]) if special is None else special.content

    def identity(self) -> str:
        return f"huggingface {hashlib.sha256(self._json).hexdigest()}"

    def save(self, folder: str | Path) -> None:
        with replaced_file(Path(folder) / KIND_FILE) as tmp:
            tmp.write_bytes(self._json)
        with replaced_file(Path(folder) / _HF_CONFIG_FILE) as tmp:
            tmp.write_text(json.dumps({"eos_token": self._tokenizer.id_to_token(self.eos_id)}) + "\n", encoding="utf-8")


class LexiconTokenizer(Tokenizer):
    """Phones, by a pronunciation lexicon in icefall's form: `lexicon.txt`, a word and its phones a line.

        hello HH AH L OW
        world W ER L D

    "hello world" is `HH AH L OW _ W ER L D`: between two words there is a token for their border. Of several
    pronunciations of a word the first counts. A word that the lexicon does not have is the one token `<unk>`.

    `decode` looks up what is between two borders, and writes the first word of the lexicon with these phones. Where
    there is none it writes the phones as tags, `<|HH|><|AH|>`. These are also the tokens' own texts (`piece_text`), for
    a language model that has them as special tokens and reads what a CTC head hears (`model.ctc_tokenizer`). A `stream`
    gives a word when its border comes.

    Args:
        path: the folder of `lexicon.txt`.

    Raises:
        FileNotFoundError: there is no such file.
        UserError: a line without phones, no line at all, or no UTF-8.
    """

    BORDER = "_"
    UNKNOWN = "<unk>"
    MAX_BEGINNINGS = 6

    def __init__(self, path: str | Path) -> None:
        path = Path(path) / LEXICON_FILE
        self._lexicon = path.read_bytes()
        try:
            lines = self._lexicon.decode("utf-8").splitlines()
        except UnicodeDecodeError as error:
            raise UserError(f"{path}: not UTF-8 text ({error})") from error
        self._pronunciation: dict[str, list[str]] = {}
        for number, line in enumerate(lines, start=1):
            word, *phones = line.split() or [""]
            if word and not phones:
                raise UserError(f"{path}, line {number}: {word!r} has no phones; a line is a word and its phones")
            if word:
                self._pronunciation.setdefault(word, phones)
        if not self._pronunciation:
            raise UserError(f"{path}: no words")
        known = {phone for pronunciation in self._pronunciation.values() for phone in pronunciation}
        self._names = ["<eos>", self.UNKNOWN, self.BORDER, *sorted(known - {self.UNKNOWN, self.BORDER})]
        self._ids_of = {name: i for i, name in enumerate(self._names)}
        self.vocab_size = len(self._names)
        self.eos_id = 0
        self._beginning_cache: dict[str, list[tuple[int, ...]]] = {}

    @property
    def tags(self) -> list[str]:
        """The text of each token but the end of text, in the order of their ids, from 1 on."""
        return [_tag(name) for name in self._names[1:]]

    def encode(self, text: str) -> list[int]:
        """The phones of the words between the spaces of `text`."""
        ids: list[int] = []
        for word in text.split():
            if ids:
                ids.append(self._ids_of[self.BORDER])
            ids.extend(self._ids_of[phone] for phone in self._pronunciation.get(word, [self.UNKNOWN]))
        return ids

    def beginnings(self, text: str, words: Sequence[str]) -> Beginnings:
        """Of the words that begin like one of `words`, as many of their phones as there are letters in what is written,
        in proportion. The first words of the lexicon count: those with `MAX_BEGINNINGS` different beginnings."""
        said = self.encode(text)
        if said:
            said.append(self._ids_of[self.BORDER])
        return Beginnings(tuple(said), [self._beginnings(word) for word in words])

    def _beginnings(self, word: str) -> list[tuple[int, ...]]:
        """Asked for at each step of a search: those of words are kept, not those of everything that is none."""
        if word in self._beginning_cache:
            return self._beginning_cache[word]
        first, last = (bisect_left(self._sorted_words, end) for end in (word, word + chr(sys.maxunicode)))
        if first == last:
            return []
        found: dict[tuple[int, ...], None] = {}
        for rank in np.sort(self._ranks[first:last]).tolist():
            whole, phones = self._in_order[rank]
            found[tuple(self._ids_of[phone] for phone in phones[: len(phones) * len(word) // len(whole)])] = None
            if len(found) == self.MAX_BEGINNINGS:
                break
        # One that goes on from another of them is never the more probable one.
        shortest = [ids for ids in found if not any(ids[:n] in found for n in range(len(ids)))]
        self._beginning_cache[word] = shortest
        return shortest

    @cached_property
    def _in_order(self) -> list[tuple[str, list[str]]]:
        """The words and their phones."""
        return list(self._pronunciation.items())

    @cached_property
    def _sorted_words(self) -> list[str]:
        return sorted(self._pronunciation)

    @cached_property
    def _ranks(self) -> NDArray[np.int64]:
        """The places in the lexicon of `_sorted_words`."""
        rank_of = {word: rank for rank, word in enumerate(self._pronunciation)}
        return np.array([rank_of[word] for word in self._sorted_words])

    def stream(self, keep_tags: bool = False, continued: bool = False) -> StreamDecoder:
        return _WordStream(self, continued)

    def word(self, phones: Sequence[str]) -> str:
        """The first word with these phones, else their tags."""
        return self._word_of.get(tuple(phones), "".join(map(_tag, phones)))

    @cached_property
    def _word_of(self) -> dict[tuple[str, ...], str]:
        found: dict[tuple[str, ...], str] = {}
        for word, phones in self._pronunciation.items():
            found.setdefault(tuple(phones), word)
        return found

    def piece(self, index: int) -> str:
        return self._names[index]

    def piece_text(self, index: int) -> str:
        return "" if index == self.eos_id else _tag(self._names[index])

    def identity(self) -> str:
        return f"lexicon {hashlib.sha256(self._lexicon).hexdigest()}"

    def save(self, folder: str | Path) -> None:
        with replaced_file(Path(folder) / LEXICON_FILE) as tmp:
            tmp.write_bytes(self._lexicon)


class _WordStream(StreamDecoder):
    """Words from phones: each when its border comes, the last one at the end."""

    def __init__(self, tokenizer: LexiconTokenizer, continued: bool) -> None:
        self._tokenizer = tokenizer
        self._phones: list[str] = []
        self._space = " " * continued

    def push(self, token_id: int) -> str:
        if token_id == self._tokenizer.eos_id or not 0 < token_id < self._tokenizer.vocab_size:
            return ""
        name = self._tokenizer.piece(token_id)
        if name == self._tokenizer.BORDER:
            return self.finish()
        self._phones.append(name)
        return ""

    def finish(self) -> str:
        if not self._phones:
            return ""
        text = self._space + self._tokenizer.word(self._phones)
        self._phones, self._space = [], " "
        return text


def _tag(phone: str) -> str:
    return f"<|{phone.strip('<>')}|>"


def _read_gguf_tokenizer(path: Path) -> tuple[bytes, str]:
    """The tokenizer of a GGUF file in the form of a tokenizer.json, and the token that ends a text."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    if importlib.util.find_spec("gguf") is None:
        raise UserError(f"{path}: a GGUF file needs the package gguf: pip install 'speechllm[gguf]'")
    version = importlib.metadata.version("transformers")
    if tuple(map(int, version.split(".")[:2])) < (5, 23):  # of 5.17 and 4.57 the tokens are others
        raise UserError(
            f"{path}: transformers {version} makes other tokens of GGUF files; install a newer one: "
            "pip install 'transformers>=5.23'"
        )
    from transformers import AutoTokenizer

    try:
        found = AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name, local_files_only=True)
    except Exception as error:  # a damaged file fails in many ways
        raise UserError(f"{path}: transformers reads no tokenizer from it ({type(error).__name__}: {error})") from error
    if found.eos_token is None:
        raise UserError(f"{path}: no end of text: its tokenizer.ggml.eos_token_id is missing")
    content = json.loads(found.backend_tokenizer.to_str())
    if (content["pre_tokenizer"] or {}).get("type") == "Metaspace":
        # It puts a space in front of a text without one only, so that a text that begins with one is read without it.
        # llama.cpp and Llama 2's own tokenizer.json put one in front of every text.
        if content["pre_tokenizer"]["prepend_scheme"] == "never":
            steps: list[dict[str, Any]] = []
        else:
            steps = [{"type": "Prepend", "prepend": _SPACE}]
        steps.append({"type": "Replace", "pattern": {"String": " "}, "content": _SPACE})
        content |= {"normalizer": {"type": "Sequence", "normalizers": steps}, "pre_tokenizer": None}
    return json.dumps(content).encode("utf-8"), found.eos_token


_HF_CONFIG_FILE = "tokenizer_config.json"
_HF_EOS_ID_FILES = ("generation_config.json", "config.json")


def _hf_eos(folder: Path, ids_of: Mapping[str, int]) -> int:
    """The end of text, by the rule of `HFTokenizer`."""
    found = {name: _read_object(folder / name) for name in (_HF_CONFIG_FILE, *_HF_EOS_ID_FILES)}
    token = found[_HF_CONFIG_FILE].get("eos_token")
    if token is not None:
        token = token["content"] if isinstance(token, dict) else token
        if token not in ids_of:
            raise UserError(f"{folder / _HF_CONFIG_FILE}: eos_token: {token!r} is not in {folder / KIND_FILE}")
        return ids_of[token]
    for name in _HF_EOS_ID_FILES:
        index = found[name].get("eos_token_id")
        index = index[0] if isinstance(index, list) and index else index
        if isinstance(index, int):
            if index not in ids_of.values():
                raise UserError(f"{folder / name}: eos_token_id: {index} is not in {folder / KIND_FILE}")
            return index
    raise UserError(
        f"{folder}: no end of text: give eos_token in {_HF_CONFIG_FILE}, or eos_token_id in {_HF_EOS_ID_FILES[0]}"
    )


def _hf_decoder(decoder: dict | None, path: Path) -> str:
    """How tokens become text: `byte-level`, `sentencepiece`, or `sentencepiece, space in front` (which goes)."""
    steps = decoder.get("decoders", [decoder]) if decoder else []
    kinds = [step["type"] for step in steps]
    if kinds == ["ByteLevel"]:
        return "byte-level"
    spaces = {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "}
    if steps[:1] == [spaces] and {*kinds} <= {"Replace", "ByteFallback", "Fuse", "Strip"}:
        return "sentencepiece, space in front" if "Strip" in kinds else "sentencepiece"
    raise UserError(
        f"{path}: decoder: {', '.join(kinds) or 'none'} is not supported; byte-level tokens (Qwen, Llama 3) and "
        "sentencepiece's (Llama 2, Mistral, Gemma) are"
    )


# GPT-2's alphabet (openai/gpt-2, encoder.py): bytes that are printable in Latin-1 stand for themselves, the others are
# the characters from 256 on, in order.
_PRINTABLE = [*range(ord("!"), ord("~") + 1), *range(ord("\u00a1"), ord("\u00ac") + 1), *range(ord("\u00ae"), 256)]
_BYTE_OF = {chr(byte): byte for byte in _PRINTABLE} | {
    chr(256 + i): byte for i, byte in enumerate(sorted(set(range(256)) - set(_PRINTABLE)))
}
_BYTE_PIECE = re.compile("<0x[0-9A-F]{2}>")


def _byte_level(piece: str) -> bytes:
    return bytes(_BYTE_OF[char] for char in piece) if set(piece) <= _BYTE_OF.keys() else piece.encode("utf-8")


def _sentencepiece_bytes(piece: str) -> bytes:
    if _BYTE_PIECE.fullmatch(piece):
        return bytes([int(piece[3:5], 16)])
    return piece.replace(_SPACE, " ").encode("utf-8")


def _read_object(path: Path) -> dict:
    """The JSON object in a file; an empty one where there is no file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: not a JSON object")
    return content


def train_sentencepiece(
    texts: Iterable[str],
    folder: str | Path,
    vocab_size: int,
    special_tokens: Sequence[str] = (),
) -> SentencePieceTokenizer:
    """Train a unigram model on `texts`, write it into `folder` and return it.

    Nothing is normalized and no space is added in front, so that a prompt keeps its spaces and newlines; what
    the texts do not contain is spelled in the 256 byte pieces. The same texts give the same model.

    Args:
        texts: what the model will be asked to write, as it will be asked: a label that follows a space in the
            prompt should start with that space here.
        folder: created where missing; receives `tokenizer.model`.
        vocab_size: at most so many pieces; a small corpus yields fewer (see `vocab_size` of the result). The
            256 byte pieces, the end of text, the special tokens and every character of the corpus must fit.
        special_tokens: strings that are always one piece, such as `<|en|>`; spaces and newlines are allowed.

    Raises:
        UserError: no text, a special token that occurs twice, or a vocabulary too small for what must fit.
    """
    import sentencepiece

    texts = [text for text in texts if text.strip()]
    if not texts:
        raise UserError("train_sentencepiece: there is no text to train on")
    if len(set(special_tokens)) != len(special_tokens) or not all(special_tokens):
        raise UserError(f"train_sentencepiece: repeated or empty special token in {special_tokens}")
    required = len(set("".join(texts).replace(" ", _SPACE))) + 256 + 2 + len(special_tokens)
    if vocab_size < required:
        raise UserError(
            f"train_sentencepiece: vocab_size {vocab_size} is too small: 256 bytes, 2 control pieces, "
            f"{len(special_tokens)} special tokens and the {required - 258 - len(special_tokens)} "
            f"characters of the corpus need {required}"
        )
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts),
            model_writer=model,
            model_type="unigram",
            vocab_size=vocab_size,
            hard_vocab_limit=False,
            character_coverage=1.0,
            byte_fallback=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            # spaces become _SPACE before symbols are looked for
            user_defined_symbols=[token.replace(" ", _SPACE) for token in special_tokens],
            unk_id=0,
            eos_id=1,
            bos_id=-1,
            pad_id=-1,
            eos_piece="<|endoftext|>",
            # one thread: the order of floating-point sums, and so the model, does not depend on the machine
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise UserError(f"train_sentencepiece: vocab_size {vocab_size} on {len(texts)} texts: {error}") from error
    folder = Path(folder)
    with replaced_file(folder / MODEL_FILE) as tmp:
        tmp.write_bytes(model.getvalue())
    return SentencePieceTokenizer(folder / MODEL_FILE)


def load_tokenizer(spec: str | Path) -> Tokenizer:
    """The tokenizer that a configuration names.

    Args:
        spec: `rwkv`, a sentencepiece `.model` file, a `.gguf` file, the folder of a Hugging Face model, one with a
            `lexicon.txt`, or one that `Tokenizer.save` wrote; or an id of the Hub (`speechllm.hub`).

    Raises:
        FileNotFoundError: nothing of that name.
        UserError: something of that name that is not a tokenizer.
    """
    if str(spec) == "rwkv":
        return RWKVTokenizer()
    path = local_path(spec)
    if path.suffix.lower() == GGUF_SUFFIX:
        return HFTokenizer(path)
    if path.is_file():
        return SentencePieceTokenizer(path)
    if not path.is_dir():
        raise FileNotFoundError(
            f"tokenizer '{spec}': no such file or folder; give 'rwkv', a sentencepiece .model file, a folder with one, "
            "or the folder of a Hugging Face model"
        )
    kind_file = path / KIND_FILE
    if kind_file.is_file():  # a model that has a sentencepiece file too has its special tokens here
        content = _read_object(kind_file)
        if "kind" not in content:
            return HFTokenizer(path)
        if content["kind"] != "rwkv":
            raise UserError(f"{kind_file}: unknown tokenizer kind {content['kind']!r}; known: 'rwkv'")
        return RWKVTokenizer()
    if (path / LEXICON_FILE).is_file():
        return LexiconTokenizer(path)
    if not (path / MODEL_FILE).is_file():
        raise FileNotFoundError(
            f"tokenizer '{spec}': the folder has none of {MODEL_FILE}, {KIND_FILE} and {LEXICON_FILE}"
        )
    return SentencePieceTokenizer(path / MODEL_FILE)
