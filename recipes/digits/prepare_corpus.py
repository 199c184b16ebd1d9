#!/usr/bin/env python3
"""Make the digits corpus: connected digits in five languages out of real recordings of single digits.

The recordings are the voice prompts of the Asterisk telephone exchange as Debian packages them. One speaker
per language (`asterisk-core-sounds-*-g722`, 16 kHz) makes the training, validation and test sets; a second
speaker for Spanish, French and Italian (8 kHz, resampled) makes another test set, `test_other`, of the same
digit strings.

A string is 1 to 7 recordings with random pauses and levels over a faint noise floor. Test and validation
strings (2 to 7 digits) occur in training in no language; single digits occur in training only. Result:

    OUTPUT/{train,valid,test,test_other}-LANG.jsonl    NeMo JSON lines: audio_filepath, duration, text, lang, and when
                                                       each word is said (alignment, as lhotse has it)
    OUTPUT/{train,valid,test}-ast-FROM-TO.jsonl        the same audio to be translated: ast_text, target_lang, task
    OUTPUT/noise.jsonl                                 synthetic white, pink and brown noise for augmentation
    OUTPUT/audio/...                                   16-bit 16 kHz wav files that the manifests name
    OUTPUT/corpus.json                                 settings and hours; where it is, the corpus is complete

The same seed and recordings give the same corpus, byte for byte.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import soundfile

SAMPLE_RATE = 16000
MAX_DIGITS = 7
FORMAT_VERSION = 2

WORDS = {
    "en": "zero one two three four five six seven eight nine",
    "es": "cero uno dos tres cuatro cinco seis siete ocho nueve",
    "fr": "zéro un deux trois quatre cinq six sept huit neuf",
    "it": "zero uno due tre quattro cinque sei sette otto nove",
    "ru": "ноль один два три четыре пять шесть семь восемь девять",
}


# Each language is translated into the next two of this circle; pairs with the one after these are in no training set.
_CIRCLE = list(WORDS)
PAIRS = [(lang, _CIRCLE[(i + step) % len(_CIRCLE)]) for i, lang in enumerate(_CIRCLE) for step in (1, 2)]
UNSEEN_PAIRS = [(lang, _CIRCLE[(i + 3) % len(_CIRCLE)]) for i, lang in enumerate(_CIRCLE)]


@dataclass(frozen=True)
class Voice:
    """One speaker: the Debian package and the folder below usr/share/asterisk/sounds that it fills."""

    lang: str
    package: str
    folder: str
    other: bool = False

    @property
    def name(self) -> Path:
        """Where the recordings lie in a sounds folder: LANG, or other/LANG for the second speakers."""
        return Path("other") / self.lang if self.other else Path(self.lang)


VOICES = [
    Voice("en", "asterisk-core-sounds-en-g722", "en_US_f_Allison"),
    Voice("es", "asterisk-core-sounds-es-g722", "es_MX_f_Allison"),
    Voice("fr", "asterisk-core-sounds-fr-g722", "fr_CA_f_June"),
    Voice("it", "asterisk-core-sounds-it-g722", "it_IT_m_Carlo"),
    Voice("ru", "asterisk-core-sounds-ru-g722", "ru_RU_f_IvrvoiceRU"),
    Voice("es", "asterisk-prompt-es-co", "es", other=True),
    Voice("fr", "asterisk-prompt-fr-armelle", "fr", other=True),
    # asterisk-prompt-it-menardi itself has no sounds: it depends on one of -wav, -gsm, -alaw
    Voice("it", "asterisk-prompt-it-menardi-wav", "it_IT_f_Menardi", other=True),
]


@dataclass(frozen=True)
class CorpusSettings:
    """What the corpus depends on besides the recordings."""

    strings_per_language: int = 600
    valid_per_language: int = 20
    test_per_language: int = 60
    noise_seconds: float = 180.0
    seed: int = 0


class CorpusError(Exception):
    """The corpus cannot be made: what is wrong, and what to do about it."""

    def __init__(self, what: str, remedy: str) -> None:
        super().__init__(f"{what}\n{remedy}")


def log(message: str) -> None:
    print(f"prepare_corpus: {message}", flush=True)


@contextmanager
def folder_in_the_making(target: Path) -> Iterator[Path]:
    """A folder beside `target` that takes its place when the block ends well, and else is removed."""
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        yield partial
        if target.exists():
            shutil.rmtree(target)
        partial.rename(target)
    except OSError as error:
        raise CorpusError(f"cannot write {target}: {error}", "Make room or choose another --output-dir.") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


# ---------------------------------------------------------------------------------------------- recordings


def download_sounds(target: Path) -> None:
    """Fetch the Debian packages and keep their digits as TARGET/[other/]LANG/digits/N.*; needs no root.

    Raises:
        CorpusError: no apt-get or dpkg-deb, no package lists, no network, or a package without the digits.
    """
    for tool in ("apt-get", "dpkg-deb"):
        if shutil.which(tool) is None:
            raise CorpusError(
                f"{tool} is not installed, so the recordings cannot be downloaded on this system.",
                "Unpack the Asterisk sounds and give --sounds-dir DIR with DIR/LANG/digits/0.* to 9.*.",
            )
    with folder_in_the_making(target) as folder:
        packages = folder / "packages"
        packages.mkdir()
        for voice in VOICES:
            log(f"downloading {voice.package}")
            _apt_download(voice.package, packages)
            (deb,) = packages.glob("*.deb")
            unpacked = packages / "unpacked"
            run = subprocess.run(["dpkg-deb", "-x", deb, unpacked], capture_output=True, text=True, check=False)
            if run.returncode != 0:
                raise CorpusError(f"cannot unpack {voice.package}: {_last_line(run.stderr)}", "Try again.")
            digits = find_digits(unpacked, voice)
            if digits is None:
                raise CorpusError(
                    f"{voice.package} has no complete digits folder.",
                    "This release of the package differs; give --sounds-dir with recordings of your own.",
                )
            (folder / voice.name / "digits").mkdir(parents=True)
            for file in digits:
                shutil.copyfile(file, folder / voice.name / "digits" / file.name)
            deb.unlink()
            shutil.rmtree(unpacked)
        shutil.rmtree(packages)


def _apt_download(package: str, folder: Path) -> None:
    lists, cache = folder / "apt-lists", folder / "apt-cache"
    own = ["-o", f"Dir::State::Lists={lists.resolve()}", "-o", f"Dir::Cache={cache.resolve()}"]
    run = _apt_get([*(own if lists.exists() else []), "download", package], folder)
    if run.returncode != 0 and _UNKNOWN_PACKAGE.search(run.stderr) and not lists.exists():
        # A fresh machine has no package lists, and only root may fetch them for all: fetch them for ourselves.
        log("fetching the package lists")
        for path in (lists / "partial", cache / "archives" / "partial"):
            path.mkdir(parents=True)
        run = _apt_get([*own, "update"], folder)
        if run.returncode == 0:
            run = _apt_get([*own, "download", package], folder)
    if run.returncode == 0:
        return
    message = _last_line(run.stderr)
    if _UNKNOWN_PACKAGE.search(run.stderr):
        raise CorpusError(
            f"apt-get does not know the package {package}.",
            "Enable Debian's or Ubuntu's main/universe and run 'apt-get update', or give --sounds-dir.",
        )
    if re.search("resolv|connect|Failed to fetch|timed out", run.stderr):
        raise CorpusError(f"cannot download {package}: {message}", "Check the network, or give --sounds-dir.")
    raise CorpusError(f"apt-get download {package} failed: {message}", "Mend that, or give --sounds-dir.")


_UNKNOWN_PACKAGE = re.compile("Unable to locate package|No packages found|Can't find a source")


def _apt_get(arguments: list[str], folder: Path) -> subprocess.CompletedProcess:
    # LC_ALL: what went wrong is looked for in the messages
    return subprocess.run(
        ["env", "LC_ALL=C", "apt-get", "-q", *arguments], cwd=folder, capture_output=True, text=True, check=False
    )


def _last_line(text: str) -> str:
    errors = [line for line in text.splitlines() if line.startswith("E:")] or text.strip().splitlines()
    return errors[-1] if errors else "no message"


def find_digits(sounds_dir: Path, voice: Voice) -> list[Path] | None:
    """The ten recordings of a voice, or None where this folder has no such voice.

    `sounds_dir` has LANG/digits/0.* (second speakers: other/LANG/digits/0.*), or unpacked packages, together
    or each in a folder of its own.

    Raises:
        CorpusError: the voice is there, but some of its digits are not.
    """
    unpacked = Path("usr/share/asterisk/sounds") / voice.folder
    candidates = [sounds_dir / voice.name, sounds_dir / unpacked, *sorted(sounds_dir.glob(f"*/{unpacked}"))]
    for candidate in candidates:
        if (candidate / "digits").is_dir():
            break
    else:
        return None
    found = {digit: sorted((candidate / "digits").glob(f"{digit}.*")) for digit in range(10)}
    missing = [str(digit) for digit, files in found.items() if not files]
    if missing:
        raise CorpusError(
            f"{candidate / 'digits'}: no recording of {', '.join(missing)}.",
            f"Add {missing[0]}.wav (or .g722, .gsm) there: the digit spoken in '{voice.lang}'.",
        )
    return [files[0] for files in found.values()]


def read_recording(path: Path) -> np.ndarray:
    """Decode any audio file to 16 kHz mono float32 (num_samples,), trimmed of silence at both ends.

    Raises:
        CorpusError: PyAV is missing, or the file is not audio or is silent.
    """
    try:
        import av
    except ImportError as error:
        raise CorpusError("PyAV is not installed; it decodes G.722 and GSM.", "Run: pip install av") from error
    try:
        with av.open(str(path)) as container:
            resampler = av.AudioResampler(format="flt", layout="mono", rate=SAMPLE_RATE)
            frames = [out for frame in container.decode(audio=0) for out in resampler.resample(frame)]
            frames += resampler.resample(None)
    except (av.FFmpegError, IndexError, ValueError) as error:
        raise CorpusError(f"{path}: cannot decode this recording ({error}).", "Replace the file.") from error
    samples = np.concatenate([frame.to_ndarray()[0] for frame in frames] or [np.zeros(0, np.float32)])
    if len(samples) < SAMPLE_RATE // 20 or np.abs(samples).max() < 1e-3:
        raise CorpusError(f"{path}: this recording is empty or silent.", "Replace the file.")
    return trim(samples)


def trim(samples: np.ndarray, margin: float = 0.04) -> np.ndarray:
    """Cut silence off both ends of (num_samples,), leaving `margin` seconds, and fade 5 ms in and out.

    Speech is what lies within 40 dB of the loudest 10 ms, and 6 dB above the quietest 5 percent of them
    (telephone recordings are never silent).
    """
    hop = SAMPLE_RATE // 100
    frames = samples[: len(samples) // hop * hop].reshape(-1, hop)
    level = 10 * np.log10((frames.astype(np.float64) ** 2).mean(axis=1) + 1e-12)
    speech = np.flatnonzero(level >= max(level.max() - 40, np.percentile(level, 5) + 6))
    if len(speech) == 0:  # a constant level, such as a tone: there is nothing to trim
        speech = np.arange(len(level))
    around = int(margin * SAMPLE_RATE)
    samples = samples[max(0, speech[0] * hop - around) : (speech[-1] + 1) * hop + around].astype(np.float32)
    fade = np.linspace(0, 1, SAMPLE_RATE // 200, dtype=np.float32)
    samples[: len(fade)] *= fade
    samples[-len(fade) :] *= fade[::-1]
    return samples


def load_digits(files: list[Path]) -> list[np.ndarray]:
    """The recordings of a voice, trimmed and equally loud, with room (RMS 0.035) for what `speak` adds."""
    digits = [read_recording(file) for file in files]
    return [digit * (0.035 / np.sqrt(np.mean(digit**2))) for digit in digits]


# ----------------------------------------------------------------------------------------------- the corpus


def held_out_strings(settings: CorpusSettings) -> tuple[list[str], list[str]]:
    """The validation and the test strings, all different, as evenly as can be of 2 to 7 digits."""
    rng = np.random.default_rng([settings.seed, 1])
    seen: set[str] = set()
    strings = []
    for index in range(settings.valid_per_language + settings.test_per_language):
        length = 2 + index % (MAX_DIGITS - 1)
        while (string := random_string(rng, length)) in seen:
            pass
        seen.add(string)
        strings.append(string)
    return strings[: settings.valid_per_language], strings[settings.valid_per_language :]


def training_strings(settings: CorpusSettings, lang: str, held_out: set[str]) -> list[str]:
    """Strings of 1 to 7 digits, as evenly as can be, none of them held out."""
    rng = np.random.default_rng([settings.seed, 2, list(WORDS).index(lang)])
    strings = []
    for index in range(settings.strings_per_language):
        length = 1 + index % MAX_DIGITS
        while (string := random_string(rng, length)) in held_out:
            pass
        strings.append(string)
    return strings


def random_string(rng: np.random.Generator, length: int) -> str:
    return "".join(map(str, rng.integers(10, size=length)))


def speak(
    digits: list[np.ndarray], string: str, rng: np.random.Generator
) -> tuple[np.ndarray, list[tuple[float, float]]]:
    """Concatenate recordings to one utterance.

    Silence of 0.1 to 0.3 s at the ends, pauses of 0.05 to 0.35 s between digits, each digit up to 3 dB louder
    or softer, the whole up to 6 dB, over a white noise floor between -75 and -60 dB so that no pause is
    exactly silent.

    Returns:
        (num_samples,) float32 within [-1, 1]; start and duration of each digit in seconds.
    """

    def silence(low: float, high: float) -> np.ndarray:
        return np.zeros(int(rng.uniform(low, high) * SAMPLE_RATE), dtype=np.float32)

    parts, spans = [silence(0.1, 0.3)], []
    for position, digit in enumerate(string):
        if position > 0:
            parts.append(silence(0.05, 0.35))
        spans.append((sum(map(len, parts)) / SAMPLE_RATE, len(digits[int(digit)]) / SAMPLE_RATE))
        parts.append(digits[int(digit)] * np.float32(10 ** (rng.uniform(-3, 3) / 20)))
    parts.append(silence(0.1, 0.3))
    samples = np.concatenate(parts) * np.float32(10 ** (rng.uniform(-6, 6) / 20))
    samples += rng.standard_normal(len(samples), dtype=np.float32) * np.float32(10 ** (rng.uniform(-75, -60) / 20))
    return np.clip(samples, -1.0, 1.0), spans


def synthetic_noise(color: str, num_samples: int, rng: np.random.Generator) -> np.ndarray:
    """White, pink (-3 dB an octave) or brown (-6 dB an octave) noise above 20 Hz, RMS 0.1."""
    spectrum = np.fft.rfft(rng.standard_normal(num_samples))
    frequency = np.fft.rfftfreq(num_samples, 1 / SAMPLE_RATE)
    slope = {"white": 0.0, "pink": 0.5, "brown": 1.0}[color]
    spectrum *= np.where(frequency < 20, 0, np.maximum(frequency, 20) ** -slope)
    noise = np.fft.irfft(spectrum, num_samples)
    return np.clip(noise * (0.1 / np.sqrt(np.mean(noise**2))), -1, 1)


def build_corpus(sounds_dir: Path, output_dir: Path, settings: CorpusSettings) -> dict:
    """Write the corpus and return what corpus.json says: settings, and strings and hours by manifest.

    A complete corpus with these settings is left alone; one with other settings is replaced.

    Raises:
        CorpusError: a voice or digit is missing, a recording is unreadable, the disk is full, or `output_dir`
            exists and is not a corpus of this program.
    """
    recordings = {voice: find_digits(sounds_dir, voice) for voice in VOICES}
    wanted = {
        "format": FORMAT_VERSION,
        "settings": asdict(settings),
        "recordings_sha256": fingerprint(file for files in recordings.values() for file in files or []),
    }
    existing = read_corpus_info(output_dir)
    if existing is not None and {key: existing.get(key) for key in wanted} == wanted:
        log(f"{output_dir} is complete, kept")
        return existing
    if existing is None and output_dir.exists() and any(output_dir.iterdir()):
        raise CorpusError(
            f"{output_dir} exists and is not a digits corpus (it has no corpus.json).",
            "Give another --output-dir, or remove that folder.",
        )
    for voice, files in recordings.items():
        if files is None and not voice.other:
            raise CorpusError(
                f"{sounds_dir}: no recordings of '{voice.lang}' (neither {voice.name}/digits nor an unpacked "
                f"{voice.package}).",
                f"Add {sounds_dir / voice.name}/digits/0.* to 9.*.",
            )
        if files is None:
            log(f"no second speaker for '{voice.lang}' ({voice.name}/digits): left out of test_other")
    voices = {voice: load_digits(files) for voice, files in recordings.items() if files is not None}
    valid, test = held_out_strings(settings)
    held_out = {*valid, *test}
    manifests: dict[str, dict] = {}
    with folder_in_the_making(output_dir) as folder:
        for voice, digits in voices.items():
            train = training_strings(settings, voice.lang, held_out)
            sets = {"test_other": test} if voice.other else {"train": train, "valid": valid, "test": test}
            for split, strings in sets.items():
                rng = np.random.default_rng([settings.seed, 3, VOICES.index(voice), len(split)])
                name = f"{split}-{voice.lang}"
                manifests[name] = write_split(folder, name, voice.lang, digits, strings, rng)
                log(f"{name}: {len(strings)} strings, {manifests[name]['hours']:.3f} h")
        for split, pairs in {"train": PAIRS, "valid": PAIRS, "test": PAIRS + UNSEEN_PAIRS}.items():
            for pair in pairs:
                write_translations(folder, split, *pair)
        manifests["noise"] = write_noise(folder, settings)
        info = {**wanted, "manifests": manifests}
        (folder / "corpus.json").write_text(json.dumps(info, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    log(f"{output_dir}: {sum(m['hours'] for m in manifests.values()):.2f} h in {len(manifests)} manifests")
    return info


def fingerprint(files: Iterable[Path]) -> str:
    """What tells one set of recordings from another."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest()


