"""The training benchmark measures what it says, on a tiny model."""

import json
import multiprocessing
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from speechllm.encoder import Zipformer
from speechllm.linear import product
from speechllm.optim.optimizer import OptimConfig
from speechllm.rwkv7 import wkv7

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def bench():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "tools")
        import bench_train

        yield bench_train


@pytest.fixture
def case(bench, model_config):
    return bench.Case("tiny", model_config, "all", OptimConfig(), batch_seconds=4.0, utterance_seconds=2.0)


def measured(bench, case, folder, steps=3):
    return bench.measure(case, folder, steps, "cpu", "fp32", False, multiprocessing.get_start_method())


def test_parts_add_up_to_the_step_and_the_tables_show_them(bench, case, tmp_path, capsys):
    result = measured(bench, case, tmp_path / "data")
    assert len(result.times) == 3
    # every border was crossed, so no part's time is in another's
    assert set(result.parts) == set(bench.PARTS) and min(result.parts.values()) > 0
    assert sum(result.parts.values()) == pytest.approx(sum(result.times) / 3, rel=0.03)
    # two or three utterances of 1.6 to 2 s a batch, with 25 tokens a second of audio and prompt at the very least
    assert 3 * 2 * 1.6 <= result.audio_seconds <= 3 * 4.0
    assert result.positions > 12.5 * result.audio_seconds
    assert result.memory > 0 and result.flops > 0 and result.product_rate > 0

    bench.print_results([case, replace(case, name="large")], [result, bench.Failure("out of memory")])
    lines = capsys.readouterr().out.splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    assert [row[:2] for row in rows if row[0] in ("tiny", "large")] == [
        ["tiny", "all"],
        ["large", "all"],
        ["tiny", "all"],
    ]
    assert rows[3][2] == "out of memory"
    header, values = rows[4], rows[6]
    shares = {name: value for name, value in zip(header, values, strict=True) if name in bench.PARTS}
    assert sum(float(value.split("(")[1].split("%")[0]) for value in shares.values()) == pytest.approx(100, abs=5)


@pytest.mark.parametrize(
    ("way", "trains"),
    [
        ("projector", {"projector", "ctc_head"}),
        ("lora", {"projector", "ctc_head", "llm"}),
        ("miss", {"projector", "ctc_head", "llm"}),
        ("all", {"encoder", "projector", "ctc_head", "llm"}),
    ],
)
def test_ways_train_what_they_say(bench, case, way, trains):
    model = bench.build_model(replace(case, way=way), "cpu")
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert {name.partition(".")[0] for name in trained} == trains
    adapted = [name for name in trained if name.startswith("llm.")]
    assert way in ("projector", "all") or all(way in name for name in adapted)


def test_published_cases(bench):
    """The encoder has the released one's shapes; checkpointing is on where the row says so."""
    shapes = json.loads((ROOT / "tests/golden/zipformer/tta_m10_shapes.json").read_text())
    case = bench.published_case("0.1b", "all-checkpointed", 20.0)
    with torch.device("meta"):
        encoder = Zipformer(case.model.encoder.zipformer)
    assert {name: list(t.shape) for name, t in encoder.state_dict().items()} == shapes
    assert case.model.encoder.checkpoint_layers and case.model.llm.checkpoint_blocks
    case = bench.published_case("0.1b", "all", 20.0)
    assert not case.model.encoder.checkpoint_layers and not case.model.llm.checkpoint_blocks


def test_digits_case_is_its_configuration(bench, tmp_path):
    bench.make_tokenizer(tmp_path)
    case = bench.digits_case(tmp_path)
    assert case.batch_seconds == 40 and case.model.llm.rwkv7.n_layer == 3 and case.optim.lr == 2.5e-3
    model = bench.build_model(case, "cpu")
    assert model.ctc_head is not None and all(p.requires_grad for p in model.parameters())


def test_products_are_counted_whoever_computes_them(bench):
    """Also those of oneDNN, which PyTorch's counter does not know."""
    x, weight = torch.randn(2, 256, 256, requires_grad=True).unbind()
    assert bench.count_flops(lambda: product(x, weight).sum().backward()) == 3 * 2 * 256**3


def test_the_recurrence_is_counted(bench):
    """One chunk of the chunked form: products inside the chunk, and of the chunk with the state before and after it."""
    H, C, K = 2, 32, 64
    r, w, k, v, a, b = (torch.rand(1, C, H, K) for _ in range(6))
    counted = bench.count_flops(lambda: wkv7(r, -0.5 * w, k, v, a, b, backend="chunked"))
    inside = (
        (1 + 4 + 1 + 2 + 2) * C * C * K
    )  # summed decays, scores, the system and its right side (v), its solution, y
    with_state = (1 + 2 + 1) * C * K * K  # u, the next state, y
    assert counted == 2 * H * (inside + with_state)
