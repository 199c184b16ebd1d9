"""ScaledAdam against golden numbers, and its properties."""

import copy
import io
import math
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from speechllm.optim.scaled_adam import ScaledAdam

GOLDEN = Path(__file__).parents[1] / "golden" / "scaled_adam.safetensors"


def parameters_like(tensors: dict[str, torch.Tensor]) -> dict[str, nn.Parameter]:
    return {name: nn.Parameter(t.clone()) for name, t in tensors.items()}


def train(optimizer: torch.optim.Optimizer, params: list[nn.Parameter], gradients: list[list[torch.Tensor]]) -> None:
    for grads in gradients:
        for p, grad in zip(params, grads, strict=True):
            p.grad = grad.clone()
        optimizer.step()


def problem(steps: int, seed: int = 0) -> tuple[list[nn.Parameter], list[list[torch.Tensor]]]:
    """Parameters of several shapes, scalars of two kinds among them, and gradients for each step."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(5, 3), (5, 3), (7,), (), (1,), (2, 3, 4), (1, 1)]
    params = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
    return params, [[torch.randn(shape, generator=generator) for shape in shapes] for _ in range(steps)]


def test_golden_numbers():
    golden = load_file(GOLDEN)
    params = parameters_like({name: golden[f"init.{name}"] for name in ("b", "s", "w", "w2")})
    optimizer = ScaledAdam(params.values(), lr=0.03, clipping_scale=2.0)
    for step in range(1, 261):
        for name, p in params.items():
            p.grad = golden[f"grads.{name}"][step - 1].clone()
        optimizer.step()
        if step in (1, 10, 100, 150, 151, 260):
            for name, p in params.items():
                torch.testing.assert_close(p.detach(), golden[f"after{step}.{name}"], atol=1e-5, rtol=1e-5)


def test_a_resumed_run_is_the_same_bit_for_bit():
    """Through a file, into new parameters; in two groups, stopped before and between updates of the sizes."""
    start, gradients = problem(130)

    def build() -> tuple[ScaledAdam, list[nn.Parameter]]:
        params = [nn.Parameter(p.detach().clone()) for p in start]
        groups = [{"params": params[:3]}, {"params": params[3:], "lr": 0.01}]
        return ScaledAdam(groups, clipping_scale=0.5), params

    optimizer, params = build()
    train(optimizer, params, gradients)
    for stop in (1, 3, 22, 101):
        first, first_params = build()
        train(first, first_params, gradients[:stop])
        file = io.BytesIO()
        torch.save({"optimizer": first.state_dict(), "params": first_params}, file)
        file.seek(0)
        state = torch.load(file, weights_only=True)
        second, second_params = build()
        with torch.no_grad():
            torch._foreach_copy_(second_params, state["params"])
        second.load_state_dict(state["optimizer"])
        train(second, second_params, gradients[stop:])
        assert all(torch.equal(a, b) for a, b in zip(params, second_params, strict=True)), stop


@pytest.mark.parametrize("beta2", [0.98, 0.5])
def test_large_tensors_in_pieces_are_updated_as_all_together(beta2, monkeypatch):
    """Small pieces here, the last one shorter; also of a tensor that is not contiguous, which is not cut up."""
    start, gradients = problem(40)
    start.append(nn.Parameter(torch.randn(6, 5).t()))
    gradients = [[*grads, torch.randn(5, 6)] for grads in gradients]
    ends, states = [], []
    for piece in (4, 1000):
        monkeypatch.setattr("speechllm.optim.scaled_adam._PIECE", piece)
        monkeypatch.setattr("speechllm.optim.scaled_adam._LARGE", piece)
        params = [nn.Parameter(p.detach().clone()) for p in start]
        optimizer = ScaledAdam(params, lr=0.03, betas=(0.9, beta2), clipping_scale=2.0)
        train(optimizer, params, gradients)
        ends.append(params)
        states.append([optimizer.state[p] for p in params])
    for one, other, one_state, other_state in zip(*ends, *states, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-6)
        for name in ("delta", "exp_avg_sq"):
            torch.testing.assert_close(one_state[name], other_state[name], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("settings", [{"lr": 0.0}, {"betas": (0.0, 0.98)}])
def test_pieces_without_a_rate_or_a_momentum(settings, monkeypatch):
    start, gradients = problem(9)
    ends = []
    for large in (4, 1000):
        monkeypatch.setattr("speechllm.optim.scaled_adam._LARGE", large)
        params = [nn.Parameter(p.detach().clone()) for p in start]
        train(ScaledAdam(params, **settings), params, gradients)
        ends.append(params)
    for one, other in zip(*ends, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-6)


def test_groups_with_the_same_settings_are_one_model():
    start, gradients = problem(60)
    ends = []
    for bounds in ([0, 7], [0, 2, 7], [0, 1, 3, 4, 7]):
        params = [nn.Parameter(p.detach().clone()) for p in start]
        groups = [{"params": params[a:b]} for a, b in pairwise(bounds)]
        train(ScaledAdam(groups, clipping_scale=0.5), params, gradients)
        ends.append(params)
    for params in ends[1:]:
        torch.testing.assert_close(params, ends[0], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("scale", [1e-3, 1e3])
def test_steps_are_relative_to_the_size(scale):
    """A tensor of another scale, with the gradient that belongs to it, makes the same steps at that scale."""
    p = torch.randn(6, 4, generator=torch.Generator().manual_seed(1))
    grads = torch.randn(20, 6, 4, generator=torch.Generator().manual_seed(2))
    settings = {"eps": 0.0, "param_min_rms": 0.0, "param_max_rms": math.inf}
    small, large = nn.Parameter(p.clone()), nn.Parameter(scale * p)
    train(ScaledAdam([small], **settings), [small], [[g] for g in grads])
    train(ScaledAdam([large], **settings), [large], [[g / scale] for g in grads])
    torch.testing.assert_close(large / scale, small, atol=1e-5, rtol=1e-4)


def test_an_exploding_gradient_is_clipped():
    params, gradients = problem(30)
    optimizer = ScaledAdam(params, clipping_scale=2.0)
    train(optimizer, params, gradients[:-1])
    before = [p.detach().clone() for p in params]
    state = copy.deepcopy(optimizer.state_dict())
    train(optimizer, params, [[1e6 * g for g in gradients[-1]]])
    huge = [p.detach().clone() for p in params]
    with torch.no_grad():
        torch._foreach_copy_(params, before)
    optimizer.load_state_dict(state)
    train(optimizer, params, [[1e3 * g for g in gradients[-1]]])
    torch.testing.assert_close([p.detach() for p in params], huge)


def test_sizes_and_scalars_stay_within_their_bounds():
    """Of the size, what learns it is bounded; the steps of the elements go a little further."""
    start = torch.randn(8, 8, generator=torch.Generator().manual_seed(0))
    sizes = []
    for param_max_rms in (1.5, math.inf):
        matrix, scalar = nn.Parameter(start.clone()), nn.Parameter(torch.tensor(1.9))
        optimizer = ScaledAdam([matrix, scalar], scalar_lr_scale=1.0, param_max_rms=param_max_rms, scalar_max=2.0)
        for _ in range(200):
            # all want to grow, the matrix in its size alone
            matrix.grad, scalar.grad = -matrix.detach().clone(), torch.tensor(-1.0)
            optimizer.step()
        sizes.append(matrix.square().mean().sqrt().item())
        assert 2.0 < scalar < 2.05  # one step behind the bound
    assert 1.4 < sizes[0] < 2.0 and sizes[1] > 20
    small = nn.Parameter(1e-6 * start)
    train(ScaledAdam([small], lr=1e-9, scalar_lr_scale=1e8), [small], [[start]] * 50)  # shrinks, were it not so small
    torch.testing.assert_close(small.detach(), 1e-6 * start, atol=0, rtol=1e-3)


def test_no_gradient_is_a_gradient_of_zeros():
    params, gradients = problem(8)
    others = [nn.Parameter(p.detach().clone()) for p in params]
    a, b = ScaledAdam(params, clipping_scale=2.0), ScaledAdam(others, clipping_scale=2.0)
    train(a, params, gradients)
    train(b, others, gradients)
    for _ in range(5):
        params[0].grad, others[0].grad = None, torch.zeros_like(others[0])
        a.step()
        b.step()
    assert all(torch.equal(p, q) for p, q in zip(params, others, strict=True))


def test_a_gradient_that_is_not_finite_changes_nothing():
    params, gradients = problem(3)
    optimizer = ScaledAdam(params, clipping_scale=2.0)
    train(optimizer, params, gradients)
    before, state = [p.detach().clone() for p in params], optimizer.state_dict()
    norms = list(state["state"][0]["model_norms"])
    params[1].grad[0, 0] = math.nan
    with pytest.raises(FloatingPointError, match="step 3: the norm of the gradients is nan"):
        optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(params, before, strict=True))
    assert optimizer.param_groups[0]["step"] == 3 and optimizer.state_dict()["state"][0]["model_norms"] == norms
