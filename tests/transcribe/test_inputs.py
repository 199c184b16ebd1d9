"""Files, folders and manifests: what each says of its audio."""

import io
import json
import os
import threading

import pytest

from speechllm.data.audio_file import UtteranceError
from speechllm.data.blocks import read_blocks
from speechllm.data.share import Share
from speechllm.errors import UserError
from speechllm.prompt.request import Request
from speechllm.transcribe.inputs import Inputs
from speechllm.transcribe.output import Output, transcribe_all
from speechllm.transcribe.segments import SegmentOptions
from tests.data.conftest import write_manifest
from tests.transcribe.conftest import Listener


def test_manifests_say_languages_and_tasks(audio, tmp_path, capsys):
    lines = [
        {"audio_filepath": "audio/a.wav", "duration": 1.2, "lang": "de"},
        {"audio_filepath": "audio/a.wav", "duration": 0.6, "offset": 0.6},
        {"audio_filepath": "audio/b.flac", "duration": 0.6, "task": "ast", "target_lang": "fr"},
        {"audio_filepath": "audio/b.flac", "duration": 0.6, "task": "ast"},
        {"audio_filepath": "audio/b.flac", "duration": -1},
    ]
    manifest = write_manifest(tmp_path / "m.jsonl", lines)
    inputs = list(Inputs([manifest], Request(language="en")))
    assert [(i.request.language, i.request.target_language) for i in inputs[:3]] == [
        ("de", None),
        ("en", None),
        ("en", "fr"),
    ]
    listener = Listener()
    assert transcribe_all(Inputs([manifest], Request(language="en")), listener, SegmentOptions(), Output()) == 1
    out, err = capsys.readouterr()
    assert [line.split("\t")[1] for line in out.splitlines()] == ["do re", "re", "mi"]
    assert f"{manifest}:4: to be translated" in err and f"{manifest}:5: duration" in err
    batch = listener.batches[0]
    assert sorted((request.language, str(request.target_language)) for request in batch.requests) == [
        ("de", "None"), ("en", "None"), ("en", "fr"),
    ]  # fmt: skip
    translated = list(Inputs([manifest], Request(language="en", target_language="zh")))
    assert [i.request.target_language for i in translated[:4]] == ["zh", "zh", "fr", "zh"]


def described(inputs):
    """Of each input its id, and its error or whether it has audio."""
    found = []
    for input in inputs:
        try:
            if input.error is not None:
                raise input.error
            found.append((input.id, len(list(input.blocks([]))) > 0))
        except (UserError, UtteranceError) as error:
            found.append((input.id, str(error)))
    return dict(found)


def test_links_are_followed_and_those_that_lead_nowhere_reported(audio, tmp_path, caplog):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/e.wav").write_bytes((audio / "a.wav").read_bytes())
    (audio / "linked").symlink_to(tmp_path / "elsewhere")
    (audio / "link.wav").symlink_to(audio / "a.wav")
    (audio / "gone.wav").symlink_to(tmp_path / "nothing.wav")
    (audio / "gone").symlink_to(tmp_path / "nothing")
    (audio / "deep/loop").symlink_to(audio)
    inputs = Inputs([audio])
    found = described(inputs)
    assert {id for id, what in found.items() if what is True} == {"a", "b", "deep/c", "deep/er/d", "linked/e", "link"}
    for name in ("gone.wav", "gone"):
        assert "a broken link to" in found[str(audio / name)]
    list(inputs)
    assert [record.getMessage() for record in caplog.records] == [
        f"{audio}/deep/loop: links to a folder that it is in; not followed"
    ]


def test_ids_are_paths_in_the_folder_that_several_inputs_have_in_common(audio):
    assert [input.id for input in Inputs([audio / "deep"])] == ["c", "er/d"]
    assert [input.id for input in Inputs([audio / "deep/c.MP3"])] == ["c"]
    assert [input.id for input in Inputs([audio / "deep/er", audio / "a.wav"])] == ["deep/er/d", "a"]
    assert [input.id for input in Inputs([audio / "deep/c.MP3", audio / "deep/er/d.ogg"])] == ["c", "er/d"]


