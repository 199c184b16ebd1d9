"""The decoding benchmark measures what it says, on tiny models."""

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


@pytest.mark.parametrize("name", ["speechllm", "transformers"])
def test_every_search_writes_all_tokens(bench, folder, name):
    model = bench.LANGUAGE_MODELS[name](folder, CONFIG, 7)
    for beam in model.searches:
        with torch.no_grad():
            assert model.decode(3, beam) == [7, 7, 7]


def test_models_have_about_the_same_size(bench, folder):
    ours = bench.SpeechLLM(folder, CONFIG, 1).parameters
    theirs = bench.Transformers(folder, CONFIG, 1).parameters
    assert theirs == pytest.approx(ours, rel=0.01)


def test_what_a_search_does_not_write_is_a_failure(bench, folder, monkeypatch):
    args = Namespace(tokens=5, batches=[1], repeat=1, profile=False)
    monkeypatch.setattr(bench.SpeechLLM, "decode", lambda self, batch, beam: [4])
    with pytest.raises(RuntimeError, match=r"wrote \[4\] tokens, not 5"):
        bench.measure_decoding("speechllm", 1, folder, CONFIG, args)


def test_tables(bench, folder, capsys, monkeypatch):
    """In this process: the speed of the reference's largest batch stands for larger ones."""
    monkeypatch.setattr(bench, "in_own_process", lambda function, *args, threads: function(*args))
    monkeypatch.setitem(bench.LANGUAGE_MODELS, "rwkv", FewUtterances)
    args = Namespace(tokens=4, batches=[1, 2], repeat=1, profile=False, skip=["transformers"], threads=1)
    bench.bench_decoding(folder, CONFIG, args)
    speeds, times = (
        [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if line.startswith("|")]
        for table in capsys.readouterr().out.split("Time of beam")
    )
    assert [row[0] for row in speeds[2:]] == ["speechllm, greedy", "speechllm, beam 4", "rwkv, greedy"]
    greedy, _, reference = speeds[2:]
    assert reference[3] == "1.00" and reference[6:] == ["-"] * 4
    for batch in (0, 1):
        tokens_per_second = [float(row[2 + 4 * batch].split()[0]) for row in (greedy, speeds[3])]
        assert float(greedy[4 + 4 * batch]) == pytest.approx(4 / tokens_per_second[0] / 10, abs=6e-4)
        slower = tokens_per_second[0] / tokens_per_second[1]
        assert float(times[2][1 + batch]) == pytest.approx(slower, rel=0.02)
        of_reference = tokens_per_second[0] / float(reference[2].split()[0])
        assert float(greedy[3 + 4 * batch]) == pytest.approx(of_reference, rel=0.02, abs=0.01)


class FewUtterances:
    searches, largest_batch, parameters = (1,), 1, 0

    def __init__(self, folder, config, tokens):
        self.tokens = tokens

    def decode(self, batch, beam):
        torch.randn(300, 300) @ torch.randn(300, 300)
        return [self.tokens] * batch


def test_the_encoder_is_the_released_one(bench):
    with torch.device("meta"):
        encoder = Zipformer(bench.encoder_config(1))
    assert sum(p.numel() for p in encoder.parameters()) == pytest.approx(152.7e6, abs=1e5)


def test_encoder_counts_more_for_more_audio(bench):
    args = Namespace(encoder_scale=16, repeat=1, profile=False)
    one, two = (bench.measure_encoder(rows, 2.0, args) for rows in (1, 2))
    assert two.flops == pytest.approx(2 * one.flops, rel=0.01)
    assert one.product_rate > 0 and one.memory > 0 and len(one.seconds) == 1
