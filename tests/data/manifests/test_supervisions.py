"""Supervisions of lhotse cuts: what of their texts is said in the audio, in which order, and on which channel."""

import numpy as np
import pytest
import soundfile
from lhotse import CutSet, MonoCut, MultiCut, Recording, SupervisionSegment
from lhotse.dataset.speech_recognition import validate_for_asr
from lhotse.supervision import AlignmentItem

from speechllm.data import SourceConfig
from speechllm.data.audio import load_samples
from speechllm.data.convert import convert_to_cuts, convert_to_shar
from speechllm.data.manifests.manifest import describe, describe_cut, iter_objects, read_manifest, to_cut
from speechllm.errors import UserError
from tests.data.corpora import streamed

SOURCE = SourceConfig("cuts.jsonl")
# (word, start, duration) of two speakers, whose speech overlaps from 5 to 6 s.
FIRST = [("One,", 0.2, 0.6), ("two", 1.0, 0.5), ("", 1.5, 0.8), ("three.", 2.4, 1.0), ("Four", 5.0, 0.9)]
SECOND = [("five", 5.2, 0.6), ("six", 6.5, 1.0), ("seven!", 8.0, 1.5)]


def supervision(name: str, words: list[tuple], aligned: bool, channel: int = 0, **fields) -> SupervisionSegment:
    """Text and bounds of the words; the alignment is in capitals and without punctuation."""
    start, end = words[0][1], words[-1][1] + words[-1][2]
    text = " ".join(word for word, _, _ in words if word)
    items = [AlignmentItem(word.strip(",.!").upper(), at, duration) for word, at, duration in words]
    fields |= {"alignment": {"word": items}} if aligned else {}
    return SupervisionSegment(name, "r", start, end - start, channel=channel, text=text, **fields)


@pytest.fixture
def recording(tmp_path):
    samples = np.random.default_rng(0).uniform(-0.1, 0.1, (160000, 1))
    soundfile.write(tmp_path / "r.wav", samples, 16000)
    return Recording.from_file(tmp_path / "r.wav", recording_id="r")


def talk(recording, aligned: bool) -> MonoCut:
    cut = recording.to_cut()
    cut.supervisions = [supervision("b", SECOND, aligned), supervision("a", FIRST, aligned)]
    return cut


def outcome(obj: dict, source: SourceConfig = SOURCE):
    """What a cut says, by all ways to read it, or None where all refuse it."""
    found = []
    for way in (lambda: describe(obj, source), lambda: describe_cut(to_cut(obj, source))):
        try:
            found.append(way())
        except ValueError as error:
            assert "supervision" in str(error)
            found.append(None)
    assert found[0] == found[1]
    return found[0]


def test_texts_are_in_the_order_of_their_times(recording):
    cut = talk(recording, aligned=False)
    assert outcome(cut.to_dict()).text == "One, two three. Four five six seven!"
    assert outcome(cut.pad(20.0).to_dict()).text == "One, two three. Four five six seven!"
    later = recording.to_cut()
    later.supervisions = [supervision("c", [("eight", 0.0, 1.0)], False)]
    assert outcome(cut.append(later).to_dict()).text == "One, two three. Four five six seven! eight"


def test_two_with_the_same_bounds_are_refused(recording):
    cut = recording.to_cut()
    cut.supervisions = [supervision(name, SECOND, False) for name in "ab"]
    with pytest.raises(ValueError, match=r"supervisions a and b are both of 5.2 to 9.5 s"):
        describe(cut.to_dict(), SOURCE)
    assert outcome(cut.to_dict()) is None
    cut.supervisions[0].text = None  # says nothing
    assert outcome(cut.to_dict()).text == "five six seven!"


@pytest.mark.parametrize("padded", [False, True])
def test_windows_are_refused_as_lhotse_refuses_them(recording, padded):
    """`cut_into_windows` keeps what reaches outside with its whole text."""
    windows = list(CutSet.from_cuts([talk(recording, aligned=False)]).cut_into_windows(3))
    refused = 0
    for window in windows:
        try:
            validate_for_asr(CutSet.from_cuts([window]))
            expected = " ".join(s.text for s in sorted(window.supervisions, key=lambda s: s.start))
        except AssertionError:
            expected = None
            refused += 1
        entry = outcome((window.pad(duration=30.0) if padded else window).to_dict())
        assert (entry and entry.text) == expected
    assert len(windows) == 4 and refused == 4


