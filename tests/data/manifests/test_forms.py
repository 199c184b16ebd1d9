"""Forms that other programs write: the same utterances as in NeMo lines, indexed and as streams, and their bad rows."""

import glob
import json
import logging
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from speechllm.cli.main import main
from speechllm.data import DataError, ManifestError, SourceConfig, read_manifest
from speechllm.data.audio import load_samples
from speechllm.data.index import open_index
from speechllm.data.manifests import row_groups
from speechllm.data.manifests.lines import expand_braces
from speechllm.data.manifests.manifest import describe, describe_cut, is_plain, iter_objects, manifest_files, to_cut
from speechllm.scoring.reading import read_lines
from speechllm.transcribe.inputs import Inputs
from tests.data.conftest import write_manifest
from tests.data.corpora import (
    FORMS,
    IN_ROWS,
    streamed,
    true_cuts,
    write_corpus,
    write_form,
    write_kind,
    write_rows,
    write_tar,
)


def facts(cut):
    """What is to be alike in all forms."""
    entry = describe_cut(cut)
    return entry.id.rpartition("/")[2], round(entry.duration, 3), entry.text, entry.lang, entry.task


def facts_of(lines):
    return [(line["id"], line["duration"], line["text"].strip(), "en", "asr") for line in lines]


@pytest.fixture
def lines(tmp_path):
    return write_corpus(tmp_path)


@pytest.mark.parametrize("form", FORMS)
def test_the_utterances_are_those_of_the_nemo_manifest(form, lines, tmp_path):
    source, true = write_form(form, tmp_path, lines), true_cuts(tmp_path, lines)
    index = open_index(source, folder=tmp_path / "index")
    in_order = [index.cut(i) for i in range(len(index))]
    cuts, errors = streamed(source)
    assert not is_plain(source) and not errors and index.bad_lines.count == 0
    for found in (list(read_manifest(source)), in_order, sorted(cuts, key=lambda cut: cut.id)):
        assert [facts(cut) for cut in found] == facts_of(lines)
        for cut, expected in zip(found, true, strict=True):
            assert np.array_equal(load_samples(cut), load_samples(expected))
    assert index.durations == pytest.approx([line["duration"] for line in lines], abs=1e-3)
    for _, obj in iter_objects(source):  # what is written beside the index is complete
        stored = json.loads(json.dumps(obj))
        assert describe(stored, source) == describe_cut(to_cut(stored, source))


@pytest.mark.parametrize("form", FORMS)
def test_audio_is_read_once_for_its_length(form, lines, tmp_path, monkeypatch):
    source = write_form(form, tmp_path, lines)
    open_index(source, folder=tmp_path / "index")
    monkeypatch.setattr("speechllm.data.manifests.headers.open_audio", None)
    index = open_index(source, folder=tmp_path / "index")
    assert len([describe_cut(index.cut(i)) for i in range(len(index))]) == len(lines)


@pytest.mark.parametrize("form", IN_ROWS)
def test_rows_with_durations_leave_the_audio_unread(form, lines, tmp_path, monkeypatch):
    source = write_rows(form, tmp_path / "rows", tmp_path, lines, durations=True)
    monkeypatch.setattr("speechllm.data.manifests.headers.open_audio", None)
    cuts = list(read_manifest(source))
    assert [facts(cut) for cut in cuts] == facts_of(lines)
    for cut, expected in zip(cuts, true_cuts(tmp_path, lines), strict=True):
        assert np.array_equal(load_samples(cut), load_samples(expected))


@pytest.mark.parametrize("form", IN_ROWS)
def test_a_row_that_says_no_duration_among_others_that_do(form, lines, tmp_path):
    said = [line | {"duration": None if i % 2 else line["duration"]} for i, line in enumerate(lines)]
    source = write_rows(form, tmp_path / "rows", tmp_path, said, durations=True)
    for cuts in (list(read_manifest(source)), sorted(streamed(source)[0], key=lambda cut: cut.id)):
        assert [facts(cut) for cut in cuts] == facts_of(lines)


