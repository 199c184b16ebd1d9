"""Tokenizers: nothing is lost on the way there and back, and no id sequence can stop a decoder."""

import random
from functools import cache

import pytest

from speechllm.tokenizer import (
    RWKVTokenizer,
    SentencePieceTokenizer,
    load_tokenizer,
    train_sentencepiece,
)

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


@pytest.mark.parametrize("text", SAMPLES)
def test_round_trip(text, small):
    for tokenizer in (rwkv(), small):
        ids = tokenizer.encode(text)
        assert all(0 <= i < tokenizer.vocab_size for i in ids)
        assert tokenizer.eos_id not in ids
        assert tokenizer.decode(ids) == text


def test_decode_takes_anything(small):
    rng = random.Random(1)
    for tokenizer in (rwkv(), small):
        for _ in range(200):
            ids = [rng.randrange(-5, tokenizer.vocab_size + 5) for _ in range(12)]
            assert isinstance(tokenizer.decode(ids), str)
        # half of a character: replaced, not raised
        halves = tokenizer.encode("🙂")[:1] if tokenizer is small else [tokenizer.encode("ÿ")[0], 195, 129]
        assert isinstance(tokenizer.decode(halves), str)
        assert tokenizer.decode([tokenizer.eos_id]) == ""


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


def test_save_and_load(tmp_path, small):
    for name, tokenizer in (("rwkv", rwkv()), ("small", small)):
        tokenizer.save(tmp_path / name)
        again = load_tokenizer(tmp_path / name)
        assert type(again) is type(tokenizer)
        assert again.encode(SAMPLES[2]) == tokenizer.encode(SAMPLES[2])
    assert isinstance(load_tokenizer("rwkv"), RWKVTokenizer)
    assert load_tokenizer(tmp_path / "small/tokenizer.model").vocab_size == small.vocab_size


def test_load_errors_say_what_is_wrong(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file or folder; give 'rwkv'"):
        load_tokenizer("wrkv")
    with pytest.raises(FileNotFoundError, match="neither tokenizer.model nor tokenizer.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("[]")
    with pytest.raises(ValueError, match="not a tokenizer file"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"kind": "gpt"}')
    with pytest.raises(ValueError, match="unknown tokenizer kind 'gpt'"):
        load_tokenizer(tmp_path)
    (tmp_path / "bad.model").write_text("hello")
    with pytest.raises(ValueError, match="not a sentencepiece model"):
        load_tokenizer(tmp_path / "bad.model")
