"""Tokenizers: nothing is lost on the way there and back, and no id sequence can stop a decoder."""

import ast
import io
import json
import random
from functools import cache
from pathlib import Path

import pytest
import sentencepiece
import tokenizers

from speechllm.errors import UserError
from speechllm.text.tokenizer import (
    HFTokenizer,
    RWKVTokenizer,
    SentencePieceTokenizer,
    Tokenizer,
    load_tokenizer,
    train_sentencepiece,
)
from tests.hf_tokenizers import train_byte_fallback, train_byte_level

GOLDEN = json.loads((Path(__file__).parents[1] / "golden/rwkv_tokenizer.json").read_text(encoding="utf-8"))
WORDS = [
    "zero",
    "one",
    "two",
    "three",
    "cuatro",
    "cinco",
    "siete",
    "zéro",
    "quatre",
    "neuf",
    "sette",
    "ноль",
    "один",
    "четыре",
    "восемь",
]
TAGS = ["<|en|>", "<|ru|>"]
SAMPLES = [
    "",
    " zero one",
    "User: hello\n\nAssistant: ноль  два \n",
    "日本語と中文，mixed\t🙂 with emoji",
    "  two leading, two trailing  ",
]


def digit_texts(n: int = 300) -> list[str]:
    rng = random.Random(0)
    return [" " + " ".join(rng.choice(WORDS) for _ in range(rng.randint(1, 7))) for _ in range(n)]


@cache
def rwkv() -> RWKVTokenizer:
    return RWKVTokenizer()


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> SentencePieceTokenizer:
    return train_sentencepiece(digit_texts(), tmp_path_factory.mktemp("spm"), 400, [*TAGS, "User: ", "\n\nAssistant:"])


CHAT = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory) -> HFTokenizer:
    return HFTokenizer(train_byte_level(digit_texts(), tmp_path_factory.mktemp("hf"), special_tokens=CHAT))


@pytest.fixture(scope="module")
def byte_fallback(tmp_path_factory) -> HFTokenizer:
    return HFTokenizer(train_byte_fallback(digit_texts(), tmp_path_factory.mktemp("hf")))


@pytest.mark.parametrize("text", SAMPLES)
def test_round_trip(text, small, byte_level, byte_fallback):
    for tokenizer in (rwkv(), small, byte_level, byte_fallback):
        ids = tokenizer.encode(text)
        assert all(0 <= i < tokenizer.vocab_size for i in ids)
        assert tokenizer.eos_id not in ids
        assert tokenizer.decode(ids) == text


