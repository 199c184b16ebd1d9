#!/usr/bin/env python3
"""The data pipeline: throughput, where its time goes, and start, memory and resume at a million lines.

    tools/bench_data.py                                # everything, about ten minutes on 2 cores
    tools/bench_data.py throughput --workers 0 1 2     # audio through the pipeline, beside lhotse's own data set
    tools/bench_data.py stages                         # each stage by itself, one utterance at a time, one thread
    tools/bench_data.py million --lines 1000000        # start, resume, memory, padding
    tools/bench_data.py rows                           # audio in Arrow and Parquet files, in order and in random order

The corpus is made up (16 kHz, 16 bit wav, 1 to 30 s, 10 s on average) and lies in a temporary folder, so that reading
is reading from memory: the operating system keeps it there. Each measurement has a process to itself. Memory is what
the process holds at its highest above what it held before (on Linux).
"""

from __future__ import annotations

import argparse
import collections
import itertools
import json
import logging
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import soundfile
import torch
from bench_wkv import Failure, in_own_process, memory_of, number
from lhotse import CutSet, Fbank, FbankConfig, Recording
from lhotse.dataset import DynamicBucketingSampler, K2SpeechRecognitionDataset, OnTheFlyFeatures, SpecAugment
from lhotse.dataset.cut_transforms import CutMix, PerturbSpeed
from lhotse.utils import fastcopy

from speechllm.config import from_dict
from speechllm.data import DataConfig, SourceConfig, build_train_loader, load_samples, read_manifest
from speechllm.data.augment.augmenter import Augmenter
from speechllm.data.features import SAMPLE_RATE, fbank, plain_fbank
from speechllm.data.index import open_index

PARTS = ("throughput", "stages", "million", "rows")
MAX_DURATION = 200.0  # seconds in a batch
SPEED = [0.9, 1.0, 1.1]
NOISE_SNR = (10.0, 20.0)


# ---- A corpus -------------------------------------------------------------------------------------------------


def random_durations(count: int) -> np.ndarray:
    """(count,) seconds, as in read speech."""
    return np.random.default_rng(0).gamma(4.0, 2.5, count).clip(1.0, 30.0).round(3)


def make_corpus(folder: Path, hours: float) -> None:
    """speech.jsonl and noise.jsonl (NeMo lines) with their audio: noise with the envelope of syllables."""
    rng = np.random.default_rng(1)
    durations = random_durations(int(hours * 360))
    for name, seconds in (("speech", durations), ("noise", np.full(50, 10.0))):
        (folder / name).mkdir()
        with open(folder / f"{name}.jsonl", "w") as file:
            for i, duration in enumerate(seconds.tolist()):
                n = round(duration * SAMPLE_RATE)
                envelope = 0.1 * np.abs(np.sin(np.arange(n) * (np.pi * 4 / SAMPLE_RATE)))
                soundfile.write(folder / f"{name}/{i}.wav", envelope * rng.standard_normal(n), SAMPLE_RATE, "PCM_16")
                line = {"audio_filepath": f"{name}/{i}.wav", "duration": duration, "text": "word " * int(duration * 2)}
                file.write(json.dumps(line) + "\n")


def lhotse_cuts(manifest: Path) -> CutSet:
    """Cuts of whole files as lhotse makes them, for its own pipeline."""
    cuts = []
    for cut in read_manifest(manifest):
        whole = Recording.from_file(cut.recording.sources[0].source, recording_id=cut.id).to_cut()
        whole.supervisions = [fastcopy(s, duration=whole.duration) for s in cut.supervisions]
        cuts.append(whole)
    return CutSet.from_cuts(cuts)


def configuration(folder: Path, workers: int, augment: dict) -> DataConfig:
    tree = {
        "train": [{"path": str(folder / "speech.jsonl")}],
        "max_duration": MAX_DURATION,
        "num_workers": workers,
        "index_dir": str(folder / "index"),
        "augment": augment,
    }
    return from_dict(DataConfig, tree)


def augmentations(folder: Path) -> dict[str, dict]:
    """The rows of the table of throughput."""
    usual = {
        "speed": {"factors": SPEED},
        "noise": {
            "sources": [{"path": str(folder / "noise.jsonl")}],
            "probability": 0.5,
            "snr_low": NOISE_SNR[0],
            "snr_high": NOISE_SNR[1],
        },
        "spec_augment": {},
    }
    everything = usual | {
        "volume": {"probability": 0.5},
        "babble": {"probability": 0.1},
        "reverb": {"probability": 0.2},
        "telephone": {"probability": 0.1},
        "codec": {"probability": 0.1},
    }
    return {"none": {}, "speed, noise, SpecAugment": usual, "everything": everything}


