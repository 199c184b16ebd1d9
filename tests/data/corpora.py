"""One small corpus as a manifest of every kind."""

import csv
import gzip
import io
import json
import os
import shutil
import tarfile
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from lhotse import CutSet, MonoCut, Recording, SupervisionSegment

from speechllm.data.manifests.manifest import ManifestError, SourceConfig, describe_cut, iter_objects, to_cut
from speechllm.data.manifests.stream import stream_cuts

from .conftest import write_manifest, write_tone

KINDS = ("nemo", "nemo.gz", "nemo shards", "tarred", "tarred, one manifest", "lhotse", "lhotse.gz", "shar", "kaldi")
TARRED = ("tarred", "tarred, one manifest", "shar")
FORMS = (
    "parquet",
    "parquet, paths",
    "arrow",
    "arrow file",
    "Common Voice",
    "csv",
    "LJSpeech",
    "WeNet",
    "FunASR",
    "WeNet shards",
    "WebDataset",
)
IN_ROWS = ("parquet", "arrow", "arrow file")


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


def write_form(form: str, folder: Path, lines: list[dict]) -> SourceConfig:
    """The lines, whose paths are against `folder`, in a form that says no durations; two shards of files with rows."""
    if form.startswith(("parquet", "arrow")):
        return write_rows(form, folder / form, folder, lines)
    if form.startswith("We") and form != "WeNet":
        return write_webdataset(form, folder / form, folder, lines)
    paths = [line["audio_filepath"] for line in lines]
    if form in ("WeNet", "FunASR"):
        audio, text = {"WeNet": ("wav", "txt"), "FunASR": ("source", "target")}[form]
        rows = [
            {"key": line["id"], audio: path, text: line["text"], "text_language": f"<|{line['lang']}|>"}
            for line, path in zip(lines, paths, strict=True)
        ]
        return SourceConfig(str(write_manifest(folder / "data.list", rows)))
    names = {"Common Voice": "validated.tsv", "csv": "metadata.csv", "LJSpeech": "lj/metadata.csv"}
    path = folder / names[form]
    if form == "csv":
        with open(path, "w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["file_name", "id", "lang", "transcription"])
            writer.writerows([[line["audio_filepath"], line["id"], line["lang"], line["text"]] for line in lines])
        return SourceConfig(str(folder))
    audio = path.parent / ("clips" if form == "Common Voice" else "wavs")
    audio.mkdir(parents=True)
    for line, name in zip(lines, paths, strict=True):
        shutil.copy(folder / name, audio / f"{line['id']}.wav")
    if form == "LJSpeech":
        path.write_text("".join(f"{line['id']}|{line['text']}|-\n" for line in lines), encoding="utf-8")
        return SourceConfig(str(path), lang="en")
    rows = "".join(f"x\t{line['id']}.wav\t{line['text']}\t{line['lang']}\n" for line in lines)
    path.write_text("client_id\tpath\tsentence\tlocale\n" + rows, encoding="utf-8")
    return SourceConfig(str(path))


def write_webdataset(form: str, path: Path, folder: Path, lines: list[dict]) -> SourceConfig:
    """The lines in two tar files, texts beside the audio; with a list of these as of WeNet, or with json."""
    path.mkdir()
    for i, shard in enumerate([lines[:3], lines[3:]]):
        members = {}
        for line in shard:
            stem = line["id"] if form == "WeNet shards" else f"./a.b/{line['id']}"
            members[f"{stem}.wav"] = (folder / line["audio_filepath"]).read_bytes()
            said = {"id": line["id"], "text": line["text"], "language": line["lang"]}
            name, text = ("txt", line["text"]) if form == "WeNet shards" else ("json", json.dumps(said))
            members[f"{stem}.{name}"] = text.encode()
        write_tar(path / f"shard_{i}.tar", members)
    if form == "WebDataset":
        return SourceConfig(str(path / "shard_{0..1}.tar"))
    (path / "data.list").write_text(f"shard_0.tar\n{path}/shard_1.tar\n")
    return SourceConfig(str(path / "data.list"), lang="en")


def write_rows(form: str, path: Path, folder: Path, lines: list[dict], durations: bool = False) -> SourceConfig:
    """The lines as shards of Parquet or Arrow files in the folder `path`, with the audio in them or as paths."""
    path.mkdir()
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    for i, shard in enumerate([lines[:3], lines[3:]]):
        files = [folder / line["audio_filepath"] for line in shard]
        audio = [{"bytes": file.read_bytes(), "path": file.name} for file in files]
        if form == "parquet, paths":
            audio = [{"bytes": None, "path": str(file)} for file in files]
        columns = {"id": [line["id"] for line in shard], "audio": pa.array(audio, type=kind)}
        columns |= {name: [line[name] for line in shard] for name in ("text", "lang")}
        if durations:
            columns["duration"] = [line["duration"] for line in shard]
        table = pa.table(columns)
        if form.startswith("parquet"):
            pq.write_table(table, path / f"train-0000{i}-of-00002.parquet", row_group_size=2)
            continue
        opener = pa.ipc.new_file if form == "arrow file" else pa.ipc.new_stream
        with pa.OSFile(str(path / f"data-0000{i}-of-00002.arrow"), "wb") as file, opener(file, table.schema) as writer:
            writer.write_table(table, max_chunksize=2)
    if form == "arrow":
        files = [{"filename": f"data-0000{i}-of-00002.arrow"} for i in range(2)]
        (path / "state.json").write_text(json.dumps({"_data_files": files}))
        return SourceConfig(str(path))
    return SourceConfig(str(path / f"*.{form.split()[0].strip(',')}"))


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