def test_rows_of_parquet_in_any_order(tmp_path):
    """Groups of more rows than are read at once, and fewer groups open than there are."""
    audio = [{"bytes": f"audio {i}".encode(), "path": None} for i in range(60)]
    path = str(tmp_path / "a.parquet")
    pq.write_table(pa.table({"audio": audio}), path, row_group_size=11)
    for i in [*range(60), *np.random.default_rng(0).permutation(60).tolist(), 59, 58, 57]:
        assert row_groups.read_row(path, i // 11, i % 11, "audio") == audio[i]["bytes"]
    with pytest.raises(OSError, match="has no row 11 in row group 0"):
        row_groups.read_row(path, 0, 11, "audio")


@pytest.mark.parametrize("form", FORMS)
def test_a_row_whose_audio_is_missing_is_named(form, lines, tmp_path):
    (tmp_path / lines[4]["audio_filepath"]).write_bytes(b"no audio")
    source = write_form(form, tmp_path, lines)
    index = open_index(source, folder=tmp_path / "index")
    assert len(index) == 6 and index.bad_lines.count == 1
    number = {
        "LJSpeech": ":5",
        "WeNet": ":5",
        "FunASR": ":5",
        "csv": ":6",
        "Common Voice": ":6",
        "WeNet shards": ":u4",
        "WebDataset": ":a.b/u4",
    }.get(form, ":row 2")
    assert f"{number}: unreadable audio" in index.bad_lines.messages[0]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.tsv", "path\tsentence\nx.mp3\n", "a.tsv:2: 1 columns, and the header has 2"),
        ("a.tsv", "path\tsentence\nx.mp3\tfoo\n", "a.tsv:2: missing file: .*x.mp3"),
        ("a.tsv", b"path\tsentence\nx.mp3\tf\xff\n", "a.tsv:2: not UTF-8"),
        ("a.tsv", "path\tsentence\n\tfoo\n", "a.tsv:2: path: expected a path"),
        ("a.csv", "path,text,duration\nx.mp3,foo,long\n", "a.csv:2: duration: expected seconds, found 'long'"),
        ("a.jsonl", '{"wav": "x", "txt": "y"}\n{"wav": "x"}\n', "a.jsonl:1: missing file"),
        ("a.jsonl", '{"wav": 5, "txt": "y"}\n', "a.jsonl:1: wav: expected a path, found 5"),
        ("a.tsv", "client_id\tsentence\nx\tfoo\n", "a.tsv:1: no column with the audio .* among client_id, sentence"),
        ("a.tsv", "path\tname\nx\tfoo\n", "a.tsv:1: no column with the text is known .*text_field: NAME .*path, name"),
        ("a.tsv", "path\tsentence\ttranscript\n", "a.tsv:1: the text may be sentence or transcript; say which"),
        ("a.tsv", "path\tsentence\n".encode("utf-16"), "a.tsv: UTF-16 text"),
        ("a.parquet", b"PAR1" + b"\x15" * 50, "a.parquet: cannot be read to its end"),
        ("a.arrow", b"\x15" * 50, "a.arrow: cannot be read to its end"),
    ],
)
def test_what_is_wrong_is_said_with_its_place(name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ManifestError, match=message):
        open_index(SourceConfig(str(tmp_path / name)), folder=tmp_path / "index")


