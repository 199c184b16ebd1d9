"""What manifests hold, and what is wrong with them: `speechllm data check`."""

from __future__ import annotations

import json
import math
from array import array
from bisect import insort
from collections import Counter, defaultdict, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
from tqdm import tqdm

from speechllm.data.ahead import map_ahead
from speechllm.data.audio import load_precomputed, load_samples, read_header, stored_kind
from speechllm.data.audio_file import AudioNote, UtteranceError
from speechllm.data.blocks import DURATION_TOLERANCE
from speechllm.data.features import SAMPLE_RATE, num_frames
from speechllm.data.loader import DataConfig
from speechllm.data.manifests.manifest import (
    LINE_ERRORS,
    Entry,
    ManifestError,
    SourceConfig,
    describe,
    explain,
    iter_objects,
    lost_texts,
    to_cut,
)
from speechllm.data.manifests.source import target_text
from speechllm.data.overlap import Keys, shared_utterances
from speechllm.files import replaced_file
from speechllm.text.tokenizer import Tokenizer

PROBLEMS_SHOWN = 20
EXTREMES_SHOWN = 3
PERCENTILES = (1, 5, 25, 50, 75, 95, 99)
HISTOGRAM_BARS = 20
# Utterances of one task of a thread, and tasks waiting per thread: enough to keep them busy, little to remember.
_CHUNK = 16
_WAITING = 8

AudioCheck = Literal["none", "header", "full"]


def sets_of(data: DataConfig) -> dict[str, list[SourceConfig]]:
    """The manifests of a configuration by what they are for: train, valid, and each test set."""
    return {"train": data.train, "valid": data.valid} | {f"test {name}": test for name, test in data.test.items()}


def sounds_of(data: DataConfig) -> list[SourceConfig]:
    """The noise and the impulse responses of the augmentation."""
    sections = (data.augment.noise, data.augment.reverb)
    return _each_once(*(section.sources for section in sections if section is not None))


def _each_once(*parts: Sequence[SourceConfig]) -> list[SourceConfig]:
    sources: list[SourceConfig] = []
    for part in parts:
        sources += [source for source in part if source not in sources]
    return sources


@dataclass(frozen=True)
class CheckOptions:
    """`audio`: none reads the manifests only, header as much of each audio file as tells how long it is, full decodes
    all of it. `tokenizer`: to count tokens per second of audio, of the text after `text_steps` (see
    `speechllm.text.normalize`). Utterances outside `min_seconds` to `max_seconds` are problems, and without a text,
    unless they are `sounds`; those of fewer than `min_frames` frames of features, which the encoder cannot hear; and
    audio that is shorter or longer than its manifest says by more than `duration_tolerance` seconds. `jobs`: threads
    that read audio."""

    audio: AudioCheck = "header"
    tokenizer: Tokenizer | None = None
    text_steps: Sequence[str] = ()
    min_seconds: float = 0.0
    max_seconds: float = math.inf
    duration_tolerance: float = DURATION_TOLERANCE
    min_frames: int = 0
    sounds: bool = False
    jobs: int = 1


@dataclass(frozen=True)
class Problem:
    """`kind`: a few words to count by; `location`: FILE:LINE, or the file as a whole."""

    kind: str
    location: str
    details: str


class Distribution:
    """Numbers of many utterances, four bytes each, and where the few smallest and largest of them stand."""

    def __init__(self) -> None:
        self.values = array("f")
        self.lowest: list[tuple[float, str]] = []
        self.highest: list[tuple[float, str]] = []

    def add(self, value: float, location: str) -> None:
        self.values.append(value)
        if len(self.lowest) < EXTREMES_SHOWN or value < self.lowest[-1][0]:
            insort(self.lowest, (value, location))
            del self.lowest[EXTREMES_SHOWN:]
        if len(self.highest) < EXTREMES_SHOWN or value > self.highest[0][0]:
            insort(self.highest, (value, location))
            del self.highest[:-EXTREMES_SHOWN]

    def percentiles(self) -> dict[int, float]:
        """Value by percentile; none of no numbers."""
        if not self.values:
            return {}
        values = np.percentile(np.frombuffer(self.values, dtype=np.float32), PERCENTILES)
        return dict(zip(PERCENTILES, values.tolist(), strict=True))

    def to_dict(self) -> dict[str, Any]:
        return {
            "percentiles": self.percentiles(),
            "lowest": [{"value": value, "location": location} for value, location in self.lowest],
            "highest": [{"value": value, "location": location} for value, location in reversed(self.highest)],
        }


