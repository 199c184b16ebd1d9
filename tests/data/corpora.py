"""One small corpus as a manifest of every kind."""

import gzip
import io
import json
import os
import tarfile
from dataclasses import replace
from pathlib import Path

from lhotse import CutSet, MonoCut, Recording, SupervisionSegment

from speechllm.data.manifests.manifest import ManifestError, SourceConfig, describe_cut, iter_objects, to_cut
from speechllm.data.manifests.stream import stream_cuts

from .conftest import write_manifest, write_tone

KINDS = ("nemo", "nemo.gz", "nemo shards", "tarred", "tarred, one manifest", "lhotse", "lhotse.gz", "shar", "kaldi")
TARRED = ("tarred", "tarred, one manifest", "shar")


def write_corpus(folder: Path, count: int = 7) -> list[dict]:
    """NeMo lines with ids and languages, with paths against `folder`; the audio has 16 bits, at 8 and 16 kHz."""
    lines = []
    for i in range(count):
        seconds, path = 0.3 + 0.1 * i, f"wav/speaker{i % 2}/u.{i}.wav"
        write_tone(folder / path, seconds, seed=i, rate=(16000, 8000)[i % 2])
        text = f"  number {i} é" if i else ""
        lines.append({"audio_filepath": path, "duration": round(seconds, 3), "text": text, "lang": "en", "id": f"u{i}"})
    return lines


def flat_name(path: str) -> str:
    """What NeMo's script calls a file in a tar."""
    stem, extension = os.path.splitext(path)
    return stem.replace("/", "_").replace(".", "_") + extension


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def write_kind(kind: str, folder: Path, lines: list[dict], custom: tuple[str, ...] = ()) -> SourceConfig:
    """The lines, whose paths are against `folder`, as a manifest of a kind; `custom`: fields for cuts to have."""
    shards = [lines[:3], lines[3:]]
    if kind == "nemo":
        return SourceConfig(str(write_manifest(folder / "m.jsonl", lines)))
    if kind == "nemo.gz":
        with gzip.open(folder / "m.jsonl.gz", "wt", encoding="utf-8") as file:
            file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        return SourceConfig(str(folder / "m.jsonl.gz"))
    if kind == "nemo shards":
        for i, shard in enumerate(shards):
            write_manifest(folder / f"m_{i}.jsonl", shard)
        return SourceConfig(str(folder / "m_{0..1}.jsonl"))
    if kind.startswith("tarred"):
        tarred = []
        for i, shard in enumerate(shards):
            data = {flat_name(line["audio_filepath"]): (folder / line["audio_filepath"]).read_bytes() for line in shard}
            write_tar(folder / f"audio_{i}.tar", data)
            flat = [line | {"audio_filepath": flat_name(line["audio_filepath"]), "shard_id": i} for line in shard]
            write_manifest(folder / f"manifest_{i}.json", flat)
            tarred += flat
        if kind == "tarred":
            return SourceConfig(str(folder / "manifest__OP_0..1_CL_.json"), tar_path=str(folder / "audio_{0..1}.tar"))
        path = write_manifest(folder / "tarred_audio_manifest.json", tarred)
        return SourceConfig(str(path), tar_path=str(folder / "audio_{0..1}.tar"))
    if kind == "kaldi":
        write_kaldi(folder / "kaldi", folder, lines)
        return SourceConfig(str(folder / "kaldi"))
    cuts = CutSet.from_cuts(true_cuts(folder, lines))
    for cut, line in zip(cuts, lines, strict=True):
        cut.custom = {name: line[name] for name in custom if name in line} or None
    if kind == "shar":
        (folder / "shar").mkdir()
        cuts.to_shar(folder / "shar", fields={"recording": "wav"}, shard_size=3)
        return SourceConfig(str(folder / "shar"))
    path = folder / ("cuts.jsonl.gz" if kind == "lhotse.gz" else "cuts.jsonl")
    cuts.to_file(path)
    return SourceConfig(str(path))


def write_kaldi(directory: Path, folder: Path, lines: list[dict]) -> None:
    directory.mkdir()
    for name, value in (
        ("wav.scp", lambda line: folder / line["audio_filepath"]),
        ("text", lambda line: line["text"]),
        ("utt2lang", lambda line: line["lang"]),
        ("utt2spk", lambda line: "someone"),
        ("utt2dur", lambda line: line["duration"]),
    ):
        rows = "".join(f"{line['id']} {value(line)}\n" for line in lines)
        (directory / name).write_text(rows, encoding="utf-8")


def true_cuts(folder: Path, lines: list[dict]) -> list:
    """Cuts with recordings as the files have them."""
    cuts = []
    for line in lines:
        name, recording = line["id"], Recording.from_file(folder / line["audio_filepath"], recording_id=line["id"])
        supervision = SupervisionSegment(name, name, 0.0, recording.duration, text=line["text"], language=line["lang"])
        cuts.append(MonoCut(name, 0.0, recording.duration, 0, supervisions=[supervision], recording=recording))
    return cuts


def streamed(source: SourceConfig) -> tuple[list, list[str]]:
    """The cuts of one pass of the source as a stream, and what is wrong with the others."""
    found = list(stream_cuts(replace(source, stream=True), seed=0, epoch=0))
    errors = [str(item) for item in found if isinstance(item, ManifestError)]
    return [item for item in found if not isinstance(item, ManifestError)], errors


def entries(source: SourceConfig) -> list:
    return [describe_cut(to_cut(obj, source)) for _, obj in iter_objects(source)]
