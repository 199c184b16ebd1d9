#!/usr/bin/env python3
"""Make more English training speech: another game, volunteers, and synthetic sentences.

    recipes/english/prepare_more.py steel-sky --packages-dir PACKAGES --corpus-dir CORPUS --output-dir OUTPUT
    recipes/english/prepare_more.py tuxpaint  --packages-dir PACKAGES --corpus-dir CORPUS --output-dir OUTPUT
    recipes/english/prepare_more.py flite     --packages-dir PACKAGES --corpus-dir CORPUS --output-dir OUTPUT

CORPUS is what prepare_corpus.py has written; no sentence of three words or more of its valid, test and other is used.
PACKAGES holds, unpacked side by side or together, the Debian packages

    steel-sky   beneath-a-steel-sky                   British actors; the game has the texts
    tuxpaint    tuxpaint-stamps-default               a volunteer who names animals; the names lie beside the recordings
    flite       dict-wn, dict-gcide, fortunes         sentences with words that nobody says in CORPUS/train.jsonl and
                flite, libflite1, libasound2          the manifests of --human, in the order of how often they are
                                                      written, spoken by four voices of a synthesizer

Result:

    OUTPUT/train_SOURCE.jsonl       as the manifests of prepare_corpus.py
    OUTPUT/left_out_SOURCE.jsonl    recordings that are not used, and why
    OUTPUT/audio/...                16 kHz mono FLAC

Where flite was stopped it goes on; the others are made whole or not at all.
"""

from __future__ import annotations

import argparse
import io
import re
import shutil
import subprocess
import sys
import tempfile
import wave
import zlib
from collections.abc import Iterable, Iterator, Sequence, Set
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import soundfile
from english_text import EnglishText, installed_dictionary
from prepare_corpus import (
    SAMPLE_RATE,
    SENTENCE_WORDS,
    Recording,
    Utterance,
    check_hash,
    convert_all,
    decode,
    describe,
    find,
    report_left_out,
    write_lines,
)
from prepare_text import paragraphs, sentences, transcripts
from steel_sky import SAMPLE_RATE as STEEL_SKY_RATE
from steel_sky import Archive, spoken_lines
from tqdm import tqdm

from speechllm.errors import UserError
from speechllm.files import replaced_file, replaced_folder

# sky.dsk of Debian's 0.0372-8, which is ScummVM's own download.
STEEL_SKY_SHA256 = "9ef6ca3dcb6f9ceb31e950bc3a05d5105bbbb38a5e9fc9a9f6508363c87849e2"
# Utterances that results are published for. Those of flite depend on what people say in the other manifests.
EXPECTED = {"steel-sky": 3452, "tuxpaint": 63}

# Of flite: three voices of unit statistics and one of diphones, with a dictionary of American English.
VOICES = ("awb", "rms", "slt", "kal16")
# How slowly, as a factor; people differ, and the voices do not.
STRETCHES = (0.9, 1.0, 1.1)
HOURS = 2.0
# Sentences that are neither cut off nor a mouthful.
FEWEST_WORDS, MOST_WORDS = 5, 14


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", choices=("steel-sky", "tuxpaint", "flite"), metavar="SOURCE", help="see above")
    parser.add_argument("--packages-dir", type=Path, required=True, help="where the packages are unpacked")
    parser.add_argument("--corpus-dir", type=Path, required=True, help="that prepare_corpus.py has written")
    parser.add_argument("--output-dir", type=Path, required=True, help="folder of this source")
    parser.add_argument(
        "--human", type=Path, nargs="*", default=[], metavar="MANIFEST", help="further training speech of people"
    )
    parser.add_argument("--hours", type=float, default=HOURS, help="flite: how much speech (default: %(default)s)")
    parser.add_argument("--dictionary", type=Path, help="as of prepare_corpus.py")
    args = parser.parse_args()
    training = [args.corpus_dir / "train.jsonl", *args.human]
    try:
        text = EnglishText.load(args.dictionary or installed_dictionary())
        if args.source == "flite":
            known = set().union(*map(words_of, training))
            chosen = choose_sentences(written_sentences(args.packages_dir, args.corpus_dir, text), known)
            utterances = synthesize(chosen, find_flite(args.packages_dir), args.output_dir, args.hours)
        else:
            recordings = {"steel-sky": steel_sky_recordings, "tuxpaint": tuxpaint_recordings}[args.source]
            utterances = build(args.source, recordings(args.packages_dir), args.corpus_dir, args.output_dir, text)
    except (UserError, OSError) as e:
        sys.exit(f"error: {e}")
    print(f"{args.source}: {describe(utterances)}")
    before = set().union(*map(words_of, training))
    after = before.union(*(utterance.text.split() for utterance in utterances))
    for name in ("valid", "test", "other"):
        words = [word for sentence in transcripts(args.corpus_dir, name) for word in sentence.split()]
        unknown = [sum(word not in known for word in words) for known in (before, after)]
        print(f"{name}: of {len(words)} words {unknown[0]} are nowhere in the training speech before, {unknown[1]} now")
    if len(utterances) != EXPECTED.get(args.source, len(utterances)):
        print(
            f"warning: {args.source} has {len(utterances)} utterances, where results are published for "
            f"{EXPECTED[args.source]}: are num2words and pocketsphinx those of speechllm's extra [english]?",
            file=sys.stderr,
        )