# ---- Throughput -----------------------------------------------------------------------------------------------


def our_batches(folder: Path, workers: int, augment: dict) -> Iterator[tuple[float, float]]:
    """Seconds of audio and padded seconds of each batch."""
    loader = build_train_loader(configuration(folder, workers, augment), seed=1)
    for batch in loader:
        yield batch.audio_seconds, batch.features.shape[0] * batch.features.shape[1] / 100
    if loader.skipped:
        raise RuntimeError(f"skipped {loader.skipped}")


def lhotse_batches(folder: Path, workers: int, augment: dict) -> Iterator[tuple[float, float]]:
    """The same through lhotse's K2SpeechRecognitionDataset, as icefall's recipes have it."""
    warnings.simplefilter("ignore")
    cuts = CutSet.from_jsonl_lazy(folder / "speech-cuts.jsonl")
    noise = CutSet.from_file(folder / "noise-cuts.jsonl")
    transforms = []
    if augment:
        transforms = [PerturbSpeed(SPEED, p=1.0), CutMix(noise, snr=NOISE_SNR, p=0.5, random_mix_offset=True)]
    dataset = K2SpeechRecognitionDataset(
        cut_transforms=transforms,
        input_strategy=OnTheFlyFeatures(Fbank(FbankConfig(num_filters=80, dither=0.0))),
        input_transforms=[SpecAugment(time_warp_factor=0)] if augment else [],
    )
    sampler = DynamicBucketingSampler(cuts, max_duration=MAX_DURATION, num_buckets=20, shuffle=True)
    for batch in torch.utils.data.DataLoader(dataset, sampler=sampler, batch_size=None, num_workers=workers):
        frames = batch["supervisions"]["num_frames"].sum().item()
        yield frames / 100, batch["inputs"].shape[0] * batch["inputs"].shape[1] / 100


def throughput(which, folder: Path, workers: int, augment: dict, start_method: str) -> tuple[float, float]:
    """Seconds of audio per second (from the first batch asked for to the last given), and the share of padding."""
    torch.set_num_threads(1)
    # a process of its own is spawned, and would spawn its workers too: a training run forks them
    torch.multiprocessing.set_start_method(start_method, force=True)
    start = time.perf_counter()
    audio, padded = np.array(list(which(folder, workers, augment))).sum(axis=0)
    return audio / (time.perf_counter() - start), 1 - audio / padded


def bench_throughput(folder: Path, worker_counts: list[int], repeat: int) -> None:
    print("\n| augmentation | workers | audio s/s | hours/minute | padding | lhotse, audio s/s | ratio |")
    print("|---|---:|---:|---:|---:|---:|---:|", flush=True)
    method = torch.multiprocessing.get_start_method()
    for (name, augment), workers in itertools.product(augmentations(folder).items(), worker_counts):
        in_own_process(throughput, our_batches, folder, 0, {}, method, threads=1)  # files into memory, index made
        # in turns, and the best of each: what disturbs, disturbs both
        results = {}
        for which in [our_batches, lhotse_batches] * repeat:
            if which is our_batches or name != "everything":  # lhotse has not all of it as transforms of batches
                result = in_own_process(throughput, which, folder, workers, augment, method, threads=1)
                if isinstance(result, Failure) or result > results.get(which, (0.0,)):
                    results[which] = result
        ours, theirs = results[our_batches], results.get(lhotse_batches)
        if isinstance(ours, Failure):
            print(f"| {name} | {workers} | {ours.reason} |")
            continue
        cells = [name, str(workers), number(ours[0]), f"{ours[0] / 60:.1f}", f"{100 * ours[1]:.1f} %"]
        if theirs is None or isinstance(theirs, Failure):
            cells += ["-", "-"]
        else:
            cells += [number(theirs[0]), f"{ours[0] / theirs[0]:.2f}"]
        print(f"| {' | '.join(cells)} |", flush=True)


# ---- Stages ---------------------------------------------------------------------------------------------------


