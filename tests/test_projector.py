"""The projector: lengths, batch invariance, gradients."""

import pytest
import torch

from speechllm.projector import Projector, ProjectorConfig


@pytest.mark.parametrize("k", [1, 2, 3])
def test_lengths_and_batch_invariance(k):
    torch.manual_seed(0)
    projector = Projector(ProjectorConfig(downsample=k), input_dim=6, output_dim=8)
    lens = torch.tensor([7, 4, 1])
    x = torch.randn(3, 7, 6)
    for i, n in enumerate(lens):
        x[i, n:] = float("nan")  # what lies beyond a length has no influence
    out, out_lens = projector(x, lens)
    assert out_lens.tolist() == [-(-n // k) for n in lens.tolist()]
    for i, n in enumerate(lens):
        alone, alone_lens = projector(x[i : i + 1, :n], lens[i : i + 1])
        assert alone.shape[1] == alone_lens.item() == out_lens[i]
        torch.testing.assert_close(out[i, : out_lens[i]], alone[0])


def test_every_parameter_gets_a_gradient():
    projector = Projector(ProjectorConfig(hidden_dim=5), 6, 8)
    projector(torch.randn(2, 5, 6), torch.tensor([5, 3]))[0].square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in projector.parameters())


def test_bad_factor():
    with pytest.raises(ValueError, match="downsample must be at least 1"):
        ProjectorConfig(downsample=0)
