"""Words and their times: the words spell the text, the times are those of their tokens."""

import math

import pytest

from speechllm.decode.ctc import TokenSpan
from speechllm.decode.timestamps import words_from_alignment
from speechllm.text.tokenizer import RWKVTokenizer, load_tokenizer
from tests.text.test_words import TEXTS, words_of


@pytest.fixture(scope="module")
def rwkv():
    return RWKVTokenizer()


@pytest.fixture(params=["rwkv", "sentencepiece"])
def tokenizer(request, rwkv, tokenizer_dir):
    return rwkv if request.param == "rwkv" else load_tokenizer(tokenizer_dir)


@pytest.mark.parametrize("text", TEXTS)
def test_words_of_aligned_tokens_spell_the_text_in_order(tokenizer, text):
    ids = tokenizer.encode(" " + text)
    spans = [TokenSpan(token, 3 * i + 1, 3 * i + 3, -0.1) for i, token in enumerate(ids)]
    words = words_from_alignment(spans, tokenizer, seconds_per_frame=1.0)
    assert [word.text for word in words] == words_of(text)
    times = [time for word in words for time in (word.start, word.end)]
    assert times == sorted(times)
    assert all(1 <= word.start < word.end <= 3 * len(ids) for word in words)
    assert all(word.confidence == pytest.approx(math.exp(-0.1)) for word in words)


def test_words_have_the_times_and_confidences_of_their_tokens(rwkv):
    ids = [token for piece in (b" one", b" ", b"tw", b"o") for token in rwkv.encode_bytes(piece)]
    places = [(2, 4, -1), (5, 6, -9), (7, 9, -2), (12, 13, -4)]
    spans = [TokenSpan(token, *place) for token, place in zip(ids, places, strict=True)]
    for frames, end in (None, 13), (16, 16), (100, 18):
        one, two = words_from_alignment(spans, rwkv, 0.04, frames)
        # A token lasts until the next one, at most 5 frames, which are 0.2 s, beyond its last.
        assert (one.start, one.end, two.start, two.end) == pytest.approx([0.04 * t for t in (2, 5, 7, end)])
        assert (one.confidence, two.confidence) == pytest.approx((math.exp(-1), math.exp(-3)))


def test_a_character_in_several_tokens_has_the_time_of_all(rwkv):
    ids = [token for byte in "\U0001f600".encode() for token in rwkv.encode_bytes(bytes([byte]))]
    spans = [TokenSpan(token, 2 * i, 2 * i + 1, -1.0) for i, token in enumerate(ids)]
    (word,) = words_from_alignment(spans, rwkv, 1.0)
    assert (word.text, word.start, word.end) == ("\U0001f600", 0, 7)
    # Cut off, its bytes are broken characters.
    (word,) = words_from_alignment(spans[:2], rwkv, 1.0)
    assert (word.text, word.start, word.end) == ("\ufffd\ufffd", 0, 3)


def test_characters_that_share_a_token_share_its_time_out(rwkv):
    (token,) = rwkv.encode("\u3042\u308a")
    first, second = words_from_alignment([TokenSpan(token, 4, 8, -1.0)], rwkv, 1.0)
    assert (first.start, first.end, second.start, second.end) == (4, 6, 6, 8)


def test_tokens_that_spell_nothing_take_no_time_of_words(tokenizer_dir):
    tokenizer = load_tokenizer(tokenizer_dir)
    (tag,) = tokenizer.encode("<|en|>")
    ids = tokenizer.encode(" two")
    spans = [TokenSpan(tag, 0, 1, -9.0)] + [TokenSpan(token, 5 + i, 6 + i, -1.0) for i, token in enumerate(ids)]
    (word,) = words_from_alignment(spans, tokenizer, 1.0)
    assert (word.text, word.end) == ("two", 5 + len(ids)) and word.start >= 5
    assert word.confidence == pytest.approx(math.exp(-1))


def test_words_of_phones_have_the_times_of_their_phones(tmp_path):
    (tmp_path / "lexicon.txt").write_text("two T UW\ntoo T UW\neight EY T\n")
    lexicon = load_tokenizer(tmp_path)
    ids = lexicon.encode("two eight too")  # T UW _ EY T _ T UW
    spans = [TokenSpan(token, 10 * i, 10 * i + 1, -1.0) for i, token in enumerate(ids)]
    words = words_from_alignment(spans, lexicon, 0.1)
    assert [word.text for word in words] == lexicon.decode(ids).split() == ["two", "eight", "two"]
    assert [(w.start, w.end) for w in words] == [pytest.approx(t) for t in ((0, 1.3), (3, 4.3), (6, 7.1))]
