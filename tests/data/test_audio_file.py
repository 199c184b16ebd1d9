"""Files of every format: the true end counts, damage is left out and noted, a part is the same part."""

import io
import os
import struct
from itertools import islice

import numpy as np
import pytest
import soundfile
from lhotse import Recording

from speechllm.data import audio_av
from speechllm.data.audio import load_samples
from speechllm.data.audio_file import UtteranceError, open_audio
from speechllm.data.blocks import read_blocks
from speechllm.data.convert import convert_to_cuts, convert_to_shar
from speechllm.data.manifests.manifest import SourceConfig, read_manifest

from .conftest import add_tracks, write_encoded, write_manifest

RATE = 16000
CODECS = {
    "mp3": "libmp3lame",
    "opus": "libopus",
    "flac": "flac",
    "m4a": "aac",
    "aac": "aac",
    "webm": "libopus",
}


def talk(seconds: float, rate: int = RATE, seed: int = 0) -> np.ndarray:
    """Loud and silent by turns, so that a variable bit rate varies."""
    time = np.arange(round(seconds * rate)) / rate
    loud = np.sin(2 * np.pi * 0.1 * time + seed) > 0.3
    noise = np.random.default_rng(seed).standard_normal(len(time))
    return (0.1 * loud * (noise + np.sin(2 * np.pi * 300 * time))).astype(np.float32)


def encoded(path, seconds, rate=RATE, seed=0, **options):
    if path.suffix == ".ogg":
        soundfile.write(path, talk(seconds, rate, seed), rate)
        return path
    return write_encoded(path, talk(seconds, rate, seed), rate, CODECS[path.suffix[1:]], options)


def read(source) -> tuple[float, list[str]]:
    """Seconds, and what is noted."""
    notes = []
    with open_audio(source, "file", notes=notes) as file:
        seconds = sum(block.shape[1] for block in file.blocks()) / file.rate
    assert all(note.reason == "damaged audio" and note.details.startswith("file: ") for note in notes)
    return seconds, [note.details for note in notes]


@pytest.mark.parametrize("rate", [11025, 22050, 44100])
def test_mp3_without_a_length(tmp_path, rate):
    path = tmp_path / "a.mp3"
    soundfile.write(path, talk(41.0, rate), rate, bitrate_mode="VARIABLE", compression_level=0.5)
    data = path.read_bytes()
    path.write_bytes(data[data.index(data[:2], data.index(b"Xing")) :])  # the frame after that which says the length
    assert abs(soundfile.info(path).duration - 41.0) > 1.0  # an estimate
    for source in (path, path.read_bytes()):
        seconds, notes = read(source)
        assert abs(seconds - 41.0) < 0.2 and notes == []
    (cut,) = read_manifest(write_manifest(tmp_path / "m.jsonl", [_line("a.mp3", 41.0)]))
    assert abs(len(load_samples(cut)) / RATE - 41.0) < 0.2


def _line(name, duration, **fields):
    return {"audio_filepath": name, "duration": duration, "text": "x", **fields}


@pytest.mark.parametrize("rate", [11025, 22050, 44100])
def test_mp3_with_a_length_is_not_taken_for_cut_off(tmp_path, rate):
    assert read(encoded(tmp_path / "a.mp3", 5.0, rate))[1] == []


@pytest.mark.parametrize("suffix", ["mp3", "ogg", "opus", "flac", "aac"])
def test_files_one_after_another_in_one(tmp_path, suffix):
    first, second = (
        encoded(tmp_path / f"{i}.{suffix}", seconds, seed=i).read_bytes() for i, seconds in ((1, 3), (2, 4))
    )
    seconds, notes = read(first + second)
    assert abs(seconds - 7.0) < 0.3 and notes == []
    with open_audio(first + second, "x") as both, open_audio(second, "x") as alone:
        joined = np.concatenate(list(both.blocks()), axis=1)
        end = np.concatenate(list(alone.blocks()), axis=1)
    np.testing.assert_allclose(joined[:, -RATE:], end[:, -RATE:], atol=0.05)


def test_a_chain_of_two_rates(tmp_path):
    first = encoded(tmp_path / "1.mp3", 3.0, 44100).read_bytes()
    second = encoded(tmp_path / "2.mp3", 4.0, 16000).read_bytes()
    assert abs(read(first + second)[0] - 7.0) < 0.2


def wav(samples: np.ndarray, stated: int, rate: int = RATE) -> bytes:
    data = (samples * 32767).astype("<i2").tobytes()
    header = (
        b"WAVEfmt " + struct.pack("<IHHIIHH", 16, 1, 1, rate, 2 * rate, 2, 16) + b"data" + struct.pack("<I", stated)
    )
    return b"RIFF" + struct.pack("<I", min(stated + 36, 2**32 - 1)) + header + data


