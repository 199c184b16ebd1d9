#!/usr/bin/env python3
"""Make the English corpus: the voices of a game, telephone prompts, and a test set of other speakers.

    recipes/english/prepare_corpus.py --packages-dir PACKAGES --output-dir recipes/english/data/corpus

PACKAGES holds, unpacked side by side or together, the Debian packages

    flight-of-the-amazon-queen      dozens of actors, 300 dialogues: train, valid and test, split by dialogue
    asterisk-core-sounds-en, -g722  prompts of a telephone exchange, one speaker: train
    pocketsphinx-testdata           five utterances of an audio book and five of playing cards: other

Result, whole or not at all:

    OUTPUT/{train,valid,test,other}.jsonl    NeMo JSON lines: audio_filepath, duration, text, lang, source
    OUTPUT/left_out.jsonl                    recordings that are in no set, and why
    OUTPUT/audio/...                         16 kHz mono FLAC files that the manifests name
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import io
import json
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path

import av
import numpy as np
import soundfile
from amazon_queen import Archive, spoken_lines
from english_text import EnglishText, installed_dictionary
from tqdm import tqdm

from speechllm.errors import UserError
from speechllm.files import replaced_folder

SAMPLE_RATE = 16000
# queen.1c of Debian's 1.0.0-9, which is ScummVM's own download.
QUEEN_SHA256 = "cc91960d133fcd4173eda4bac304e80d2bbdbaa085640287ab9e0507bd603f67"
# Utterances of the sets that results are published for.
EXPECTED = {"train": 6222, "valid": 123, "test": 409, "other": 10}

# Of the dialogues in the order of their names every 20th is for testing, every 40th for validation.
TEST, VALID = slice(10, None, 20), slice(4, None, 40)
# A text of so many words that is in the test set may be in no other; shorter ones ("yes", "thank you") may.
SENTENCE_WORDS = 3

# Letters a second of what sounds: outside of these the recording has other words than the text.
FASTEST, SLOWEST = 28.0, 3.0
_STAGE_DIRECTION = re.compile(r"[<>()@#$&/]|\d:\d|2B")

# Prompts whose recordings say something else, or spell.
_OTHER_PROMPTS = re.compile(r"spy-|(demo-instruct|demo-moreinfo|vm-intro)$")
_SOUND = re.compile(r"\[.*?\]|<.*?>|\(.*?\)")  # instead of words, or the sign that a word stands for
_PROMPT_KEYS = {"*": " star ", "#": " pound "}


@dataclass(frozen=True)
class Recording:
    """Encoded audio and what is written to be said in it.

    Args:
        name: of its file in OUTPUT/audio, without the suffix.
        source: dialogue, cut scene or package that it is from; sets are made of whole sources.
        text: as written; reason: why it cannot be used, where the text alone says so.
    """

    name: str
    source: str
    text: str
    format: str
    content: Callable[[], bytes]
    reason: str | None = None


@dataclass(frozen=True)
class Utterance:
    """A line of a manifest; duration in seconds."""

    audio_filepath: str
    duration: float
    text: str
    source: str
    lang: str = "en"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--packages-dir", type=Path, required=True, help="where the packages are unpacked")
    parser.add_argument("--output-dir", type=Path, required=True, help="folder of the corpus; replaced as a whole")
    parser.add_argument(
        "--dictionary", type=Path, help="pronunciation dictionary (default: that of the installed pocketsphinx)"
    )
    args = parser.parse_args()
    try:
        check_hash(find(args.packages_dir, "queen.1c"), QUEEN_SHA256, "flight-of-the-amazon-queen 1.0.0-9")
        text = EnglishText.load(args.dictionary or installed_dictionary())
        sets = build_corpus(args.packages_dir, args.output_dir, text)
    except (UserError, OSError) as e:
        sys.exit(f"error: {e}")
    for name, utterances in sets.items():
        print(f"{name}: {describe(utterances)}")
        if len(utterances) != EXPECTED[name]:
            print(
                f"warning: {name} has {len(utterances)} utterances, where results are published for {EXPECTED[name]}: "
                "are num2words and pocketsphinx those of speechllm's extra [english]?",
                file=sys.stderr,
            )


def check_hash(path: Path, sha256: str, package: str) -> None:
    """Whether a file is the one that is meant.

    Raises:
        UserError: the file has another hash.
    """
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != sha256:
        raise UserError(
            f"{path}: has the SHA-256 {found}, and not {sha256}: is it complete, and that of the package {package}? "
            "Remove it and fetch it again"
        )


def find(folder: Path, pattern: str) -> Path:
    """The file of this name, or path from some folder on, wherever it lies in `folder`.

    Raises:
        UserError: there is none, or more than one.
    """
    found = sorted(folder.rglob(pattern))
    if len(found) != 1:
        what = "no" if not found else f"{len(found)} files"
        raise UserError(f"{folder}: has {what} {pattern}; unpack each of the packages there once (see --help)")
    return found[0]


def build_corpus(packages: Path, output: Path, text: EnglishText) -> dict[str, list[Utterance]]:
    """Write the corpus.

    Returns:
        its sets by name.

    Raises:
        UserError: a package is missing or not as expected.
    """
    with replaced_folder(output) as folder:
        archive = Archive(find(packages, "queen.1c"))
        dialogues, left_out = convert_all(queen_recordings(archive), text, folder)
        sets = split(dialogues)
        spoken_prompts, wrong_prompts = convert_all(prompts(packages), text, folder)
        sets["train"] += spoken_prompts
        left_out += wrong_prompts
        sets["other"], _ = convert_all(other_speakers(packages), text, folder, check=False)
        for name, utterances in sets.items():
            write_lines(folder / f"{name}.jsonl", map(asdict, utterances))
        write_lines(folder / "left_out.jsonl", left_out)
    report_left_out(left_out)
    return sets


def write_lines(path: Path, objects: Iterable[dict]) -> None:
    """Write JSON lines."""
    path.write_text("".join(json.dumps(obj) + "\n" for obj in objects), encoding="utf-8")


def report_left_out(left_out: Iterable[Mapping[str, str]]) -> None:
    for reason, count in Counter(line["why"] for line in left_out).most_common():
        print(f"left out: {count} of {reason}")


# ---------------------------------------------------------------------------------------------- recordings


def queen_recordings(archive: Archive) -> list[Recording]:
    """Each recording of the game that has a text, in the order of their names."""
    lines = defaultdict(list)
    for line in spoken_lines(archive):
        lines[line.recording].append(line)
    recordings = []
    for name, (first, *others) in sorted(lines.items()):
        reason = None
        if any(line.text != first.text for line in others):
            reason = "two texts for a recording"
        elif _STAGE_DIRECTION.search(first.text):
            reason = "stage directions or codes"
        stem = name.removesuffix(".SB").lower()
        content = lambda name=name: archive.read(name)  # noqa: E731
        recordings.append(Recording(f"queen/{stem}", first.source, first.text.strip(), "mp3", content, reason))
    return recordings


def prompts(packages: Path) -> list[Recording]:
    """The prompts of the telephone exchange that are speech.

    Raises:
        UserError: a package is missing.
    """
    listed = find(packages, "core-sounds-en.txt*")
    lines = gzip.decompress(listed.read_bytes()) if listed.suffix == ".gz" else listed.read_bytes()
    sounds = find(packages, "en_US_f_Allison")
    recordings = []
    for line in lines.decode("utf-8").splitlines():
        key, colon, text = line.partition(":")
        path = sounds / f"{key.strip()}.g722"
        if line.startswith(";") or not colon or not path.is_file() or _OTHER_PROMPTS.match(key):
            continue
        text = _SOUND.sub("", text)
        for sign, word in _PROMPT_KEYS.items():
            text = text.replace(sign, word)
        name = f"asterisk/{key.strip().replace('/', '-')}"
        recordings.append(Recording(name, "asterisk", text.strip(), "g722", path.read_bytes))
    return recordings


def other_speakers(packages: Path) -> list[Recording]:
    """The utterances of pocketsphinx's test data that have a transcript.

    Raises:
        UserError: the package is missing.
    """
    recordings = []
    for listed in ("librivox/transcription", "cards/cards.transcription"):
        path = find(packages, f"test/data/{listed}")
        for line in path.read_text(encoding="utf-8").splitlines():
            match = re.fullmatch(r"<s> (.*) </s> \((.*)\)", line)
            if match is None:
                raise UserError(f"{path}: expected <s> TEXT </s> (NAME), got {line!r}")
            audio = path.parent / f"{match[2]}.wav"
            source = listed.partition("/")[0]
            recordings.append(Recording(f"{source}/{match[2]}", source, match[1].strip(), "wav", audio.read_bytes))
    return recordings


def decode(content: bytes, format: str) -> np.ndarray:
    """Encoded audio to 16 kHz mono int16, (num_samples,); what cannot be decoded has no samples."""
    try:
        with av.open(io.BytesIO(content), format=format) as container:
            resampler = av.AudioResampler(format="s16", layout="mono", rate=SAMPLE_RATE)
            frames = chain.from_iterable(map(resampler.resample, chain(container.decode(audio=0), [None])))
            return np.concatenate([frame.to_ndarray()[0] for frame in frames])
    except (av.FFmpegError, IndexError, ValueError):
        return np.zeros(0, np.int16)


# ---------------------------------------------------------------------------------------------------- sets


def convert_all(
    recordings: Iterable[Recording], text: EnglishText, folder: Path, check: bool = True
) -> tuple[list[Utterance], list[dict[str, str]]]:
    """`convert` each recording.

    Returns:
        the utterances; and for each recording that is left out its name, source, text, and why.
    """
    kept: list[Utterance] = []
    left_out: list[dict[str, str]] = []
    for recording in tqdm(recordings, unit="recording", disable=None):
        converted = convert(recording, text, folder, check)
        if isinstance(converted, Utterance):
            kept.append(converted)
        else:
            left_out.append(
                {"name": recording.name, "source": recording.source, "text": recording.text, "why": converted}
            )
    return kept, left_out


def convert(recording: Recording, text: EnglishText, folder: Path, check: bool) -> Utterance | str:
    """Write the audio of a recording to FOLDER/audio.

    Args:
        check: leave out what training or testing would suffer from.

    Returns:
        its line of the manifest; or why it is left out, and nothing is written.
    """
    words = text.normalize(recording.text)
    if check and (reason := recording.reason or wrong_text(words, text)):
        return reason
    samples = decode(recording.content(), recording.format)
    if check and (reason := wrong_audio(samples, words)):
        return reason
    path = folder / "audio" / f"{recording.name}.flac"
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, samples, SAMPLE_RATE, subtype="PCM_16")
    duration = round(len(samples) / SAMPLE_RATE, 4)
    return Utterance(path.relative_to(folder).as_posix(), duration, words, recording.source)


def wrong_text(words: str, text: EnglishText) -> str | None:
    """Why a normalized text cannot be that of an utterance, if so."""
    if not words:
        return "no words"
    if text.unknown_words(words):
        return "unknown words"
    return "sounds only" if text.is_sounds_only(words) else None


def wrong_audio(samples: np.ndarray, words: str) -> str | None:
    """Why 16 kHz int16 samples (num_samples,) cannot be an utterance of these words, if so."""
    frame = SAMPLE_RATE // 50
    duration = len(samples) / SAMPLE_RATE
    if duration < 0.3:
        return "too short"
    frames = samples[: len(samples) // frame * frame].reshape(-1, frame).astype(np.float64) / 2**15
    level = np.sqrt((frames**2).mean(axis=1))
    if level.max() < 0.005:
        return "silent"
    sounding = (level > level.max() / 100).sum() / 50  # seconds within 40 dB of the loudest
    rate = len(words.replace(" ", "")) / sounding
    if rate > FASTEST:
        return "too little audio for the text"
    return "too much audio for the text" if rate < SLOWEST and duration > 1.5 else None


def split(utterances: Sequence[Utterance]) -> dict[str, list[Utterance]]:
    """Train, valid and test, by whole sources; sentences of the test set are in no other.

    A validation sentence that training has too is left out of validation, where it costs less.
    """
    sources = sorted({utterance.source for utterance in utterances})
    test_sources, valid_sources = set(sources[TEST]), set(sources[VALID])
    sets: dict[str, list[Utterance]] = {"train": [], "valid": [], "test": []}
    for utterance in utterances:
        name = "test" if utterance.source in test_sources else "valid" if utterance.source in valid_sources else "train"
        sets[name].append(utterance)
    sets["train"] = without_sentences_of(sets["test"], sets["train"])
    sets["valid"] = without_sentences_of(sets["test"] + sets["train"], sets["valid"])
    return sets


def without_sentences_of(others: Iterable[Utterance], utterances: Iterable[Utterance]) -> list[Utterance]:
    known = {utterance.text for utterance in others if len(utterance.text.split()) >= SENTENCE_WORDS}
    return [utterance for utterance in utterances if utterance.text not in known]


def describe(utterances: Sequence[Utterance]) -> str:
    hours = sum(utterance.duration for utterance in utterances) / 3600
    num_words = sum(len(utterance.text.split()) for utterance in utterances)
    num_sources = len({utterance.source for utterance in utterances})
    return f"{len(utterances)} utterances, {hours:.3f} hours, {num_words} words, {num_sources} sources"


if __name__ == "__main__":
    main()
