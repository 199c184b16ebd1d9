"""Commands in Kaldi's wav.scp: run once for a recording, whoever needs it."""

import os
import subprocess
import sys

import numpy as np
import pytest
import soundfile

from speechllm.data import DataConfig, SourceConfig, build_train_loader
from speechllm.data.audio import load_samples
from speechllm.data.check import CheckOptions, check_manifests
from speechllm.data.commands import command_output
from speechllm.data.manifests.manifest import read_manifest


@pytest.fixture
def kaldi(tmp_path):
    """A data directory with 12 segments of two recordings, which commands write and a log counts."""
    samples = 0.1 * np.random.default_rng(0).standard_normal(16000 * 8)
    soundfile.write(tmp_path / "long.wav", samples, 16000)
    folder = tmp_path / "data"
    folder.mkdir()
    command = f"echo run >> {tmp_path}/log; cat {tmp_path}/long.wav"
    (folder / "wav.scp").write_text(f"a {command} |\nb : ; {command} |\n")
    rows = [(f"{r}-{i}", r, i, -1 if i == 5 else i + 1) for r in "ab" for i in range(6)]
    (folder / "segments").write_text("".join(f"{u} {r} {start} {end}\n" for u, r, start, end in rows))
    (folder / "text").write_text("".join(f"{u} words\n" for u, *_ in rows))
    return SourceConfig(str(folder)), samples, tmp_path / "log"


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("stream", [False, True])
def test_an_epoch_runs_each_command_once(kaldi, workers, stream, tmp_path):
    source, _, log = kaldi
    source.stream = stream
    config = DataConfig(train=[source], num_workers=workers, max_duration=4.0, index_dir=str(tmp_path / "index"))
    loader = build_train_loader(config, seed=1)
    for epoch in (1, 2):
        loader.set_epoch(epoch)
        assert sum(len(batch) for batch in loader) == 12 and not loader.skipped
    assert log.read_text() == "run\n" * 2


def test_a_check_runs_each_command_once(kaldi):
    source, _, log = kaldi
    assert not check_manifests([source], CheckOptions(audio="full", jobs=3)).problem_counts
    assert log.read_text() == "run\n" * 2


def test_segments_of_what_a_command_writes(kaldi):
    source, samples, _ = kaldi
    for cut in read_manifest(source):
        start = round(cut.start * 16000)
        end = len(samples) if cut.id.endswith("5") else start + 16000
        np.testing.assert_allclose(load_samples(cut), samples[start:end], atol=1e-4)


def test_a_command_that_fails_is_run_again_and_leaves_nothing(tmp_path):
    command = f"echo x >> {tmp_path}/log; echo half; exit $(test $(wc -l < {tmp_path}/log) -gt 1; echo $?)"
    with pytest.raises(subprocess.CalledProcessError):
        command_output(command, keep=True)
    with open(command_output(command, keep=True), "rb") as file:
        assert file.read() == b"half\n"


def test_without_room_nothing_is_kept(kaldi, monkeypatch, caplog):
    source, _, log = kaldi
    monkeypatch.setattr("speechllm.data.commands._LEAST_FREE", 1 << 80)
    cuts = list(read_manifest(source))
    for cut in cuts:
        load_samples(cut)
    assert log.read_text().count("run") > 12 and caplog.text.count("less than a gigabyte is free") == 1


def test_the_folder_goes_with_the_process(tmp_path):
    code = "from speechllm.data.commands import command_output as c; print(c('echo x', keep=True))"
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    environment.pop("SPEECHLLM_COMMAND_OUTPUT", None)
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert run.stdout.startswith(str(tmp_path)) and os.listdir(tmp_path) == []