def test_windows_with_a_word_alignment_have_the_words_that_are_in_them(recording):
    windows = list(CutSet.from_cuts([talk(recording, aligned=True)]).cut_into_windows(3))
    texts = [outcome(window.to_dict()).text for window in windows]
    # "three." is from 2.4 to 3.4 s: more than half of it is in the first window
    assert texts == ["One, two three.", "Four five", "six seven!", ""]
    words = outcome(windows[0].to_dict()).words
    assert [(w.word, round(w.start, 3), round(w.end, 3)) for w in words] == [
        ("ONE", 0.2, 0.8), ("TWO", 1.0, 1.5), ("", 1.5, 2.3), ("THREE", 2.4, 3.0),
    ]  # fmt: skip
    assert [outcome(window.pad(duration=5.0).to_dict()).text for window in windows] == texts
    lower = SourceConfig("cuts.jsonl", text=["lowercase", "remove_punctuation"])
    assert [outcome(window.to_dict(), lower).text for window in windows[:2]] == ["one two three", "four five"]


def test_words_without_spaces_and_of_another_text(recording):
    cut = recording.to_cut()
    words = [AlignmentItem(word, at, 1.0) for at, word in enumerate(["你好", "世界", "再见"])]
    cut.supervisions = [SupervisionSegment("a", "r", 0.0, 3.0, text="你好世界 再见", alignment={"word": words})]
    first, second, *_ = CutSet.from_cuts([cut]).cut_into_windows(2)
    assert outcome(first.to_dict()).text == "你好世界" and outcome(second.to_dict()).text == "再见"
    first.supervisions[0].text = "something else"
    with pytest.raises(ValueError, match="the words of its alignment are not those of its text"):
        describe(first.to_dict(), SOURCE)
    first.supervisions[0].custom = {"task": "ast", "ast_text": "hello world", "target_lang": "en"}
    assert outcome(first.to_dict()) is None


def test_trim_to_supervisions_where_speech_overlaps(recording):
    cut = talk(recording, aligned=False)
    kept = {c.start: c for c in cut.trim_to_supervisions(keep_overlapping=True)}
    assert [outcome(c.to_dict()) for c in kept.values()] == [None, None]
    alone = [outcome(c.to_dict()).text for c in cut.trim_to_supervisions(keep_overlapping=False)]
    assert sorted(alone) == ["One, two three. Four", "five six seven!"]
    aligned = talk(recording, aligned=True).trim_to_supervisions(keep_overlapping=True)
    assert sorted(outcome(c.to_dict()).text for c in aligned) == ["Four five six seven!", "One, two three. Four five"]


@pytest.mark.parametrize(("outside", "is_refused"), [(0.0, False), (0.0015, False), (0.003, True), (0.1, True)])
@pytest.mark.parametrize("end", [False, True])
def test_the_tolerance_is_that_of_lhotse(recording, outside, is_refused, end):
    cut = recording.to_cut()
    start = 0.0 if end else -outside
    cut.supervisions = [SupervisionSegment("a", "r", start, 10.0 + outside if end else 5.0, text="x")]
    assert (outcome(cut.to_dict()) is None) == is_refused


def test_supervisions_of_several_languages(recording):
    cut = talk(recording, aligned=False)
    for languages, lang in ((("de", "en"), None), (("English", "en-US"), "en-US"), ((None, "en"), "en")):
        for one, language in zip(cut.supervisions, languages, strict=True):
            one.language = language
        found = outcome(cut.to_dict())
        assert (found and found.lang) == lang
    cut.supervisions[0].language, cut.supervisions[0].text = "de", None  # nothing is written in it
    assert outcome(cut.to_dict()).lang == "en"


def test_translations_of_several_supervisions(recording):
    cut = talk(recording, aligned=False)
    for one, text in zip(cut.supervisions, ("sechs", "eins"), strict=True):
        one.language, one.custom = "en", {"ast_text": text, "target_lang": "de", "task": "ast"}
    assert outcome(cut.to_dict()).target == "eins sechs"
    cut.supervisions[0].custom.pop("ast_text")
    assert outcome(cut.to_dict()) is None  # its text is no translation where the other has one beside its text
    cut.supervisions[1].custom["task"] = "asr"
    assert outcome(cut.to_dict()) is None
    for one in cut.supervisions:
        one.custom = None
    cut.custom = {"ast_text": "alles", "target_lang": "de", "task": "ast"}
    assert outcome(cut.to_dict()).target == "alles"


@pytest.fixture
def two_channels(tmp_path):
    """A call: one speaker on each channel."""
    samples = np.random.default_rng(1).uniform(-0.1, 0.1, (160000, 2)).astype(np.float32)
    soundfile.write(tmp_path / "call.wav", samples, 16000, subtype="FLOAT")
    call = MultiCut("call", 0.0, 10.0, [0, 1], recording=Recording.from_file(tmp_path / "call.wav"))
    call.supervisions = [supervision("b", SECOND, False, channel=1), supervision("a", FIRST, False, channel=0)]
    return call, samples.T