def read_corpus_info(output_dir: Path) -> dict | None:
    try:
        return json.loads((output_dir / "corpus.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def write_split(
    folder: Path, name: str, lang: str, digits: list[np.ndarray], strings: list[str], rng: np.random.Generator
) -> dict:
    words = WORDS[lang].split()
    (folder / "audio" / name).mkdir(parents=True)
    lines, total = [], 0
    for index, string in enumerate(strings):
        samples, spans = speak(digits, string, rng)
        path = Path("audio") / name / f"{name}-{index:05d}-{string}.wav"
        soundfile.write(folder / path, samples, SAMPLE_RATE, subtype="PCM_16")
        said = [words[int(digit)] for digit in string]
        alignment = [
            [word, round(start, 4), round(seconds, 4)] for word, (start, seconds) in zip(said, spans, strict=True)
        ]
        lines.append(manifest_line(path, len(samples), " ".join(said), lang, alignment))
        total += len(samples)
    (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    return {"strings": len(strings), "hours": total / SAMPLE_RATE / 3600}


def write_translations(folder: Path, split: str, lang: str, target_lang: str) -> None:
    """The manifest of a split with its digits in the words of another language."""
    translation = dict(zip(WORDS[lang].split(), WORDS[target_lang].split(), strict=True))
    lines = []
    for line in (folder / f"{split}-{lang}.jsonl").read_text(encoding="utf-8").splitlines():
        entry = json.loads(line)
        ast = {
            "id": f"{Path(entry['audio_filepath']).stem}-{target_lang}",
            "task": "ast",
            "target_lang": target_lang,
            "ast_text": " ".join(translation[word] for word in entry["text"].split()),
        }
        lines.append(json.dumps(entry | ast, ensure_ascii=False) + "\n")
    (folder / f"{split}-ast-{lang}-{target_lang}.jsonl").write_text("".join(lines), encoding="utf-8")


def write_noise(folder: Path, settings: CorpusSettings, seconds_each: float = 10.0) -> dict:
    (folder / "audio" / "noise").mkdir(parents=True)
    rng = np.random.default_rng([settings.seed, 4])
    colors = ["white", "pink", "brown"]
    lines = []
    count = max(len(colors), round(settings.noise_seconds / seconds_each))
    num_samples = int(seconds_each * SAMPLE_RATE)
    for index in range(count):
        color = colors[index % len(colors)]
        path = Path("audio/noise") / f"synthetic-{color}-{index:02d}.wav"
        soundfile.write(folder / path, synthetic_noise(color, num_samples, rng), SAMPLE_RATE, subtype="PCM_16")
        lines.append(manifest_line(path, num_samples, ""))
    (folder / "noise.jsonl").write_text("".join(lines), encoding="utf-8")
    return {"strings": count, "hours": count * seconds_each / 3600}


def manifest_line(
    path: Path, num_samples: int, text: str, lang: str | None = None, alignment: list[list] | None = None
) -> str:
    line = {"audio_filepath": path.as_posix(), "duration": num_samples / SAMPLE_RATE, "text": text}
    if lang is not None:
        line |= {"lang": lang, "alignment": {"word": alignment}}
    return json.dumps(line, ensure_ascii=False) + "\n"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Make the digits corpus from the recordings of Debian's Asterisk packages.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    defaults = CorpusSettings()
    parser.add_argument("--output-dir", type=Path, default=Path("data/digits"), help="where the corpus goes")
    parser.add_argument(
        "--sounds-dir",
        type=Path,
        help="recordings that are already here: LANG/digits/0.* or unpacked packages; by default they are "
        "downloaded to 'sounds' beside the output",
    )
    parser.add_argument("--strings-per-language", type=int, default=defaults.strings_per_language, help="train")
    parser.add_argument("--valid-per-language", type=int, default=defaults.valid_per_language, help="valid")
    parser.add_argument("--test-per-language", type=int, default=defaults.test_per_language, help="test and test_other")
    parser.add_argument("--noise-seconds", type=float, default=defaults.noise_seconds, help="synthetic noise")
    parser.add_argument("--seed", type=int, default=defaults.seed)
    args = parser.parse_args(argv)
    settings = CorpusSettings(**{name: getattr(args, name) for name in asdict(defaults)})
    if not (settings.strings_per_language >= 1 and settings.seed >= 0 and settings.noise_seconds >= 0):
        parser.error("--strings-per-language must be at least 1, --seed and --noise-seconds at least 0")
    if not (settings.valid_per_language >= 1 and settings.test_per_language >= 1):
        parser.error("--valid-per-language and --test-per-language must be at least 1")
    if settings.valid_per_language + settings.test_per_language > 300:
        parser.error("at most 300 valid and test strings together: only 100 strings of two digits exist")
    try:
        if args.sounds_dir is None:
            args.sounds_dir = args.output_dir.parent / "sounds"
            if args.sounds_dir.is_dir():
                log(f"recordings are in {args.sounds_dir}, kept")
            else:
                download_sounds(args.sounds_dir)
        elif not args.sounds_dir.is_dir():
            raise CorpusError(f"--sounds-dir {args.sounds_dir}: no such folder.", "Give the folder of recordings.")
        build_corpus(args.sounds_dir, args.output_dir, settings)
    except CorpusError as error:
        what, remedy = str(error).split("\n", 1)
        print(f"prepare_corpus: error: {what}\nprepare_corpus: {remedy}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