AUDIO = "wav/speaker0/u.2.wav"
PART = {"type": "audio", "audio": AUDIO}
LINKED = {"type": "audio_url", "audio_url": {"url": f"file://{AUDIO}"}}
ASKED = {"role": "user", "content": "<audio>What is said?"}
ANSWER = {"role": "assistant", "content": "number 2"}
MESSAGES = {
    "Qwen-Audio": {"messages": [{"role": "user", "content": [PART, {"type": "text", "text": "Say"}]}, ANSWER]},
    "tags": {
        "conversations": [
            {"from": "user", "value": f"1: <audio>{AUDIO}</audio>\n?"},
            {"from": "gpt", "value": "number 2"},
        ]
    },
    "ms-swift": {"messages": [{"role": "system", "content": "Help."}, ASKED, ANSWER], "audios": [AUDIO]},
    "LLaMA-Factory": {"messages": [ANSWER | {"content": "number 2"}, ASKED][::-1], "audios": AUDIO},
    "FunASR": {"messages": [{"role": "user", "content": f"写：<|startofspeech|>!{AUDIO}<|endofspeech|>"}, ANSWER]},
    "NeMo": {
        "conversations": [
            {"from": "User", "value": AUDIO, "type": "audio"},
            {"from": "Assistant", "value": "number 2", "type": "text"},
        ]
    },
    "a URL": {"messages": [{"role": "user", "content": [LINKED]}, ANSWER]},
}


@pytest.mark.parametrize("name", MESSAGES)
@pytest.mark.parametrize("task", ["asr", "ast"])
def test_messages_are_a_line_with_their_audio_and_answer(name, task, lines, tmp_path):
    path = write_manifest(tmp_path / "chat.jsonl", [MESSAGES[name] | {"id": "a"}, MESSAGES[name]])
    source = SourceConfig(str(path), task=task, lang="en", target_lang="de" if task == "ast" else None)
    index = open_index(source, folder=tmp_path / "index")
    cuts = [index.cut(i) for i in range(len(index))]
    assert [cut.id for cut in cuts] == ["a", AUDIO.removesuffix(".wav")]
    entry = describe_cut(cuts[0])
    assert (entry.task, entry.target, entry.text) == (task, "number 2", "number 2" if task == "asr" else "")
    assert np.array_equal(load_samples(cuts[0]), load_samples(true_cuts(tmp_path, lines)[2]))
    assert entry.duration == pytest.approx(0.5) and not streamed(source)[1]


@pytest.mark.parametrize(
    ("obj", "settings", "message"),
    [
        ({"messages": [ASKED, ANSWER], "audios": [AUDIO]}, {}, "the answer may be anything; .* task: asr"),
        ({"messages": [ASKED, ANSWER]}, {"task": "asr"}, "0 audio files and 1 answers"),
        ({"messages": [ASKED, ANSWER] * 2, "audios": [AUDIO] * 2}, {"task": "asr"}, "2 audio files and 2 answers"),
        ({"messages": [ASKED | {"role": "tool"}, ANSWER]}, {"task": "asr"}, "the role 'tool' is none of user, "),
        (
            {"messages": [ASKED | {"content": [{"type": "image"}]}]},
            {"task": "asr"},
            "a part of type 'image' is not used",
        ),
        (
            {"messages": [ASKED | {"content": [{"type": "input_audio", "input_audio": {"data": "UklGR"}}]}]},
            {"task": "asr"},
            "input_audio: expected a path; audio in the line itself",
        ),
        ({"messages": "hello"}, {"task": "asr"}, "messages: expected a list of messages"),
    ],
)
def test_messages_that_are_no_transcript_for_certain_are_refused(obj, settings, message, tmp_path):
    path = write_manifest(tmp_path / "chat.jsonl", [obj])
    with pytest.raises(ManifestError, match=f"chat.jsonl:1: .*{message}"):
        open_index(SourceConfig(str(path), **settings), folder=tmp_path / "index")


@pytest.mark.parametrize("form", FORMS)
def test_the_commands_take_all_forms(form, lines, tmp_path, capsys):
    source = write_form(form, tmp_path, [line for line in lines if line["text"]])
    options = ["--lang", "en"] if form in ("LJSpeech", "WeNet shards") else []
    shar = str(tmp_path / "shar")
    for command in (["check", source.path, "--audio", "full"], ["convert", source.path, shar, "--to", "shar"]):
        with pytest.raises(SystemExit) as caught:
            main(["data", *command, *options])
        assert caught.value.code == 0
    assert "problems: 0" in capsys.readouterr().out
    converted = list(read_manifest(tmp_path / "shar"))
    assert [facts(cut) for cut in converted] == facts_of(lines[1:])
    for cut, true in zip(converted, true_cuts(tmp_path, lines)[1:], strict=True):
        assert np.array_equal(load_samples(cut), load_samples(true))
    if form != "csv":  # a folder with audio, in which that is looked for
        found = list(Inputs(sorted(path for part in expand_braces(source.path) for path in glob.glob(part))))
        assert [input.text for input in found] == [line["text"].strip() for line in lines[1:]]


