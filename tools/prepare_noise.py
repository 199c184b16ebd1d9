#!/usr/bin/env python3
"""Make noise manifests of a folder of audio files: wav, flac, ogg and mp3, in all folders below it.

    tools/prepare_noise.py --audio-dir musan/noise --output-dir data --prefix musan

writes data/musan_recordings.jsonl.gz and data/musan_cuts.jsonl.gz (lhotse, with absolute paths, in the order of the
file names). Long files are cut into windows. The cuts are what a configuration takes as noise:

    data:
      augment:
        noise: {sources: [{path: data/musan_cuts.jsonl.gz}], probability: 0.5, snr_low: 10, snr_high: 20}

Only the headers are read. Files that are not audio are reported and left out; the exit status is 1, and nothing is
written, when none is left.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import sys
from collections.abc import Iterable
from pathlib import Path

import soundfile
from lhotse import AudioSource, Recording
from lhotse.cut import Cut
from tqdm import tqdm

from speechllm.errors import UserError
from speechllm.files import replaced_file

SUFFIXES = (".wav", ".flac", ".ogg", ".mp3")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--audio-dir", type=Path, required=True, help="folder of the audio files")
    parser.add_argument("--output-dir", type=Path, required=True, help="folder to write to")
    parser.add_argument("--prefix", required=True, help="how the manifests' names begin")
    parser.add_argument(
        "--window", type=float, default=10.0, help="seconds to cut longer files into (default: %(default)s)"
    )
    parser.add_argument(
        "--min-seconds",
        type=float,
        default=0.5,
        help="shorter files, and shorter rests of cut ones, are left out (default: %(default)s)",
    )
    args = parser.parse_args()
    if not 0 < args.min_seconds <= args.window:
        parser.error(f"--min-seconds {args.min_seconds} and --window {args.window}: need 0 < min-seconds <= window")
    if Path(args.prefix).name != args.prefix:
        parser.error(f"--prefix {args.prefix}: a name without folders; --output-dir says where")
    try:
        prepare_noise(args.audio_dir, args.output_dir, args.prefix, args.window, args.min_seconds)
    except (UserError, OSError) as e:
        sys.exit(f"error: {e}")


def prepare_noise(audio_dir: Path, output_dir: Path, prefix: str, window: float, min_seconds: float) -> None:
    if not audio_dir.is_dir():
        raise UserError(f"{audio_dir}: no such folder")
    paths = sorted(path for path in audio_dir.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    if not paths:
        raise UserError(f"{audio_dir}: no {', '.join(SUFFIXES)} files in it")
    recordings: list[Recording] = []
    cuts: list[Cut] = []
    unreadable, too_short = 0, 0
    for path in tqdm(paths, unit="file", disable=None):
        try:
            recording = read_header(path, f"{prefix}/{path.relative_to(audio_dir).as_posix()}")
        except soundfile.LibsndfileError as e:
            tqdm.write(f"unreadable: {path}: {e.error_string}", file=sys.stderr)
            unreadable += 1
            continue
        if recording.duration < min_seconds:
            too_short += 1
            continue
        recordings.append(recording)
        cuts += [w for w in recording.to_cut().cut_into_windows(window) if w.duration >= min_seconds]
    counts = f"{len(paths)} files, {unreadable} unreadable, {too_short} shorter than {min_seconds:g} s"
    if not cuts:
        raise UserError(f"{audio_dir}: no noise: {counts}")
    for kind, items in (("recordings", recordings), ("cuts", cuts)):
        write_jsonl(output_dir / f"{prefix}_{kind}.jsonl.gz", items)
    hours = sum(cut.duration for cut in cuts) / 3600
    print(f"{counts}\nwrote {output_dir / prefix}_recordings.jsonl.gz: {len(recordings)} recordings")
    print(f"wrote {output_dir / prefix}_cuts.jsonl.gz: {len(cuts)} cuts, {hours:.2f} hours")


def read_header(path: Path, recording_id: str) -> Recording:
    header = soundfile.info(str(path))
    channels = list(range(header.channels))
    return Recording(
        id=recording_id,
        sources=[AudioSource("file", channels, os.path.abspath(path))],
        sampling_rate=header.samplerate,
        num_samples=header.frames,
        duration=header.frames / header.samplerate,
        channel_ids=channels,
    )


def write_jsonl(path: Path, items: Iterable[Recording | Cut]) -> None:
    """lhotse's own form, whole or not at all, the same bytes each time."""
    with replaced_file(path) as tmp, tmp.open("wb") as raw, gzip.GzipFile("", "wb", fileobj=raw, mtime=0) as file:
        for item in items:
            file.write(json.dumps(item.to_dict(), ensure_ascii=False).encode() + b"\n")


if __name__ == "__main__":
    main()
