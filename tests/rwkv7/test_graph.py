"""A graphed step gives what the plain step gives."""

import pytest
import torch

from speechllm.rwkv7.graph import GraphedStep
from tests.rwkv7.small import assert_same, random_state, small_model


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def test_it_equals_the_plain_step(device):
    model = small_model().to(device)
    step = GraphedStep(model, rows=3)
    for _ in range(2):  # twice, so that the second text begins from memory that the first has left behind
        start = random_state(model, 3)
        kept = start.to("cpu")
        state, graphed = start, start
        for ids in torch.randint(40, (5, 3), device=device):
            expected, state = model.step(ids, state)
            logits, graphed = step(ids, graphed)
            torch.testing.assert_close(logits, expected)
        assert_same(graphed, state)
        assert_same(start.cpu(), kept, rtol=0, atol=0)  # what it was given is not overwritten
