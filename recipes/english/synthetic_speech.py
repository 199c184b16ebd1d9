"""Speech that nobody spoke: which sentences, the synthesizers, and the files that they make.

flite (Carnegie Mellon University) has four voices; Kokoro, in kokoro.py, has many and natural ones, and is slower.
"""

from __future__ import annotations

import io
import shutil
import subprocess
import tempfile
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import asdict
from itertools import chain, zip_longest
from pathlib import Path
from typing import NamedTuple, Protocol

import kokoro
import numpy as np
import soundfile
from english_text import EnglishText
from prepare_corpus import SAMPLE_RATE, Utterance, decode, find, write_lines
from prepare_text import paragraphs, sentences
from tqdm import tqdm

from speechllm.errors import UserError
from speechllm.files import replaced_file

# Sentences that are neither cut off nor a mouthful.
FEWEST_WORDS, MOST_WORDS = 5, 14


class Sentence(NamedTuple):
    """Normalized words, and how they are written where they come from, which says how to speak them."""

    words: str
    written: str


class Synthesizer(Protocol):
    """Who speaks.

    Attributes:
      name: of the source in manifests.
    """

    name: str

    def voice(self, key: int) -> str:
        """The name of the voice that speaks the sentence with this hash."""

    def speak(self, sentence: Sentence, key: int) -> np.ndarray:
        """16 kHz int16 samples, (num_samples,).

        Raises:
            UserError: it cannot be spoken.
        """


# -------------------------------------------------------------------------------------------------- sentences


def written_sentences(
    packages: Path, text: EnglishText, held_out: Set[str], names: Iterable[str]
) -> dict[str, list[Sentence]]:
    """The usable sentences of a usual length in each of the packages, each once, sorted.

    Raises:
        UserError: a package is missing.
    """
    found: dict[str, list[Sentence]] = {}
    for name, written in paragraphs(packages, names).items():
        of_package: dict[str, str] = {}
        for paragraph in tqdm(written, desc=name, unit="paragraph", disable=None):
            of_package.update(sentences(paragraph, text, held_out))
        found[name] = [
            Sentence(words, written)
            for words, written in sorted(of_package.items())
            if FEWEST_WORDS <= len(words.split()) <= MOST_WORDS
        ]
    return found


def choose_sentences(written: Mapping[str, Sequence[Sentence]], known: Set[str]) -> Iterator[Sentence]:
    """Sentences with words that are not known yet, those of the most frequent word first.

    Each word in turn, by how many sentences have it, gets one sentence, unless one chosen before has it: that whose
    unknown words are the most frequent for its length.
    """
    of_word: dict[str, list[str]] = {}
    by_words = {sentence.words: sentence for sentence in sorted(chain.from_iterable(written.values()))}
    for sentence in by_words:
        for word in set(sentence.split()) - known:
            of_word.setdefault(word, []).append(sentence)
    spoken: set[str] = set()

    def gain(sentence: str) -> float:
        words = sentence.split()
        return sum(len(of_word[word]) for word in set(words) if word in of_word and word not in spoken) / len(words)

    for word in sorted(of_word, key=lambda word: (-len(of_word[word]), word)):
        if word not in spoken:
            sentence = max(of_word[word], key=gain)
            spoken.update(sentence.split())
            yield by_words[sentence]


def in_turns(sources: Iterable[Sequence[Sentence]]) -> Iterator[Sentence]:
    """A sentence of each source in turn, each source in an order as of chance; none twice, and none with digits.

    A number can be read in more than one way.
    """
    shuffled = [sorted(source, key=lambda sentence: zlib.crc32(sentence.words.encode())) for source in sources]
    seen: set[str] = set()
    for sentence in chain.from_iterable(zip_longest(*shuffled)):
        if sentence is None or sentence.words in seen or any(map(str.isdigit, sentence.written)):
            continue
        seen.add(sentence.words)
        yield sentence


# ----------------------------------------------------------------------------------------------- synthesizers