@pytest.mark.parametrize("padded", [False, True])
def test_a_supervision_for_each_channel(two_channels, padded):
    call, samples = two_channels
    obj = (call.pad(duration=12.0) if padded else call).to_dict()
    with pytest.raises(ValueError, match=r"supervisions of several channels \(0 and 1\).* choose one with channel"):
        describe(obj, SOURCE)
    for channel, text in enumerate(("One, two three. Four", "five six seven!")):
        source = SourceConfig("cuts.jsonl", channel=channel)
        cut = to_cut(obj, source)
        assert cut.id == obj["id"]
        assert outcome(obj, source).text == describe_cut(cut).text == text
        np.testing.assert_array_equal(load_samples(cut)[:160000], samples[channel])
    with pytest.raises(ValueError, match="channel: 2 was chosen, the cut has 0, 1"):
        to_cut(obj, SourceConfig("cuts.jsonl", channel=2))


def test_the_channel_of_the_only_supervision_is_taken(two_channels):
    call, samples = two_channels
    call.supervisions = call.supervisions[:1]
    cut = to_cut(call.to_dict(), SOURCE)
    assert outcome(call.to_dict()).text == "five six seven!"
    np.testing.assert_array_equal(load_samples(cut), samples[1])
    call.supervisions[0].channel = [0, 1]
    cut = to_cut(call.to_dict(), SOURCE)
    np.testing.assert_allclose(load_samples(cut), samples.mean(axis=0), atol=1e-7)
    alone = to_cut(call.to_dict(), SourceConfig("cuts.jsonl", channel=0))
    assert describe_cut(alone).text == "five six seven!"
    np.testing.assert_array_equal(load_samples(alone), samples[0])
    for mono in call.to_mono():
        assert outcome(mono.to_dict()).text == "five six seven!"
    call.supervisions[0].channel = 2
    assert outcome(call.to_dict()) is None


@pytest.mark.parametrize("kind", ["cuts.jsonl", "cuts.jsonl.gz", "shar"])
def test_windows_are_refused_in_all_forms(recording, tmp_path, kind):
    windows = CutSet.from_cuts([talk(recording, aligned=False)]).cut_into_windows(3)
    path = tmp_path / kind
    if kind == "shar":
        path.mkdir()
        windows.to_shar(path, fields={"recording": "wav"})
    else:
        windows.to_file(path)
    source = SourceConfig(str(path))
    assert [outcome(obj, source) for _, obj in iter_objects(source)] == [None] * 4
    _, errors = streamed(source)
    assert len(errors) == 4 and all("its text is not that of this audio" in error for error in errors)
    with pytest.raises(UserError, match="no utterance can be used: 4 bad manifest line"):
        convert_to_cuts(source, tmp_path / "out.jsonl")


def test_shar_with_an_alignment_of_the_whole_recording_is_refused(recording, tmp_path):
    """lhotse writes the audio of a window alone to Shar, and leaves the times of words those of the recording."""
    (tmp_path / "shar").mkdir()
    windows = CutSet.from_cuts([talk(recording, aligned=True)]).cut_into_windows(3)
    windows.to_shar(tmp_path / "shar", fields={"recording": "wav"})
    source = SourceConfig(str(tmp_path / "shar"))
    entries = [outcome(obj, source) for _, obj in iter_objects(source)]
    assert [entry and entry.text for entry in entries] == [None] * 4


def test_shar_of_a_part_has_an_alignment_that_is_off_by_little(recording, tmp_path):
    """By so little that the times of its words might be right."""
    (tmp_path / "shar").mkdir()
    cut = recording.to_cut()
    cut.supervisions = [supervision("a", FIRST, aligned=True)]
    for start in (0.1, 0.4):  # before the supervision, and inside of it
        part = cut.truncate(offset=start, duration=2.0)
        assert outcome(part.to_dict()).text == "One, two"
        CutSet.from_cuts([part]).to_shar(tmp_path / "shar", fields={"recording": "wav"})
        source = SourceConfig(str(tmp_path / "shar"))
        assert [outcome(obj, source) for _, obj in iter_objects(source)] == [None]


@pytest.mark.parametrize(("convert", "output"), [(convert_to_cuts, "out.jsonl.gz"), (convert_to_shar, "out")])
def test_windows_with_an_alignment_are_converted(recording, tmp_path, convert, output):
    CutSet.from_cuts([talk(recording, aligned=True)]).cut_into_windows(3).to_file(tmp_path / "w.jsonl")
    before = [describe_cut(cut) for cut in read_manifest(tmp_path / "w.jsonl")]
    assert [entry.text for entry in before] == ["One, two three.", "Four five", "six seven!", ""]
    convert(SourceConfig(str(tmp_path / "w.jsonl")), tmp_path / output)
    after = [describe_cut(cut) for cut in read_manifest(tmp_path / output)]
    for one, other in zip(before, after, strict=True):
        assert (one.id, one.text) == (other.id, other.text)
        times = [[(w.start, w.end) for w in entry.words or ()] for entry in (one, other)]
        np.testing.assert_allclose(*times, atol=1e-6)
