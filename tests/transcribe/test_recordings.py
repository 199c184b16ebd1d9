"""`speechllm transcribe`, with a recogniser that hears tones: each is a word."""

import argparse
import json
from itertools import pairwise

import numpy as np
import pytest
import soundfile
import torch

from speechllm.decode.result import Hypothesis, Recognition, Word
from speechllm.errors import UserError
from speechllm.transcribe.formats import Recording, Segment
from speechllm.transcribe.recordings import (
    Inputs,
    Output,
    SegmentOptions,
    add_transcribe,
    audio_input,
    prompt_context,
    run_transcribe,
    transcribe_all,
    transcribe_inputs,
    without_overlap,
)
from tests.data.conftest import write_manifest

RATE = 16000
TONES = {"do": 300, "re": 500, "mi": 800, "fa": 1200, "sol": 1800, "la": 2600, "ti": 3600}


def melody(words: list[str], pause: float, rate: int = RATE) -> np.ndarray:
    """(num_samples,): 0.4 s of tone for each word, and a pause after each."""
    time = np.arange(int(0.4 * rate)) / rate
    silence = np.zeros(int(pause * rate))
    parts = [part for word in words for part in (0.2 * np.sin(2 * np.pi * TONES[word] * time), silence)]
    return np.concatenate([*parts, np.zeros(0)]).astype(np.float32)


def random_words(count: int, seed: int) -> list[str]:
    """No word twice in a row."""
    names, rng = list(TONES), np.random.default_rng(seed)
    places = np.cumsum(rng.integers(1, len(names), count))
    return [names[place % len(names)] for place in places]


class Listener:
    """Hears a word where one tone is the loudest for 0.1 s; keeps the batches that it was given."""

    def __init__(self, timestamps: bool = False) -> None:
        self.timestamps = timestamps
        self.batches = []
        bins = torch.tensor([self._bin(TONES[name]) for name in TONES])
        self.names = {int(bin): name for bin, name in zip(bins, TONES, strict=True)}

    @staticmethod
    def _bin(frequency: float) -> int:
        from speechllm.data.features import fbank

        return int(fbank(np.sin(2 * np.pi * frequency * np.arange(RATE) / RATE).astype(np.float32)).mean(0).argmax())

    def __call__(self, batches):
        for batch in batches:
            self.batches.append(batch)
            yield [
                self._recognition(rows[:frames])
                for rows, frames in zip(batch.features, batch.feature_lens.tolist(), strict=True)
            ]

    def _recognition(self, features: torch.Tensor) -> Recognition:
        heard = [int(row.argmax()) if row.max() > -3 else None for row in features]
        words, start = [], 0
        for i in range(1, len(heard) + 1):
            if i == len(heard) or heard[i] != heard[start]:
                if heard[start] is not None and i - start >= 10:
                    words.append(Word(self.names[heard[start]], start / 100, i / 100, 1.0))
                start = i
        text = " ".join(word.text for word in words)
        best = Hypothesis(tuple(range(len(words))), (-0.1,) * len(words), 0.0, "end")
        return Recognition(text, (best,), (text,), words=tuple(words) if self.timestamps else None)


def result_of(samples: np.ndarray, recognise: Listener, max_seconds: float = 30.0) -> Recording:
    ((_, found),) = transcribe_inputs([audio_input(samples, "a")], recognise, SegmentOptions(max_seconds=max_seconds))
    return found


def words_of(recording: Recording) -> list[str]:
    return " ".join(segment.text for segment in recording.segments).split()


@pytest.mark.parametrize("timestamps", [False, True])
@pytest.mark.parametrize("pause", [0.0, 0.05, 0.3, 3.0])
@pytest.mark.parametrize("seed", range(3))
def test_long_audio_has_each_word_once(seed, pause, timestamps):
    words = random_words(80, seed)
    found = result_of(melody(words, pause), Listener(timestamps), 7.0)
    assert len(found.segments) > 4
    assert words_of(found) == words
    assert found.duration == pytest.approx(len(words) * (0.4 + pause))
    for before, after in pairwise(found.segments):
        assert before.offset + before.duration <= after.offset + 1e-6
    if timestamps:
        timed = [word for segment in found.segments for word in segment.words]
        assert [word.text for word in timed] == words
        starts = [i * (0.4 + pause) for i in range(len(words))]
        assert np.abs(np.array([word.start for word in timed]) - starts).max() < 0.35  # a word that was cut: its rest


def test_silence_is_not_recognised():
    listener = Listener()
    found = result_of(np.zeros(RATE * 70, dtype=np.float32), listener)
    assert (found.segments, found.duration, listener.batches) == ([], 70.0, [])


def said(text: str, offset: float, duration: float, times: list[float] | None = None) -> Segment:
    words = None if times is None else tuple(Word(w, t, t + 0.1, 1.0) for w, t in zip(text.split(), times, strict=True))
    return Segment(offset, duration, Recognition(text, (), (), words=words))


