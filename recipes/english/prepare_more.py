#!/usr/bin/env python3
"""Make more English training speech: another game, volunteers, and synthetic sentences.

    recipes/english/prepare_more.py steel-sky --packages-dir PACKAGES --corpus-dir CORPUS --output-dir OUTPUT
    recipes/english/prepare_more.py tuxpaint  --packages-dir PACKAGES --corpus-dir CORPUS --output-dir OUTPUT
    recipes/english/prepare_more.py flite     --packages-dir PACKAGES --corpus-dir CORPUS --output-dir OUTPUT
    recipes/english/prepare_more.py kokoro    --packages-dir PACKAGES --corpus-dir CORPUS --output-dir OUTPUT

CORPUS is what prepare_corpus.py has written; no sentence of three words or more of its valid, test and other is used.
PACKAGES holds, unpacked side by side or together, the packages

    steel-sky   beneath-a-steel-sky                   British actors; the game has the texts
    tuxpaint    tuxpaint-stamps-default               a volunteer who names animals; the names lie beside the recordings
    flite       dict-wn, dict-gcide, fortunes         sentences with words that nobody says in CORPUS/train.jsonl and
                flite, libflite1, libasound2          the manifests of --human, in the order of how often they are
                                                      written, spoken by four voices of a synthesizer
    kokoro      dict-wn, dict-gcide, fortunes,        sentences of all kinds and of CORPUS/train.jsonl, spoken by the
                r-cran-janeaustenr; kokoro-*          many voices of a better one (kokoro.py, kokoro.txt)

Result:

    OUTPUT/train_SOURCE.jsonl       as the manifests of prepare_corpus.py
    OUTPUT/left_out_SOURCE.jsonl    recordings that are not used, and why
    OUTPUT/audio/...                16 kHz mono FLAC

Where flite or kokoro was stopped it goes on; the others are made whole or not at all.
"""

from __future__ import annotations

import argparse
import io
import re
import sys
import wave
from collections.abc import Iterable, Iterator, Set
from dataclasses import asdict, replace
from pathlib import Path

from english_text import EnglishText, installed_dictionary
from prepare_corpus import (
    SENTENCE_WORDS,
    Recording,
    Utterance,
    check_hash,
    convert_all,
    describe,
    find,
    report_left_out,
    write_lines,
)
from prepare_text import ALL_TEXTS, DICTIONARIES, transcripts
from steel_sky import SAMPLE_RATE as STEEL_SKY_RATE
from steel_sky import Archive, spoken_lines
from synthetic_speech import (
    Flite,
    Kokoro,
    Sentence,
    Synthesizer,
    choose_sentences,
    in_turns,
    synthesize,
    written_sentences,
)

from speechllm.errors import UserError
from speechllm.files import replaced_folder

# sky.dsk of Debian's 0.0372-8, which is ScummVM's own download.
STEEL_SKY_SHA256 = "9ef6ca3dcb6f9ceb31e950bc3a05d5105bbbb38a5e9fc9a9f6508363c87849e2"
# Utterances that results are published for. Those of flite depend on what people say in the other manifests.
EXPECTED = {"steel-sky": 3452, "tuxpaint": 63}
# Sources that are spoken by a synthesizer, and how much each speaks, in hours.
SYNTHETIC = {"flite": 2.0, "kokoro": 1.0}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", choices=(*EXPECTED, *SYNTHETIC), metavar="SOURCE", help="see above")
    parser.add_argument("--packages-dir", type=Path, required=True, help="where the packages are unpacked")
    parser.add_argument("--corpus-dir", type=Path, required=True, help="that prepare_corpus.py has written")
    parser.add_argument("--output-dir", type=Path, required=True, help="folder of this source")
    parser.add_argument(
        "--human", type=Path, nargs="*", default=[], metavar="MANIFEST", help="further training speech of people"
    )
    hours = ", ".join(f"{source} {hours:g}" for source, hours in SYNTHETIC.items())
    parser.add_argument("--hours", type=float, help=f"how much synthetic speech (default: {hours})")
    parser.add_argument("--kokoro-dir", type=Path, help="where Kokoro's packages are unpacked (default: PACKAGES)")
    parser.add_argument("--dictionary", type=Path, help="as of prepare_corpus.py")
    args = parser.parse_args()
    try:
        text = EnglishText.load(args.dictionary or installed_dictionary())
        known = set().union(*map(words_of, [args.corpus_dir / "train.jsonl", *args.human]))
        utterances = make(args, text, known)
    except (UserError, OSError) as e:
        sys.exit(f"error: {e}")
    report(args.source, utterances, args.corpus_dir, known)


def make(args: argparse.Namespace, text: EnglishText, known: Set[str]) -> list[Utterance]:
    """What one source has, written to its folder; `known` are the words of the training speech so far.

    Raises:
        UserError: a package is missing, or damaged. FileNotFoundError: the corpus has not been made.
    """
    packages, corpus, output = args.packages_dir, args.corpus_dir, args.output_dir
    if args.source == "steel-sky":
        return build(args.source, steel_sky_recordings(packages), corpus, output, text)
    if args.source == "tuxpaint":
        return build(args.source, tuxpaint_recordings(packages), corpus, output, text)
    held_out = held_out_sentences(corpus)
    synthesizer: Synthesizer
    if args.source == "flite":
        chosen = choose_sentences(written_sentences(packages, text, held_out, DICTIONARIES), known)
        synthesizer = Flite(packages)
    else:
        written = written_sentences(packages, text, held_out, ALL_TEXTS)
        transcribed = [Sentence(words, words) for words in transcripts(corpus, "train")]
        chosen = in_turns([*written.values(), transcribed])
        synthesizer = Kokoro(args.kokoro_dir or packages)
    return synthesize(chosen, synthesizer, output / manifest_name(args.source), args.hours or SYNTHETIC[args.source])


def report(source: str, utterances: list[Utterance], corpus: Path, known: Set[str]) -> None:
    print(f"{source}: {describe(utterances)}")
    now_known = known.union(*(utterance.text.split() for utterance in utterances))
    for name in ("valid", "test", "other"):
        words = [word for sentence in transcripts(corpus, name) for word in sentence.split()]
        unknown = [sum(word not in vocabulary for word in words) for vocabulary in (known, now_known)]
        print(f"{name}: of {len(words)} words {unknown[0]} are nowhere in the training speech before, {unknown[1]} now")
    if len(utterances) != EXPECTED.get(source, len(utterances)):
        print(
            f"warning: {source} has {len(utterances)} utterances, where results are published for "
            f"{EXPECTED[source]}: are num2words and pocketsphinx those of speechllm's extra [english]?",
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


if __name__ == "__main__":
    main()
