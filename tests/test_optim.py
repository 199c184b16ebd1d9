"""Parameter groups and the learning-rate schedule."""

import pytest
import torch

from speechllm.config import ConfigError
from speechllm.optim import OptimConfig, build_optimizer, build_scheduler, lr_factor, parameter_groups


def test_groups_hold_each_trainable_parameter_once(model):
    model.projector.requires_grad_(False)
    groups = parameter_groups(model, OptimConfig(lr=1.0, lr_scale={"llm": 0.5}, weight_decay=0.1))
    params = [p for group in groups for p in group["params"]]
    assert len(params) == len(set(params)) and set(params) == {p for p in model.parameters() if p.requires_grad}
    for group in groups:
        assert group["lr"] == (0.5 if group["name"] == "llm" else 1.0)
        for p in group["params"]:
            assert (group["weight_decay"] > 0) == (p.squeeze().dim() >= 2)


def test_mistakes_are_named(model):
    with pytest.raises(ConfigError, match="lr_scale: lm is not a trained part; trained: ctc_head, encoder, llm"):
        parameter_groups(model, OptimConfig(lr_scale={"lm": 2.0}))
    with pytest.raises(ConfigError, match="no parameter is trainable"):
        parameter_groups(model.requires_grad_(False), OptimConfig())
    with pytest.raises(ValueError, match="betas must be two numbers"):
        OptimConfig(betas=[0.9])


def test_schedule(model):
    factors = [lr_factor(step, 10, 110, 0.1) for step in range(120)]
    assert factors[0] == 0.1 and factors[9] == factors[10] == 1.0
    assert all(a > b for a, b in zip(factors[10:110], factors[11:111], strict=True))
    assert factors[60] == pytest.approx(0.55) and factors[110:] == pytest.approx([0.1] * 10)

    config = OptimConfig(lr=2.0, lr_scale={"llm": 0.5}, warmup_steps=4)
    optimizer = build_optimizer(model, config)
    scheduler = build_scheduler(optimizer, config, 20)
    for step in range(20):
        for group in optimizer.param_groups:
            scale = 0.5 if group["name"] == "llm" else 1.0
            assert group["lr"] == pytest.approx(2.0 * scale * lr_factor(step, 4, 20, config.final_lr_factor))
        optimizer.step()
        scheduler.step()


def test_no_weight_decay_on_vectors(model):
    optimizer = build_optimizer(model, OptimConfig(lr=0.1, weight_decay=0.5))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for name, p in model.named_parameters():
        factor = 1 - 0.1 * 0.5 if p.squeeze().dim() >= 2 else 1.0
        torch.testing.assert_close(p.detach(), before[name] * factor)
