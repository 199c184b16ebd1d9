"""Rows of streams: which chunk a token belongs to, and what is where in the row."""

import dataclasses
import math
import random
import unicodedata
from itertools import pairwise

import pytest

from speechllm.errors import UserError
from speechllm.llm.interface import IGNORE
from speechllm.prompt.interleave import StreamingConfig, deal_out, interleave
from speechllm.prompt.label import WordTime
from speechllm.prompt.request import Request, requests_of
from speechllm.prompt.splice import Kind, splice
from speechllm.prompt.template import PRESETS, PromptConfig
from speechllm.text.tokenizer import HFTokenizer, RWKVTokenizer, load_tokenizer
from tests.hf_tokenizers import train_byte_level

RWKV = RWKVTokenizer()
WORDS = [WordTime("one", 0.1, 0.4), WordTime("two", 0.5, 0.64), WordTime("three", 0.7, 0.9), WordTime("two", 1.9, 2.4)]
TEXT = "one two three two"
ENGLISH = [Request(language="en")]
LEARNED = {"boundary": True, "soft_tokens": 2}


def dealt(text=TEXT, words=WORDS, tokenizer=RWKV, before_label=" ", num_chunks=3, chunk_seconds=0.64, **options):
    ids = tokenizer.encode(before_label + text)
    options = {"num_chunks": num_chunks, "chunk_seconds": chunk_seconds, "before_label": before_label, **options}
    chunks = deal_out(ids, words, tokenizer, **options)
    assert [token for chunk in chunks for token in chunk] == ids and len(chunks) == num_chunks + 1
    return [tokenizer.decode(chunk) for chunk in chunks]


def test_a_chunk_has_the_words_that_end_in_it():
    assert dealt() == [" one two", " three", "", " two"]  # at its very end is in it
    assert dealt(chunk_seconds=0.32, num_chunks=7) == ["", " one two", " three", "", "", "", "", " two"]
    assert dealt(num_chunks=0) == [" one two three two"]
    assert dealt(words=()) == ["", "", "", " one two three two"]


def test_a_delay_moves_words_to_later_chunks():
    assert dealt(delay_seconds=0.2) == [" one", " two three", "", " two"]
    assert dealt(delay_seconds=10.0) == ["", "", "", " one two three two"]


def test_words_stay_in_their_order_whatever_their_times():
    words = [WordTime("one", 0.1, 1.0), WordTime("two", 0.2, 0.5), WordTime("three", 1.4, 1.5)]
    assert dealt("one two three", words) == ["", " one two", " three", ""]


@pytest.mark.parametrize("before_label", ["", " ", "Text: "])
def test_what_stands_before_the_label_comes_with_its_first_word(before_label):
    words = [WordTime("one", 0.1, 1.0), WordTime("two", 0.2, 1.5)]
    assert dealt("one two", words, before_label=before_label) == ["", f"{before_label}one", " two", ""]


def test_every_tokenizer_gives_whole_words(tokenizer_dir, tmp_path):
    """Also pieces of bytes, tokens over several words, and characters that a tokenizer normalizes."""
    text = "one 七星 caf\u0065\u0301 été x"
    train_byte_level(["one two three"] * 3, tmp_path)
    rng = random.Random(0)
    for tokenizer in (RWKV, load_tokenizer(tokenizer_dir), HFTokenizer(tmp_path)):
        for _ in range(20):
            said = ["one", "七", "星", "caf\u0065\u0301", "été", "x"]
            ends = sorted(rng.uniform(0, 3) for _ in said)
            words = [WordTime(word, 0.0, end) for word, end in zip(said, ends, strict=True)]
            chunks = dealt(text, words, tokenizer, num_chunks=4, chunk_seconds=0.5)
            starts = [0.0, 0.5, 1.0, 1.5, 2.0, math.inf]
            expected = [
                "".join(word for word, end in zip(said, ends, strict=True) if start < end <= stop)
                for start, stop in pairwise(starts)
            ]
            assert [unicodedata.normalize("NFD", "".join(chunk.split())) for chunk in chunks] == [
                unicodedata.normalize("NFD", text) for text in expected
            ]


def rows_of(prompt, chunks, audio_len, positions, requests=ENGLISH):
    return interleave(prompt, RWKV, [audio_len] * len(requests), requests, chunks, 0.64, positions)


def shown(row, i=0, tokenizer=RWKV):
    """What is read, and what is predicted, at each position."""
    names = {Kind.AUDIO: "A", Kind.SOFT: "S", Kind.BOUNDARY: "B"}
    texts = []
    for kind, token, label in zip(
        row.kinds[i].tolist(), row.token_ids[i].tolist(), row.labels[i].tolist(), strict=True
    ):
        read = names.get(kind) or ("next" if token == tokenizer.eos_id else tokenizer.decode([token]))
        said = "" if label == IGNORE else "next" if label == tokenizer.eos_id else tokenizer.decode([label])
        texts.append(f"{read}>{said}" if said else read)
    return texts[: int(row.lens[i])]


def test_the_row():
    prompt = PromptConfig(streaming="<{chunk_seconds} {audio}|", **LEARNED)
    one, two = RWKV.encode(" one"), RWKV.encode(" two")
    row = rows_of(prompt, [[one + two, [], one]], 5, 2)
    before = [RWKV.decode([token]) for token in RWKV.encode("<0.64 ")]
    expected = "S S BEFORE B A A> one one> two two>next next A A>next next A B |> one one>next".replace("BEFORE", "\0")
    found = " ".join(text.strip() for text in shown(row)).replace(" ".join(t.strip() for t in before), "\0")
    assert found == expected
    assert int(row.audio_starts[0]) == 3 + len(before)


