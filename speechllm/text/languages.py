"""Names of languages for prompts, in English and in simplified and traditional Chinese.

They are a table of our own because a prompt must stay what it was in training, whatever a library's next version says.
"""

from __future__ import annotations

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
_NAMES = {tag: dict(zip(NAMES_IN, names, strict=True)) for tag, *names in map(str.split, _TABLE.strip().splitlines())}


def language_name(tag: str, name_in: str = "en") -> str:
    """The name of the language with an ISO 639 tag; a region such as that of `en-GB` plays no part.

    Args:
      name_in: the language of the name, one of `NAMES_IN`.

    Raises:
      UserError: the language is not in the table.
    """
    names = _NAMES.get(tag.replace("_", "-").partition("-")[0].lower())
    if names is None:
        raise UserError(f"no name is known for the language {tag!r}; known are {', '.join(_NAMES)}")
    return names[name_in]
