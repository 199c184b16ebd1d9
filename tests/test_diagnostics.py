"""Statistics of activations: right numbers, and the place where something stops being finite."""

import pytest
import torch
from torch import nn

from speechllm.diagnostics import ActivationStatistics
from speechllm.model import SpeechLLM


def cells(report: str, section: str, name: str) -> list[str]:
    lines = report.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(section))
    return next(line.split()[1:] for line in lines[start + 1 :] if line.split()[:1] == [name])


def test_numbers_are_those_of_the_tensors():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU())
    x = torch.randn(5, 4)
    with ActivationStatistics(model) as statistics:
        model(x).square().sum().backward()
        model(x)  # sums go on
    report = statistics.report()
    out = model[0](x).relu()
    expected = [out.abs().mean(), out.square().mean().sqrt(), out.max(), 100 * (out == 0).float().mean()]
    got = [float(cell) for cell in cells(report, "output of", "1")]
    assert got[:4] == pytest.approx([float(v) for v in expected], rel=1e-2, abs=0.05) and got[4] == 0
    weight = [float(cell) for cell in cells(report, "parameter", "0.weight")]
    assert weight[0] == pytest.approx(model[0].weight.square().mean().sqrt().item(), rel=1e-2)
    assert weight[2] == pytest.approx(weight[1] / weight[0], rel=2e-2)
    model(x * torch.inf)  # afterwards nothing is watched
    assert statistics.report() == report


def test_the_first_module_that_is_not_finite_is_named(model_config):
    model = SpeechLLM.from_config(model_config).train()
    with torch.no_grad():
        model.projector.out_proj.weight[0, 0] = torch.nan
    before = list(dict(model.projector.named_modules()))
    with ActivationStatistics(model) as statistics:
        out = model(torch.randn(2, 100, 80), torch.tensor([100, 90]), ["one", "two"], ["en", "en"])
        out["loss"].backward()
    report = statistics.report()
    assert report.startswith("first non-finite output: projector.out_proj"), before
    assert "first non-finite gradient on the way back" in report
