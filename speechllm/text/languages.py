"""Languages: their tags in manifests, and their names for prompts, in English and in two scripts of Chinese.

A tag is a code of ISO 639, of two letters where there is one, perhaps with script and region as in BCP 47: `en`, `yue`,
`zh-TW`, `pt-BR`. `language_tag` makes it of what manifests write. The script and the region stay, because the spelling
depends on them: `zh-CN` and `zh-TW` are written in different characters.

Names and two-letter codes are tables of our own because a prompt must stay what it was in training, whatever a
library's next version says.
"""

from __future__ import annotations

import re
from functools import cache

from speechllm.errors import UserError

NAMES_IN = ("en", "zh", "zh-hant")
"""The languages that names are known in; the columns of the table."""

_TABLE = """
ar  Arabic      阿拉伯语      阿拉伯語
bg  Bulgarian   保加利亚语    保加利亞語
bn  Bengali     孟加拉语      孟加拉語
ca  Catalan     加泰罗尼亚语  加泰隆尼亞語
cs  Czech       捷克语        捷克語
cy  Welsh       威尔士语      威爾斯語
da  Danish      丹麦语        丹麥語
de  German      德语          德語
el  Greek       希腊语        希臘語
en  English     英语          英語
es  Spanish     西班牙语      西班牙語
et  Estonian    爱沙尼亚语    愛沙尼亞語
fa  Persian     波斯语        波斯語
fi  Finnish     芬兰语        芬蘭語
fr  French      法语          法語
he  Hebrew      希伯来语      希伯來語
hi  Hindi       印地语        印地語
hr  Croatian    克罗地亚语    克羅埃西亞語
hu  Hungarian   匈牙利语      匈牙利語
id  Indonesian  印度尼西亚语  印尼語
it  Italian     意大利语      義大利語
ja  Japanese    日语          日語
kk  Kazakh      哈萨克语      哈薩克語
ko  Korean      韩语          韓語
lt  Lithuanian  立陶宛语      立陶宛語
lv  Latvian     拉脱维亚语    拉脫維亞語
mn  Mongolian   蒙古语        蒙古語
ms  Malay       马来语        馬來語
nan Hokkien     闽南语        閩南語
nl  Dutch       荷兰语        荷蘭語
no  Norwegian   挪威语        挪威語
pl  Polish      波兰语        波蘭語
pt  Portuguese  葡萄牙语      葡萄牙語
ro  Romanian    罗马尼亚语    羅馬尼亞語
ru  Russian     俄语          俄語
sk  Slovak      斯洛伐克语    斯洛伐克語
sl  Slovenian   斯洛文尼亚语  斯洛維尼亞語
sr  Serbian     塞尔维亚语    塞爾維亞語
sv  Swedish     瑞典语        瑞典語
sw  Swahili     斯瓦希里语    斯瓦希里語
ta  Tamil       泰米尔语      坦米爾語
th  Thai        泰语          泰語
tr  Turkish     土耳其语      土耳其語
ug  Uyghur      维吾尔语      維吾爾語
uk  Ukrainian   乌克兰语      烏克蘭語
ur  Urdu        乌尔都语      烏爾都語
uz  Uzbek       乌兹别克语    烏茲別克語
vi  Vietnamese  越南语        越南語
yue Cantonese   粤语          粵語
zh  Chinese     中文          中文
"""
# More English names that corpora are published with, lhotse's recipes among them.
_MORE_NAMES = """
af Afrikaans, am Amharic, as Assamese, ast Asturian, az Azerbaijani, ba Bashkir, be Belarusian, bo Tibetan, br
Breton, bs Bosnian, ceb Cebuano, ckb Sorani Kurdish, ckb Central Kurdish, cv Chuvash, cy Cymraeg, de Deutsch, el
Modern Greek, el Ellinika, eo Esperanto, es Castilian, es Castellano, es Español, eu Basque, fa Farsi, ff Fula, ff
Fulah, fil Filipino, fo Faroese, fr Français, fy Frisian, fy West Frisian, ga Irish, gd Scottish Gaelic, gl
Galician, gn Guarani, gu Gujarati, ha Hausa, haw Hawaiian, ht Haitian, ht Haitian Creole, hy Armenian, ia
Interlingua, ig Igbo, is Icelandic, it Italiano, jv Javanese, ka Georgian, kab Kabyle, kam Kamba, kea Kabuverdianu,
km Khmer, kmr Kurmanji, kmr Kurmanji Kurdish, kmr Northern Kurdish, kn Kannada, ko Hangul, ku Kurdish, ky Kyrgyz, ky
Kirghiz, la Latin, lb Luxembourgish, lg Ganda, lg Luganda, ln Lingala, lo Lao, luo Luo, luo Dholuo, mg Malagasy, mi
Maori, mi Māori, mk Macedonian, ml Malayalam, mr Marathi, mt Maltese, my Burmese, my Myanmar, nan Min Nan, nan
Minnan, nan Taiwanese, nan Taiwanese Hokkien, nb Bokmål, nb Norwegian Bokmål, ne Nepali, nl Flemish, nn Nynorsk, nn
Norwegian Nynorsk, nso Northern Sotho, nso Sepedi, ny Chichewa, ny Nyanja, oc Occitan, om Oromo, or Odia, or Oriya,
pa Punjabi, pa Panjabi, ps Pashto, ps Pushto, pt Português, rw Kinyarwanda, sa Sanskrit, sd Sindhi, si Sinhala, si
Sinhalese, sn Shona, so Somali, sq Albanian, st Southern Sotho, st Sesotho, su Sundanese, sw Kiswahili, te Telugu,
tg Tajik, ti Tigrinya, tk Turkmen, tl Tagalog, tn Tswana, tn Setswana, tpi Tok Pisin, tt Tatar, ug Uighur, umb
Umbundu, wo Wolof, xh Xhosa, xh isiXhosa, yi Yiddish, yo Yoruba, yue Yue, yue Yue Chinese, zh Mandarin, zh Mandarin
Chinese, zh Chinese Mandarin, zh Putonghua, zu Zulu, zu isiZulu, zh 普通话, zh 国语, zh 國語, zh 汉语,
zh 漢語, yue 广东话, yue 廣東話
"""
# ISO 639-1 with the codes of three letters that ISO 639-2 and 639-3 have for the same language.
_CODES = """
aa:aar ab:abk ae:ave af:afr ak:aka am:amh an:arg ar:ara as:asm av:ava ay:aym az:aze ba:bak be:bel bg:bul bi:bis bm:bam
bn:ben bo:bod:tib br:bre bs:bos ca:cat ce:che ch:cha co:cos cr:cre cs:ces:cze cu:chu cv:chv cy:cym:wel da:dan
de:deu:ger dv:div dz:dzo ee:ewe el:ell:gre en:eng eo:epo es:spa et:est eu:eus:baq fa:fas:per ff:ful fi:fin fj:fij
fo:fao fr:fra:fre fy:fry ga:gle gd:gla gl:glg gn:grn gu:guj gv:glv ha:hau he:heb hi:hin ho:hmo hr:hrv ht:hat hu:hun
hy:hye:arm hz:her ia:ina id:ind ie:ile ig:ibo ii:iii ik:ipk io:ido is:isl:ice it:ita iu:iku ja:jpn jv:jav ka:kat:geo
kg:kon ki:kik kj:kua kk:kaz kl:kal km:khm kn:kan ko:kor kr:kau ks:kas ku:kur kv:kom kw:cor ky:kir la:lat lb:ltz lg:lug
li:lim ln:lin lo:lao lt:lit lu:lub lv:lav mg:mlg mh:mah mi:mri:mao mk:mkd:mac ml:mal mn:mon mr:mar ms:msa:may mt:mlt
my:mya:bur na:nau nb:nob nd:nde ne:nep ng:ndo nl:nld:dut nn:nno no:nor nr:nbl nv:nav ny:nya oc:oci oj:oji om:orm or:ori
os:oss pa:pan pi:pli pl:pol ps:pus pt:por qu:que rm:roh rn:run ro:ron:rum ru:rus rw:kin sa:san sc:srd sd:snd se:sme
sg:sag sh:hbs si:sin sk:slk:slo sl:slv sm:smo sn:sna so:som sq:sqi:alb sr:srp ss:ssw st:sot su:sun sv:swe sw:swa ta:tam
te:tel tg:tgk th:tha ti:tir tk:tuk tl:tgl tn:tsn to:ton tr:tur ts:tso tt:tat tw:twi ty:tah ug:uig uk:ukr ur:urd uz:uzb
ve:ven vi:vie vo:vol wa:wln wo:wol xh:xho yi:yid yo:yor za:zha zh:zho:chi zu:zul
"""
# Codes of the standard variety of a language that has a code of two letters, and codes that were withdrawn.
_SAME_LANGUAGE = {
    "cmn": "zh", "arb": "ar", "pes": "fa", "swh": "sw", "zsm": "ms", "ekk": "et", "lvs": "lv", "khk": "mn", "npi": "ne",
    "ory": "or", "azj": "az", "uzn": "uz", "plt": "mg", "als": "sq", "gug": "gn", "ydd": "yi",
    "iw": "he", "in": "id", "ji": "yi", "jw": "jv", "mo": "ro",
}  # fmt: skip
_TAG = re.compile(r"(?P<language>[a-z]{2,3})(?:-[a-z0-9]{2,8})*", re.IGNORECASE)
# Codes that say that the language is not known, or is none.
_NO_LANGUAGE = frozenset(["und", "mul", "mis", "zxx"])

