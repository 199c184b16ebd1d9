import math
import random

import pytest
import torch
import torch.nn.functional as F

from speechllm.encoder import scaling
from speechllm.encoder.scaling import Balancer, BiasNorm, ScheduledFloat, Whiten, constant


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
    random.seed(0)


def double(*shape):
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


def test_swoosh_is_its_formula():
    x = torch.linspace(-60, 60, 1001, dtype=torch.float64)
    zero = torch.zeros((), dtype=torch.float64)
    left = torch.logaddexp(zero, x - 4) - 0.08 * x - 0.035
    right = torch.logaddexp(zero, x - 1) - 0.08 * x - 0.313261687
    torch.testing.assert_close(scaling.swoosh_l(x), left, atol=1e-8, rtol=0)
    torch.testing.assert_close(scaling.swoosh_r(x), right, atol=1e-8, rtol=0)
    assert scaling.swoosh_l(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("swoosh", [scaling.swoosh_l, scaling.swoosh_r])
def test_swoosh_of_a_fresh_tensor_takes_its_place(swoosh, monkeypatch):
    monkeypatch.setattr(scaling, "_PIECE", 7)
    x = torch.cat([torch.linspace(-90, 60, 60), torch.tensor([79.0, 81.0, 1e4, torch.inf, torch.nan, -1e4])]).view(
        6, 11
    )
    for dtype, near in ((torch.float32, {"atol": 1e-6, "rtol": 3e-7}), (torch.bfloat16, {"atol": 0, "rtol": 8e-3})):
        fresh = x.to(dtype)
        expected = swoosh(fresh.double()).to(dtype)
        torch.testing.assert_close(swoosh(fresh), expected, equal_nan=True, **near)
        assert torch.equal(fresh, x.to(dtype)) or fresh.isnan().any()  # it was left alone
        out = swoosh(fresh, fresh=True)
        torch.testing.assert_close(out, expected, equal_nan=True, **near)
        assert out.dtype == dtype and out.data_ptr() == fresh.data_ptr()
    assert swoosh(torch.empty(0, 3), fresh=True).shape == (0, 3)
    strided = torch.randn(4, 6)[:, ::2]
    torch.testing.assert_close(swoosh(strided, fresh=True), swoosh(strided))
    learns = torch.randn(50, requires_grad=True)
    before, grad = learns.detach().clone(), torch.randn(50)
    swoosh(learns, fresh=True).backward(grad)
    exact = before.double().requires_grad_()
    swoosh(exact).backward(grad.double())
    assert torch.equal(learns.detach(), before)
    torch.testing.assert_close(learns.grad, exact.grad.float())


@pytest.mark.cuda
def test_swoosh_is_that_of_k2():
    k2 = pytest.importorskip("k2", exc_type=ImportError)
    for ours, theirs in ((scaling.swoosh_l, k2.swoosh_l), (scaling.swoosh_r, k2.swoosh_r)):
        x = torch.randn(1000, device="cuda").mul_(4).requires_grad_()
        grad = torch.randn_like(x)
        expected, got = (f(x) for f in (theirs, ours))
        torch.testing.assert_close(got, expected)
        # k2 keeps the derivative in 8 bits
        (expected,), (got,) = (torch.autograd.grad(y, x, grad) for y in (expected, got))
        torch.testing.assert_close(got, expected, rtol=0, atol=0.02)


def test_custom_gradients():
    x = double(3, 4, 6)
    assert torch.autograd.gradcheck(scaling.swoosh_l, (x * 4,))
    assert torch.autograd.gradcheck(scaling.swoosh_r, (x * 4,))
    assert torch.autograd.gradcheck(scaling._BiasNorm.apply, (x, double(6), double()))


def test_bias_norm_is_its_formula():
    norm, x = BiasNorm(5).eval(), torch.randn(2, 3, 5)
    with torch.no_grad():
        norm.bias.normal_()
        expected = x / (x - norm.bias).square().mean(-1, keepdim=True).sqrt() * norm.log_scale.exp()
        torch.testing.assert_close(norm(x), expected)
        assert norm(torch.zeros(1, 1, 5)).isfinite().all()


def test_dropout_mask_keeps_the_mean():
    mask = scaling.dropout_mask(torch.zeros(1000, 7, 20), 0.25)
    assert mask.shape == (1000, 1, 20) and mask.mean().item() == pytest.approx(1.0, abs=0.02)
    assert scaling.dropout_mask(torch.zeros(2, 7, 20), 0.0) is None


def test_schedule():
    schedule = ScheduledFloat((10.0, 1.0), (20.0, 0.5), (40.0, 0.0))
    for count, value in ((0, 1.0), (10, 1.0), (15, 0.75), (20, 0.5), (30, 0.25), (40, 0.0), (1e6, 0.0)):
        schedule.set_batch_count(count)
        assert schedule.value == pytest.approx(value)
    module = Balancer(0.1, schedule, 0.2, 1.0)
    assert list(scaling.scheduled_floats(module)).count(schedule) == 1


def descend(regularizer, x, steps=400, lr=0.03):
    """Moves x along the regularizer's push alone: the gradient that arrives is noise of mean 0."""
    for _ in range(steps):
        x = x.detach().requires_grad_()
        regularizer(x).backward(torch.randn_like(x))
        x = x.detach() - lr * x.grad
    return x


def test_balancer_moves_statistics_into_their_limits():
    x = torch.randn(500, 3) * torch.tensor([0.01, 1.0, 10.0]) + torch.tensor([0.0, 3.0, 0.0])
    y = descend(Balancer(0.4, 0.6, 0.5, 2.0, prob=1.0), x)
    before, after = x.abs().mean(0), y.abs().mean(0)
    assert after[0] > 4 * before[0]
    assert y[:, 1].mean() < x[:, 1].mean() - 0.2
    assert after[2] < before[2] - 0.2


def test_balancer_gradient_is_that_of_its_loss():
    """Against the definition, by autograd: the loss |m - clamp(m)| + |log(clamp(rms) / rms)| per channel."""
    x = torch.randn(40, 4) * torch.tensor([0.1, 1.0, 9.0, 1.0]) + torch.tensor([0.0, 3.0, -9.0, 0.0])
    grad = torch.randn_like(x)
    limits = (-0.3, 0.3, 0.5, 2.0)
    leaf = x.clone().requires_grad_()
    scaling._Balance.apply(leaf, limits, 0.04).backward(grad)
    y = x.clone().requires_grad_()
    square = y.square().mean(0)
    m, rms = y.mean(0) / (square - y.mean(0).square()).sqrt(), square.sqrt()
    loss = (m - m.clamp(-0.3, 0.3)).abs() + (rms.clamp(0.5, 2.0) / rms).log().abs()
    (push,) = torch.autograd.grad(loss.sum(), y)
    push = push * 0.04 / push.square().mean(0).sqrt().clamp(min=1e-20)
    torch.testing.assert_close(leaf.grad, grad + grad.abs() * push)
    torch.testing.assert_close(leaf.grad[:, 3], grad[:, 3])  # within the limits


def test_whitening_metric_and_its_gradient():
    x = torch.randn(200, 8, dtype=torch.float64) * torch.arange(1.0, 9.0)
    x.requires_grad_()
    for groups in (1, 2):
        metric, direction = scaling.whitening_metric(x, groups)
        (true,) = torch.autograd.grad(metric, x)
        assert F.cosine_similarity(direction.flatten(), true.flatten(), dim=0).item() == pytest.approx(1.0)
    metric, _ = scaling.whitening_metric(torch.randn(100000, 4), 1)
    assert metric == pytest.approx(1.0, abs=0.01)


def test_whiten_acts_above_its_limit_only():
    x = torch.randn(300, 6) + 5.0 * torch.randn(300, 1)
    before, _ = scaling.whitening_metric(x, 1)
    whiten = Whiten(constant(1.5), grad_scale=0.02)
    whiten.prob = 1.1
    after, _ = scaling.whitening_metric(descend(whiten, x), 1)
    assert after < 0.95 * before
    white = torch.randn(300, 6, requires_grad=True)
    grad = torch.randn(300, 6)
    whiten(white).backward(grad)
    torch.testing.assert_close(white.grad, grad)


def test_limit_parameter_turns_back():
    random.seed(1)  # acts on the first draw
    p = torch.tensor([-1.0, 0.5, 2.0], requires_grad=True)
    scaling._LimitParameter.apply(p, 0.0, 1.0).backward(torch.tensor([1.0, 1.0, -1.0]))
    assert p.grad.tolist() == [-1.0, 1.0, 1.0]


def test_penalize_large():
    x = torch.tensor([-3.0, 0.0, 3.0], requires_grad=True)
    scaling.penalize_large(x, limit=2.0, penalty=0.5).sum().backward()
    assert x.grad.tolist() == [0.5, 1.0, 1.5]


def test_nothing_happens_in_eval_mode():
    x = torch.randn(50, 4, requires_grad=True)
    for module in (Balancer(0.4, 0.6, 5.0, 6.0, prob=1.0), Whiten(constant(1.0))):
        assert module.eval()(x) is x


def test_limits_on_the_mean_follow_the_share_of_positive_values():
    assert scaling._mean_over_std(0.5) == pytest.approx(0.0, abs=1e-9)
    assert scaling._mean_over_std(0.7) == pytest.approx(0.345, abs=0.01)
    assert math.isfinite(scaling._mean_over_std(1.0))


def test_balancer_gives_finite_gradients_to_constant_channels():
    x = torch.tensor([0.0, 1e-12, 1.0, -30.0, 1e4]).repeat(50, 1).requires_grad_()
    balancer = Balancer(0.4, 0.6, 0.5, 2.0, prob=1.0)
    balancer(x).backward(torch.randn_like(x))
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("mean", [0.0, 1e-3, -0.3, 1.0, 100.0])
def test_balancer_pushes_as_hard_where_channels_are_nearly_constant(mean):
    """As large as grad_scale in the rms sense where a limit is violated, neither more nor less."""
    deviations = torch.tensor([0.0, *(10.0**-k for k in range(10))])
    x = (mean + deviations * torch.randn(500, 11)).requires_grad_()
    grad = torch.ones(500, 11)
    scaling._Balance.apply(x, (0.1, 0.2, 10.0, 20.0), 0.04).backward(grad)
    push = (x.grad - grad).square().mean(0).sqrt()
    torch.testing.assert_close(push, torch.full((11,), 0.04), rtol=0.02, atol=0)


@pytest.mark.parametrize("size", [1e-4, 1.0, 100.0])
def test_whiten_is_within_the_range_of_half_precision(size):
    x = size * (torch.randn(400, 8) + 3 * torch.randn(400, 1)).half()
    grad = torch.randn(400, 8).half() * 64

    def push(x, grad):
        x.requires_grad_()
        scaling._Whiten.apply(x, 1, 1.1, 0.5).backward(grad)
        return x.grad.float() - grad.float()

    torch.testing.assert_close(push(x, grad), push(x.detach().float(), grad.float()), rtol=0.01, atol=0.1)
