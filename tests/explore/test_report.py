"""The data of a page is what was scored; audio is linked or copied as a browser needs it."""

import base64
import json
import random

import numpy as np
import pytest
import soundfile

from speechllm.decode.result import Hypothesis, Recognition, Word
from speechllm.errors import UserError
from speechllm.explore.report import ExploreOptions, write_report
from speechllm.scoring import Transcript, recogs_text, score
from speechllm.scoring.command import score_files
from speechllm.transcribe.formats import Recording, Segment, format_json

REF, HYP = 0, 1


def results(count, seed=0):
    rng = random.Random(seed)
    text = lambda: " ".join(rng.choices(["one", "two", "<b>three</b>", "vier", "\u4e94"], k=rng.randrange(1, 6)))  # noqa: E731
    return [Transcript(f"utt-{i}", text(), text(), rng.choice(["en", "de"]), f"s{i % 3}", 1 + i) for i in range(count)]


def write_recogs(path, found):
    path.parent.mkdir(exist_ok=True)
    path.write_text(recogs_text(found), encoding="utf-8")
    return path


def write_manifest(path, found, seconds=1.0, suffix="wav"):
    lines = []
    for i, result in enumerate(found):
        samples = 0.1 * np.sin(np.arange(int(16000 * seconds)) * (i + 1) / 20, dtype=np.float32)
        soundfile.write(path.parent / f"{result.id}.{suffix}", samples, 16000, format="WAV")
        line = {"id": result.id, "audio_filepath": f"{result.id}.{suffix}", "duration": seconds, "text": result.ref}
        lines.append(line | {"lang": result.language, "speaker": result.speaker})
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return path


def page_data(folder):
    text = (folder / "data.js").read_text(encoding="utf-8")
    return json.loads(json.loads(text.removeprefix("globalThis.REPORT = JSON.parse(").removesuffix(");\n")))


def sides(pairs, joined=" "):
    both = [pair if isinstance(pair, list) else [pair, pair] for pair in pairs]
    return tuple(joined.join(pair[side] for pair in both if pair[side] is not None) for side in (REF, HYP))


@pytest.mark.parametrize("unit", ["word", "char"])
def test_page_holds_what_was_scored(tmp_path, unit):
    found = results(30)
    recogs = write_recogs(tmp_path / "exp" / "recogs-test-avg-5.txt", found)
    manifest = write_manifest(tmp_path / "m.jsonl", found)
    said = write_report([recogs], tmp_path / "page", ExploreOptions([manifest], unit=unit, audio="none"))
    data = page_data(tmp_path / "page")
    split = list if unit == "char" else str.split
    total = score(found, lambda text: split(text.replace(" ", "") if unit == "char" else text))
    assert data["totals"] == [str(total)]
    assert str(total) in said
    for result, shown in zip(found, data["utterances"], strict=True):
        assert (shown["id"], shown["language"], shown["speaker"]) == (result.id, result.language, result.speaker)
        expected = [text if unit == "word" else text.replace(" ", "") for text in (result.ref, result.hyp)]
        assert list(sides(shown["systems"][0]["pairs"], data["joined"])) == expected
        assert sum(shown["systems"][0]["errors"]) == sum(
            isinstance(pair, list) for pair in shown["systems"][0]["pairs"]
        )
    assert {name: [g["name"] for g in groups] for name, groups in data["groups"].items()} == {
        "set": ["test-avg-5", "all"],
        "language": ["de", "en"],
        "speaker": ["s0", "s1", "s2"],
        "duration": ["0-2 s"],
    }
    assert sorted(i for group in data["groups"]["speaker"] for i in group["members"]) == list(range(30))


def test_folders_hold_sets_and_a_second_system_is_compared_as_by_score(tmp_path):
    first, second = results(20), [Transcript(r.id, r.ref, r.ref) for r in results(20)]
    for name, found in (("a", first), ("b", second)):
        write_recogs(tmp_path / name / "recogs-x.txt", found[:10])
        write_recogs(tmp_path / name / "recogs-y.txt", found[10:])
        write_recogs(tmp_path / "all" / f"{name}.txt", found)
    options = ExploreOptions(compare_with=[tmp_path / "b"])
    write_report([tmp_path / "a"], tmp_path / "page", options)
    data = page_data(tmp_path / "page")
    assert [u["set"] for u in data["utterances"]] == ["x"] * 10 + ["y"] * 10
    assert data["systems"] == ["a", "b"]
    scored = score_files(tmp_path / "all" / "a.txt", compare_with=tmp_path / "all" / "b.txt").split("\n\n")[-1]
    paths = str(tmp_path / "all" / "a.txt"), str(tmp_path / "all" / "b.txt")
    assert data["comparison"] == scored.replace(paths[0], "a").replace(paths[1], "b")


