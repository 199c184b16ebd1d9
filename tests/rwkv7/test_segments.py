"""Training a segment at a time: against the whole sequence at once."""

import pytest
import torch

from speechllm.rwkv7 import RWKV7State
from speechllm.rwkv7.segments import backward_in_segments

from .small import assert_same, random_state, small_model

LENS = torch.tensor([50, 0, 23])


@pytest.fixture
def data():
    labels, embeds = torch.randint(0, 40, (3, 50)), torch.randn(3, 50, 32)
    labels[:, ::3] = -100
    for row, n in enumerate(LENS):
        labels[row, n:] = -100
    return labels, embeds


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("segment", [7, 16, 50, 80])
def test_exact_gradients_of_everything(data, segment):
    labels, embeds = data
    model = small_model()
    results = []
    for whole in (True, False):
        model.zero_grad()
        x = embeds.clone().requires_grad_()
        torch.manual_seed(3)
        state = RWKV7State(*(s.requires_grad_() for s in vars(random_state(model, 3)).values()))
        if whole:
            loss, last = model.loss(labels, inputs_embeds=x, lens=LENS, state=state)
            (loss.loss * 0.1).backward()
        else:
            loss, last = backward_in_segments(
                model, segment, labels, inputs_embeds=x, lens=LENS, state=state, scale=0.1, truncate=False
            )
            assert not loss.loss.requires_grad and not last.wkv.requires_grad
        parts = [*vars(state).values(), x]
        results.append((loss, last, {**gradients(model), **{str(i): p.grad for i, p in enumerate(parts)}}))
    (loss, last, grads), (loss_2, last_2, grads_2) = results
    torch.testing.assert_close(loss_2.loss, loss.loss)
    assert (loss_2.tokens, loss_2.correct) == (loss.tokens, loss.correct)
    assert_same(last_2, last.detach(), rtol=1e-4, atol=1e-5)
    for name, grad in grads.items():
        assert (grads_2[name] - grad).norm() <= 1e-4 * grad.norm() + 1e-7, name


def test_truncated_gradients_stop_at_the_border(data):
    labels, embeds = data
    model = small_model()
    state, total = None, 0.0
    for part in (slice(0, 20), slice(20, 40), slice(40, 50)):
        lens = (LENS - part.start).clamp(0, part.stop - part.start)
        loss, state = model.loss(labels[:, part], inputs_embeds=embeds[:, part], lens=lens, state=state)
        loss.loss.backward()
        total, state = total + loss.loss.detach(), state.detach()
    expected = gradients(model)
    model.zero_grad()
    loss, last = backward_in_segments(model, 20, labels, inputs_embeds=embeds, lens=LENS)
    torch.testing.assert_close(loss.loss, total)
    assert_same(last, state, rtol=1e-5, atol=1e-6)
    for name, grad in gradients(model).items():
        torch.testing.assert_close(grad, expected[name], msg=name)


@pytest.mark.parametrize("truncate", [True, False])
def test_a_tuned_initial_state_learns(data, truncate):
    labels, embeds = data
    model = small_model()
    model.add_initial_state()
    backward_in_segments(model, 20, labels, inputs_embeds=embeds, lens=LENS, truncate=truncate)
    assert model.initial_wkv.grad.abs().sum() > 0


def test_going_on_from_the_last_state(data):
    labels, embeds = data
    model = small_model()
    whole, end = backward_in_segments(model, 10, labels, inputs_embeds=embeds)
    first, middle = backward_in_segments(model, 10, labels[:, :30], inputs_embeds=embeds[:, :30])
    second, last = backward_in_segments(model, 10, labels[:, 30:], inputs_embeds=embeds[:, 30:], state=middle)
    torch.testing.assert_close(first.loss + second.loss, whole.loss)
    assert_same(last, end, rtol=1e-5, atol=1e-6)


def test_a_segment_without_positions_is_refused(data):
    with pytest.raises(ValueError, match="a segment of 0 positions"):
        backward_in_segments(small_model(), 0, data[0], inputs_embeds=data[1])
