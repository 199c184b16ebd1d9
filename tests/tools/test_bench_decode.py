"""The decoding benchmark measures what it says, on tiny models."""

import re
import time
from argparse import Namespace
from pathlib import Path

import pytest
import torch

from speechllm.encoder import Zipformer
from speechllm.rwkv7 import RWKV7Config

ROOT = Path(__file__).parents[2]
CONFIG = RWKV7Config(2, 128, 300)


@pytest.fixture(scope="module")
def bench():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "tools")
        import bench_decode

        yield bench_decode


@pytest.fixture
def folder(bench, tmp_path):
    bench.prepare(CONFIG, tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", ["speechllm", "transformers", "speechllm, Qwen2"])
def test_every_search_writes_all_tokens(bench, folder, name):
    model = bench.LANGUAGE_MODELS[name](folder, CONFIG)
    for beam in model.searches:
        with torch.no_grad():
            assert model.decode(3, beam, 7) == [7, 7, 7]


def test_models_have_about_the_same_size(bench, folder):
    ours = bench.SpeechLLM(folder, CONFIG).parameters
    theirs = bench.Transformers(folder, CONFIG).parameters
    assert theirs == pytest.approx(ours, rel=0.01)


def test_what_a_search_does_not_write_is_a_failure(bench, folder, monkeypatch):
    args = Namespace(tokens=5, batches=[1], repeat=1, profile=False)
    monkeypatch.setattr(bench.SpeechLLM, "decode", lambda self, batch, beam, tokens: [4])
    with pytest.raises(RuntimeError, match=r"wrote \[4\] tokens, not 5"):
        bench.measure_decoding("speechllm", 1, folder, CONFIG, args)


def test_greedy_search_alone(bench, folder, capsys, monkeypatch):
    monkeypatch.setattr(bench, "in_own_process", lambda function, *args, threads: function(*args))
    skip = [name for name in bench.LANGUAGE_MODELS if name != "speechllm"]
    args = Namespace(tokens=4, batches=[1], repeat=1, profile=False, greedy=True, skip=skip, threads=1)
    bench.bench_decoding(folder, CONFIG, args)
    printed = capsys.readouterr()
    assert "speechllm, greedy" in printed.out and "beam 4" not in printed.out + printed.err


def test_tables(bench, folder, capsys, monkeypatch):
    """In this process: the speed of the reference's largest batch stands for larger ones."""
    monkeypatch.setattr(bench, "in_own_process", lambda function, *args, threads: function(*args))
    monkeypatch.setitem(bench.LANGUAGE_MODELS, "rwkv", FewUtterances)
    args = Namespace(
        tokens=4,
        batches=[1, 2],
        repeat=1,
        profile=False,
        greedy=False,
        skip=["transformers", "speechllm, Qwen2"],
        threads=1,
    )
    bench.bench_decoding(folder, CONFIG, args)
    out = capsys.readouterr().out
    one, two, beams = (
        [[cell.strip() for cell in line.strip("|").split("|")] for line in part.splitlines() if line.startswith("|")][
            2:
        ]
        for part in re.split("Batch 2|Seconds of beam", out)
    )
    for table in (one, two):
        assert [row[0] for row in table] == ["speechllm, greedy", "speechllm, beam 4", "rwkv, greedy"]
    reference = float(one[2][4].split()[0])
    assert one[2][3] == one[2][5] == "1.00" and two[2][2:] == ["-"] * 6
    for batch, table in ((1, one), (2, two)):
        greedy, beam = (float(row[4].split()[0]) for row in table[:2])
        assert float(table[0][6]) == pytest.approx(greedy / (10 * batch), abs=6e-4)
        assert float(table[0][5]) == pytest.approx(batch * reference / greedy, rel=0.02, abs=0.01)
        assert float(beams[0][batch]) == pytest.approx(beam / greedy, rel=0.02)


def rows_of(table):
    lines = [line.strip("|") for line in table.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.split("|")] for line in lines[2:]]


class FewUtterances:
    """The longer the more tokens."""

    searches, largest_batch, parameters = (1,), 1, 0

    def __init__(self, folder, config):
        pass

    def decode(self, batch, beam, tokens):
        time.sleep(0.05 * tokens)
        return [tokens] * batch


def test_tokens_per_second_leave_out_what_comes_before_the_second(bench):
    args = Namespace(batches=[8], tokens=41)
    assert bench.tokens_per_second(bench.Decoding([[5.0, 9.0]], [[1.0, 1.0]], [0], 0), 0, args) == [80.0, 40.0]


def test_the_encoder_is_the_released_one(bench):
    with torch.device("meta"):
        encoder = Zipformer(bench.encoder_config(1))
    assert sum(p.numel() for p in encoder.parameters()) == pytest.approx(152.7e6, abs=1e5)


def test_encoder_counts_more_for_more_audio(bench):
    args = Namespace(encoder_scale=16, repeat=1, profile=False, cpu_time=True)
    one, two = (bench.measure_encoder(rows, 2.0, "float32", args) for rows in (1, 2))
    assert two.flops == pytest.approx(2 * one.flops, rel=0.01)
    assert one.product_rate > 0 and one.memory > 0 and len(one.seconds) == 1
    half = bench.measure_encoder(2, 2.0, "bfloat16", args)
    assert half.flops == two.flops
    faster, error = bench.encoder_cells(half, two, 4.0)[5:7]
    assert float(faster) > 0 and 1e-4 < float(error) < 2e-2
