"""`speechllm score` on files: all kinds are read alike, and what does not fit is an error."""

import json
import random

import pytest

from speechllm.errors import UserError
from speechllm.scoring import Transcript, recogs_text
from speechllm.scoring.command import score_files
from speechllm.scoring.reading import Line, matched, read_lines

RESULTS = [
    Transcript("b:1", 'it\'s a "quoted" word', "its a word", "en", "s1", 3.0),
    Transcript("a", "\u6211\u5011 ok", "\u6211\u5011", "zh", "s2", 1.0),
    Transcript("c", "don't \\ [x]", "", "en", "s2", 40.0),
]


def write(path, lines):
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def total_row(text):
    return next(line.split() for line in text.splitlines() if line.startswith("all "))


@pytest.fixture
def files(tmp_path):
    """The same results in each kind of file."""
    nemo = [
        {"id": r.id, "audio_filepath": f"{r.id}.wav", "text": r.ref, "pred_text": r.hyp}
        | {"lang": r.language, "speaker": r.speaker, "duration": r.duration}
        for r in RESULTS
    ]
    recogs = tmp_path / "recogs-test.txt"
    recogs.write_text(recogs_text(RESULTS), encoding="utf-8")
    return {
        "nemo": write(tmp_path / "m.jsonl", map(json.dumps, nemo)),
        "recogs": recogs,
        "kaldi_ref": write(tmp_path / "text", (f"{r.id} {r.ref}" for r in RESULTS)),
        "kaldi_hyp": write(tmp_path / "hyp", (f"{r.id} {r.hyp}" for r in reversed(RESULTS))),
        "json_ref": write(tmp_path / "ref.jsonl", (json.dumps({"id": r.id, "text": r.ref}) for r in RESULTS)),
        "json_hyp": write(tmp_path / "hyp.jsonl", (json.dumps({"id": r.id, "pred_text": r.hyp}) for r in RESULTS)),
    }


def test_recogs_come_back_exactly(tmp_path):
    rng = random.Random(0)
    strange = "ab'\"\\[],:=\u00e9\u4f60\U0001f600\u200b\x00"
    text = lambda: " ".join("".join(rng.choices(strange, k=rng.randrange(1, 5))) for _ in range(rng.randrange(5)))  # noqa: E731
    written = [Transcript(f"{i}:x={i}", text(), text()) for i in range(200)]
    path = tmp_path / "recogs-x.txt"
    path.write_text(recogs_text(written), encoding="utf-8")
    read = [Transcript(line.id, line.text, line.predicted) for line in read_lines(path).values()]
    assert read == written


@pytest.mark.parametrize("unit", ["word", "char", "mixed"])
def test_all_kinds_give_the_same(files, unit):
    pairs = [("recogs",), ("kaldi_ref", "kaldi_hyp"), ("json_ref", "json_hyp"), ("nemo", "recogs")]
    # all but the bounds, which are by speaker where speakers are known
    totals = {tuple(total_row(score_files(*(files[name] for name in pair), unit=unit))[:-2]) for pair in pairs}
    ((_, utterances, *_),) = totals
    assert utterances == "3"


@pytest.mark.parametrize(
    "by, groups",
    [
        ("language", ["en", "zh"]),
        ("speaker", ["s1", "s2"]),
        ("duration", ["0-2", "2-5", "30+"]),
    ],
)
def test_groups_come_from_the_references_or_a_manifest(files, by, groups):
    own = score_files(files["nemo"], by=by)
    assert [line.split()[0] for line in own.splitlines()] == [by, *groups, "all", "95%:"]
    assert score_files(files["recogs"], by=by, manifest=files["nemo"]) == own
    with pytest.raises(UserError, match=f"no {by} .* --manifest"):
        score_files(files["recogs"], by=by)