def test_a_folder_of_several_sets_is_refused(lines, tmp_path):
    """What is in a folder may be test data, too."""
    rows = tmp_path / "rows"
    write_rows("parquet", rows, tmp_path, lines)
    (rows / "test-00000-of-00001.parquet").write_bytes((rows / "train-00000-of-00002.parquet").read_bytes())
    with pytest.raises(ManifestError, match=r"rows: holds 2 sets; .*rows/test-\*.parquet, .*rows/train-\*.parquet"):
        read_manifest(rows)
    assert len(list(read_manifest(rows / "train-*.parquet"))) == 7
    (tmp_path / "dict").mkdir()
    (tmp_path / "dict/dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    with pytest.raises(ManifestError, match="dict: a directory with several sets; .*dict/train, .*dict/test"):
        read_manifest(tmp_path / "dict")


def test_durations_of_common_voice_are_used(lines, tmp_path, monkeypatch):
    source = write_form("Common Voice", tmp_path, lines)
    clips = "".join(f"{line['id']}.wav\t{round(1000 * line['duration'])}\n" for line in lines)
    (tmp_path / "clip_durations.tsv").write_text("clip\tduration[ms]\n" + clips)
    monkeypatch.setattr("speechllm.data.manifests.headers.open_audio", None)
    assert [facts(cut) for cut in read_manifest(source)] == facts_of(lines)


@pytest.mark.parametrize(
    ("row", "settings", "said"),
    [
        ({"sentence": "one"}, {}, ("one", "asr", None)),
        ({"text": "one", "sentence": "two"}, {}, ("one", "asr", None)),
        ({"text": "one", "normalized_text": "two"}, {"text_field": "normalized_text"}, ("two", "asr", None)),
        ({"text": {"en": "one", "de": "eins"}}, {"text_field": "text.de"}, ("eins", "asr", None)),
        ({"sentence": "one", "translation": "eins", "task": "ast", "target_lang": "de"}, {}, ("eins", "ast", "de")),
        ({"text": "one", "locale": "fr"}, {"lang": "en"}, ("one", "asr", None)),
        ({"text": "one", "language": 7, "speaker": 12, "translation": {"de": "x"}}, {}, ("one", "asr", None)),
        ({"text": "one", "speech": "fr"}, {"lang_field": "speech", "lang": "en"}, ("one", "asr", None)),
    ],
)
def test_columns_mean_what_their_names_say(row, settings, said, lines, tmp_path):
    row = {"audio": str(tmp_path / lines[2]["audio_filepath"])} | row
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "a.parquet")
    (cut,) = read_manifest(SourceConfig(str(tmp_path / "a.parquet"), **settings))
    entry = describe_cut(cut)
    assert (entry.target, entry.task, entry.target_lang) == said
    assert entry.lang == ("fr" if "locale" in row or "speech" in row else settings.get("lang"))