_NAMES = {tag: dict(zip(NAMES_IN, names, strict=True)) for tag, *names in map(str.split, _TABLE.strip().splitlines())}


def language_name(tag: str, name_in: str = "en") -> str:
    """The name of the language with an ISO 639 tag; a region such as that of `en-GB` plays no part.

    Args:
      name_in: the language of the name, one of `NAMES_IN`.

    Raises:
      UserError: the language is not in the table.
    """
    names = _NAMES.get(language_tag(tag).partition("-")[0])
    if names is None:
        raise UserError(f"no name is known for the language {tag!r}; known are {', '.join(_NAMES)}")
    return names[name_in]


def _tags_by_name() -> dict[str, str]:
    tags = {name.lower(): tag for tag, names in _NAMES.items() for name in names.values()}
    for entry in _MORE_NAMES.replace("\n", " ").split(","):
        tag, name = entry.strip().split(" ", 1)
        tags[name.lower()] = tag
    return tags


_TAGS_BY_NAME = _tags_by_name()
_TWO_LETTERS = {code: codes[0] for codes in (entry.split(":") for entry in _CODES.split()) for code in codes}
_TWO_LETTERS |= _SAME_LANGUAGE


@cache
def language_tag(name: str) -> str:
    """The tag of a language: of its name (`English`, `Mandarin`, `中文`) or of a tag in any spelling.

    Codes of three letters become those of two where there are such: `eng` is `en`, `cmn` and `zho` are `zh`, `yue`
    stays. Script and region stay and are written as in BCP 47: `en_us` is `en-US`, `cmn_hans_cn` is `zh-Hans-CN`. What
    is neither a name nor a code that is known is returned as it is.
    """
    name = name.strip()
    if (tag := _TAGS_BY_NAME.get(" ".join(name.replace("_", " ").lower().split()))) is not None:
        return tag
    written = name.replace("_", "-")
    match = _TAG.fullmatch(written)
    if match is None or not _is_code(match["language"].lower()):
        return name
    language, *parts = written.lower().split("-")
    return "-".join([_TWO_LETTERS.get(language, language), *map(_spelled, parts)])


def _spelled(part: str) -> str:
    """A script such as Hans, a region such as US, or a variant."""
    if len(part) == 4 and part.isalpha():
        return part.title()
    return part.upper() if len(part) == 2 or (len(part) == 3 and part.isdigit()) else part


def is_language_tag(tag: str) -> bool:
    """Whether a tag of `language_tag` begins with the code of a language (ISO 639), or is for private use (`x-...`)."""
    match = _TAG.fullmatch(tag)
    return tag.startswith("x-") or (match is not None and _is_code(match["language"].lower()))


def same_language(one: str, other: str) -> bool:
    """Whether two tags are of one language, whatever their scripts and regions."""
    return one.partition("-")[0] == other.partition("-")[0]


@cache
def _is_code(code: str) -> bool:
    if len(code) == 2:
        return code in _TWO_LETTERS
    if code in _NO_LANGUAGE or code in _TWO_LETTERS:
        return code not in _NO_LANGUAGE
    import langcodes  # its tables take time to load, and most languages are found without them

    return langcodes.tag_is_valid(code)