@pytest.mark.parametrize(
    ("before", "after", "joined"),
    [
        (
            "we went to the old market and bo",
            "arket and bought some bread",
            "we went to the old market and bought some bread",
        ),
        ("one two three", "two three four", "one two three four"),
        ("One two, three", "Two three. Four", "One two, three Four"),
        ("a b c d", "e f g h", "a b c d e f g h"),
        ("", "one two", "one two"),
        ("one two", "", "one two"),
        ("今天天气很好我们", "很好我们去公园吧", "今天天气很好我们去公园吧"),
        # a single word in common, far from both ends, is no overlap
        ("it is the end of all", "now a cat of his is here", "it is the end of all now a cat of his is here"),
    ],
)
def test_the_words_of_an_overlap_come_once(before, after, joined):
    first, second = without_overlap(said(before, 0.0, 4.0), said(after, 2.0, 4.0))
    separator = " " if joined.isascii() else ""
    assert separator.join(filter(None, (first.text, second.text))) == joined
    assert (first.offset, first.duration, second.offset, second.duration) == (0.0, 3.0, 3.0, 3.0)


def test_words_with_times_are_taken_from_their_side_of_the_middle():
    before = said("a b x y", 10.0, 4.0, [0.0, 1.5, 2.5, 3.5])
    after = said("p q c d", 12.0, 4.0, [0.2, 1.5, 2.5, 3.5])
    first, second = without_overlap(before, after)
    assert (first.text, second.text) == ("a b x", "q c d")
    assert [word.start for word in first.words] == [10.0, 11.5, 12.5]
    assert [word.start for word in second.words] == [13.5, 14.5, 15.5]


def test_batches_are_full_of_segments_of_similar_length_and_results_in_order():
    rng = np.random.default_rng(0)
    texts = [random_words(int(rng.integers(1, 12)), i) for i in range(60)]
    listener = Listener()
    inputs = [audio_input(melody(words, 0.2), str(i), f"l{i}", None) for i, words in enumerate(texts)]
    found = list(transcribe_inputs(iter(inputs), listener, SegmentOptions(batch_seconds=20.0)))
    assert [words_of(recording) for _, recording in found] == texts
    assert [recording.id for _, recording in found] == [str(i) for i in range(60)]
    assert sorted(tag for batch in listener.batches for tag in batch.languages) == sorted(f"l{i}" for i in range(60))
    padded = [batch.features.shape[0] * batch.features.shape[1] for batch in listener.batches]
    assert max(padded) <= 2000 + 60
    assert sum(padded) < 1.15 * sum(int(batch.feature_lens.sum()) for batch in listener.batches)


def test_a_batch_does_not_wait_for_all_inputs():
    opened = []

    def inputs():
        for i in range(100):
            opened.append(i)
            yield audio_input(melody(["do"] * 5, 0.1), str(i))

    results = transcribe_inputs(inputs(), Listener(), SegmentOptions(batch_seconds=10.0))
    assert next(results)[0].id == "0"
    assert len(opened) < 25


@pytest.fixture
def audio(tmp_path):
    """A folder with four files of several formats and rates, a broken one, and no audio."""
    folder = tmp_path / "audio"
    (folder / "deep/er").mkdir(parents=True)
    for name, words, rate, channels in (
        ("a.wav", ["do", "re"], 8000, 1),
        ("b.flac", ["mi"], 44100, 2),
        ("deep/c.MP3", ["ti", "la"], 16000, 1),
        ("deep/er/d.ogg", ["fa", "do", "fa"], 22050, 2),
    ):
        samples = melody(words, 0.2, rate)
        soundfile.write(folder / name, np.stack([samples] * channels, axis=1), rate)
    (folder / "bad.wav").write_bytes(b"RIFF, and no more")
    (folder / "notes.txt").write_text("no audio")
    return folder


EXPECTED = {"a": "do re", "b": "mi", "deep/c": "ti la", "deep/er/d": "fa do fa"}


def test_folders_to_standard_output(audio, capsys):
    status = transcribe_all(Inputs([audio, audio / "none.wav"]), Listener(), SegmentOptions(), Output())
    out, err = capsys.readouterr()
    names = [audio / name for name in ("a.wav", "b.flac", "deep/c.MP3", "deep/er/d.ogg")]
    assert out == "".join(f"{name}\t{text}\n" for name, text in zip(names, EXPECTED.values(), strict=True))
    assert status == 1
    assert f"{audio}/bad.wav" in err and f"missing file: {audio}/none.wav" in err
    assert err.endswith("error: 2 of 6 could not be transcribed\n")


