"""Labels: what is filled in is read back, through every tokenizer; what is missing or ambiguous is an error."""

import random

import pytest

from speechllm.decode.timestamps import words_from_label
from speechllm.prompt.label import LabelError, LabelTemplate, ReadLabel, WordTime
from speechllm.prompt.request import Request
from speechllm.text.tokenizer import RWKVTokenizer, SentencePieceTokenizer, train_sentencepiece

TEMPLATES = [
    "{text}",
    "<|{lang}|>{text}",
    "<|{lang}|> {text}",
    "{timed_text}",
    "<|{lang}|>{timed_text}",
    "{text} ({lang})",
]


@pytest.fixture(scope="module", params=["rwkv", "tags are pieces", "tags are spelled"])
def tokenizer(request, tmp_path_factory):
    if request.param == "rwkv":
        return RWKVTokenizer()
    folder = tmp_path_factory.mktemp("tokenizer")
    special = ["<|en|>", "<|zh|>", "<0.24>"] if request.param == "tags are pieces" else []
    train_sentencepiece(["one two three", "uno, dos"] * 20, folder, 330, special)
    return SentencePieceTokenizer(folder / "tokenizer.model")


def utterances(count):
    """Text, language and the times of its words; words are characters in Chinese."""
    generator = random.Random(0)
    for i in range(count):
        language = generator.choice(["en", "zh"])
        words = generator.choices(["one", "two,", "naïve", "<3"] if language == "en" else ["你", "好"], k=i % 6)
        times = sorted(round(generator.uniform(0, 30), 3) for _ in range(2 * len(words)))
        timed = [WordTime(word, *times[2 * k : 2 * k + 2]) for k, word in enumerate(words)]
        yield (" " if language == "en" else "").join(words), language, timed


@pytest.mark.parametrize("written", TEMPLATES)
def test_what_is_filled_in_is_read_back(written, tokenizer):
    template = LabelTemplate(written)
    for text, language, words in utterances(30):
        label = template.fill(text, Request(language=language), words)
        assert label == text or not template.is_plain
        ids = tokenizer.encode(label)
        read = template.read(tokenizer.decode(ids, keep_tags=True))
        assert (read.text, read.language) == (text, language if template.has_language else None)
        if not template.has_times:
            assert read.words is None
            continue
        found = words_from_label(read, ids, [-0.5] * (len(ids) + 1), tokenizer)
        assert [word.text for word in found] == [word.word for word in words]
        for word, expected in zip(found, words, strict=True):
            assert abs(word.start - expected.start) <= 0.045 and abs(word.end - expected.end) <= 0.045
            assert word.confidence == pytest.approx(2.718281828**-0.5)


def test_times_are_whole_positions():
    words = [WordTime("one", 0.243, 0.66), WordTime("two", 0.81, 1.1)]
    assert LabelTemplate("{timed_text}", 0.08).fill("one two", words=words) == "<0.24>one<0.64><0.80> two<1.12>"
    assert LabelTemplate("{timed_text}", 0.16).fill("one two", words=words) == "<0.32>one<0.64><0.80> two<1.12>"
    assert LabelTemplate("{timed_text}").fill("uno dos", Request(language="en", target_language="es")) == "uno dos"


def test_the_confidence_of_a_word_is_that_of_its_tokens(tokenizer):
    label = "<0.24>one<0.64><0.80> two<1.12>"
    ids = tokenizer.encode(label)
    log_probs = [0.0] * (len(ids) + 1)
    (place,) = [i for i in range(len(ids)) if tokenizer.decode(ids[: i + 1]).endswith("> two")]
    log_probs[place] = -1.0
    one, two = words_from_label(LabelTemplate("{timed_text}").read(label), ids, log_probs, tokenizer)
    assert one.confidence == 1.0 > two.confidence


@pytest.mark.parametrize(
    "label, text",
    [
        ("<0.24>one<0.64><0.80> two", "one two"),
        ("<0.24>one", "one"),
        ("one<0.24>", "one"),
        ("<0.24><0.32>one<0.64>", "one"),
        ("<0.64>one<0.24>", "one"),
        ("<0.24>one<0.64> and<0.80> two<1.12>", "one and two"),
        ("<0.24> <0.64>", " "),
    ],
)
def test_times_that_are_not_in_order_are_none(label, text):
    assert LabelTemplate("{timed_text}").read(label) == ReadLabel(text)


def test_a_label_that_is_not_as_the_template_says_is_text():
    assert LabelTemplate("<|{lang}|> {text}").read("<|en one") == ReadLabel("<|en one")
    assert LabelTemplate("<|{lang}|>{text}").read(" <|en|>one", 1) == ReadLabel("one", "en")


@pytest.mark.parametrize(
    "template, message",
    [
        ("{txt}", r"unknown slot \{txt\}; allowed: \{lang\}, \{text\}, \{timed_text\}"),
        ("<|{lang}|>", r"needs \{text\} or \{timed_text\}, once"),
        ("{text} {timed_text}", "once"),
        ("{lang}{text}", r"nothing tells \{lang\} from the text"),
        ("{text}{lang}", "nothing tells"),
        ("<|{lang}|><|{lang}|>{text}", "more than once"),
        ("{text", "no slot"),
    ],
)
def test_templates_that_cannot_be(template, message):
    with pytest.raises(ValueError, match=f"label: .*{message}"):
        LabelTemplate(template)


def test_what_an_utterance_lacks_is_named():
    with pytest.raises(LabelError, match=r"\{lang\} slot .* no language: give `lang`"):
        LabelTemplate("<|{lang}|>{text}").fill("one")
    with pytest.raises(LabelError, match=r"\{timed_text\} slot .* no word times: give `alignment`"):
        LabelTemplate("{timed_text}").fill("one")
    for words in (["two"], ["on"], ["one", "two"], []):
        with pytest.raises(LabelError, match="alignment: its words are .* the text is 'one'"):
            LabelTemplate("{timed_text}").fill("one", words=[WordTime(word, 0, 1) for word in words])