@dataclass
class SourceSummary:
    """One manifest: its lines, those that can be understood, and the seconds that they say they have."""

    path: str
    lines: int = 0
    utterances: int = 0
    seconds: float = 0.0
    problems: int = 0


class CheckReport:
    """What `check_manifests` found.

    Args:
        keep_all: remember every problem, not only the first `PROBLEMS_SHOWN` of a kind.
    """

    def __init__(self, keep_all: bool = False) -> None:
        self.sources: list[SourceSummary] = []
        self.durations = Distribution()
        self.characters_per_second = Distribution()
        self.tokens_per_second = Distribution()
        self.characters = 0
        self.tokens = 0
        self.languages: Counter[str] = Counter()
        self.language_seconds: defaultdict[str, float] = defaultdict(float)
        self.tasks: Counter[str] = Counter()
        self.problem_counts: Counter[str] = Counter()
        self.problems: dict[str, list[Problem]] = {}
        self._keep_all = keep_all

    @property
    def seconds(self) -> float:
        """Seconds of audio, by the manifests."""
        return sum(source.seconds for source in self.sources)

    def add_problem(self, problem: Problem, source: SourceSummary | None = None) -> None:
        """Counted, and remembered if there is room; of the manifest that is being read, or of `source`."""
        self.problem_counts[problem.kind] += 1
        (source or self.sources[-1]).problems += 1
        remembered = self.problems.setdefault(problem.kind, [])
        if self._keep_all or len(remembered) < PROBLEMS_SHOWN:
            remembered.append(problem)

    def add_entry(self, entry: Entry, location: str, options: CheckOptions) -> None:
        """Count an utterance, and its problems that can be seen without its audio."""
        summary, text = self.sources[-1], target_text(entry, options.text_steps)
        summary.utterances += 1
        summary.seconds += entry.duration
        language = entry.lang or "unknown"
        if entry.task == "ast":
            language += f">{entry.target_lang or 'unknown'}"
        self.languages[language] += 1
        self.language_seconds[language] += entry.duration
        self.tasks[entry.task] += 1
        self.durations.add(entry.duration, location)
        self.characters += len(text)
        self.characters_per_second.add(len(text) / entry.duration, location)
        if options.tokenizer is not None:
            tokens = len(options.tokenizer.encode(text))
            self.tokens += tokens
            self.tokens_per_second.add(tokens / entry.duration, location)
        if not text and not options.sounds:
            self.add_problem(Problem("empty text", location, f"id {entry.id!r} has nothing to write"))
        if not options.min_seconds <= entry.duration <= options.max_seconds:
            limits = f"{options.min_seconds:g} s to {options.max_seconds:g} s"
            details = f"{entry.duration:g} s is not in {limits}"
            self.add_problem(Problem("duration out of range", location, details))
        if (frames := num_frames(round(entry.duration * SAMPLE_RATE))) < options.min_frames and not options.sounds:
            details = f"{entry.duration:g} s are {frames} frames, and the encoder needs {options.min_frames}"
            self.add_problem(Problem("too short for the encoder", location, details))

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain values, for JSON."""
        seconds = max(self.seconds, 1e-9)
        report = {
            "manifests": [vars(source) for source in self.sources],
            "seconds": self.seconds,
            "languages": {
                name: {"utterances": count, "seconds": self.language_seconds[name]}
                for name, count in self.languages.most_common()
            },
            "tasks": dict(self.tasks),
            "duration": self.durations.to_dict() | {"histogram": _histogram(self.durations)},
            "characters_per_second": {"mean": self.characters / seconds} | self.characters_per_second.to_dict(),
            "problem_counts": dict(self.problem_counts),
            "problems": [vars(problem) for problems in self.problems.values() for problem in problems],
        }
        if self.tokens_per_second.values:
            report["tokens_per_second"] = {"mean": self.tokens / seconds} | self.tokens_per_second.to_dict()
        return report

    def save(self, path: str | Path) -> None:
        """Write `to_dict` as JSON."""
        with replaced_file(path) as tmp:
            tmp.write_text(json.dumps(self.to_dict(), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")

    def __str__(self) -> str:
        lines = [f"{'lines':>10} {'utterances':>10} {'hours':>10} {'problems':>9}  manifest"]
        total = SourceSummary("all")
        for source in self.sources:
            lines.append(_summary_line(source))
            for name in ("lines", "utterances", "seconds", "problems"):
                setattr(total, name, getattr(total, name) + getattr(source, name))
        if len(self.sources) > 1:
            lines.append(_summary_line(total))
        if total.utterances:
            lines += ["", f"{'utterances':>10} {'hours':>10}  language"]
            for name, count in self.languages.most_common():
                lines.append(f"{count:>10} {self.language_seconds[name] / 3600:>10.3f}  {name}")
            lines += ["", "tasks: " + ", ".join(f"{name} {count}" for name, count in self.tasks.most_common())]
            lines += ["", "duration in seconds: " + _percentiles(self.durations), *_extremes(self.durations)]
            lines += _bars(_histogram(self.durations))
            for name, distribution, units in (
                ("characters", self.characters_per_second, self.characters),
                ("tokens", self.tokens_per_second, self.tokens),
            ):
                if distribution.values:
                    lines += ["", f"{name} per second of audio: mean {units / total.seconds:.2f}, "]
                    lines[-1] += _percentiles(distribution)
                    lines += _extremes(distribution)
        lines += ["", f"problems: {total.problems}"]
        for kind, count in self.problem_counts.most_common():
            lines.append(f"  {kind}: {count}")
            lines += [f"    {p.location}: {p.details}" for p in self.problems[kind][:PROBLEMS_SHOWN]]
            if count > PROBLEMS_SHOWN:
                lines.append(f"    and {count - PROBLEMS_SHOWN} more")
        return "\n".join(lines)


def check_manifests(
    sources: Sequence[SourceConfig] | Mapping[str, Sequence[SourceConfig]],
    options: CheckOptions,
    keep_all: bool = False,
    sounds: Sequence[SourceConfig] = (),
) -> CheckReport:
    """Read all lines of the manifests, and as much of the audio as `options.audio` says.

    Memory: about 40 bytes a line. An id that occurs twice in a manifest is a problem, unless task or target language
    tell the two apart.

    Args:
        sources: manifests; or sets of them by name, which must not share ids or audio (see `shared_utterances`).
        keep_all: the report holds all problems instead of the first of each kind.
        sounds: manifests of noise and impulse responses, of any duration and without text.
    """
    report = CheckReport(keep_all)
    of_sounds = replace(options, sounds=True, min_seconds=0.0, max_seconds=math.inf)
    sets = sources if isinstance(sources, Mapping) else {"all": sources}
    all_sources = [(source, options) for source in _each_once(*sets.values())]
    all_sources += [(source, of_sounds) for source in sounds]
    keys = [Keys() for _ in all_sources]
    with ThreadPoolExecutor(options.jobs) as pool:
        for (source, options), keys_of_source in zip(all_sources, keys, strict=True):
            report.sources.append(SourceSummary(source.path))
            try:
                _check_source(source, options, report, pool, keys_of_source)
            except (ManifestError, OSError) as error:
                report.add_problem(Problem("unreadable manifest", source.path, _without(source.path, error)))
    known = [source for source, _ in all_sources]
    by_id = {id(s): keys[known.index(s)] for group in sets.values() for s in group}
    for kind, location, details, source in shared_utterances(sets, by_id):
        report.add_problem(Problem(kind, location, details), report.sources[known.index(source)])
    return report


def _check_source(
    source: SourceConfig, options: CheckOptions, report: CheckReport, pool: ThreadPoolExecutor, shared: Keys
) -> None:
    keys = array("q")
    unknown_languages: dict[str, tuple[str, int]] = {}  # tag: where first, and how often

    def audio_tasks() -> Iterator[tuple[str, dict]]:
        for location, obj in tqdm(iter_objects(source), desc=source.path, unit=" lines", disable=None):
            report.sources[-1].lines += 1
            try:
                if isinstance(obj, ManifestError):
                    raise obj
                entry = describe(obj, source)
            except LINE_ERRORS as error:
                report.add_problem(Problem("bad line", location, _without(location, error)))
                continue
            keys.append(_key(entry))
            shared.add(obj, entry, source)
            for tag in source.unknown_languages(entry):
                first, count = unknown_languages.get(tag, (location, 0))
                unknown_languages[tag] = first, count + 1
            report.add_entry(entry, location, options)
            yield location, obj

    if options.audio == "none":
        deque(audio_tasks(), maxlen=0)
    else:

        def audio_problems(task: list[tuple[str, dict]]) -> list[Problem]:
            return [problem for item in task for problem in _audio_problems(*item, source, options)]

        waiting = _WAITING * options.jobs
        for problems in map_ahead(pool, audio_problems, _chunks(audio_tasks(), _CHUNK), waiting):
            for problem in problems:
                report.add_problem(problem)
    for problem in _duplicates(source, keys):
        report.add_problem(problem)
    for tag, (location, count) in unknown_languages.items():
        details = f"{tag!r} ({count} times) is no code or name of ISO 639; say what it is in the source's `languages`"
        report.add_problem(Problem("unknown language", location, details))
    for location, details in lost_texts(source):
        report.add_problem(Problem("text without audio", location, details))


def _audio_problems(location: str, obj: dict, source: SourceConfig, options: CheckOptions) -> list[Problem]:
    notes: list[AudioNote] = []
    try:
        cut = to_cut(obj, source)
        if options.audio == "header":
            read_header(cut, options.duration_tolerance)
            if not cut.has_recording:
                stored_kind(cut)
        elif cut.has_recording:
            load_samples(cut, tolerance=options.duration_tolerance, notes=notes)
        else:
            load_precomputed(cut, stored_kind(cut))
    except UtteranceError as error:
        return [Problem(error.reason, location, str(error).removeprefix(f"{error.reason}: "))]
    except LINE_ERRORS as error:
        return [Problem("bad line", location, explain(error))]
    return [Problem(note.reason, location, note.details) for note in notes]


def _key(entry: Entry) -> int:
    return hash((entry.id, entry.task, entry.target_lang))


def _duplicates(source: SourceConfig, keys: array) -> Iterator[Problem]:
    """Reads the manifest once more if a key occurs twice, for where it does."""
    found, counts = np.unique(np.frombuffer(keys, dtype=np.int64), return_counts=True)
    repeated = set(found[counts > 1].tolist())
    first: dict[tuple, str] = {}
    for location, obj in iter_objects(source) if repeated else ():
        try:
            if isinstance(obj, ManifestError):
                continue
            entry = describe(obj, source)
        except LINE_ERRORS:
            continue  # reported by the first reading
        if _key(entry) in repeated:
            identity = (entry.id, entry.task, entry.target_lang)
            earlier = first.setdefault(identity, location)
            if earlier != location:
                yield Problem("duplicate id", location, f"id {entry.id!r} is also that of {earlier}")


def _chunks(items: Iterable, size: int) -> Iterator[list]:
    iterator = iter(items)
    while chunk := list(islice(iterator, size)):
        yield chunk


def _without(location: str, error: Exception) -> str:
    return explain(error).removeprefix(f"{location}: ")


def _histogram(distribution: Distribution) -> list[dict[str, float]]:
    """Utterances by duration, in steps of 1, 2 or 5 times a power of ten; the last bar takes the long tail."""
    if not distribution.values:
        return []
    values = np.frombuffer(distribution.values, dtype=np.float32)
    widest = float(np.percentile(values, 99.5)) / (HISTOGRAM_BARS - 1)
    decade = 10.0 ** math.floor(math.log10(widest))
    width = next(step * decade for step in (1, 2, 5, 10) if step * decade >= widest)
    bars = np.bincount(np.minimum(values / width, HISTOGRAM_BARS - 1).astype(int))
    first = int(np.flatnonzero(bars)[0])
    return [{"from": i * width, "utterances": int(bars[i])} for i in range(first, len(bars))]


def _bars(histogram: list[dict[str, float]]) -> list[str]:
    most = max(bar["utterances"] for bar in histogram)
    lines = []
    for bar in histogram:
        strokes = "#" * math.ceil(bar["utterances"] / most * 50)
        lines.append(f"  from {bar['from']:>8.3g} s {bar['utterances']:>10} {strokes}".rstrip())
    return lines


def _percentiles(distribution: Distribution) -> str:
    percentiles = distribution.percentiles().items()
    return ", ".join(f"{'median' if p == 50 else f'{p} %'} {value:.2f}" for p, value in percentiles)


def _extremes(distribution: Distribution) -> list[str]:
    """Where the least and the greatest stand."""
    return [
        f"  {name}: " + ", ".join(f"{value:.2f} ({location})" for value, location in values)
        for name, values in (("lowest", distribution.lowest), ("highest", distribution.highest[::-1]))
    ]


def _summary_line(source: SourceSummary) -> str:
    hours = source.seconds / 3600
    return f"{source.lines:>10} {source.utterances:>10} {hours:>10.3f} {source.problems:>9}  {source.path}"
