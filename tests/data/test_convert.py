"""`speechllm data convert`: what is written reads back to the same entries, samples and features."""

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from lhotse import CutSet, Recording

from speechllm.cli.main import main
from speechllm.data import SourceConfig, fbank, read_manifest
from speechllm.data.audio import UtteranceError, load_precomputed, load_samples
from speechllm.data.convert import convert_to_cuts, convert_to_cuts_in_parts, convert_to_shar
from speechllm.data.features import extract_features
from speechllm.data.manifests.manifest import describe_cut
from speechllm.errors import UserError

from .conftest import write_manifest, write_tone


def status(*arguments) -> int:
    with pytest.raises(SystemExit) as caught:
        main(["data", "convert", *map(str, arguments)])
    return caught.value.code


@pytest.fixture
def source(tmp_path):
    """Rates, channels, segments, ids and tasks of all sorts; 16-bit audio."""
    write_tone(tmp_path / "audio/wide.wav", 1.0, seed=1, rate=44100, channels=2)
    write_tone(tmp_path / "audio/phone.wav", 0.7, seed=2, rate=8000)
    write_tone(tmp_path / "audio/long.wav", 5.0, seed=3)
    soundfile.write(tmp_path / "audio/plain.flac", *soundfile.read(tmp_path / "audio/phone.wav"))
    lines = [
        {"audio_filepath": "audio/wide.wav", "duration": 1.0, "text": "a", "lang": "en"},
        {"audio_filepath": "audio/phone.wav", "duration": 0.7, "text": "b c", "id": "x.y/z"},
        {"audio_filepath": "audio/long.wav", "duration": 1.25, "offset": 3.5, "text": "d"}
        | {"alignment": {"word": [["d", 3.75, 0.5]]}},
        {"audio_filepath": "audio/plain.flac", "duration": 0.7, "text": "e", "ast_text": "f", "task": "ast"}
        | {"source_lang": "en", "target_lang": "zh"},
    ]
    return SourceConfig(str(write_manifest(tmp_path / "m.jsonl", lines)))


def write(source, tmp_path, to, **options):
    if to == "shar":
        output = tmp_path / "out"
        convert_to_shar(source, output, shard_size=3, **options)
    else:
        output = tmp_path / f"out{to}"
        convert_to_cuts(source, output, **options)
    return list(read_manifest(SourceConfig(str(output))))


@pytest.mark.parametrize("to", [".jsonl", ".jsonl.gz", "shar"])
def test_entries_and_samples_come_back(source, tmp_path, to):
    before, after = list(read_manifest(source)), write(source, tmp_path, to)
    assert [describe_cut(cut) for cut in after] == [describe_cut(cut) for cut in before]
    assert [describe_cut(cut).words for cut in after] == [None, None, (("d", 0.25, 0.75),), None]
    for one, other in zip(before, after, strict=True):
        assert np.array_equal(load_samples(one), load_samples(other)), one.id
        assert (other.recording.sampling_rate, other.num_channels) == rate_and_channels(one)


def rate_and_channels(cut) -> tuple[int, int]:
    info = soundfile.info(cut.recording.sources[0].source)
    return info.samplerate, info.channels


