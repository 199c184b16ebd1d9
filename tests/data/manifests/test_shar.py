"""lhotse Shar directories: features, cuts without data, and what can be wrong."""

import gzip

import numpy as np
import pytest
from lhotse import CutSet, Fbank

from speechllm.data import ManifestError, SourceConfig, read_manifest
from speechllm.data.audio import load_samples
from speechllm.data.manifests.manifest import describe_cut, iter_objects, manifest_files
from speechllm.data.manifests.stream import stream_cuts
from speechllm.data.manifests.tar import TAR, with_tar_data
from tests.data.corpora import streamed, true_cuts, write_corpus, write_kind


def problems(source) -> list[str]:
    return [str(found) for _, found in iter_objects(source) if isinstance(found, ManifestError)]


def change_lines(path, change) -> None:
    lines = gzip.decompress(path.read_bytes()).decode().splitlines()
    path.write_bytes(gzip.compress("".join(line + "\n" for line in change(lines)).encode()))


@pytest.fixture
def shar(tmp_path):
    lines = write_corpus(tmp_path)
    return write_kind("shar", tmp_path, lines), lines, tmp_path / "shar"


def test_features(tmp_path):
    lines = write_corpus(tmp_path, 13)[::2]  # those at 16 kHz
    cuts = CutSet.from_cuts(true_cuts(tmp_path, lines)).compute_and_store_features(Fbank(), tmp_path / "feats")
    (tmp_path / "shar").mkdir()
    cuts.to_shar(tmp_path / "shar", fields={"recording": "wav", "features": "numpy"}, shard_size=3)
    source = SourceConfig(str(tmp_path / "shar"))
    assert len(manifest_files(source)) == 9
    for cut, true in zip(read_manifest(source), cuts, strict=True):
        loaded = with_tar_data(cut)
        assert TAR in cut.custom and TAR not in (loaded.custom or {}) and with_tar_data(loaded) is loaded
        np.testing.assert_allclose(loaded.load_features(), true.load_features(), atol=1e-6)
        np.testing.assert_allclose(load_samples(cut), load_samples(true), atol=1e-4)


def test_cuts_without_data(tmp_path):
    first, second = true_cuts(tmp_path, write_corpus(tmp_path, 2))
    first.recording = None
    (tmp_path / "shar").mkdir()
    CutSet.from_cuts([first, second]).to_shar(tmp_path / "shar", fields={"recording": "wav"})
    without, with_audio = read_manifest(tmp_path / "shar")
    assert not without.has_recording and len(load_samples(with_audio))


def test_cuts_and_data_must_go_together(shar):
    source, lines, folder = shar
    change_lines(folder / "cuts.000000.jsonl.gz", lambda rows: [rows[1], "{", rows[2]])
    change_lines(folder / "cuts.000001.jsonl.gz", lambda rows: rows[:2])
    change_lines(folder / "cuts.000002.jsonl.gz", lambda rows: rows * 2)
    wrong_id, invalid, more_data, more_cuts = problems(source)
    assert "cuts.000000.jsonl.gz:1: cut 'u1', but" in wrong_id and "'u0' in its place" in wrong_id
    assert "cuts.000000.jsonl.gz:2: invalid JSON" in invalid
    assert "cuts.000001.jsonl.gz:u5: the shard has data of this cut" in more_data
    assert "cuts.000002.jsonl.gz:2: " in more_cuts and "recording.000002.tar ends before this cut" in more_cuts
    good = [obj["id"] for _, obj in iter_objects(source) if not isinstance(obj, ManifestError)]
    assert good == ["u2", "u3", "u4", "u6"]


def test_a_damaged_shard_leaves_the_others(shar):
    source, lines, folder = shar
    tar = folder / "recording.000000.tar"
    tar.write_bytes(tar.read_bytes()[:2000])
    found = problems(source)
    assert len(found) == 3 and f"{tar}: not a whole, uncompressed tar file" in found[0]
    cuts, errors = streamed(source)
    assert {cut.id for cut in cuts} == {line["id"] for line in lines[3:]}
    assert len(errors) == 1 and f"{tar}: not a whole, uncompressed tar file" in errors[0]


def test_a_shard_is_missing(shar):
    source, _, folder = shar
    (folder / "recording.000001.tar").unlink()
    with pytest.raises(ManifestError, match="3 shards of cuts, but 2 of recording"):
        read_manifest(source)


def test_streams_through_commands(shar):
    _, lines, folder = shar
    source = SourceConfig(f"pipe:gzip -dcf {folder}/cuts.00000{{0..2}}.jsonl.gz", stream=True, lang="xx", task="ast")
    cuts = list(stream_cuts(source, seed=0, epoch=0))
    assert {cut.id for cut in cuts} == {line["id"] for line in lines}
    assert {(describe_cut(cut).lang, describe_cut(cut).task) for cut in cuts} == {("en", "ast")}
    with pytest.raises(ManifestError, match="expected the pattern of the cuts"):
        list(stream_cuts(SourceConfig("pipe:cat something", stream=True), seed=0, epoch=0))