def test_inputs_that_are_none_are_told_by_name(audio, tmp_path):
    (tmp_path / "x.RAW").write_bytes(bytes(3200))
    (tmp_path / "empty").mkdir()
    for name, message in (
        ("https://example.org/a.wav", "a URL"),
        ("s3://bucket/a.wav", "a URL"),
        (str(tmp_path / "x.RAW"), "without a header"),
        (str(tmp_path / "empty"), "no file with a suffix"),
        ("", "an empty name"),
    ):
        (found,) = described(Inputs([name])).values()
        assert message in found and (name in found or not name)


def test_standard_input_and_pipes(audio, tmp_path, monkeypatch):
    data = (audio / "b.flac").read_bytes()
    for given, expected in ((data, True), (b"", "unreadable audio: standard input: no data")):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(given)))
        assert described(Inputs(["-"])) == {"stdin": expected}
    with pytest.raises(UserError, match="given twice"):
        Inputs(["-", "-"])
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=(tmp_path / "pipe").write_bytes, args=(data,))
    writer.start()
    assert described(Inputs([tmp_path / "pipe"])) == {"pipe": True}
    writer.join()


@pytest.mark.parametrize("name", [b"caf\xe9.wav", b"\xff\xfe.flac", b"n" * 251 + b".wav"])
def test_names_of_any_bytes(audio, tmp_path, name):
    folder = tmp_path / "names"
    folder.mkdir()
    (folder / os.fsdecode(name)).write_bytes((audio / "a.wav").read_bytes())
    output = Output("json", tmp_path / "out")
    for _ in range(2):
        assert transcribe_all(Inputs([folder]), Listener(), SegmentOptions(), output) == 0
    (result,) = (tmp_path / "out").glob("*.json")
    record = json.loads(result.read_bytes())
    assert record["text"] == "do re"
    assert record["audio"].encode() == os.fsencode(folder / os.fsdecode(name)).decode(errors="surrogateescape").encode(
        errors="backslashreplace"
    )


def test_a_line_that_cannot_be_recognized_ends_nothing(audio, tmp_path, capsys):
    lines = [{"audio_filepath": str(audio / "a.wav"), "duration": 1.2, "id": str(i)} for i in range(3)]
    lines[1]["lang"] = "en"

    manifest = write_manifest(tmp_path / "m.jsonl", lines)
    assert transcribe_all(Inputs([manifest]), Listener(needs_language=True), SegmentOptions(), Output()) == 1
    out, err = capsys.readouterr()
    assert out == "1\tdo re\n" and "error: 0 has no language" in err and "error: 2 has no language" in err


def test_whatever_a_decoder_raises_ends_nothing(audio, monkeypatch, capsys):
    def read(file, **options):
        if file.endswith("b.flac"):
            raise TypeError("a decoder's\nown mistake")
        return read_blocks(file, **options)

    monkeypatch.setattr("speechllm.transcribe.inputs.read_blocks", read)
    assert transcribe_all(Inputs([audio]), Listener(), SegmentOptions(), Output()) == 1
    assert f"unreadable audio: {audio}/b.flac: TypeError: a decoder's\n" in capsys.readouterr().err


def test_shares_of_all_kinds_of_inputs(audio, tmp_path, monkeypatch):
    """Disjoint, together all; and what is another's is not looked at."""
    lines = [{"audio_filepath": str(audio / f"{i}.wav"), "duration": 1.2, "id": str(i)} for i in range(4)]
    manifest = write_manifest(tmp_path / "m.jsonl", [*lines, {"audio_filepath": "broken", "duration": "long"}])
    paths = [audio, "-", "", manifest, tmp_path / "missing.jsonl", audio / "a.wav"]
    everything = [input.name for input in Inputs(paths)]
    assert len(everything) == len(Inputs(paths)) == 14
    for world_size in (2, 3):
        shares = [Inputs(paths, share=Share(rank, world_size)) for rank in range(world_size)]
        assert [[input.name for input in share] for share in shares] == [
            everything[rank::world_size] for rank in range(world_size)
        ]
        assert [len(share) for share in shares] == [len(everything[rank::world_size]) for rank in range(world_size)]
    looked_at = []
    monkeypatch.setattr("speechllm.transcribe.inputs.to_cut", lambda line, source: looked_at.append(line) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        list(Inputs([manifest], share=Share(3, 5)))
    assert [line["id"] for line in looked_at] == ["3"]
