"""Text to token ids and back: one interface, two tokenizers.

`RWKVTokenizer` is the "World" vocabulary that the released RWKV-7 models were trained with (BlinkDL/RWKV-LM);
it encodes with pyrwkv-tokenizer. `SentencePieceTokenizer` is for small models that are trained from scratch
(Kudo and Richardson, arXiv 1808.06226).

Both keep every character: decode(encode(text)) == text, spaces and newlines included, except that `decode`
leaves out the end of text and, for sentencepiece, pieces of the form <|...|> such as language tags.
"""

from __future__ import annotations

import ast
import io
import json
import re
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Protocol

from speechllm.errors import UserError
from speechllm.files import replaced_file

MODEL_FILE = "tokenizer.model"
KIND_FILE = "tokenizer.json"
_TAG = re.compile(r"<\|.*\|>")


class Tokenizer(Protocol):
    """What the model, the recipes and the searches ask of a tokenizer."""

    vocab_size: int
    """Ids are in [0, vocab_size): the rows of the embedding and of the output layer."""
    eos_id: int
    """The id that ends a text."""

    def encode(self, text: str) -> list[int]:
        """The ids of `text`, without the end of text."""
        ...

    def decode(self, ids: Iterable[int]) -> str:
        """The text of any ids whatsoever; bytes that are not whole UTF-8 become U+FFFD. Never raises for an
        int."""
        ...

    def save(self, folder: str | Path) -> None:
        """Write what `load_tokenizer(folder)` needs into `folder`, which is created."""
        ...


class RWKVTokenizer:
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
        # Lines are `id 'python literal' byte_length`. Read only when something is decoded: it takes half a
        # second. pyrwkv's own decode aborts the thread on ids that are not whole UTF-8, which a model in
        # training emits.
        table = {}
        with open(self._encoder.vocab_filepath, encoding="utf-8") as file:
            for line in file:
                index, rest = line.split(" ", 1)
                piece = ast.literal_eval(rest[: rest.rindex(" ")])
                table[int(index)] = piece if isinstance(piece, bytes) else piece.encode("utf-8")
        return table

    def encode(self, text: str) -> list[int]:
        return list(self._encoder.encode(text))

    def decode(self, ids: Iterable[int]) -> str:
        table = self._bytes_of
        return b"".join(table.get(int(i), b"") for i in ids).decode("utf-8", errors="replace")

    def save(self, folder: str | Path) -> None:
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / KIND_FILE).write_text(json.dumps({"kind": "rwkv"}) + "\n", encoding="utf-8")


class SentencePieceTokenizer:
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
        self._dropped = {
            i
            for i in range(self.vocab_size)
            if self._sp.is_control(i) or self._sp.is_unknown(i) or _TAG.fullmatch(self._sp.id_to_piece(i))
        }

    def encode(self, text: str) -> list[int]:
        return self._sp.encode(text)

    def decode(self, ids: Iterable[int]) -> str:
        kept = [int(i) for i in ids]
        return self._sp.decode([i for i in kept if 0 <= i < self.vocab_size and i not in self._dropped])

    def piece(self, index: int) -> str:
        """The piece with this id as sentencepiece shows it (U+2581 for a space), for logs and reports."""
        return self._sp.id_to_piece(index)

    def save(self, folder: str | Path) -> None:
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / MODEL_FILE).write_bytes(self._model)


def train_sentencepiece(
    texts: Iterable[str],
    folder: str | Path,
    vocab_size: int,
    special_tokens: Sequence[str] = (),
) -> SentencePieceTokenizer:
    """Train a unigram model on `texts`, write it into `folder` and return it.

    Nothing is normalised and no space is added in front, so that a prompt keeps its spaces and newlines; what
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
    required = len(set("".join(texts).replace(" ", "\u2581"))) + 256 + 2 + len(special_tokens)
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
            # sentencepiece writes a space as U+2581 before it looks for symbols
            user_defined_symbols=[token.replace(" ", "\u2581") for token in special_tokens],
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
        spec: `rwkv`, a sentencepiece `.model` file, or a folder that `Tokenizer.save` wrote.

    Raises:
        FileNotFoundError: nothing of that name.
        UserError: something of that name that is not a tokenizer.
    """
    if str(spec) == "rwkv":
        return RWKVTokenizer()
    path = Path(spec)
    if path.is_file():
        return SentencePieceTokenizer(path)
    if not path.is_dir():
        raise FileNotFoundError(
            f"tokenizer '{spec}': no such file or folder; give 'rwkv', a sentencepiece .model file or a folder with one"
        )
    if (path / MODEL_FILE).is_file():
        return SentencePieceTokenizer(path / MODEL_FILE)
    kind_file = path / KIND_FILE
    if not kind_file.is_file():
        raise FileNotFoundError(f"tokenizer '{spec}': the folder has neither {MODEL_FILE} nor {KIND_FILE}")
    try:
        kind = json.loads(kind_file.read_text(encoding="utf-8"))["kind"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f'{kind_file}: not a tokenizer file; expected {{"kind": "rwkv"}}') from error
    if kind != "rwkv":
        raise UserError(f"{kind_file}: unknown tokenizer kind {kind!r}; known: 'rwkv'")
    return RWKVTokenizer()