def test_a_folder_for_results_is_filled_once(audio, tmp_path, capsys):
    output = Output("json", tmp_path / "out")

    def run(output: Output, **options) -> Listener:
        listener = Listener(timestamps=True)
        status = transcribe_all(Inputs([audio]), listener, SegmentOptions(**options), output)
        assert status == 1  # the broken one
        return listener

    def batched(listener: Listener) -> int:
        return sum(len(batch.feature_lens) for batch in listener.batches)

    assert batched(run(output)) == 4
    files = sorted(str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*") if path.is_file())
    assert files == [f"{id}.json" for id in EXPECTED]
    for id, text in EXPECTED.items():
        record = json.loads((tmp_path / f"out/{id}.json").read_text())
        assert (record["id"], record["text"]) == (id, text)
        assert [word["word"] for segment in record["segments"] for word in segment["words"]] == text.split()
    assert batched(run(output)) == 0
    assert "4 of 5 were done before" in capsys.readouterr().err
    (tmp_path / "out/deep/c.json").unlink()
    assert batched(run(output)) == 1
    assert batched(run(Output("json", tmp_path / "out", overwrite=True))) == 4


def test_an_interrupted_run_leaves_whole_files_alone(audio, tmp_path):
    class Stopped(Exception):
        pass

    def stops(batches):
        for i, found in enumerate(Listener()(batches)):
            if i == 2:
                raise Stopped
            yield found

    output, options = Output("txt", tmp_path / "out"), SegmentOptions(batch_seconds=0.1)
    with pytest.raises(Stopped):
        transcribe_all(Inputs([audio]), stops, options, output)
    there = {path for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert 0 < len(there) < 4
    assert transcribe_all(Inputs([audio]), Listener(), options, output) == 1
    assert {id: (tmp_path / f"out/{id}.txt").read_text() for id in EXPECTED} == {
        id: f"{text}\n" for id, text in EXPECTED.items()
    }


def test_two_inputs_do_not_get_the_same_file(audio, tmp_path, capsys):
    inputs = Inputs([audio / "a.wav", audio / "deep/../a.wav", audio / "b.flac"])
    assert transcribe_all(inputs, Listener(), SegmentOptions(), Output("txt", tmp_path / "out")) == 1
    assert "a.txt is for" in capsys.readouterr().err
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a.txt", "b.txt"]


def test_results_stay_inside_their_folder(tmp_path):
    output = Output("txt", tmp_path)
    for id, expected in (("/etc/x", "etc/x.txt"), ("../../y.z", "y.z.txt"), ("a@1.5", "a@1.5.txt"), ("..", "...txt")):
        assert output.file_of(audio_input(np.zeros(1), id)) == tmp_path / expected


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


def test_manifests_and_options_say_what_the_prompt_needs(audio, tmp_path):
    said = [{}, {"previous": "before"}, {"hotwords": ["x", "y"]}]
    lines = [{"audio_filepath": str(audio / "a.wav"), "duration": 1.2, "id": str(i)} | x for i, x in enumerate(said)]
    manifest = write_manifest(tmp_path / "m.jsonl", lines)
    (tmp_path / "phrases").write_text("New York\n\nBoston \n", encoding="utf-8-sig")
    options = ["--previous", "given", "--prompt-hotwords", str(tmp_path / "phrases")]
    for given, expected in (([], (None, None)), (options, ("given", ("New York", "Boston")))):
        context = prompt_context(parsed("a.wav", *given))
        listener = Listener()
        inputs = Inputs([manifest, audio / "a.wav"], context=context)
        assert transcribe_all(inputs, listener, SegmentOptions(), Output()) == 0
        found = {c.id: (c.previous, c.hotwords) for batch in listener.batches for c in batch.contexts}
        assert found.pop(str(audio / "a.wav")) == expected
        assert found == {"0": expected, "1": ("before", expected[1]), "2": (expected[0], ("x", "y"))}
    with pytest.raises(FileNotFoundError, match="--prompt-hotwords: .*nothing: no such file"):
        prompt_context(parsed("a.wav", "--prompt-hotwords", str(tmp_path / "nothing")))


def test_samples_from_python():
    samples = melody(["do", "ti"], 0.1)
    for given in (samples, samples.astype(np.float64), torch.from_numpy(samples)):
        assert words_of(result_of(given, Listener())) == ["do", "ti"]
    for wrong in (np.zeros((2, 100), dtype=np.float32), np.zeros(100, dtype=np.int16)):
        with pytest.raises(UserError, match="must be"):
            audio_input(wrong, "a")


def parsed(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_transcribe(parser.add_subparsers())
    return parser.parse_args(["transcribe", *arguments, "--model", "no-such-model"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a.wav", "--top-k", "3"], "method sample"),
        (["a.wav", "--task", "ast"], "--target-language"),
        (["a.wav", "--task", "asr", "--target-language", "de"], "--target-language"),
        (["a.wav", "--batch-duration", "0"], "more than 0"),
        (["a.wav", "--max-segment", "2"], "at least 5"),
        (["a.wav", "b.wav", "--format", "srt"], "--output"),
        (["a.wav", "--overwrite"], "--output"),
        (["a.wav", "--output", __file__], "not a folder"),
    ],
)
def test_options_that_do_not_go_together(arguments, message):
    with pytest.raises(UserError, match=message):
        run_transcribe(parsed(*arguments))


def test_a_whole_model_transcribes(model, audio, tmp_path, monkeypatch):
    monkeypatch.setattr("speechllm.model.build.load_model", lambda folder: model.eval())
    arguments = [str(audio), "--language", "en", "--format", "ctm", "--search", "beam", "--beam", "2"]
    assert run_transcribe(parsed(*arguments, "--output", str(tmp_path / "out"))) == 1
    assert sorted(path.stem for path in (tmp_path / "out").rglob("*.ctm")) == ["a", "b", "c", "d"]