def test_large_row_groups_are_warned_of(lines, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("speechllm.data.manifests.parquet._LARGE_GROUP_BYTES", 100)
    source = write_form("parquet", tmp_path, lines)
    assert len(streamed(source)[0]) == 7 and not [
        r for r in caplog.records if r.levelno >= logging.WARNING
    ]  # that is the advice
    list(read_manifest(source))
    assert "has row groups of 0 MB" in caplog.text and "row_group_size=100" in caplog.text


def test_without_pyarrow_it_says_what_to_install(lines, tmp_path, monkeypatch):
    source = write_form("parquet", tmp_path, lines)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(DataError, match=r"parquet: .* need pyarrow: pip install 'speechllm\[parquet\]'"):
        open_index(source, folder=tmp_path / "index")


def test_a_compressed_arrow_file_is_refused(lines, tmp_path):
    audio = [{"bytes": b"a" * 10000, "path": "a.wav"}]
    table = pa.table({"audio": audio, "text": ["x"]})
    options = pa.ipc.IpcWriteOptions(compression="zstd")
    with (
        pa.OSFile(str(tmp_path / "a.arrow"), "wb") as file,
        pa.ipc.new_stream(file, table.schema, options=options) as out,
    ):
        out.write_table(table)
    with pytest.raises(ManifestError, match="a.arrow: is compressed; write it without compression"):
        open_index(SourceConfig(str(tmp_path / "a.arrow")), folder=tmp_path / "index")


@pytest.mark.parametrize("name", ["a.arrow", "a.parquet"])
def test_a_row_without_audio_is_named_as_such(name, lines, tmp_path):
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    audio = [{"bytes": (tmp_path / lines[2]["audio_filepath"]).read_bytes(), "path": None}, None]
    table = pa.table({"audio": pa.array(audio, type=kind), "text": ["one", "two"]})
    if name == "a.parquet":
        pq.write_table(table, tmp_path / name)
    else:
        with pa.ipc.new_stream(str(tmp_path / name), table.schema) as file:
            file.write_table(table)
    good, bad = (found for _, found in iter_objects(SourceConfig(str(tmp_path / name))))
    assert good["text"] == "one" and str(bad) == f"{tmp_path / name}:row 2: audio: neither audio nor a path"


def test_files_that_rows_name_are_found_whether_their_length_is_said_or_not(lines, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows").mkdir()
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    row = {"audio": {"bytes": None, "path": lines[2]["audio_filepath"]}, "text": "one"}
    for name, more in (("a", {}), ("b", {"duration": lines[2]["duration"]})):
        schema = pa.Table.from_pylist([row | more]).schema.set(0, pa.field("audio", kind))
        pq.write_table(pa.Table.from_pylist([row | more], schema=schema), tmp_path / f"rows/{name}.parquet")
        (cut,) = read_manifest(tmp_path / f"rows/{name}.parquet")
        assert np.array_equal(load_samples(cut), load_samples(true_cuts(tmp_path, lines)[2]))


def test_texts_of_rows_are_references_for_scores(lines, tmp_path):
    write_form("parquet", tmp_path, lines)
    (path, *_) = sorted((tmp_path / "parquet").iterdir())
    assert {id: line.text for id, line in read_lines(path).items()} == {
        line["id"]: line["text"].strip() for line in lines[:3]
    }


def test_kaldi_texts_of_funasr(lines, tmp_path):
    source = write_kind("kaldi", tmp_path, lines)
    (tmp_path / "kaldi/text").rename(tmp_path / "kaldi/text.txt")
    assert tmp_path / "kaldi/text.txt" in manifest_files(source)
    assert [facts(cut) for cut in read_manifest(source)] == facts_of(lines)


def test_what_is_wrong_in_a_tar_file_is_said_with_its_place(lines, tmp_path):
    audio = (tmp_path / lines[2]["audio_filepath"]).read_bytes()
    members = {"a.1.wav": audio, "a.1.txt": b"one", "a.2.txt": b"two", "a.3.wav": audio, "a.4.wav": audio}
    path = write_tar(tmp_path / "a.tar", members | {"a.4.json": b"{"})
    assert [str(found) for _, found in iter_objects(SourceConfig(str(path))) if isinstance(found, ManifestError)] == [
        f"{path}:a.2: no audio (wav, flac, mp3, ogg, opus, m4a, aac, wma, amr, webm) among txt",
        f"{path}:a.3: no text (txt, json) among wav",
        f"{path}:a.4: invalid JSON: Expecting property name enclosed in double quotes: line 1 column 2 (char 1)",
    ]
    (tmp_path / "data.list").write_text("no.tar\n")
    with pytest.raises(ManifestError, match="data.list:1: no such tar file: .*no.tar"):
        read_manifest(tmp_path / "data.list")