def random_ids(tokenizer: Tokenizer, n: int) -> list[list[int]]:
    """Texts cut anywhere, among them pieces of single bytes, spaces and ids that stand for nothing."""
    rng = random.Random(1)
    frequent = [i for text in SAMPLES for i in tokenizer.encode(text)] + [tokenizer.eos_id]

    def any_id() -> int:
        return rng.choice(frequent) if rng.random() < 0.7 else rng.randrange(-5, tokenizer.vocab_size + 5)

    cut = [tokenizer.encode("\u0e20🙂中é\ufffd" * 2)[rng.randrange(9) :][: rng.randrange(9)] for _ in range(n // 2)]
    return cut + [[any_id() for _ in range(rng.randrange(12))] for _ in range(n - len(cut))]


SENTENCEPIECE = ["small", "prefix", "prefix, spaces removed", "spaces removed"]


@pytest.fixture(scope="module", params=["rwkv", "byte_level", "byte_fallback", *SENTENCEPIECE])
def any_tokenizer(request, small, tmp_path_factory) -> Tokenizer:
    """Ours, those of Hugging Face models, and sentencepiece models of others that add or remove spaces."""
    if request.param == "rwkv":
        return rwkv()
    if request.param in ("small", "byte_level", "byte_fallback"):
        return request.getfixturevalue(request.param)
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(digit_texts()),
        model_writer=model,
        vocab_size=340,
        hard_vocab_limit=False,
        byte_fallback=True,
        add_dummy_prefix="prefix" in request.param,
        remove_extra_whitespaces="removed" in request.param,
        user_defined_symbols=["\u2581\u2581", "<|en|>"],
        minloglevel=2,
    )
    path = tmp_path_factory.mktemp("foreign") / "foreign.model"
    path.write_bytes(model.getvalue())
    return SentencePieceTokenizer(path)


def test_stream_gives_the_decoded_text_and_only_whole_characters(any_tokenizer):
    for ids in random_ids(any_tokenizer, 1500):
        text = any_tokenizer.decode(ids)
        text.encode("utf-8")  # no lone surrogate
        stream = any_tokenizer.stream()
        shown = ""
        for i in ids:
            shown += stream.push(i)
            assert text.startswith(shown), ids
        assert shown + stream.finish() == text, ids


def test_stream_waits_for_the_rest_of_a_character(small):
    for tokenizer, ids in ((rwkv(), [0xC3 + 1, 0xA9 + 1]), (small, small.encode("🙂"))):
        assert len(ids) > 1
        stream = tokenizer.stream()
        assert [stream.push(i) for i in ids[:-1]] == [""] * (len(ids) - 1)
        assert stream.push(ids[-1]) == tokenizer.decode(ids) and stream.finish() == ""
        cut = tokenizer.stream()
        assert cut.push(ids[0]) == "" and cut.finish() == "\ufffd"


@pytest.mark.parametrize("any_tokenizer", SENTENCEPIECE, indirect=True)
def test_decode_is_that_of_sentencepiece(any_tokenizer, tmp_path):
    any_tokenizer.save(tmp_path)
    reference = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    left_out = {i for i in range(reference.vocab_size()) if reference.is_control(i) or reference.is_unknown(i)}
    left_out |= {reference.piece_to_id(tag) for tag in TAGS}
    for ids in random_ids(any_tokenizer, 1500):
        kept = [i for i in ids if 0 <= i < reference.vocab_size() and i not in left_out]
        assert any_tokenizer.decode(ids) == reference.decode(kept), ids


@pytest.mark.parametrize("any_tokenizer", ["byte_level", "byte_fallback"], indirect=True)
def test_a_hugging_face_tokenizer_is_that_of_its_library(any_tokenizer, tmp_path):
    any_tokenizer.save(tmp_path)
    reference = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    for text in SAMPLES:
        assert any_tokenizer.encode(text) == reference.encode(text, add_special_tokens=False).ids
    compared = 0
    for ids in random_ids(any_tokenizer, 1500):
        kept = [i for i in ids if 0 <= i < any_tokenizer.vocab_size]
        expected = reference.decode(kept, skip_special_tokens=True)
        if "\ufffd" not in expected:  # of which the library makes one for several bytes
            assert any_tokenizer.decode(ids) == expected, ids
            compared += 1
    assert compared > 200


def test_special_tokens_of_a_hugging_face_model(byte_level, byte_fallback):
    ids = byte_level.encode("<|im_start|>one<think> two<|im_end|>")
    assert ids[0] == CHAT.index("<|im_start|>") and ids[-1] == CHAT.index("<|im_end|>")
    assert byte_level.decode(ids) == "one<think> two"
    assert byte_level.eos_id == CHAT.index("<|endoftext|>")
    assert byte_fallback.encode("one</s>")[-1] == byte_fallback.eos_id
    assert max(byte_level.encode("<think>")) == byte_level.vocab_size - 1  # added behind the others


def test_the_end_of_text_of_a_hugging_face_model(tmp_path):
    train_byte_level(digit_texts(20), tmp_path, special_tokens=CHAT)

    def eos(**files) -> int:
        for name in ("tokenizer_config", "generation_config", "config"):
            (tmp_path / f"{name}.json").unlink(missing_ok=True)
            if name in files:
                (tmp_path / f"{name}.json").write_text(json.dumps(files[name]))
        return load_tokenizer(tmp_path).eos_id

    chat, ids = {"eos_token": "<|im_end|>"}, {"eos_token_id": [1, 0]}
    assert eos(tokenizer_config=chat, generation_config=ids) == 2
    assert eos(tokenizer_config={"eos_token": None}, generation_config=ids, config={"eos_token_id": 0}) == 1
    assert eos(config={"eos_token_id": 0}) == 0
    for files, message in (
        ({}, "no end of text: give eos_token in tokenizer_config.json"),
        ({"tokenizer_config": {"eos_token": "</s>"}}, "tokenizer_config.json: eos_token: '</s>' is not in"),
        ({"config": {"eos_token_id": 5000}}, "config.json: eos_token_id: 5000 is not in"),
        ({"config": []}, "config.json: not a JSON object"),
    ):
        with pytest.raises(ValueError, match=message):
            eos(**files)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    (tmp_path / "tokenizer.json").write_text(
        json.dumps(content | {"decoder": {"type": "BPEDecoder", "suffix": "</w>"}})
    )
    with pytest.raises(ValueError, match="decoder: BPEDecoder is not supported"):
        eos(tokenizer_config=chat)


def test_rwkv_ids_are_those_of_the_rwkv_package():
    for case in GOLDEN["texts"]:
        assert rwkv().encode(case["text"]) == case["ids"], case["name"]
        assert rwkv().encode_bytes(case["text"].encode()) == case["ids"], case["name"]
        assert rwkv().decode(case["ids"]) == case["text"]
    for case in GOLDEN["bytes"]:
        assert rwkv().encode_bytes(bytes.fromhex(case["hex"])) == case["ids"], case["hex"]


def test_rwkv_is_the_world_vocabulary():
    tokenizer = rwkv()
    assert (tokenizer.vocab_size, tokenizer.eos_id) == (65536, 0)
    assert tokenizer.encode("User: hello\n\nAssistant:") == [24281, 59, 38685, 261, 5585, 41693, 59]
    # a lone UTF-8 lead byte, on which pyrwkv's own decode aborts: ids 1 to 256 are the bytes 0 to 255
    assert tokenizer.decode([0xF0 + 1, 0x41 + 1]) == "\ufffdA"


def test_small_model_has_whole_words_and_tags(small):
    assert small.vocab_size <= 400
    for text in digit_texts(50):
        assert len(small.encode(text)) == len(text.split())
    ids = small.encode("User: <|ru|>\n\nAssistant: ноль")
    assert [small.piece(i) for i in ids] == ["User:\u2581", "<|ru|>", "\n\nAssistant:", "\u2581ноль"]
    assert small.decode(ids) == "User: \n\nAssistant: ноль"


def test_training_is_deterministic(tmp_path):
    for name in ("a", "b"):
        train_sentencepiece(digit_texts(), tmp_path / name, 400, TAGS)
    assert (tmp_path / "a/tokenizer.model").read_bytes() == (tmp_path / "b/tokenizer.model").read_bytes()
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["tokenizer.model"]


def test_large_vocabulary_is_a_soft_limit_and_a_small_one_an_error(tmp_path):
    assert train_sentencepiece(digit_texts(), tmp_path, 5000).vocab_size < 600
    with pytest.raises(ValueError, match="vocab_size 270 is too small.* need "):
        train_sentencepiece(digit_texts(), tmp_path, 270, TAGS)
    with pytest.raises(ValueError, match="no text"):
        train_sentencepiece(["", " "], tmp_path, 400)


def test_save_and_load(tmp_path, small, byte_level, byte_fallback):
    named = {"rwkv": rwkv(), "small": small, "byte_level": byte_level, "byte_fallback": byte_fallback}
    for name, tokenizer in named.items():
        tokenizer.save(tmp_path / name)
        again = load_tokenizer(tmp_path / name)
        assert type(again) is type(tokenizer)
        assert again.encode(SAMPLES[2]) == tokenizer.encode(SAMPLES[2])
        assert (again.eos_id, again.identity()) == (tokenizer.eos_id, tokenizer.identity())
    assert len({tokenizer.identity() for tokenizer in named.values()}) == len(named)
    assert isinstance(load_tokenizer("rwkv"), RWKVTokenizer)
    assert load_tokenizer(tmp_path / "small/tokenizer.model").vocab_size == small.vocab_size


def test_literals_of_the_vocabulary_are_what_python_takes_them_for():
    with open(rwkv()._encoder.vocab_filepath, encoding="utf-8") as file:
        literals = {int(line.split(" ", 1)[0]): line.split(" ", 1)[1].rsplit(" ", 1)[0] for line in file}
    pieces = {index: ast.literal_eval(literal) for index, literal in literals.items()}
    assert rwkv()._bytes_of == {i: p if isinstance(p, bytes) else p.encode("utf-8") for i, p in pieces.items()}


def test_identity_is_that_of_the_vocabulary(tmp_path, small):
    small.save(tmp_path / "same")
    other = train_sentencepiece(digit_texts(50), tmp_path / "other", 350)
    assert load_tokenizer(tmp_path / "same").identity() == small.identity() != other.identity()
    assert RWKVTokenizer().identity() == rwkv().identity() != small.identity()


def test_load_errors_say_what_is_wrong(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file or folder; give 'rwkv'"):
        load_tokenizer("wrkv")
    with pytest.raises(FileNotFoundError, match="none of tokenizer.model, tokenizer.json and lexicon.txt"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("[]")
    with pytest.raises(ValueError, match="not a JSON object"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="not a tokenizer of the tokenizers library"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"kind": "gpt"}')
    with pytest.raises(ValueError, match="unknown tokenizer kind 'gpt'"):
        load_tokenizer(tmp_path)
    (tmp_path / "bad.model").write_text("hello")
    with pytest.raises(ValueError, match="not a sentencepiece model"):
        load_tokenizer(tmp_path / "bad.model")


def test_a_lexicon_makes_phones_of_words(tmp_path, small):
    lines = "hello HH AH L OW\nhello HH EH L OW\n\nhelo HH AH L OW\nworld W ER L D\n"
    (tmp_path / "lexicon.txt").write_text(lines, encoding="utf-8")
    phones = load_tokenizer(tmp_path)
    ids = phones.encode("  hello world there ")
    assert " ".join(map(phones.piece, ids)) == "HH AH L OW _ W ER L D _ <unk>"
    assert phones.decode(ids) == "hello world <|unk|>" and phones.decode(ids[1:4]) == "<|AH|><|L|><|OW|>"
    assert phones.eos_id not in ids and phones.decode([phones.eos_id, -1, 10**6]) == ""
    assert phones.decode(phones.encode("helo hello")) == "hello hello", "homophones: the first"
    stream = phones.stream(continued=True)
    assert [stream.push(i) for i in ids] + [stream.finish()] == [
        *[""] * 4,
        " hello",
        *[""] * 4,
        " world",
        "",
        " <|unk|>",
    ]
    # a language model reads them as its special tokens, one each
    llm = train_sentencepiece(["hello world"], tmp_path / "llm", 320, special_tokens=phones.tags)
    heard = "".join(map(phones.piece_text, ids))
    assert heard.startswith("<|HH|><|AH|><|L|><|OW|><|_|><|W|>") and phones.piece_text(phones.eos_id) == ""
    assert llm.encode(heard) == [llm.encode(phones.tags[i - 1])[-1] for i in ids]
    phones.save(tmp_path / "saved")
    assert load_tokenizer(tmp_path / "saved").identity() == phones.identity() != small.identity()


@pytest.mark.parametrize("lines, message", [("hello\n", "line 1: 'hello' has no phones"), ("\n", "no words")])
def test_a_lexicon_that_is_none(tmp_path, lines, message):
    (tmp_path / "lexicon.txt").write_text(lines, encoding="utf-8")
    with pytest.raises(UserError, match=message):
        load_tokenizer(tmp_path)
