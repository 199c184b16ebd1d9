"""Parameter groups and the learning-rate schedule."""

import pytest
import torch
from torch import nn

from speechllm.config import ConfigError
from speechllm.optim import OptimConfig, build_optimizer, build_scheduler, lr_factor, parameter_groups


def rule_of(groups: list[dict]) -> dict:
    """Parameter -> (part, learning rate, weight decay)"""
    return {p: (group["name"], group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}


def test_groups_hold_each_trainable_parameter_once(model):
    model.projector.requires_grad_(False)
    groups = parameter_groups(model, OptimConfig(lr=1.0, lr_scale={"llm": 0.5}, weight_decay=0.1))
    rules = rule_of(groups)
    assert sum(len(group["params"]) for group in groups) == len(rules)
    assert set(rules) == {p for p in model.parameters() if p.requires_grad}
    for name, part in model.named_children():
        if name not in ("llm", "projector"):
            for p in part.parameters():
                assert rules[p] == (name, 1.0, 0.1 if p.squeeze().dim() >= 2 else 0.0)


@pytest.mark.parametrize("bare", [False, True])
def test_rwkv7_has_the_rules_of_its_own_training(model, bare):
    llm = model.llm
    att = llm.blocks[1].att
    # parameters as peft and state tuning add them
    att.receptance.lora_A = nn.ModuleDict({"default": nn.Linear(32, 4, bias=False)})
    llm.initial_wkv = nn.Parameter(torch.zeros(2, 2, 16, 16))
    rules = rule_of(parameter_groups(llm if bare else model, OptimConfig(lr=1.0, weight_decay=0.1)))

    matrices = {"receptance.weight", "key.weight", "value.weight", "output.weight", "receptance.lora_A.default.weight"}
    for name, p in att.named_parameters():
        assert rules[p] == ("llm", 2.0 if name == "w0" else 1.0, 0.1 if name in matrices else 0.0), name
    decayed = [llm.emb.weight, llm.head.weight, llm.blocks[0].ffn.key.weight, llm.blocks[0].ffn.value.weight]
    others = [llm.initial_wkv, llm.ln_out.weight, llm.ln_out.bias, llm.blocks[0].ln0.weight, llm.blocks[0].ffn.x_k]
    assert all(rules[p] == ("llm", 1.0, 0.1) for p in decayed) and all(rules[p] == ("llm", 1.0, 0.0) for p in others)
    assert set(rules) == set((llm if bare else model).parameters())

    llm.requires_grad_(False)
    att.w0.requires_grad_(True)
    rules = rule_of(parameter_groups(llm, OptimConfig(lr=1.0, lr_scale={"llm": 0.5})))
    assert rules == {att.w0: ("llm", 1.0, 0.0)}


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
    peak = [group["lr"] for group in optimizer.param_groups]
    scheduler = build_scheduler(optimizer, config, 20)
    for step in range(20):
        factor = lr_factor(step, 4, 20, config.final_lr_factor)
        assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([lr * factor for lr in peak])
        optimizer.step()
        scheduler.step()


def test_weight_decay_is_where_the_groups_say(model):
    optimizer = build_optimizer(model, OptimConfig(lr=0.1, weight_decay=0.5))
    rules = rule_of(optimizer.param_groups)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for name, p in model.named_parameters():
        _, lr, weight_decay = rules[p]
        torch.testing.assert_close(p.detach(), before[name] * (1 - lr * weight_decay))