def manifest_name(source: str) -> str:
    return f"train_{source.replace('-', '_')}.jsonl"


def held_out_sentences(corpus: Path) -> set[str]:
    """The sentences of the sets that are not for training, of `SENTENCE_WORDS` or more."""
    held_out = (words for name in ("valid", "test", "other") for words in transcripts(corpus, name))
    return {words for words in held_out if len(words.split()) >= SENTENCE_WORDS}


def words_of(manifest: Path) -> set[str]:
    return {word for text in transcripts(manifest.parent, manifest.stem) for word in text.split()}


# ---------------------------------------------------------------------------------------------- recordings


def build(
    source: str, recordings: Iterable[Recording], corpus: Path, output: Path, text: EnglishText
) -> list[Utterance]:
    """Convert recordings, and write the manifests.

    Raises:
        FileNotFoundError: the corpus has not been made.
    """
    held_out = held_out_sentences(corpus)
    with replaced_folder(output) as folder:
        marked = (without_held_out(recording, held_out, text) for recording in recordings)
        utterances, left_out = convert_all(marked, text, folder)
        write_lines(folder / manifest_name(source), map(asdict, utterances))
        write_lines(folder / manifest_name(source).replace("train", "left_out"), left_out)
    report_left_out(left_out)
    return utterances


def without_held_out(recording: Recording, held_out: Set[str], text: EnglishText) -> Recording:
    """The recording, with a reason not to use it if its text is that of a test set."""
    if recording.reason is None and text.normalize(recording.text) in held_out:
        return replace(recording, reason="a sentence of valid, test or other")
    return recording


def steel_sky_recordings(packages: Path) -> Iterator[Recording]:
    """The game's recordings, in the order of their numbers.

    Raises:
        UserError: the package is missing, or damaged.
    """
    data = find(packages, "sky.dsk")
    check_hash(data, STEEL_SKY_SHA256, "beneath-a-steel-sky 0.0372-8")
    archive = Archive(find(packages, "sky.dnr"), data)
    for line in spoken_lines(archive):
        content = lambda number=line.recording: wav(archive.recording(number), STEEL_SKY_RATE)  # noqa: E731
        reason = "characters without a known code" if line.text is None else None
        name = f"steel_sky/{line.recording}"
        yield Recording(name, f"steel-sky-{line.section}", line.text or "", "wav", content, reason)


def wav(samples: bytes, rate: int) -> bytes:
    """Unsigned 8-bit mono samples as a WAV file."""
    file = io.BytesIO()
    with wave.open(file, "wb") as writer:
        writer.setnchannels(1)
        writer.setsampwidth(1)
        writer.setframerate(rate)
        writer.writeframes(samples)
    return file.getvalue()


# What the first line of a text has and the recordings do not say; and two recordings that say something else, by how
# likely Whisper tiny.en finds the texts.
_NOT_SAID = re.compile(r"\b(an?|two|brown|red)\b", re.IGNORECASE)
_OTHER_STAMPS = ("nandou", "chimp")


def tuxpaint_recordings(packages: Path) -> Iterator[Recording]:
    """The names of the stamps in English, from the first lines of the files beside them: "A frog." says "frog".

    Raises:
        UserError: the package is missing.
    """
    stamps = find(packages, "tuxpaint/stamps")
    for path in sorted(stamps.rglob("*_desc.ogg")):
        text = path.with_name(path.name.replace("_desc.ogg", ".txt"))
        first_line = text.read_text(encoding="utf-8").partition("\n")[0] if text.is_file() else ""
        said = _NOT_SAID.sub("", first_line).strip()
        reason = "other words than the text" if text.stem in _OTHER_STAMPS else None
        name = path.relative_to(stamps).as_posix().removesuffix("_desc.ogg").replace("/", "-")
        yield Recording(f"tuxpaint/{name}", "tuxpaint", said, "ogg", path.read_bytes, reason)