def test_without_anything_after_the_audio_the_last_next_predicts_the_rest():
    prompt = PromptConfig(streaming="go{audio}")
    one = RWKV.encode(" one")
    assert shown(rows_of(prompt, [[one, one]], 2, 2))[-4:] == ["A> one", " one>next", "next> one", " one>next"]
    assert shown(rows_of(prompt, [[one, []]], 2, 2))[-3:] == ["A> one", " one>next", "next>next"]


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("learned", [{}, LEARNED])
def test_one_chunk_that_covers_all_is_the_offline_row(preset, learned):
    prompt = PromptConfig(preset=preset, **learned)
    request = Request("a", draw=0.6, language="en")
    ids = RWKV.encode(" one two")
    row = rows_of(prompt, [[ids]], 7, 99, [request])
    offline_text = prompt.written_out().streaming.replace("{chunk_seconds}", "0.64")
    offline = splice(dataclasses.replace(prompt, asr=offline_text), RWKV, [7], [request], [ids])
    assert all((a == b).all() for a, b in zip(row, offline, strict=True))


def test_a_row_of_a_batch_is_that_alone_and_translations_are_offline():
    prompt = PromptConfig(**LEARNED)
    ids = RWKV.encode(" one two")
    chunks = [[ids, ids[:1], []], [ids], [[], ids]]
    requests = requests_of(["en", "es", "fr"], [None, "de", None])
    batch = rows_of(prompt, chunks, 11, 3, requests)
    for i in range(3):
        alone = rows_of(prompt, chunks[i : i + 1], 11, 3, requests[i : i + 1])
        n = int(alone.lens)
        for name in ("token_ids", "kinds", "labels"):
            assert (getattr(alone, name)[0] == getattr(batch, name)[i, :n]).all()
        assert not batch.kinds[i, n:].any() and (batch.labels[i, n:] == IGNORE).all()
    translation = splice(prompt, RWKV, [11], requests[1:2], [ids])
    assert (batch.token_ids[1, : int(translation.lens)] == translation.token_ids[0]).all()


def test_the_loss_is_on_text_and_next_only():
    row = rows_of(PromptConfig(), [[[11, 12], [], [13], [14]]], 9, 2)
    said = [label for label in row.labels[0].tolist() if label != IGNORE]
    eos = RWKV.eos_id
    assert said == [11, 12, eos, eos, 13, eos, 14, eos]
    # each is predicted before it is read, and the last one never is
    read = [t for t, kind in zip(row.token_ids[0].tolist(), row.kinds[0].tolist(), strict=True) if kind == Kind.LABEL]
    assert read == said[:-1]


def test_less_audio_than_chunks_is_no_stream():
    with pytest.raises(ValueError, match="2 chunks of 3 positions in audio of 5"):
        rows_of(PromptConfig(), [[[], [], []]], 5, 3)


def test_the_prompt_may_need_what_an_utterance_lacks():
    with pytest.raises(UserError, match=r"\{lang\} slot .*prompt\.streaming"):
        PromptConfig().fill(Request(), 0.64)
    with pytest.raises(UserError, match=r"unknown slot \{chunk_seconds\}"):
        PromptConfig(asr="{audio}{chunk_seconds}")
    assert PromptConfig().fill(Request(language="en"), 0.64) == ("User: <|en|>0.64 s: ", "\n\nAssistant:")
    translated = Request(language="en", target_language="de")
    assert PromptConfig().fill(translated, 0.64) == PromptConfig().fill(translated)


def test_instructions_of_streams_alone():
    prompt = PromptConfig(asr="Go {audio}", streaming="{instruction} {audio}", instructions=["a", "b"])
    assert prompt.written_out() == prompt.written_out().written_out()
    assert prompt.fill(Request(draw=0.6), 0.64) == ("b ", "")
    with pytest.raises(UserError, match=r"instructions: asr has no \{instruction\} slot"):
        PromptConfig(asr="Go {audio}", instructions=["a", "b"])


def test_what_ends_a_stream_is_known_from_the_prompt():
    assert PromptConfig().tells_end_of_stream()
    assert not PromptConfig(streaming="go {audio}{previous}").tells_end_of_stream()
    assert PromptConfig(streaming="go {audio}", boundary=True).tells_end_of_stream()
    assert PromptConfig(streaming="go {audio}{lang}").tells_end_of_stream()


def test_draws_follow_from_seed_epoch_and_batch_and_are_in_proportion():
    config = StreamingConfig([0.32, 0.64], offline_share=0.4)
    draws = [config.draw(1, 2, number) for number in range(2000)]
    assert draws == [config.draw(1, 2, number) for number in range(2000)]
    assert draws[:50] != [config.draw(2, 2, n) for n in range(50)] != [config.draw(1, 3, n) for n in range(50)]
    shares = [draws.count(size) / 2000 for size in (None, 0.32, 0.64)]
    assert shares == pytest.approx([0.4, 0.3, 0.3], abs=0.04)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"chunk_seconds": []}, "chunk_seconds must be"),
        ({"chunk_seconds": [0.0]}, "chunk_seconds must be"),
        ({"delay_seconds": -1.0}, "delay_seconds must be"),
        ({"offline_share": 0.0}, "offline_share must be"),
        ({"offline_share": 1.0}, "offline_share must be"),
    ],
)
def test_settings_out_of_range(settings, said):
    with pytest.raises(ValueError, match=said):
        StreamingConfig(**settings)
