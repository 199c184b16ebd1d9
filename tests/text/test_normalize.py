"""Text normalisation: what each step does, that none fails on any string, and that once is enough."""

import builtins
import random
import sys
import unicodedata

import pytest

from speechllm.errors import UserError
from speechllm.text import normalize as text_module
from speechllm.text.normalize import STEPS, check_steps, normalize_text

# What steps treat in a way of its own, beside characters of every kind.
SPECIAL = list(
    "'’-‐‑_!¿´῾\u0307\u0640\u200b\u200c\u180e\u061c、。，～（）Ａｚ９\u3000\u00a0\u200d\ufe0f\u20e3❤👨🙂\u0301\u0345\u00adÉİΣσςßŉ¨ﬁ①Ⅷ〇々里后乾干發发麹钜薴"
)
SPECIAL += ["\0", "\ud800", "\udfff", "\U0010ffff", " ", "\t", "\n", "\x85", "a", "B", "7"]


def random_texts(count: int) -> list[str]:
    rng = random.Random(0)

    def character() -> str:
        kind = rng.random()
        if kind < 0.5:
            return rng.choice(SPECIAL)
        return chr(rng.randrange(0x4E00, 0x9FA6) if kind < 0.8 else rng.randrange(0x110000))

    return ["".join(character() for _ in range(rng.randrange(12))) for _ in range(count)]


@pytest.mark.parametrize("steps", [[], *([step] for step in STEPS if "leaderboard" not in step)], ids=str)
def test_any_string_is_normalised_by_one_application(steps):
    for text in random_texts(3000):
        once = normalize_text(text, steps)
        assert normalize_text(once, steps) == once, (text, once)
        assert once == " ".join(once.split())


@pytest.mark.parametrize(
    ("step", "text", "expected"),
    [
        ("nfc", "ze\u0301ro ﬁ", "z\u00e9ro ﬁ"),
        ("nfkc", "ze\u0301ro ﬁ Ａ", "z\u00e9ro fi A"),
        ("lowercase", "ÉTÉ Straße", "été straße"),
        ("uppercase", "été Straße", "ÉTÉ STRASSE"),
        ("remove_punctuation", "“Don’t,” she said: it's 5€, e.g. a_b!", "Don't she said it's 5 e g a b"),
        ("remove_punctuation", "mother‑in-law -- rock-'n'-roll", "mother-in-law rock n roll"),
        ("remove_punctuation", "3.5, 1,000 and 50%. (Up 5.)", "3.5 1,000 and 50% Up 5"),
        ("remove_punctuation", "at 10:30; 1/2 -- v1.2 % $5.00", "at 10:30 1/2 v1.2 5.00"),
        ("remove_punctuation", "٣٫٥٪ a.b,c:d", "٣٫٥٪ a b c d"),
        ("remove_punctuation", "'tis the boys' -x 1-2 a--b", "tis the boys x 1-2 a b"),
        ("remove_punctuation", "你好，世界。《书》", "你好 世界 书"),
        ("remove_punctuation", "हिन्दी, cafe\u0301's 👨\u200d👩\u200d👧 ❤\ufe0f", "हिन्दी cafe\u0301's"),
        ("leaderboard", "Mr. COLOUR, uh, won't [noise] cost twenty-one: $3.5", "mister color will not cost 21 $3.5"),
        ("leaderboard", "1,000 or fifty percent", "1000 or 50%"),
        ("leaderboard_multilingual", "Ça va, l'ÉTÉ? (rires) हिन्दी", "ça va l été हिन्दी"),
        ("halfwidth", "ＡＢＣ　１２３！ ｱ ﬁ 。", "ABC 123! ｱ ﬁ 。"),
        ("simplified", "萬里長城 and 乾隆皇帝的頭髮", "万里长城 and 乾隆皇帝的头发"),
        ("traditional", "万里长城 and 皇后的头发", "萬里長城 and 皇后的頭髮"),
        ("traditional", "萬里長城", "萬里長城"),
        ("split_chinese", "我有iPhone 15和〇𠀀。", "我 有 iPhone 15 和 〇 𠀀 。"),
        ("join_chinese", "我 有 iPhone 15 和 你 \t们", "我有 iPhone 15 和你们"),
    ],
)  # fmt: skip
def test_what_a_step_does(step, text, expected):
    assert normalize_text(text, [step]) == expected


def test_what_is_removed_is_punctuation_and_symbols_alone():
    categories = {chr(code): unicodedata.category(chr(code)) for code in range(0x110000)}
    text = normalize_text(" ".join(categories), ["remove_punctuation"])
    expected = [
        c for c, category in categories.items() if category[0] not in "PS" and c != "\u0640" and normalize_text(c, [])
    ]
    assert text.split() == expected


@pytest.mark.parametrize("steps", [[], ["nfkc"], ["lowercase", "remove_punctuation"]], ids=str)
def test_what_is_never_seen_is_gone_and_what_shapes_letters_stays(steps):
    for invisible in "\u200b\u00ad\ufeff\u200e\u200f\u061c\u202a\u202e\u2066\u2069\u2060\u034f\x00\x7f\u3164":
        assert normalize_text(invisible * 3, steps) == ""
        assert normalize_text(f" a{invisible}b {invisible} c", steps) == "ab c"
    for joined in ("می\u200cخواهم", "क्\u200dष", "ന്\u200d", "ක්\u200dෂ", "ᠠ\u180eᠠ", "נ\u05b8"):
        assert normalize_text(joined, steps) == unicodedata.normalize("NFKC" if "nfkc" in steps else "NFC", joined)
    for stray, clean in (("a\u200cb", "ab"), ("a\u200d b", "a b"), ("می\u200c", "می"), ("\u200dक", "क")):
        assert normalize_text(stray, steps) == clean
    for lone in "\u200c\u200d\u180e":
        assert normalize_text(lone, steps) == ""


