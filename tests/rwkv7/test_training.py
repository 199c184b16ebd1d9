"""A small language model trained from scratch on text: ours against the plain module, step by step."""

from pathlib import Path

import torch
import torch.nn.functional as F

from speechllm.optim.optimizer import OptimConfig, build_optimizer
from speechllm.rwkv7 import RWKV7, RWKV7Config

from .plain import PlainRWKV7

TEXT = Path(__file__).parents[2] / "LICENSE"


def test_training_on_text_follows_the_plain_module():
    torch.manual_seed(0)
    config = RWKV7Config(2, 64, 128, head_size=32)
    ours, plain = RWKV7(config), PlainRWKV7(config)
    plain.load_state_dict(ours.state_dict())
    optimizer = build_optimizer(ours, OptimConfig(lr=3e-3, weight_decay=0.1), part="llm")
    names = {p: name for name, p in ours.named_parameters()}
    plain_parameters = dict(plain.named_parameters())
    groups = [
        {**group, "params": [plain_parameters[names[p]] for p in group["params"]]} for group in optimizer.param_groups
    ]
    plain_optimizer = torch.optim.AdamW(groups)

    text = torch.tensor(list(TEXT.read_bytes()))
    losses, plain_losses = [], []
    for _ in range(40):
        starts = torch.randint(0, len(text) - 33, (8,))
        batch = torch.stack([text[i : i + 33] for i in starts])
        ids, labels = batch[:, :-1], batch[:, 1:]
        loss = ours.loss(labels, ids)[0].loss / labels.numel()
        plain_loss = F.cross_entropy(plain(ids).flatten(0, 1), labels.flatten())
        for value, history, its_optimizer in (
            (loss, losses, optimizer),
            (plain_loss, plain_losses, plain_optimizer),
        ):
            its_optimizer.zero_grad()
            value.backward()
            its_optimizer.step()
            history.append(value.item())
    losses, plain_losses = torch.tensor(losses), torch.tensor(plain_losses)
    # rounding grows from step to step
    assert (losses - plain_losses)[:15].abs().max() <= 1e-3
    assert abs(losses[-10:].mean() - plain_losses[-10:].mean()) <= 0.02
    assert losses[0] > 4.7  # log(128)
    assert losses[-10:].mean() < 2.6  # the frequencies of the bytes alone leave 3.07