# ------------------------------------------------------------------------------------------- synthetic speech


def written_sentences(packages: Path, corpus: Path, text: EnglishText) -> list[str]:
    """The usable sentences of a usual length, each once, sorted.

    Raises:
        UserError: a package is missing. FileNotFoundError: the corpus is.
    """
    held_out = held_out_sentences(corpus)
    found: set[str] = set()
    for name, written in paragraphs(packages).items():
        for paragraph in tqdm(written, desc=name, unit="paragraph", disable=None):
            found.update(sentences(paragraph, text, held_out))
    return sorted(sentence for sentence in found if FEWEST_WORDS <= len(sentence.split()) <= MOST_WORDS)


def choose_sentences(written: Sequence[str], known: Set[str]) -> Iterator[str]:
    """Sentences with words that are not known yet, those of the most frequent word first.

    Each word in turn, by how many sentences have it, gets one sentence, unless one chosen before has it: that whose
    unknown words are the most frequent for its length.
    """
    of_word: dict[str, list[str]] = {}
    for sentence in written:
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
            yield sentence


def find_flite(packages: Path) -> list[str]:
    """The command that starts flite: the installed one, or that of the packages with their libraries.

    Raises:
        UserError: there is none, or it does not start.
    """
    command = ["flite"]
    if shutil.which("flite") is None:
        folders = sorted({str(path.parent) for path in packages.rglob("lib*.so*") if path.is_file()})
        command = ["env", f"LD_LIBRARY_PATH={':'.join(folders)}", str(find(packages, "usr/bin/flite"))]
    try:
        voices = subprocess.run([*command, "-lv"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as e:
        raise UserError(f"{command[-1]} does not start: {getattr(e, 'stderr', e)}; install flite") from e
    if missing := set(VOICES) - set(voices.split()):
        raise UserError(f"{command[-1]}: has no voice {', '.join(sorted(missing))}, only:{voices.partition(':')[2]}")
    return command


def synthesize(chosen: Iterable[str], flite: Sequence[str], output: Path, hours: float) -> list[Utterance]:
    """Let the voices speak the sentences, until there are so many hours.

    A recording that is there already is not made again: its name says the voice, and the text by a hash.

    Raises:
        UserError: flite fails.
    """
    utterances: list[Utterance] = []
    seconds = 0.0
    with tqdm(total=hours, unit="hour", disable=None) as progress:
        for words in chosen:
            if seconds >= hours * 3600:
                break
            # by its hash, so that another choice of sentences leaves the recordings of these as they are
            key = zlib.crc32(words.encode())
            voice, stretch = VOICES[key % len(VOICES)], STRETCHES[key // len(VOICES) % len(STRETCHES)]
            path = output / "audio" / "flite" / voice / f"{key:08x}.flac"
            if not path.is_file():
                samples = speak(words, [*flite, "-voice", voice], stretch)
                with replaced_file(path) as tmp:
                    soundfile.write(tmp, samples, SAMPLE_RATE, format="FLAC", subtype="PCM_16")
            duration = round(soundfile.info(path).duration, 4)
            seconds += duration
            progress.update(duration / 3600)
            name = path.relative_to(output).as_posix()
            utterances.append(Utterance(name, duration, words, f"flite-{voice}"))
    with replaced_file(output / manifest_name("flite")) as tmp:
        write_lines(tmp, map(asdict, utterances))
    return utterances


def speak(words: str, flite: Sequence[str], stretch: float) -> np.ndarray:
    """16 kHz int16 samples, (num_samples,).

    Raises:
        UserError: flite fails, or says nothing.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "spoken.wav"
        command = [*flite, "--setf", f"duration_stretch={stretch}", "-t", words, "-o", str(path)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        samples = decode(path.read_bytes(), "wav") if done.returncode == 0 and path.is_file() else np.zeros(0, np.int16)
    if not len(samples):
        raise UserError(f"{' '.join(command)} failed: {done.stderr.strip() or 'it said nothing'}")
    return samples


if __name__ == "__main__":
    main()
