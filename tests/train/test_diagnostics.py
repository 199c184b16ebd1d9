"""Statistics of activations: the numbers are those of the tensors, and what made a NaN is named."""

import copy
import math
import random

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from speechllm.train.diagnostics import ActivationStatistics


def first_line(report, start):
    return next(line for line in report.splitlines() if line.startswith(start))


def row(report, name):
    return next(line for line in report.splitlines() if line.split()[:1] == [name]).split()


def output_names(report):
    return [line.split()[0] for line in report.split("\n\n")[1].splitlines()[1:]]


def run(model, batch):
    with ActivationStatistics(model) as statistics:
        model(*batch)["loss"].backward()
    return statistics.report()


def test_numbers_are_those_of_the_tensors():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 1))
    inputs = [torch.randn(3, 5), torch.randn(7, 5)]
    with ActivationStatistics(model) as statistics:
        for x in inputs:
            model(x).sum().backward()
    report = statistics.report()
    y = model[1](model[0](torch.cat(inputs))).detach()
    gradient = model[2].weight.detach().expand_as(y)
    expected = [y.abs().mean(), y.square().mean().sqrt(), y.abs().max(), 100 * (y == 0).double().mean()]
    expected += [gradient.square().mean().sqrt(), gradient.abs().max()]
    name, kind, *cells = row(report, "1")
    assert kind == "ReLU"
    assert [float(c.rstrip("%")) for c in cells] == pytest.approx([e.item() for e in expected], rel=6e-3)
    weight, cells = model[2].weight, row(report, "2.weight")
    rms, gradient_rms = (t.square().mean().sqrt().item() for t in (weight, weight.grad))
    assert [float(cells[i]) for i in (2, 5, 7)] == pytest.approx([rms, gradient_rms, gradient_rms / rms], rel=6e-3)
    assert report.startswith("all outputs, parameters and gradients are finite")


def test_watching_changes_nothing_and_leaves_no_hook(model, batch):
    other = copy.deepcopy(model)
    for watched in (model, other):
        torch.manual_seed(1)
        random.seed(1)  # the encoder's balancers draw from it
        if watched is model:
            report = run(watched, batch)
        else:
            watched(*batch)["loss"].backward()
    for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        assert p.grad is None or torch.equal(p.grad, q.grad), name
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    for name in ("(model)", "encoder", "projector", "llm.ln_out", "ctc_head", "projector.out_proj.weight"):
        assert row(report, name)


def test_the_layer_that_makes_a_nan_is_named(model, batch):
    name = "llm.blocks.1.ffn.key"
    model.eval()  # no random draws
    clean = run(copy.deepcopy(model), batch)
    model.get_submodule(name).register_forward_hook(lambda module, args, output: output / 0.0 * 0.0)
    with ActivationStatistics(model) as statistics, torch.no_grad():
        model(*batch)
    report = statistics.report()
    line = first_line(report, "first non-finite output")
    assert line.startswith(f"first non-finite output: {name} (Linear)") and "the layer itself makes it" in line
    names = output_names(report)
    assert sorted(names) == sorted(output_names(clean))
    assert names.index(name) < names.index("encoder")  # what is not finite comes first


def test_a_damaged_parameter_is_named(model, batch):
    with torch.no_grad():
        model.projector.out_proj.weight[0, 0] = math.inf
    report = run(model, batch)
    line = first_line(report, "first non-finite parameter")
    assert line.startswith("first non-finite parameter: projector.out_proj.weight, 1 of ")
    assert "projector.out_proj (" in first_line(report, "first non-finite output")


def test_a_batch_that_is_not_finite_is_named(model, batch):
    features, *rest = batch
    features[0, 3, 7] = math.nan
    report = run(model, (features, *rest))
    assert report.startswith("the model's input is not finite")
    assert "it comes from the model's input" in first_line(report, "first non-finite output")


class Functional(nn.Module):
    """Two layers, `between` them, and `behind` them."""

    def __init__(self, between=torch.clone, behind=torch.sum):
        super().__init__()
        self.first, self.second, self.between, self.behind = nn.Linear(3, 3), nn.Linear(3, 3), between, behind

    def forward(self, x):
        return {"loss": self.behind(self.second(self.between(self.first(x)))).sum()}


def test_a_nan_from_between_the_layers_is_not_blamed_on_the_next():
    report = run(Functional(lambda x: x.abs().neg().log()), (torch.randn(2, 3),))
    line = first_line(report, "first non-finite output")
    assert line.startswith("first non-finite output: second (Linear): 6 nan, 0 inf of 6")
    assert "made after the output of first, in the code between the layers" in line


def test_a_loss_that_is_not_finite_behind_finite_layers_is_found():
    line = first_line(run(Functional(behind=lambda x: x * math.inf), (torch.randn(2, 3),)), "first non-finite output")
    assert line.startswith("first non-finite output: (model) (Functional): ") and "itself makes it" in line


def test_a_gradient_that_is_not_finite_is_found_where_outputs_are():
    report = run(Functional(lambda x: (x * 0).sqrt()), (torch.randn(2, 3),))  # the slope at 0 is infinite
    assert "first non-finite output" not in report
    line = first_line(report, "first non-finite gradient of an output")
    assert "backward order: first (Linear)" in line and line.endswith("the last finite one is that of second (Linear)")
    assert "first.weight, 2 of 4" in first_line(report, "first non-finite gradient of a parameter")


def test_a_model_wrapped_for_ddp_has_the_same_report(model, batch, tmp_path):
    model.eval()  # no random draws
    expected = run(copy.deepcopy(model), batch)
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        assert run(DistributedDataParallel(model), batch) == expected
    finally:
        torch.distributed.destroy_process_group()
