"""Parameter groups, what trains in a stage, and the learning-rate schedules."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from speechllm.config import ConfigError, from_dict
from speechllm.optim.optimizer import (
    Eden,
    OptimConfig,
    build_optimizer,
    build_scheduler,
    freeze_parameters,
    lr_factor,
    parameter_groups,
)
from speechllm.optim.scaled_adam import ScaledAdam

GOLDEN = Path(__file__).parents[1] / "golden" / "eden.json"


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
    rules = rule_of(
        parameter_groups(llm if bare else model, OptimConfig(lr=1.0, weight_decay=0.1), "llm" if bare else "")
    )

    matrices = {"receptance.weight", "key.weight", "value.weight", "output.weight", "receptance.lora_A.default.weight"}
    for name, p in att.named_parameters():
        assert rules[p] == ("llm", 2.0 if name == "w0" else 1.0, 0.1 if name in matrices else 0.0), name
    decayed = [llm.emb.weight, llm.head.weight, llm.blocks[0].ffn.key.weight, llm.blocks[0].ffn.value.weight]
    others = [llm.initial_wkv, llm.ln_out.weight, llm.ln_out.bias, llm.blocks[0].ln0.weight, llm.blocks[0].ffn.x_k]
    assert all(rules[p] == ("llm", 1.0, 0.1) for p in decayed) and all(rules[p] == ("llm", 1.0, 0.0) for p in others)
    assert set(rules) == set((llm if bare else model).parameters())

    llm.requires_grad_(False)
    att.w0.requires_grad_(True)
    rules = rule_of(parameter_groups(llm, OptimConfig(lr=1.0, lr_scale={"llm": 0.5}), part="llm"))
    assert rules == {att.w0: ("llm", 1.0, 0.0)}


def test_patterns_choose_by_name_and_the_last_match_counts(model):
    config = OptimConfig(
        lr=1.0,
        weight_decay=0.1,
        lr_scale={"llm": 0.5, "llm.blocks.0": 0.25, "*.att.receptance.weight": 0.125},
        weight_decay_scale={"llm.head": 0.0, "projector": 2.0},
    )
    rules = rule_of(parameter_groups(model, config))
    for name, p in model.named_parameters():
        part, lr, decay = rules[p]
        scale = 0.5 if part == "llm" else 1.0
        if name.startswith("llm.blocks.0."):
            scale = 0.25
        if name.endswith(".att.receptance.weight"):
            scale = 0.125
        assert lr == scale * (2 if name.endswith(".w0") else 1), name
        assert decay in (0.0, {"llm.head.weight": 0.0}.get(name, 0.2 if part == "projector" else 0.1)), name
    assert rules[model.projector.out_proj.weight][2] == 0.2


def test_freezing(model):
    """The lowest layers of an encoder; twice is once; what is frozen is in no group."""
    lowest = ["encoder.encoder_embed", "encoder.encoder.encoders.0"]
    optimizer = build_optimizer(model, OptimConfig(freeze=lowest))
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {n for n, _ in model.named_parameters() if n.startswith(tuple(f"{path}." for path in lowest))}
    assert len(frozen) > 10
    freeze_parameters(model, lowest)
    trained = {p for group in optimizer.param_groups for p in group["params"]}
    assert trained == {p for name, p in model.named_parameters() if name not in frozen}

    build_optimizer(model, OptimConfig(freeze=["encoder", "llm", "ctc_head"]))
    assert {n.partition(".")[0] for n, p in model.named_parameters() if p.requires_grad} == {"projector"}


def test_a_stage_of_projector_and_adapter(model):
    model.llm.requires_grad_(False)
    lora = model.llm.blocks[0].att.receptance
    lora.lora_A = nn.ModuleDict({"default": nn.Linear(32, 4, bias=False)})
    groups = parameter_groups(model, OptimConfig(lr=1.0, lr_scale={"llm.*.lora_*": 0.5}))
    assert rule_of(groups)[lora.lora_A.default.weight] == ("llm", 0.5, 0.01)


def test_mistakes_are_named(model):
    with pytest.raises(ConfigError, match="lr_scale: lm matches no trained parameter; did you mean llm.*parts: "):
        parameter_groups(model, OptimConfig(lr_scale={"lm": 2.0}))
    with pytest.raises(ConfigError, match=r"optim.freeze: encoder.encoder_embd .* did you mean encoder.encoder_embed"):
        build_optimizer(model, OptimConfig(freeze=["encoder.encoder_embd"]))
    with pytest.raises(ConfigError, match="optim.lr_scale: projector matches no trained parameter"):
        build_optimizer(model, OptimConfig(freeze=["projector"], lr_scale={"projector": 2.0}))
    with pytest.raises(ConfigError, match="no parameter is trainable"):
        build_optimizer(model, OptimConfig(freeze=["*"]))
    with pytest.raises(ValueError, match="betas must be two numbers"):
        OptimConfig(betas=[0.9])
    with pytest.raises(ValueError, match="lr_scale.llm must be positive, got 0.0; .* freeze"):
        OptimConfig(lr_scale={"llm": 0.0})
    with pytest.raises(ConfigError, match="name: expected one of adamw, scaled_adam, got 'adam'"):
        from_dict(OptimConfig, {"name": "adam"})


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"name": "scaled_adam", "weight_decay": 0.1}, "weight_decay: 0.1 is only for name: adamw, but name is scaled"),
        ({"name": "scaled_adam", "weight_decay_scale": {"llm": 0.0}}, "weight_decay_scale: .* only for name: adamw"),
        ({"name": "scaled_adam", "clip_grad_norm": 1.0}, "clip_grad_norm: 1.0 is only for name: adamw"),
        ({"clipping_scale": 3.0}, "clipping_scale: 3.0 is only for name: scaled_adam"),
        ({"schedule": "constant", "final_lr_factor": 0.1}, "final_lr_factor: 0.1 is only for schedule: cosine"),
        ({"lr_epochs": 5.0}, "lr_epochs: 5.0 is only for schedule: eden, but schedule is cosine"),
    ],
)
def test_settings_that_nothing_reads_are_mistakes(settings, message):
    with pytest.raises(ValueError, match=message):
        OptimConfig(**settings)


def test_scaled_adam(model):
    config = OptimConfig(name="scaled_adam", lr=0.04, lr_scale={"llm": 0.5}, weight_decay=0.0, clipping_scale=3.0)
    optimizer = build_optimizer(model, config)
    assert isinstance(optimizer, ScaledAdam) and optimizer.clipping_scale == 3.0
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.0}
    # the only split inside a part is RWKV-7's double rate
    assert sorted((g["name"], g["lr"]) for g in optimizer.param_groups) == [
        ("ctc_head", 0.04),
        ("encoder", 0.04),
        ("llm", 0.02),
        ("llm", 0.04),
        ("projector", 0.04),
    ]
    assert config.max_grad_norm == float("inf") and OptimConfig(clip_grad_norm=2.0).max_grad_norm == 2.0


def test_eden_golden_numbers():
    golden = json.loads(GOLDEN.read_text())
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=golden["base_lr"])
    scheduler = Eden(optimizer, golden["lr_batches"], golden["lr_epochs"], golden["warmup_batches"])
    for epoch, batch, lr in golden["rows"]:
        while scheduler.epoch < epoch:
            scheduler.step_epoch()
        while scheduler.batch < batch:
            scheduler.step_batch()
        assert scheduler.get_last_lr() == [pytest.approx(lr, abs=1e-9)]


def test_constant_schedule(model):
    optimizer = build_optimizer(model, config := OptimConfig(lr=2.0, schedule="constant", warmup_steps=4))
    scheduler = build_scheduler(optimizer, config, 10)
    rates = []
    for _ in range(10):
        rates.append(optimizer.param_groups[0]["lr"])
        scheduler.step_batch()
        scheduler.step_epoch()
    assert rates == [0.5, 1.0, 1.5] + [2.0] * 7


@pytest.mark.parametrize("schedule", ["cosine", "constant", "eden"])
@pytest.mark.parametrize("name", ["adamw", "scaled_adam"])
def test_a_resumed_schedule_is_the_same(model, name, schedule):
    config = OptimConfig(name=name, schedule=schedule, lr_scale={"llm": 0.5}, warmup_steps=4)

    def build() -> tuple:
        optimizer = build_optimizer(model, config)
        return optimizer, build_scheduler(optimizer, config, 30)

    def run(scheduler, steps) -> list[list[float]]:
        rates = []
        for step in steps:
            rates.append(scheduler.get_last_lr())
            scheduler.step_batch()
            if step % 5 == 4:
                scheduler.step_epoch()
        return rates

    _, whole = build()
    expected = run(whole, range(20))
    for stop in (2, 5, 13):
        optimizer, scheduler = build()
        assert run(scheduler, range(stop)) == expected[:stop]
        resumed_optimizer, resumed = build()
        resumed_optimizer.load_state_dict(optimizer.state_dict())
        resumed.load_state_dict(scheduler.state_dict())
        assert run(resumed, range(stop, 20)) == expected[stop:]


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
        scheduler.step_batch()


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