@pytest.mark.parametrize(
    ("stated", "is_cut_off"),
    [(0, False), (0xFFFFFFFF, False), (0x7FFFFFFF, False), (0x7FFFF000, False), (96000, False), (200000, True)],
)
def test_wav_of_every_length_that_headers_say(stated, is_cut_off):
    seconds, notes = read(wav(talk(3.0), stated))
    assert seconds == 3.0
    assert notes == (["file: ends at 3.000 s, its header says 6.250 s"] if is_cut_off else [])


def test_flac_of_unknown_length():
    buffer = io.BytesIO()
    soundfile.write(buffer, talk(3.36), RATE, format="FLAC")
    data = bytearray(buffer.getvalue())
    data[21] &= 0xF0  # the 36 bits of total samples in the STREAMINFO block
    data[22:26] = bytes(4)
    assert read(bytes(data)) == (3.36, [])


def test_rf64_is_read(tmp_path):
    soundfile.write(tmp_path / "a.rf64", talk(2.0), RATE, format="RF64")
    assert read(tmp_path / "a.rf64") == (2.0, [])


@pytest.mark.parametrize("suffix", ["mp3", "ogg", "opus", "flac", "m4a", "aac"])
def test_a_damaged_block_is_left_out_and_noted(tmp_path, suffix):
    data = bytearray(encoded(tmp_path / f"a.{suffix}", 20.0).read_bytes())
    assert read(bytes(data))[1] == []
    middle = len(data) // 2
    data[middle : middle + 200] = np.random.default_rng(0).bytes(200)
    seconds, notes = read(bytes(data))
    assert 10.0 < seconds < 20.1
    if suffix != "aac":  # which has no checksums: some decoders take what they find
        assert len(notes) == 1 and "could not be decoded, the first at " in notes[0]
    with open_audio(bytes(data), "x") as file:  # and no noise in its place
        assert max(np.abs(block).max() for block in file.blocks()) < 1.0