def stage_times(folder: Path) -> dict[str, float]:
    """Times real time of each stage, by the CPU time of one thread."""
    torch.set_num_threads(1)
    cuts = list(read_manifest(folder / "speech.jsonl"))[:100]
    seconds = sum(cut.duration for cut in cuts)
    samples = [load_samples(cut) for cut in cuts]
    features = [fbank(s) for s in samples]
    everything = augmentations(folder)["everything"]

    def speed_of(run) -> float:
        run()  # caches fill
        times = []
        for _ in range(3):
            start = time.process_time()
            run()
            times.append(time.process_time() - start)
        return seconds / min(times)

    def always(name: str) -> Augmenter:
        tree = {"augment": {name: everything[name] | {"probability": 1.0}}}
        return Augmenter(from_dict(DataConfig, tree).augment, cuts)

    def waveform(name: str):
        augmenter = always(name)
        return lambda: [augmenter.samples(s, np.random.default_rng(i)) for i, s in enumerate(samples)]

    rows = {"read": speed_of(lambda: [load_samples(cut) for cut in cuts])}
    for factor in (0.9, 1.1):
        both = speed_of(lambda factor=factor: [load_samples(cut, speed=factor) for cut in cuts])
        rows[f"speed {factor}"] = 1 / (1 / both - 1 / rows["read"])
    for name in ("noise", "babble", "reverb", "telephone", "codec", "volume"):
        rows[name] = speed_of(waveform(name))
    rows["fbank"] = speed_of(lambda: [fbank(s) for s in samples])
    rows["fbank by lhotse"] = speed_of(lambda: [plain_fbank(torch.from_numpy(s)) for s in samples])
    augmenter = always("spec_augment")
    rows["SpecAugment"] = speed_of(
        lambda: [augmenter.features(f, np.random.default_rng(i)) for i, f in enumerate(features)]
    )
    return rows


def bench_stages(folder: Path) -> None:
    rows = in_own_process(stage_times, folder, threads=1)
    if isinstance(rows, Failure):
        print(rows.reason)
        return
    print("\n| stage (applied to every utterance) | times real time, CPU time of one thread |")
    print("|---|---:|")
    for name, value in rows.items():
        print(f"| {name} | {number(value)} |")


# ---- A million lines ------------------------------------------------------------------------------------------


def make_lines(folder: Path, lines: int) -> None:
    """lines.jsonl: many segments of the few files of the corpus."""
    with open(folder / "speech.jsonl") as file:
        files = [json.loads(line) for line in file]
    durations = random_durations(lines).tolist()
    longest = max(files, key=lambda line: line["duration"])
    with open(folder / "lines.jsonl", "w") as file:
        for i, duration in enumerate(durations):
            line = {"audio_filepath": longest["audio_filepath"], "offset": 0.0, "duration": duration, "id": f"u{i}"}
            file.write(json.dumps(line | {"text": "word " * int(duration * 2), "lang": "en"}) + "\n")


def million_config(folder: Path) -> DataConfig:
    tree = {
        "train": [{"path": str(folder / "lines.jsonl")}],
        "max_duration": 600.0,
        "num_buckets": 30,
        "num_workers": 0,
        "index_dir": str(folder / "index"),
    }
    return from_dict(DataConfig, tree)


def measured(run) -> tuple[float, float]:
    """Seconds and MB that `run` takes."""
    start = time.perf_counter()
    held, highest = memory_of(run)
    return time.perf_counter() - start, (highest - held) / 1e6


def read_lazily(folder: Path) -> tuple[float, float]:
    return measured(lambda: collections.deque(read_manifest(folder / "lines.jsonl"), maxlen=0))


def first_batch(folder: Path) -> tuple[float, float]:
    return measured(lambda: next(iter(build_train_loader(million_config(folder), seed=1))))


def resumed_batch(folder: Path, batches: int) -> tuple[float, float]:
    """From nothing to the first batch after so many."""

    def run() -> None:
        loader = build_train_loader(million_config(folder), seed=1)
        loader.load_state_dict(loader.state_dict() | {"batches": batches})
        next(iter(loader))

    return measured(run)


def planned(folder: Path) -> tuple[int, float]:
    """Number of batches, and share of padding."""
    log = _Records()
    logging.getLogger().addHandler(log)
    logging.getLogger().setLevel(logging.INFO)
    next(iter(build_train_loader(million_config(folder), seed=1)))
    _, _, _, batches, _, padding = next(r.args for r in log.records if "padding" in r.msg)
    return batches, padding / 100


class _Records(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)


def lhotse_replay(folder: Path, batches: int) -> tuple[float, float]:
    """lhotse's sampler (its defaults but for the sizes) from nothing to the batch after so many: seconds, padding."""
    cuts = CutSet.from_jsonl_lazy(folder / "lines-cuts.jsonl")
    sampler = DynamicBucketingSampler(cuts, max_duration=600.0, num_buckets=30, shuffle=True)
    start = time.perf_counter()
    audio = padded = 0.0
    for batch in itertools.islice(sampler, batches + 1):
        durations = [cut.duration for cut in batch]
        audio += sum(durations)
        padded += len(durations) * max(durations)
    return time.perf_counter() - start, 1 - audio / padded


