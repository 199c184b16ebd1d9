"""Files, folders and manifests: what each says of its audio."""

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
    inputs = list(Inputs([manifest], language="en"))
    assert [(i.language, i.target_language) for i in inputs[:3]] == [("de", None), ("en", None), ("en", "fr")]
    listener = Listener()
    assert transcribe_all(Inputs([manifest], language="en"), listener, SegmentOptions(), Output()) == 1
    out, err = capsys.readouterr()
    assert [line.split("\t")[1] for line in out.splitlines()] == ["do re", "re", "mi"]
    assert f"{manifest}:4: to be translated" in err and f"{manifest}:5: duration" in err
    batch = listener.batches[0]
    assert sorted(zip(batch.languages, map(str, batch.target_languages), strict=True)) == [
        ("de", "None"), ("en", "None"), ("en", "fr"),
    ]  # fmt: skip
    translated = list(Inputs([manifest], "en", "zh"))
    assert [i.target_language for i in translated[:4]] == ["zh", "zh", "fr", "zh"]
