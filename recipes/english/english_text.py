"""English as it is written to English as it is said: lower-case words, numbers in words, one spelling.

    Dr. Ironstein paid $1,500 in 1947 -- "Nooo!"
    doctor ironstein paid one thousand five hundred dollars in nineteen forty seven no

Transcripts are normalized for training; for scoring, references and what any recognizer has written are, alike.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import yaml
from num2words import num2words

from speechllm.errors import UserError

_WORDS_FILE = Path(__file__).with_name("words.yaml")
_AS_ASCII = str.maketrans({"’": "'", "‘": "'", "`": "'", "&": " and "})
_TITLES = {"dr": "doctor", "mr": "mister", "mrs": "missus"}
_TITLE = re.compile(r"\b(dr|mr|mrs)\b\.?")
_SAINT = re.compile(r"\bst\.(?= )")
_DOLLARS = re.compile(r"\$(\d[\d,]*(?:\.\d+)?)")
_DECADE = re.compile(r"\b(1[89]|20)(\d)0'?s\b")
_ORDINAL = re.compile(r"\b(\d+)(?:st|nd|rd|th)\b")
_YEAR = re.compile(r"(?<![\d,.])(1[1-9]\d\d|20\d\d)(?![\d,]*\d|\.\d)")
_NUMBER = re.compile(r"\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d+(?:\.\d+)?")
_NOT_IN_WORDS = re.compile("[^a-z']+")
_LONG_RUN = re.compile(r"(.)\1{2,}")


@dataclass(frozen=True)
class EnglishText:
    """Words and their spelling.

    Args:
        dictionary: the words of English, those of `words.yaml` included.
        sounds: noises that are written as words.
        spelling: word -> words, for all texts; same_in_scoring: for scoring as well.
    """

    dictionary: frozenset[str]
    sounds: frozenset[str]
    spelling: Mapping[str, str]
    same_in_scoring: Mapping[str, str]

    @classmethod
    def load(cls, dictionary: Path) -> EnglishText:
        """The words of a dictionary; sounds and spelling are those of `words.yaml`.

        Args:
            dictionary: a pronunciation dictionary, of CMU's form: a line starts with its word; `word(2)` is another
                pronunciation.

        Raises:
            FileNotFoundError: no such file. UserError: it has no words.
        """
        lines = dictionary.read_text(encoding="utf-8").splitlines()
        words = {re.sub(r"\(\d+\)$", "", line.split()[0]).lower() for line in lines if line.strip()}
        if not {"the", "of", "you"} <= words:
            raise UserError(f"{dictionary}: no dictionary of English (it lacks the, of or you)")
        own = yaml.safe_load(_WORDS_FILE.read_text(encoding="utf-8"))
        return cls(
            frozenset(words | set(own["words"].split())),
            frozenset(own["sounds"].split()),
            own["spelling"],
            own["same_in_scoring"],
        )

    def normalize(self, text: str) -> str:
        """Words of a to z and apostrophes within them, single spaces between."""
        text = text.translate(_AS_ASCII).lower()
        text = _TITLE.sub(lambda match: _TITLES[match[1]], text)
        text = _SAINT.sub("saint", text)
        text = _DOLLARS.sub(r"\1 dollars", text)
        text = re.sub(r"(?<=\d)\s*%", " percent", text)
        text = _DECADE.sub(_decade_in_words, text)
        text = _ORDINAL.sub(lambda match: num2words(int(match[1]), to="ordinal"), text)
        text = _YEAR.sub(lambda match: num2words(int(match[1]), to="year"), text)
        text = _NUMBER.sub(lambda match: f" {_number_in_words(match[0])} ", text)
        words = (word.strip("'") for word in _NOT_IN_WORDS.sub(" ", text).split())
        shortened = (self._without_long_runs(word) for word in words if word)
        return " ".join(self.spelling.get(word, word) for word in shortened)

    def for_scoring(self, text: str) -> str:
        """`normalize`, and one form for what may be written in two."""
        return " ".join(self.same_in_scoring.get(word, word) for word in self.normalize(text).split())

    def unknown_words(self, text: str) -> list[str]:
        """The words of a normalized text that the dictionary does not have."""
        return [word for word in text.split() if word not in self.dictionary]

    def is_sounds_only(self, text: str) -> bool:
        """Whether a normalized text has nothing but noises, or nothing."""
        return self.sounds.issuperset(text.split())

    def _without_long_runs(self, word: str) -> str:
        """hmmmm -> hmm, nooo -> no: three or more of a letter are two or one, whichever is a word."""
        if not _LONG_RUN.search(word):
            return word
        two, one = _LONG_RUN.sub(r"\1\1", word), _LONG_RUN.sub(r"\1", word)
        return one if one in self.dictionary and two not in self.dictionary else two


def installed_dictionary() -> Path:
    """The pronunciation dictionary of the installed pocketsphinx.

    Raises:
        UserError: it is not installed.
    """
    try:
        import pocketsphinx
    except ImportError as e:
        raise UserError("pocketsphinx is not installed: pip install 'speechllm[english]'") from e
    return Path(pocketsphinx.get_model_path("en-us/cmudict-en-us.dict"))


def _decade_in_words(match: re.Match) -> str:
    century, tens = int(match[1]), int(match[2])
    # twenty -> twenties
    return f"{num2words(century)} {('hundreds', 'tens')[tens] if tens < 2 else num2words(10 * tens)[:-1] + 'ies'}"


def _number_in_words(digits: str) -> str:
    digits = digits.replace(",", "")
    return num2words(float(digits) if "." in digits else int(digits))
