"""The reference model: golden data, and the same numbers as the model that it is the reference of."""

from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from speechllm.rwkv7 import RWKV7, RWKV7Config
from tests.rwkv7.plain import PlainRWKV7

GOLDEN = Path(__file__).parents[1] / "golden" / "rwkv7" / "small"


def test_golden():
    golden = load_file(GOLDEN / "io.safetensors")
    weights = torch.load(GOLDEN / "model.pth", weights_only=True)
    for i in range(3):
        del weights[f"blocks.0.att.v{i}"]  # in the file, never used
    ranks = {"decay": 32, "a": 32, "v": 16, "gate": 48}
    model = PlainRWKV7(RWKV7Config(3, 128, 160, head_size=64, ffn_size=512, lora_ranks=ranks))
    model.load_state_dict(weights)
    logits = model(golden["input_ids"])
    assert (logits - golden["logits"]).abs().max() <= 1e-4
    F.cross_entropy(logits[:, :-1].flatten(0, 1), golden["input_ids"][:, 1:].flatten()).backward()
    parameters = dict(model.named_parameters())
    checked = [name for name in golden if name.startswith("grad.")]
    assert checked
    for name in checked:
        got, expected = parameters[name.removeprefix("grad.")].grad, golden[name]
        assert (got - expected).norm() <= 1e-3 * expected.norm(), name


def test_logits_and_gradients_equal_those_of_the_model():
    torch.manual_seed(0)
    model = RWKV7(RWKV7Config(2, 64, 50, head_size=16)).double()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.1)  # nothing stays at its zero start
    plain = PlainRWKV7(model.config).double()
    plain.load_state_dict(model.state_dict())
    ids = torch.randint(0, 50, (2, 21))
    expected, logits = plain(ids), model(ids)[0]
    torch.testing.assert_close(logits, expected, rtol=1e-8, atol=1e-10)
    weights = torch.randn_like(expected)
    gradients = [
        torch.autograd.grad((x * weights).sum(), m.parameters()) for x, m in ((expected, plain), (logits, model))
    ]
    names = [[name for name, _ in m.named_parameters()] for m in (plain, model)]
    by_name = [dict(zip(n, g, strict=True)) for n, g in zip(names, gradients, strict=True)]
    torch.testing.assert_close(by_name[1], by_name[0], rtol=1e-7, atol=1e-9)