def test_paths_stand_in_for_ids_as_in_decoding(tmp_path):
    line = {"audio_filepath": "audio/x.wav", "duration": 2.0, "text": "a b"}
    ref = write(tmp_path / "ref.jsonl", [json.dumps(line), json.dumps(line | {"offset": 3.5})])
    assert list(read_lines(ref)) == ["audio/x", "audio/x@3.5"]
    hyp = write(tmp_path / "hyp.jsonl", [json.dumps({"audio_filepath": "audio/x.wav", "pred_text": "a"})])
    assert read_lines(hyp)["audio/x"].duration is None


def test_translations_are_scored_against_the_translation(tmp_path):
    line = {"id": "a", "text": "yes", "ast_text": "ja", "task": "ast", "lang": "en", "target_lang": "de"}
    (found,) = read_lines(write(tmp_path / "m.jsonl", [json.dumps(line)])).values()
    assert (found.text, found.language) == ("ja", "en>de")


def test_normalized_alike(tmp_path):
    ref, hyp = write(tmp_path / "ref", ["a Hello, you"]), write(tmp_path / "hyp", ["a hello you!"])
    row = total_row(score_files(ref, hyp, text_steps=["lowercase", "remove_punctuation"]))
    assert row[3] == "0.00%"
    with pytest.raises(UserError, match="lowercase"):
        score_files(ref, hyp, text_steps=["lowrcase"])


def test_ids_that_do_not_match_are_listed(tmp_path):
    ref = write(tmp_path / "ref", [f"u{i} one two" for i in range(8)])
    hyp = write(tmp_path / "hyp", ["u0 one two", "other x"])
    with pytest.raises(UserError) as caught:
        score_files(ref, hyp)
    assert "no hypothesis for 7 of the 8" in str(caught.value)
    assert "u1, u2, u3, u4, u5 and 2 more" in str(caught.value)
    assert "1 utterances that" in str(caught.value) and "other" in str(caught.value)
    with pytest.raises(UserError, match="other"):
        score_files(ref, hyp, missing_as_empty=True)
    hyp = write(tmp_path / "hyp", ["u0 one two"])
    assert total_row(score_files(ref, hyp, missing_as_empty=True))[3] == "87.50%"
    with pytest.raises(UserError, match="references only"):
        score_files(ref)
    with pytest.raises(UserError, match="holds no utterances"):
        score_files(write(tmp_path / "empty", []), hyp)


def test_a_line_without_prediction_is_not_its_own_reference(tmp_path):
    lines = [{"id": "a", "text": "x", "pred_text": "x"}, {"id": "b", "text": "y"}]
    with pytest.raises(UserError, match="no hypothesis for 1 of the 2 .*: b"):
        score_files(write(tmp_path / "m.jsonl", map(json.dumps, lines)))


@pytest.mark.parametrize(
    "name, lines, message",
    [
        ("m.jsonl", ['{"id": "a", "text": null, "pred_text": "x"}'], r"1 utterances without a reference: a"),
        ("m.jsonl", ['{"id": "a", "text": "x"}', '{"id": "a", "text": "y"}'], r"m.jsonl:2: the id a .* second time"),
        ("m.jsonl", ['{"id": "a", "text": "x"}', "{"], r"m.jsonl:2: invalid JSON"),
        ("m.jsonl", ['{"id": "a", "text": 3}'], r"m.jsonl:1: text: expected a string"),
        ("m.jsonl", ['{"text": "x"}'], r"m.jsonl:1: neither an id nor"),
        ("recogs", ["a:\tref=['x']", "a:\thyp=['x'"], r"recogs:2: expected ID"),
        ("recogs", ["a:\tref=['x']", "a:\thyp=[3]"], r"recogs:2: expected ID"),
        ("recogs", ["a:\tref=['x']", "a:\tref=['x']"], r"recogs:2: ref of the id a"),
        ("recogs", ["a:\thyp=['x']"], r"1 utterances without a reference: a"),
    ],
)
def test_bad_lines_are_named(tmp_path, name, lines, message):
    with pytest.raises(UserError, match=message):
        score_files(write(tmp_path / name, lines))