def test_emoji_keep_their_joiners():
    for emoji in ("👨\u200d👩\u200d👧", "❤\ufe0f\u200d🔥", "👩🏽\u200d🚀", "1\ufe0f\u20e3"):
        assert normalize_text(emoji, []) == emoji


@pytest.mark.parametrize("step", ["nfkc", "remove_punctuation"])
def test_the_tatweel_says_nothing(step):
    assert normalize_text("كتـــاب", [step]) == "كتاب"
    assert normalize_text("كتـاب", []) == "كتـاب"


@pytest.mark.parametrize(
    ("text", "language", "lower", "upper"),
    [
        ("IĞDIR İyi ılık", "tr", "ığdır iyi ılık", "IĞDIR İYİ ILIK"),
        ("Iİ", "az-Latn", "ıi", "Iİ"),
        ("I\u0307zmir", "tr", "izmir", "İZMİR"),
        ("Iİ I\u0307 i", None, "ii i i", "IİIİ I"),
        ("Iİ i", "en", "ii i", "Iİ I"),
        ("ΟΔΟΣ Straße", "de", "οδος straße", "ΟΔΟΣ STRASSE"),
    ],
)
def test_case_is_that_of_the_language(text, language, lower, upper):
    assert normalize_text(text, ["lowercase"], language) == lower
    if language is not None:
        assert normalize_text(text, ["uppercase"], language) == upper


def test_nfkc_leaves_no_stray_accents():
    for text, expected in (("l´amour", "l'amour"), ("d᾽ἄρα", "d'ἄρα"), ("a ¨ b", "a ¨ b"), ("ﾊﾟ", "パ"), ("ﻢﹹ", "مُ")):
        assert normalize_text(text, ["nfkc"]) == expected
    for code in range(0x10000):
        before = f"a{chr(code)}b"
        added = normalize_text(before, ["nfkc"]).startswith("a ") and not chr(code).isspace()
        assert not added or chr(code) in "\u2017\u203e", hex(code)


def test_halfwidth_is_the_part_of_nfkc_that_it_says():
    for code in (0x3000, *range(0xFF01, 0xFF5F)):
        assert normalize_text(f"a{chr(code)}b", ["halfwidth"]) == unicodedata.normalize("NFKC", f"a{chr(code)}b")
    others = "".join(chr(code) for code in range(0x80, 0xFFFF) if not 0xFF01 <= code < 0xFF5F)
    assert normalize_text(others, ["halfwidth"]) == normalize_text(others, [])


def test_split_and_join_are_inverse_on_chinese():
    rng = random.Random(1)
    for _ in range(200):
        text = "".join(chr(rng.randrange(0x4E00, 0xA000)) for _ in range(rng.randrange(20)))
        split = normalize_text(text, ["split_chinese"])
        assert split.split() == list(text)
        assert normalize_text(split, ["join_chinese"]) == text


def test_steps_are_taken_in_order():
    assert normalize_text("ＡＢ，你好", ["halfwidth", "remove_punctuation", "lowercase", "split_chinese"]) == "ab 你 好"
    assert normalize_text("你，好", ["remove_punctuation", "join_chinese"]) == "你好"
    assert normalize_text("你，好", ["join_chinese", "remove_punctuation"]) == "你 好"


def test_check_steps():
    check_steps([])
    check_steps(["nfkc", "lowercase", "remove_punctuation", "simplified", "split_chinese"])
    with pytest.raises(ValueError, match="unknown step 'lower_case'; did you mean lowercase. the steps are nfc, nfkc,"):
        check_steps(["nfc", "lower_case"])
    for steps in (["lowercase", "uppercase"], ["simplified", "traditional"], ["split_chinese", "join_chinese"]):
        with pytest.raises(ValueError, match=f"text: {steps[0]} and {steps[1]} undo each other"):
            check_steps(steps[::-1])


@pytest.mark.parametrize("step", ["simplified", "traditional"])
def test_without_opencc_the_message_says_what_to_install(step, monkeypatch):
    real_import = builtins.__import__

    def import_without_opencc(name, *args):
        if name == "opencc":
            raise ImportError(name)
        return real_import(name, *args)

    monkeypatch.setattr(builtins, "__import__", import_without_opencc)
    text_module._opencc.cache_clear()
    assert normalize_text("plain", [step]) == "plain"
    for use in (lambda: check_steps([step]), lambda: normalize_text("中", [step])):
        with pytest.raises(UserError, match=r"pip install 'speechllm\[chinese\]'"):
            use()


def test_without_whisper_normalizer_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "whisper_normalizer.english", None)
    text_module._whisper_normalizer.cache_clear()
    with pytest.raises(UserError, match=r"leaderboard .*pip install 'speechllm\[leaderboard\]'"):
        check_steps(["leaderboard"])


@pytest.mark.parametrize("step", ["leaderboard", "leaderboard_multilingual"])
def test_the_leaderboards_steps_take_any_string(step):
    for text in random_texts(300):
        assert isinstance(normalize_text(text, [step]), str)


def test_the_tables_are_loaded_once(monkeypatch):
    import opencc

    loaded = []
    opencc_class = opencc.OpenCC
    monkeypatch.setattr(opencc, "OpenCC", lambda config: loaded.append(config) or opencc_class(config))
    text_module._opencc.cache_clear()
    for text in ("中", "國"):
        normalize_text(text, ["simplified"])
    assert loaded == ["t2s"]
