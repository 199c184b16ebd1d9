"""Files that are no manifests are named as what they are; compressed ones are read; lines that are to be skipped."""

import bz2
import gzip
import io
import json
import lzma
import zipfile

import pytest
import soundfile

from speechllm.cli.main import main
from speechllm.data import ManifestError, SourceConfig, read_manifest
from speechllm.data.index import open_index
from speechllm.data.manifests.manifest import describe_cut, is_plain, iter_objects
from tests.data.conftest import write_manifest
from tests.data.corpora import KINDS, entries, streamed, write_corpus, write_kind

LINE = {"audio_filepath": "x.wav", "duration": 1.0, "text": "é"}
LINES = "".join(json.dumps(LINE | {"id": str(i)}, ensure_ascii=False) + "\n" for i in range(3))


def zipped() -> bytes:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        archive.writestr("m.jsonl", LINES)
    return data.getvalue()


def audio() -> bytes:
    data = io.BytesIO()
    soundfile.write(data, [0.0] * 100, 16000, format="WAV")
    return data.getvalue()


OTHERS = {
    "m.jsonl.zst": (b"\x28\xb5\x2f\xfd" + b"\0" * 20, "compressed with zstd, .*zstd -d"),
    "m.jsonl.bz2": (bz2.compress(LINES.encode()), "compressed with bzip2"),
    "m.jsonl.xz": (lzma.compress(LINES.encode()), "compressed with xz"),
    "m.jsonl": (bz2.compress(LINES.encode()), "compressed with bzip2"),
    "m.zip": (zipped(), "a zip archive"),
    "utf16.jsonl": (LINES.encode("utf-16"), "UTF-16 text, .*save it as UTF-8"),
    "utf16le.jsonl": (LINES.encode("utf-16-le"), "binary, or UTF-16 text"),
    "array.json": (json.dumps([LINE, LINE]).encode(), "a JSON array, .*one object a line"),
    "pretty.json": (json.dumps([LINE, LINE], indent=2).encode(), "a JSON array"),
    "array.jsonl.gz": (gzip.compress(json.dumps([LINE]).encode()), "a JSON array"),
    "one.json": (json.dumps({"data": [LINE]}, indent=2).encode(), "one JSON document over several lines"),
    "csv.txt": (b"audio_filepath,duration,text\nx.wav,1.0,a\n", r"a table with commas \(CSV\), .*call it .tsv or .csv"),
    "tsv.txt": (b"path\tsentence\nx.mp3\thello, you\n", r"a table with tabs \(TSV\)"),
    "m.tsv": ("path\tsentence\nx.mp3\thello\n".encode("utf-16"), "UTF-16 text"),
    "x.wav": (audio(), "an audio file"),
    "rows": (b"PAR1" + b"\x15" * 50, "a Parquet file"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_a_file_of_another_format_is_named(name, tmp_path, capsys):
    content, what = OTHERS[name]
    (tmp_path / name).write_bytes(content)
    source = SourceConfig(str(tmp_path / name))
    for read in (read_manifest, iter_objects, open_index):
        with pytest.raises(ManifestError, match=f"{name}: {what}"):
            read(source)
    with pytest.raises(SystemExit) as caught:
        main(["data", "check", str(tmp_path / name)])
    assert caught.value.code == 1 and "unreadable manifest" in capsys.readouterr().out


def test_gzip_is_known_by_what_it_begins_with(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_bytes(gzip.compress(b"\xef\xbb\xbf" + LINES.encode()))
    assert not is_plain(SourceConfig(str(path)))
    assert [describe_cut(cut).text for cut in read_manifest(path)] == ["é"] * 3
    index = open_index(SourceConfig(str(path)))
    assert [index.cut(i).id for i in range(len(index))] == ["0", "1", "2"]


@pytest.mark.parametrize("content", ["", "\n\n", LINES + "{", "{\n" + LINES, 'x,y\n{"a": 1}\n'])
def test_a_bad_line_does_not_make_another_format(content, tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_text(content)
    assert read_manifest(path).is_lazy


@pytest.mark.parametrize("kind", sorted(set(KINDS) - {"kaldi"}))
def test_lines_that_are_to_be_skipped_are_left_out(kind, tmp_path):
    lines = write_corpus(tmp_path)
    for i, value in ((1, True), (4, 1), (5, False), (6, 0)):
        lines[i]["_skipme"] = value
    if kind.startswith(("lhotse", "shar")):
        source = write_kind(kind, tmp_path, lines, custom=("_skipme",))
    else:
        source = write_kind(kind, tmp_path, lines)
    used = ["u0", "u2", "u3", "u5", "u6"]
    assert not any(isinstance(found, ManifestError) for _, found in iter_objects(source))
    assert [entry.id for entry in entries(source)] == used
    index = open_index(source)
    assert index.bad_lines.count == 0 and [index.cut(i).id for i in range(len(index))] == used
    cuts, errors = streamed(source)
    assert sorted(cut.id for cut in cuts) == used and not errors


def test_lines_to_be_skipped_and_others_that_have_no_audio_in_their_tar_file(tmp_path):
    lines = write_corpus(tmp_path)
    source = write_kind("tarred", tmp_path, lines)
    with open(tmp_path / "manifest_1.json", "a") as file:
        for line in (LINE | {"_skipme": True}, {"conversations": [{"from": "User"}]}):
            file.write(json.dumps(line) + "\n")
    for errors in ([str(e) for _, e in iter_objects(source) if isinstance(e, ManifestError)], streamed(source)[1]):
        assert len(errors) == 1 and "conversations of several turns" in errors[0]


def test_a_skip_that_says_nothing_is_a_bad_line(tmp_path):
    path = write_manifest(tmp_path / "m.jsonl", [LINE, LINE | {"_skipme": "no"}])
    with pytest.raises(ManifestError, match="m.jsonl:2: _skipme: expected true or false, found 'no'"):
        list(read_manifest(path))
    assert open_index(SourceConfig(str(path))).bad_lines.count == 1
