"""Names and codes of languages to tags."""

import pytest

from speechllm.errors import UserError
from speechllm.text.languages import NAMES_IN, is_language_tag, language_name, language_tag, same_language


@pytest.mark.parametrize(
    ("written", "tag"),
    [
        ("English", "en"), ("english", "en"), (" EN ", "en"), ("eng", "en"), ("en-US", "en-US"), ("en_us", "en-US"),
        ("Mandarin", "zh"), ("mandarin_chinese", "zh"), ("Chinese", "zh"), ("cmn", "zh"), ("zho", "zh"), ("chi", "zh"),
        ("zh-CN", "zh-CN"), ("zh-tw", "zh-TW"), ("cmn_hans_cn", "zh-Hans-CN"), ("中文", "zh"), ("英語", "en"),
        ("Cantonese", "yue"), ("yue", "yue"), ("nan", "nan"), ("ger", "de"), ("deu", "de"), ("fre", "fr"),
        ("Lao", "lo"),        ("es-419", "es-419"), ("sr_latn", "sr-Latn"),
        ("arb", "ar"), ("iw", "he"), ("ceb", "ceb"), ("x-ours", "x-ours"),
    ],
)  # fmt: skip
def test_names_and_codes_become_tags(written, tag):
    assert language_tag(written) == tag and language_tag(tag) == tag
    assert is_language_tag(tag)


@pytest.mark.parametrize("unknown", ["xx", "klingon", "und", "unknown", "", "EN1", "e", "englsh", "jp", "en/de"])
def test_what_is_no_language_stays_as_it_is(unknown):
    assert language_tag(unknown) == unknown and not is_language_tag(unknown)


def test_scripts_and_regions_do_not_make_another_language():
    assert same_language("zh-CN", "zh-Hant-TW") and same_language("en", "en-GB")
    assert not same_language("zh", "yue") and not same_language("en", "eo")


def test_names_go_to_tags_and_back():
    for tag in ("en", "zh", "nan", "yue", "uk"):
        assert {language_tag(language_name(tag, name_in)) for name_in in NAMES_IN} == {tag}
    assert language_name("eng") == language_name("en_GB") == "English"
    with pytest.raises(UserError, match="'xx'"):
        language_name("xx")