class Flite:
    """Three voices of unit statistics and one of diphones, with a dictionary of American English.

    Args:
      packages: where a flite is unpacked if none is installed.
    """

    name = "flite"
    voices = ("awb", "rms", "slt", "kal16")
    # How slowly, as a factor; people differ, and the voices do not.
    _stretches = (0.9, 1.0, 1.1)

    def __init__(self, packages: Path) -> None:
        """Raises:
        UserError: there is none, or it does not start.
        """
        self._command = ["flite"]
        if shutil.which("flite") is None:
            folders = sorted({str(path.parent) for path in packages.rglob("lib*.so*") if path.is_file()})
            self._command = ["env", f"LD_LIBRARY_PATH={':'.join(folders)}", str(find(packages, "usr/bin/flite"))]
        name = self._command[-1]
        try:
            voices = subprocess.run([*self._command, "-lv"], capture_output=True, text=True, check=True).stdout
        except (OSError, subprocess.CalledProcessError) as e:
            raise UserError(f"{name} does not start: {getattr(e, 'stderr', e)}; install flite") from e
        if missing := set(self.voices) - set(voices.split()):
            raise UserError(f"{name}: has no voice {', '.join(sorted(missing))}, only:{voices.partition(':')[2]}")

    def voice(self, key: int) -> str:
        return self.voices[key % len(self.voices)]

    def speak(self, sentence: Sentence, key: int) -> np.ndarray:
        stretch = self._stretches[key // len(self.voices) % len(self._stretches)]
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "spoken.wav"
            options = ["-voice", self.voice(key), "--setf", f"duration_stretch={stretch}", "-t", sentence.words]
            command = [*self._command, *options, "-o", str(path)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            is_made = done.returncode == 0 and path.is_file()
            samples = decode(path.read_bytes(), "wav") if is_made else np.zeros(0, np.int16)
        if not len(samples):
            raise UserError(f"{' '.join(command)} failed: {done.stderr.strip() or 'it said nothing'}")
        return samples


class Kokoro:
    """The voices of Kokoro-82M and mixtures of them (kokoro.py)."""

    name = "kokoro"

    def __init__(self, packages: Path) -> None:
        """Raises:
        UserError: a package is missing.
        """
        self._kokoro = kokoro.Kokoro(packages)

    def voice(self, key: int) -> str:
        return self._kokoro.speaker(key).first

    def speak(self, sentence: Sentence, key: int) -> np.ndarray:
        samples = self._kokoro.speak(sentence.written, self._kokoro.speaker(key))
        file = io.BytesIO()
        soundfile.write(file, samples, kokoro.RATE, format="WAV")
        return decode(file.getvalue(), "wav")


def synthesize(chosen: Iterable[Sentence], synthesizer: Synthesizer, manifest: Path, hours: float) -> list[Utterance]:
    """Let the voices speak the sentences, until there are so many hours, and write a manifest.

    A recording that is there already is not made again: its name says the voice, and the text by a hash.

    Raises:
        UserError: the synthesizer fails.
    """
    output, source = manifest.parent, synthesizer.name
    utterances: list[Utterance] = []
    seconds = 0.0
    with tqdm(total=hours, unit="hour", disable=None) as progress:
        for sentence in chosen:
            if seconds >= hours * 3600:
                break
            # by its hash, so that another choice of sentences leaves the recordings of these as they are
            key = zlib.crc32(sentence.words.encode())
            voice = synthesizer.voice(key)
            path = output / "audio" / source / voice / f"{key:08x}.flac"
            if not path.is_file():
                samples = synthesizer.speak(sentence, key)
                with replaced_file(path) as tmp:
                    soundfile.write(tmp, samples, SAMPLE_RATE, format="FLAC", subtype="PCM_16")
            duration = round(soundfile.info(path).duration, 4)
            seconds += duration
            progress.update(duration / 3600)
            name = path.relative_to(output).as_posix()
            utterances.append(Utterance(name, duration, sentence.words, f"{source}-{voice}"))
    with replaced_file(manifest) as tmp:
        write_lines(tmp, map(asdict, utterances))
    return utterances
