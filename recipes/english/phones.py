"""How English words are pronounced, and how they may be misheard.

    recipes/english/phones.py recipes/english/data/corpus/train.jsonl --output recipes/english/data/lexicon

writes `lexicon.txt`, the words that the recipe knows and their phones: the 39 of the CMU pronouncing dictionary. Words
that it does not have, most of them names of the game, are read by the letters. The words of the manifests come first,
those said most often foremost: of words that sound alike it is the first that a head of phones writes by itself.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from english_text import EnglishText, installed_dictionary

from speechllm.errors import UserError
from speechllm.files import replaced_folder
from speechllm.text.tokenizer import LEXICON_FILE

# Letters to phones, the longest that fits first; what a person would try who never heard the word.
_LETTERS = {
    "eigh": "EY", "tion": "SH AH N", "ing": "IH NG", "igh": "AY", "tch": "CH", "oo": "UW", "ee": "IY", "ea": "IY",
    "ai": "EY", "ay": "EY", "oa": "OW", "ow": "OW", "ou": "AW", "oi": "OY", "oy": "OY", "au": "AO", "aw": "AO",
    "ie": "IY", "ei": "EY", "ue": "UW", "ar": "AA R", "er": "ER", "ir": "ER", "or": "AO R", "ur": "ER", "th": "TH",
    "sh": "SH", "ch": "CH", "ph": "F", "wh": "W", "ck": "K", "ng": "NG", "qu": "K W", "ll": "L", "ss": "S", "tt": "T",
    "nn": "N", "mm": "M", "pp": "P", "bb": "B", "dd": "D", "gg": "G", "rr": "R", "ff": "F", "zz": "Z", "a": "AE",
    "b": "B", "c": "K", "d": "D", "e": "EH", "f": "F", "g": "G", "h": "HH", "i": "IH", "j": "JH", "k": "K", "l": "L",
    "m": "M", "n": "N", "o": "AA", "p": "P", "q": "K", "r": "R", "s": "S", "t": "T", "u": "AH", "v": "V", "w": "W",
    "x": "K S", "y": "IY", "z": "Z",
}  # fmt: skip
_SPELLED = re.compile("|".join(sorted(_LETTERS, key=len, reverse=True)))

# Phones that are taken for one another: neighbors in the vowel space, and consonants of one manner.
_SIMILAR = (
    "IY IH EY", "IH EH AH", "EH AE AH EY", "AE AA AH", "AA AO AH OW", "UH UW OW", "AH UH ER IH", "AY AA OY", "AW OW AA",
    "P B T K", "T D K CH", "K G T", "B D G V", "F V TH S", "TH DH F D", "S Z SH", "SH ZH CH S", "CH JH SH", "JH ZH D",
    "M N NG", "N NG M", "L R W", "R W ER", "W V L", "Y IY", "HH F",
)  # fmt: skip


class Mishearing:
    """Makes of phones what a CTC head that is not sure may hear: some taken for similar ones, some lost, some too many.

    Args:
        most: the largest share of the phones that is wrong in a text; each text has its own share below it.
    """

    BORDER = "_"

    def __init__(self, seed: int, most: float) -> None:
        self._random = random.Random(seed)
        self._most = most
        self._like: dict[str, list[str]] = {}
        for group in map(str.split, _SIMILAR):
            for phone in group:
                self._like.setdefault(phone, []).extend(x for x in group if x != phone)
        self._all = sorted(self._like)

    def __call__(self, phones: Sequence[str]) -> list[str]:
        share = self._random.uniform(0, self._most) if self._random.random() < 0.85 else 0.0
        heard: list[str] = []
        for phone in phones:
            if self._random.random() >= share:
                heard.append(phone)
                continue
            kind = self._random.random()
            if phone == self.BORDER or kind < 0.3:  # lost
                continue
            if kind < 0.45:  # one too many
                heard += [phone, self._random.choice([self.BORDER, *self._all])]
            else:
                anything = self._random.random() < 0.2
                heard.append(self._random.choice(self._all if anything else self._like[phone]))
        return heard


def pronunciations(dictionary: Path, text: EnglishText) -> dict[str, list[str]]:
    """The first pronunciation of every word of `text.dictionary`."""
    found: dict[str, list[str]] = {}
    for line in dictionary.read_text(encoding="utf-8").splitlines():
        word, *phones = line.split() or [""]
        if re.fullmatch("[a-z'][a-z']*", word.lower()):
            found.setdefault(word.lower(), phones)
    for word in sorted(text.dictionary - found.keys()):
        if word.endswith("'s") and word[:-2] in found:
            found[word] = [*found[word[:-2]], "Z"]
        elif spelled := _SPELLED.findall(word):
            found[word] = [phone for letters in spelled for phone in _LETTERS[letters].split()]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("manifests", nargs="+", type=Path, metavar="MANIFEST", help="of training")
    parser.add_argument("--output", type=Path, required=True, help="folder of lexicon.txt; replaced as a whole")
    parser.add_argument("--dictionary", type=Path, help="as of prepare_corpus.py")
    args = parser.parse_args()
    try:
        dictionary = args.dictionary or installed_dictionary()
        lexicon = pronunciations(dictionary, EnglishText.load(dictionary))
        lines = (line for path in args.manifests for line in path.read_text(encoding="utf-8").splitlines())
        said = Counter(word for line in lines for word in json.loads(line)["text"].split())
        words = sorted(lexicon, key=lambda word: (-said[word], word))
        with replaced_folder(args.output) as folder:
            content = "".join(f"{word} {' '.join(lexicon[word])}\n" for word in words)
            (folder / LEXICON_FILE).write_text(content, encoding="utf-8")
    except (UserError, OSError) as e:
        sys.exit(f"error: {e}")
    print(f"{args.output}: {len(lexicon)} words")


if __name__ == "__main__":
    main()