@pytest.mark.parametrize("to", [".jsonl.gz", "shar"])
def test_lhotse_reads_what_was_written_without_us(source, tmp_path, to):
    before = list(read_manifest(source))
    write(source, tmp_path, to, features="fbank")
    if to == "shar":
        assert len(list((tmp_path / "out").glob("cuts.*"))) == 2  # 4 utterances in shards of 3
        cuts = CutSet.from_shar(in_dir=tmp_path / "out")
    else:
        cuts = CutSet.from_file(tmp_path / f"out{to}")
    for one, cut in zip(before, cuts, strict=True):
        assert cut.load_audio().shape == (cut.num_channels, round(one.duration * cut.recording.sampling_rate))
        expected = fbank(load_samples(one))
        torch.testing.assert_close(torch.tensor(cut.load_features()), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("to", [".jsonl.gz", "shar"])
def test_stored_features_have_the_kind_that_was_asked_for(source, tmp_path, to):
    write(source, tmp_path, to, features="whisper128")
    stored = SourceConfig(str(tmp_path / ("out" if to == "shar" else f"out{to}")))
    for one, cut in zip(read_manifest(source), read_manifest(stored), strict=True):
        expected = extract_features(load_samples(one), "whisper128")
        torch.testing.assert_close(load_precomputed(cut, "whisper128"), expected, rtol=0, atol=1e-6)
        with pytest.raises(UtteranceError, match="stored are whisper128, the model needs fbank"):
            load_precomputed(cut, "fbank")


@pytest.mark.parametrize(("audio_format", "formats"), [("wav", {"WAV"}), ("flac", {"FLAC"})])
def test_the_format_is_the_one_asked_for(source, tmp_path, audio_format, formats):
    convert_to_shar(source, tmp_path / "out", audio_format=audio_format)
    assert stored_formats(tmp_path / "out") == formats


def test_the_original_formats_are_kept(source, tmp_path):
    convert_to_shar(source, tmp_path / "out", audio_format="original")
    assert stored_formats(tmp_path / "out") == {"WAV", "FLAC"}


def stored_formats(folder) -> set[str]:
    cuts = CutSet.from_shar(in_dir=folder)
    return {cut.recording.sources[0].format.upper() for cut in cuts}


@pytest.mark.parametrize("to", [".jsonl", "shar"])
def test_mixed_cuts_and_shar_itself_are_converted(corpus, tmp_path, to):
    cuts = [Recording.from_file(path).to_cut() for path in sorted((corpus / "b").glob("*.wav"))[:4]]
    cuts = [cuts[0].append(cuts[1]).with_id("both"), cuts[2].pad(3.0).with_id("padded"), cuts[3]]
    CutSet.from_cuts(cuts).to_file(tmp_path / "cuts.jsonl")
    after = write(SourceConfig(str(tmp_path / "cuts.jsonl")), tmp_path, to)
    for one, other in zip(cuts, after, strict=True):
        assert one.id == other.id
        np.testing.assert_allclose(load_samples(one), load_samples(other), atol=1 / 65536)
    if to == "shar":
        again = tmp_path / "again"
        convert_to_shar(SourceConfig(str(tmp_path / "out")), again, audio_format="wav")
        for one, other in zip(after, read_manifest(SourceConfig(str(again))), strict=True):
            assert describe_cut(one) == describe_cut(other)
            assert np.array_equal(load_samples(one), load_samples(other))
        with pytest.raises(UserError, match="use --to shar"):
            convert_to_cuts(SourceConfig(str(again)), tmp_path / "from_shar.jsonl")
        assert not (tmp_path / "from_shar.jsonl").exists()


@pytest.mark.parametrize("to", ["cuts", "shar"])
def test_bad_utterances_are_left_out_and_reported(source, tmp_path, to, capsys):
    path = tmp_path / "m.jsonl"
    lines = path.read_text().splitlines()
    missing = json.dumps({"audio_filepath": "missing.wav", "duration": 1.0, "text": "x"})
    path.write_text("\n".join([lines[0], missing, lines[1][:-1], *lines[2:]]))
    output = tmp_path / "out.jsonl.gz"
    assert status(path, output, "--to", to) == 1
    printed = capsys.readouterr()
    assert "3 utterances" not in printed.err and "3 utterances" in printed.out
    assert "m.jsonl:2: missing file" in printed.err and "m.jsonl:3: bad manifest line" in printed.err
    assert [cut.id for cut in read_manifest(SourceConfig(str(output)))] == [
        cut.id for cut in read_manifest(SourceConfig(str(write_manifest_lines(tmp_path, [lines[0], *lines[2:]]))))
    ]
    assert status(path, output, "--to", to) == 1
    assert "exists already" in capsys.readouterr().err


def write_manifest_lines(folder, lines):
    path = folder / "good.jsonl"
    path.write_text("\n".join(lines))
    return path


@pytest.mark.parametrize("to", ["cuts", "shar"])
def test_nothing_usable_leaves_nothing_behind(tmp_path, to, capsys):
    path = write_manifest(tmp_path / "m.jsonl", [{"audio_filepath": "0.wav", "duration": 1.0, "text": "x"}])
    output = tmp_path / "out.jsonl"
    assert status(path, output, "--to", to, "--features", "fbank") == 1
    assert "no utterance can be used: 1 missing file" in capsys.readouterr().err
    assert [file.name for file in tmp_path.iterdir()] == ["m.jsonl"]


def test_a_conversion_in_parts_goes_on_where_it_was_stopped(source, tmp_path):
    computed, stop_at = [], [3]

    def extract(samples):
        if len(computed) == stop_at[0]:
            raise KeyboardInterrupt
        computed.append(len(samples))
        return np.full((len(samples) // 160, 80), len(computed), np.float32)

    output = tmp_path / "out.jsonl"
    with pytest.raises(KeyboardInterrupt):
        convert_to_cuts_in_parts(source, output, "fbank", extract, part_size=2)
    assert not output.exists() and len(computed) == 3
    stop_at[0] = None
    convert_to_cuts_in_parts(source, output, "fbank", extract, part_size=2)
    assert len(computed) == 3 + 2  # the first part is not computed again
    cuts = list(read_manifest(SourceConfig(str(output))))
    assert [describe_cut(cut) for cut in cuts] == [describe_cut(cut) for cut in read_manifest(source)]
    assert [cut.load_features()[0, 0] for cut in cuts] == [1, 2, 4, 5]
    with pytest.raises(UserError, match="exists already"):
        convert_to_cuts_in_parts(source, output, "fbank", extract)


def test_a_part_may_be_bad_but_not_all_of_them(source, tmp_path):
    lines = Path(source.path).read_text().splitlines(keepends=True)
    Path(source.path).write_text("".join(["{}\n"] * 2 + lines))
    convert_to_cuts_in_parts(source, tmp_path / "out.jsonl", "fbank", lambda x: np.zeros((len(x) // 160, 80)), 2)
    assert len(list(read_manifest(SourceConfig(str(tmp_path / "out.jsonl"))))) == 4
    Path(source.path).write_text("{}\n" * 3)
    with pytest.raises(UserError, match="no utterance can be used: 3 bad manifest line"):
        convert_to_cuts_in_parts(source, tmp_path / "none.jsonl", "fbank", len, 2)
    assert not (tmp_path / "none.jsonl").exists()


def test_no_two_utterances_share_stored_features(tmp_path):
    """Ids that differ behind a dot or in case alone, that are the same for two tasks, or too long for a file name."""
    ids = ["a.b", "a.c", "A.b", "x/a", "y/a", "a", "a", "n" * 300, ""]
    lines = []
    for i, name in enumerate(ids):
        write_tone(tmp_path / f"{i}.wav", 0.3, seed=i)
        lines.append({"audio_filepath": f"{i}.wav", "duration": 0.3, "text": str(i), "id": name})
    lines[-3] |= {"task": "ast", "ast_text": "6", "target_lang": "de", "lang": "en"}
    source = SourceConfig(str(write_manifest(tmp_path / "m.jsonl", lines)))
    assert convert_to_cuts(source, tmp_path / "cuts.jsonl", features="fbank").utterances == len(ids)
    cuts = list(read_manifest(tmp_path / "cuts.jsonl"))
    assert len({cut.features.storage_key for cut in cuts}) == len(ids)
    for cut, true in zip(cuts, read_manifest(source), strict=True):
        torch.testing.assert_close(load_precomputed(cut, "fbank"), fbank(load_samples(true)))