def test_other_encodings_are_named(tmp_path):
    (tmp_path / "text").write_bytes("a z\u00e9ro\n".encode("latin-1"))
    with pytest.raises(UserError, match="text:1: not UTF-8"):
        score_files(tmp_path / "text")
    with pytest.raises(UserError, match="no such manifest file"):
        score_files(tmp_path / "nothing")


def test_two_systems(files, tmp_path):
    words = [f"w{i}" for i in range(20)]
    rng = random.Random(0)
    both = [
        [Transcript(f"u{i}", " ".join(words), " ".join(w for w in words if rng.random() > rate)) for i in range(40)]
        for rate in (0.2, 0.1)
    ]
    for name, results in zip("ab", both, strict=True):
        (tmp_path / f"recogs-{name}").write_text(recogs_text(results))
    text = score_files(tmp_path / "recogs-a", compare_with=tmp_path / "recogs-b")
    p_value = float(text.split("p = ")[1].split()[0])
    assert p_value < 0.01 and "MAPSSWE" in text
    ref = write(tmp_path / "r", ["u0 one"])
    few = score_files(ref, ref, compare_with=write(tmp_path / "h", ["u0 two"]))
    assert "1 segments, too few to tell" in few
    (tmp_path / "recogs-b").write_text((tmp_path / "recogs-b").read_text().replace("ref=['w0'", "ref=['W0'"))
    with pytest.raises(UserError, match="other references .* 40 utterances .*--normalize"):
        score_files(tmp_path / "recogs-a", compare_with=tmp_path / "recogs-b")
    assert "p = " in score_files(tmp_path / "recogs-a", compare_with=tmp_path / "recogs-b", text_steps=["lowercase"])


def test_output_holds_the_files_and_the_table(files, tmp_path):
    folder = tmp_path / "out"
    text = score_files(files["nemo"], files["recogs"], unit="char", by="speaker", output=folder)
    name = "m-test-char.txt"
    assert {p.name for p in folder.iterdir()} == {
        f"{kind}-{name}" for kind in ("recogs", "errs", "wer-summary", "wer-by-speaker")
    }
    assert text.startswith((folder / f"wer-by-speaker-{name}").read_text())
    again = score_files(folder / f"recogs-{name}", unit="char", by="speaker", manifest=files["nemo"])
    assert sorted(again.split()) == sorted(text.split())


def test_manifests_of_all_kinds_say_who_speaks(tmp_path):
    cut = {"id": "a", "start": 0, "duration": 2.0, "channel": 0, "type": "MonoCut"}
    part = {
        "id": "a",
        "recording_id": "a",
        "start": 0,
        "duration": 2.0,
        "text": "hi",
        "language": "en",
        "speaker": "s1",
    }
    cuts = write(tmp_path / "cuts.jsonl", [json.dumps(cut | {"supervisions": [part]})])
    kaldi = tmp_path / "kaldi"
    kaldi.mkdir()
    tables = {"wav.scp": "x.wav", "text": "hi", "utt2spk": "s1", "utt2lang": "en", "utt2dur": "2.0"}
    for name, value in tables.items():
        write(kaldi / name, [f"a {value}"])
    expected = Line("a", "hi", None, "en", "s1", 2.0)
    assert read_lines(cuts) == {"a": expected}
    assert read_lines(kaldi) == {"a": expected}


def test_text_is_normalized_by_the_rules_of_its_language(tmp_path):
    lines = [
        {"id": "1", "text": "IĞDIR", "pred_text": "ığdır", "lang": "tr", "duration": None},
        {"id": "2", "text": "IRIS", "pred_text": "iris", "lang": "Turkish", "target_lang": "en", "task": "ast"},
        {"id": "3", "text": "IRIS", "pred_text": "iris"},
    ]
    path = tmp_path / "m.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    refs = read_lines(path)
    assert [line.language for line in refs.values()] == ["tr", "tr>en", None]
    found = matched(refs, refs, (path, path), ["lowercase"], missing_as_empty=False)
    assert [(result.ref, result.hyp) for result in found] == [("ığdır", "ığdır"), ("iris", "iris"), ("iris", "iris")]