def test_confidences_words_and_alternatives_of_transcribe(tmp_path):
    (result,) = results(1)
    manifest = write_manifest(tmp_path / "m.jsonl", [result])
    nbest = (Hypothesis((1,), (-0.1,), -0.1, "end"), Hypothesis((2,), (-0.7,), -0.7, "end"))
    words = (Word("one", 0.1, 0.3, 0.9),)
    found = Recognition("one", nbest, ("one", "two"), words=words, fallback="ctc")
    recording = Recording(result.id, str(tmp_path / f"{result.id}.wav"), 1.0, [Segment(0.0, 1.0, found)], ["clipped"])
    json_file = tmp_path / "results.jsonl"
    json_file.write_text(format_json(recording))
    write_report([json_file], tmp_path / "page", ExploreOptions([manifest]))
    (shown,) = page_data(tmp_path / "page")["utterances"]
    (system,) = shown["systems"]
    assert system["confidence"] == pytest.approx(np.exp(-0.1), abs=1e-4)
    assert system["words"] == [["one", 0.1, 0.3, 0.9]]
    assert [[text for text, _ in hypotheses] for hypotheses in system["nbest"]] == [["one", "two"]]
    assert system["notes"] == ["ctc", "clipped"]
    write_report([json_file], tmp_path / "alone", ExploreOptions())  # its audio is known, no reference
    data = page_data(tmp_path / "alone")
    assert data["systems"] == [] and data["utterances"][0]["audio"]["src"] == f"../{result.id}.wav"


def test_clips_link_what_browsers_play_and_copy_the_rest(tmp_path, caplog):
    playable, other = results(3)[:2], results(3)[2:]
    manifest = write_manifest(tmp_path / "m.jsonl", playable)
    sphere = write_manifest(tmp_path / "n.jsonl", other, suffix="sph")
    with manifest.open("a") as file:
        part = {"id": "part", "audio_filepath": "utt-0.wav", "offset": 0.25, "duration": 0.5, "text": "part"}
        missing = {"id": "missing", "audio_filepath": "missing.wav", "duration": 1.0, "text": "gone"}
        file.write(f"{json.dumps(part)}\n{json.dumps(missing)}\n")
    said = write_report([manifest, sphere], tmp_path / "deep" / "page", ExploreOptions())
    assert said == "5 utterances, 4 with audio"
    assert "missing.wav" in caplog.text
    shown = {u["id"]: u.get("audio") for u in page_data(tmp_path / "deep" / "page")["utterances"]}
    assert shown["utt-1"]["src"] == "../../utt-1.wav"
    assert (shown["part"]["start"], shown["part"]["end"]) == (0.25, 0.75)
    assert shown["missing"] is None
    copied = tmp_path / "deep" / "page" / shown["utt-2"]["src"]
    assert copied.suffix == ".flac" and soundfile.info(copied).frames == 16000
    peaks = np.frombuffer(base64.b64decode(shown["utt-0"]["peaks"]), np.uint8)
    assert len(peaks) == 400 and peaks.max() == 255 and peaks.min() > 0
    write_report([manifest], tmp_path / "copies", ExploreOptions(audio="copy"))
    copies = [u["audio"] for u in page_data(tmp_path / "copies")["utterances"] if "audio" in u]
    assert [clip["src"] for clip in copies] == ["audio/0.flac", "audio/1.flac", "audio/2.flac"]
    assert soundfile.info(tmp_path / "copies" / "audio" / "2.flac").frames == 8000


def test_what_does_not_go_together_is_an_error(tmp_path):
    found = results(4)
    recogs = write_recogs(tmp_path / "exp" / "recogs-x.txt", found)
    manifest = write_manifest(tmp_path / "m.jsonl", found)
    page = tmp_path / "page"
    with pytest.raises(UserError, match="2 files for 1 of results"):
        write_report([recogs], page, ExploreOptions(compare_with=[recogs, recogs]))
    with pytest.raises(UserError, match="say what it is of: --manifest"):
        write_report([recogs, manifest], page, ExploreOptions())
    with pytest.raises(UserError, match="nothing to compare"):
        write_report([manifest], page, ExploreOptions(compare_with=[manifest]))
    with pytest.raises(UserError, match="does not have 1 of the 4"):
        write_manifest(manifest, found[:3])
        write_report([recogs], page, ExploreOptions([manifest]))
    assert not page.exists()
