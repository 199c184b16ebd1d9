"""A small AISHELL-1: its exact layout, with Mandarin speech by espeak-ng (https://github.com/espeak-ng/espeak-ng)."""

from __future__ import annotations

import ctypes
from pathlib import Path

import espeakng_loader
import numpy as np
import soundfile

# With spaces between words, as AISHELL's transcripts have them; the full-width letter is also there.
SENTENCES = {
    "train": [
        "今天 天气 很 好",
        "我们 明天 去 北京",
        "他 在 学校 学习 汉语",
        "这 件 ｔ恤 很 便宜",
        "请 打开 窗户",
        "再见",
    ],
    "dev": ["他 明天 去 学校", "今天 很 便宜"],
    "test": ["我们 学习 汉语", "请 明天 再 打开", "北京 天气 很 好"],
}
SPEAKERS = {"train": ("S0002", "S0003"), "dev": ("S0724",), "test": ("S0764",)}
WITHOUT_TRANSCRIPT = "BAC009S0002W0999"  # a few of AISHELL's recordings have none

_SYNCHRONOUS, _DONT_EXIT, _UTF8, _RATE, _PITCH = 2, 0x8000, 1, 1, 3  # of espeak-ng's speak_lib.h


class Speaker:
    """espeak-ng's Mandarin voice (cmn)."""

    def __init__(self) -> None:
        self._espeak = espeakng_loader.load_library()
        data = espeakng_loader.get_data_path().encode()
        self._rate = self._espeak.espeak_Initialize(_SYNCHRONOUS, 0, data, _DONT_EXIT)
        assert self._rate > 0 and self._espeak.espeak_SetVoiceByName(b"cmn") == 0

    def say(self, text: str, words_per_minute: int, pitch: int) -> np.ndarray:
        """(num_samples,) float32 at 16 kHz."""
        chunks = []

        @ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)
        def receive(samples, count, events):
            if samples and count:
                chunks.append(np.ctypeslib.as_array(samples, (count,)).copy())
            return 0

        self._espeak.espeak_SetSynthCallback(receive)
        self._espeak.espeak_SetParameter(_RATE, words_per_minute, 0)
        self._espeak.espeak_SetParameter(_PITCH, pitch, 0)
        encoded = text.encode() + b"\0"
        assert self._espeak.espeak_Synth(encoded, len(encoded), 0, 1, 0, _UTF8, None, None) == 0
        samples = np.concatenate(chunks).astype(np.float32) / 32768
        times = np.arange(int(len(samples) * 16000 / self._rate)) / 16000
        return np.interp(times, np.arange(len(samples)) / self._rate, samples).astype(np.float32)


def write_aishell(corpus_dir: Path) -> None:
    """CORPUS_DIR/data_aishell/{wav,transcript} and CORPUS_DIR/resource_aishell."""
    speaker = Speaker()
    lines = []
    for part, speakers in SPEAKERS.items():
        for name in speakers:
            folder = corpus_dir / "data_aishell" / "wav" / part / name
            folder.mkdir(parents=True)
            for number, text in enumerate(SENTENCES[part]):
                utterance = f"BAC009{name}W{122 + number:04d}"
                samples = speaker.say(text.replace(" ", ""), 150 + 10 * int(name[-1]), 30 + 5 * int(name[-1]))
                soundfile.write(folder / f"{utterance}.wav", samples, 16000, subtype="PCM_16")
                lines.append(f"{utterance} {text}\n")
    folder = corpus_dir / "data_aishell" / "wav" / "train" / "S0002"
    soundfile.write(folder / f"{WITHOUT_TRANSCRIPT}.wav", speaker.say("再见", 160, 40), 16000, subtype="PCM_16")
    (corpus_dir / "data_aishell" / "transcript").mkdir()
    transcript = corpus_dir / "data_aishell" / "transcript" / "aishell_transcript_v0.8.txt"
    transcript.write_text("".join(sorted(lines)), encoding="utf-8")
    (corpus_dir / "resource_aishell").mkdir()
    (corpus_dir / "resource_aishell" / "lexicon.txt").write_text("再见 z ai4 j ian4\n", encoding="utf-8")
    (corpus_dir / "resource_aishell" / "speaker.info").write_text("0002 F\n0003 M\n0724 F\n0764 M\n")