@pytest.mark.parametrize("suffix", ["mp3", "flac"])
def test_a_file_that_was_cut_off_says_so(tmp_path, suffix):
    data = encoded(tmp_path / f"a.{suffix}", 20.0).read_bytes()
    seconds, notes = read(data[: len(data) // 2])
    assert 3.0 < seconds < 15.0 and len(notes) == 1


@pytest.mark.parametrize("kind", ["WAV", "AIFF", "AU", "W64"])
def test_an_uncompressed_file_that_was_cut_off_says_so(kind):
    buffer = io.BytesIO()
    soundfile.write(buffer, talk(20.0), RATE, format=kind, subtype="PCM_16")
    assert read(buffer.getvalue()) == (20.0, [])
    seconds, notes = read(buffer.getvalue()[: len(buffer.getvalue()) // 2])
    assert 9.9 < seconds < 10.0 and len(notes) == 1 and ", its header says " in notes[0]
    assert float(notes[0].split()[-2]) == pytest.approx(20.0, abs=0.01)


def test_mp3_in_wav_is_read_as_mp3_is(tmp_path):
    data = write_encoded(tmp_path / "a.wav", talk(20.0), RATE, "libmp3lame").read_bytes()
    whole, notes = read(data)
    assert whole == pytest.approx(20.0, abs=0.2) and notes == []
    middle = len(data) // 2
    seconds, notes = read(data[:middle] + np.random.default_rng(0).bytes(400) + data[middle + 400 :])
    assert whole - 1.0 < seconds < whole and len(notes) == 1 and "could not be decoded" in notes[0]
    assert read(data + bytes(3000))[0] == pytest.approx(whole, abs=0.1)


def test_a_track_that_is_shorter_than_another_is_not_taken_for_cut_off(tmp_path):
    path = tmp_path / "a.mkv"
    add_tracks(path, [(talk(3.0, seed=1), RATE), (talk(20.0, seed=2), RATE)], "libopus")
    assert read(path) == (pytest.approx(3.0, abs=0.05), [])
    data = path.read_bytes()
    (tmp_path / "cut.mkv").write_bytes(data[: len(data) // 10])
    seconds, notes = read(tmp_path / "cut.mkv")
    assert seconds < 2.9 and len(notes) == 1 and "its header says 3.0" in notes[0]


@pytest.mark.parametrize("suffix", ["mp3", "flac", "ogg", "opus", "m4a", "aac", "webm", "wav"])
@pytest.mark.parametrize("chained", [False, True])
def test_a_part_of_a_long_file_is_that_part_of_the_whole(tmp_path, suffix, chained, monkeypatch):
    path = tmp_path / f"a.{suffix}"
    if suffix == "wav":
        soundfile.write(path, talk(80.0), RATE)
    else:
        encoded(path, 80.0)
    if chained:
        path.write_bytes(path.read_bytes() * 2)
    with open_audio(path, "x") as file:
        whole = np.concatenate(list(file.blocks()), axis=1)
    decoded = []
    original = audio_av._float_samples
    monkeypatch.setattr(audio_av, "_float_samples", lambda frame: decoded.append(frame.samples) or original(frame))
    for start in (3.1, 31.7, 70.123):
        first, count = round(start * file.rate), 2 * file.rate
        del decoded[:]
        with open_audio(path, "x") as file:
            part = np.concatenate(list(islice(file.blocks(first), 3)), axis=1)[:, :count]
        np.testing.assert_allclose(part, whole[:, first : first + count], atol=1e-5)
    if not chained and suffix not in ("wav", "webm"):
        assert sum(decoded) < 10 * file.rate  # not all that is before it


def test_of_several_tracks_the_default_one(tmp_path):
    path = tmp_path / "a.mkv"
    add_tracks(path, [(talk(2.0, seed=1), RATE), (talk(3.0, seed=2), RATE)], "aac")
    lengths = {track: round(sum(map(len, read_blocks(path, track=track))) / RATE) for track in (None, 0, 1)}
    assert lengths == {None: 2, 0: 2, 1: 3}
    add_tracks(path, [(talk(2.0, seed=1), RATE), (talk(3.0, seed=2), RATE)], "aac", default=1)
    assert round(sum(map(len, read_blocks(path))) / RATE) == 3
    with pytest.raises(UtteranceError, match=r"no such track: .*a\.mkv: 2 is not among \[0, 1\]"):
        list(read_blocks(path, track=2))
    soundfile.write(tmp_path / "a.wav", talk(1.0), RATE)
    with pytest.raises(UtteranceError, match="no such track"):
        list(read_blocks(tmp_path / "a.wav", track=1))


@pytest.mark.parametrize(
    "name", ["12:30:00.mp3", "http:__x.mp3", b"caf\xe9.mp3".decode(errors="surrogateescape"), "%d.mp3"]
)
def test_names_are_names(tmp_path, name):
    encoded(tmp_path / "a.mp3", 2.0).rename(tmp_path / name)
    assert abs(read(tmp_path / name)[0] - 2.0) < 0.1


@pytest.mark.parametrize(
    "playlist",
    [
        "#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:2,\na.mp3\n#EXT-X-ENDLIST\n",
        "ffconcat version 1.0\nfile a.mp3\n",
    ],
)
def test_a_playlist_opens_nothing(tmp_path, playlist):
    encoded(tmp_path / "a.mp3", 2.0)
    (tmp_path / "list.mp3").write_text(playlist)
    with pytest.raises(UtteranceError, match="unreadable audio"):
        read(tmp_path / "list.mp3")


def test_cuts_that_lhotse_puts_together_and_conversion_read_the_same(tmp_path):
    data = encoded(tmp_path / "a.ogg", 3.0).read_bytes() + encoded(tmp_path / "a.ogg", 4.0).read_bytes()
    (tmp_path / "a.ogg").write_bytes(data)
    manifest = write_manifest(tmp_path / "m.jsonl", [_line("a.ogg", 7.0)])
    convert_to_cuts(SourceConfig(str(manifest)), tmp_path / "cuts.jsonl")
    (cut,) = read_manifest(tmp_path / "cuts.jsonl")
    alone = load_samples(cut)
    assert abs(len(alone) - 7 * RATE) < 500
    np.testing.assert_allclose(load_samples(cut.append(cut)), np.concatenate([alone, alone]), atol=1e-6)
    np.testing.assert_allclose(load_samples(cut.perturb_volume(0.5)), alone / 2, atol=1e-6)
    convert_to_shar(SourceConfig(str(manifest)), tmp_path / "shar")
    (stored,) = read_manifest(tmp_path / "shar")
    np.testing.assert_allclose(load_samples(stored), alone, atol=1e-4)
    (tmp_path / "a.ogg").unlink()
    with pytest.raises(UtteranceError, match=r"^unreadable audio: .*AudioLoadingError: missing file: .*a\.ogg"):
        load_samples(cut.perturb_volume(0.5))
    assert Recording.from_file(encoded(tmp_path / "b.ogg", 1.0)).duration == 1.0  # by lhotse as it was before


def test_segments_of_a_damaged_file_are_not_trusted(tmp_path):
    path = encoded(tmp_path / "a.mp3", 20.0)
    data = bytearray(path.read_bytes())
    data[len(data) // 2 : len(data) // 2 + 200] = np.random.default_rng(0).bytes(200)
    path.write_bytes(data)
    lines = [_line("a.mp3", 20.0), _line("a.mp3", 2.0, offset=1.0), _line("a.mp3", 2.0, offset=17.0)]
    whole, before, after = read_manifest(write_manifest(tmp_path / "m.jsonl", lines))
    notes = []
    assert len(load_samples(whole, notes=notes)) > 19 * RATE
    assert [note.reason for note in notes] == ["damaged audio"]
    assert len(load_samples(before)) == 2 * RATE
    with pytest.raises(UtteranceError, match="^damaged audio: .*a.mp3: 1 place could not be decoded"):
        load_samples(after)


def test_files_are_closed(tmp_path):
    path = encoded(tmp_path / "a.mp3", 40.0)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        list(read_blocks(path, 35.0, 1.0))
        next(read_blocks(path)).sum()
        with pytest.raises(UtteranceError):
            list(read_blocks(path, track=3))
    assert len(os.listdir("/proc/self/fd")) == before
