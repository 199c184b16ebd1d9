"""The losses of CTC and CR-CTC by their formulas."""

import pytest
import torch
import torch.nn.functional as F

from speechllm.encoder.ctc import CRCTCConfig, consistency_losses, ctc_losses


def test_ctc_is_that_of_each_row_alone():
    torch.manual_seed(0)
    logits, lens, labels = torch.randn(3, 9, 6), torch.tensor([9, 5, 2]), [[0, 0, 3], [], [1, 2, 4]]
    found = ctc_losses(logits, lens, labels, blank=5)
    for row, n, ids, loss in zip(logits[:2], lens[:2], labels[:2], found[:2], strict=True):
        log_probs = row[:n].log_softmax(-1)
        expected = F.ctc_loss(log_probs, torch.tensor(ids, dtype=torch.long), (n,), (len(ids),), 5, reduction="sum")
        torch.testing.assert_close(loss, expected)
    assert found[2] == 0  # more tokens than frames


def test_consistency_is_the_mean_divergence_of_both_directions():
    torch.manual_seed(0)
    logits, lens = torch.randn(4, 7, 5), torch.tensor([7, 3, 7, 3])
    found = consistency_losses(logits, lens)
    probs = logits.softmax(-1)
    for i, n in enumerate(lens[:2]):
        p, q = probs[i, :n], probs[i + 2, :n]
        expected = ((p * (p / q).log()).sum() + (q * (q / p).log()).sum()) / 2
        torch.testing.assert_close(found[i], expected)
    assert not consistency_losses(logits[:2].repeat(2, 1, 1), lens).any()  # equal views agree


def test_each_view_learns_from_the_other_as_a_constant():
    torch.manual_seed(0)
    logits = torch.randn(2, 4, 5, requires_grad=True)
    consistency_losses(logits, torch.tensor([4, 4])).sum().backward()
    # the gradient of KL(constant || softmax(x)) by x is softmax(x) - constant; half of it in each direction
    probs = logits.detach().softmax(-1)
    torch.testing.assert_close(logits.grad, (probs - probs.flip(0)) / 2)


def test_a_weight_without_effect():
    with pytest.raises(ValueError, match="weight must be above 0"):
        CRCTCConfig(0.0)