def bench_million(folder: Path, lines: int) -> None:
    make_lines(folder, lines)
    size = os.path.getsize(folder / "lines.jsonl") / 1e6
    print(f"\n{lines} lines, {size:.0f} MB")
    print("\n| | seconds | MB |")
    print("|---|---:|---:|", flush=True)

    def row(title: str, result) -> None:
        cells = [result.reason, ""] if isinstance(result, Failure) else [f"{result[0]:.2f}", f"{result[1]:.0f}"]
        print(f"| {title} | {cells[0]} | {cells[1]} |", flush=True)

    row("every line to a cut, one after the other", in_own_process(read_lazily, folder, threads=1))
    row("first batch of a run, index to be made", in_own_process(first_batch, folder, threads=1))
    row("first batch of a run, index there", in_own_process(first_batch, folder, threads=1))
    batches, padding = in_own_process(planned, folder, threads=1)
    middle = batches // 2
    row(f"resumed after {middle} of {batches} batches", in_own_process(resumed_batch, folder, middle, threads=1))
    read_manifest(folder / "lines.jsonl").to_file(folder / "lines-cuts.jsonl")
    seconds, their_padding = in_own_process(lhotse_replay, folder, middle, threads=1)
    print(f"| lhotse's DynamicBucketingSampler, replayed up to there | {seconds:.2f} | |")
    print(f"\npadding: {100 * padding:.1f} %, lhotse's sampler {100 * their_padding:.1f} %")


# ---- Audio in rows --------------------------------------------------------------------------------------------


def write_rows(folder: Path) -> dict[str, str]:
    """The corpus as Arrow and as Parquet with row groups of several sizes, as Hugging Face datasets writes them."""
    lines = [json.loads(line) for line in (folder / "speech.jsonl").read_text().splitlines()]
    files = [folder / line["audio_filepath"] for line in lines]
    audio = [{"bytes": file.read_bytes(), "path": file.name} for file in files]
    table = pa.table({"audio": audio, "text": [line["text"] for line in lines]})
    found = {"wav files": str(folder / "speech.jsonl"), "Arrow": str(folder / "speech.arrow")}
    with pa.ipc.new_stream(found["Arrow"], table.schema) as file:
        file.write_table(table, max_chunksize=1000)
    for rows in (100, 1000):
        name = f"Parquet, {rows} rows a group"
        found[name] = str(folder / f"speech-{rows}-rows.parquet")
        pq.write_table(table, found[name], row_group_size=rows)
    return found


def row_times(path: str, folder: Path, count: int) -> tuple[float, float, float]:
    """Of one thread, CPU time: seconds to make the index; milliseconds an utterance in order, and in random order."""
    start = time.process_time()
    index = open_index(SourceConfig(path), folder=folder / "index")
    times = [time.process_time() - start]
    numbers = np.random.default_rng(0).permutation(len(index))[:count]
    for order in (range(count), numbers):
        start = time.process_time()
        for number_of_line in order:
            load_samples(index.cut(int(number_of_line)))
        times.append((time.process_time() - start) * 1000 / count)
    return times[0], times[1], times[2]


def bench_rows(folder: Path) -> None:
    print("\n| | index, s | in order, ms | random, ms |")
    print("|---|---:|---:|---:|", flush=True)
    for name, path in write_rows(folder).items():
        seconds, in_order, at_random = in_own_process(row_times, path, folder, 100, threads=1)
        print(f"| {name} | {seconds:.2f} | {in_order:.2f} | {at_random:.2f} |", flush=True)


# ---------------------------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("parts", nargs="*", default=[*PARTS], metavar="PART")
    parser.add_argument("--workers", nargs="+", type=int, default=[0, 1, 2], help="worker processes to try")
    parser.add_argument(
        "--repeat", type=int, default=3, help="of the throughput, the best counts (default: %(default)s)"
    )
    parser.add_argument("--hours", type=float, default=2.0, help="of the corpus for throughput (default: %(default)s)")
    parser.add_argument("--lines", type=int, default=1_000_000, help="of the large manifest (default: %(default)s)")
    args = parser.parse_args()
    if unknown := set(args.parts) - set(PARTS):
        parser.error(f"unknown part {', '.join(sorted(unknown))}; choose from {', '.join(PARTS)}")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_corpus(folder, args.hours)
        for name in ("speech", "noise"):
            lhotse_cuts(folder / f"{name}.jsonl").to_file(folder / f"{name}-cuts.jsonl")
        if "throughput" in args.parts:
            bench_throughput(folder, args.workers, args.repeat)
        if "stages" in args.parts:
            bench_stages(folder)
        if "million" in args.parts:
            bench_million(folder, args.lines)
        if "rows" in args.parts:
            bench_rows(folder)


if __name__ == "__main__":
    sys.exit(main())
