import pytest
import torch
from crosslace.train.transcoder.activations import (
    batchtopk_threshold,
    heaviside,
    jumprelu,
    keep_reaching,
    rect,
    to_sparse,
    topk_threshold,
)
from torch.autograd import gradcheck

EPS = 0.4


def away_from_kinks(theta: torch.Tensor) -> torch.Tensor:
    """Pre-activations outside every window, where the estimators are exact derivatives."""
    h = torch.randn(7, len(theta), dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    near = (h - theta).abs() < EPS
    return (h + 2 * EPS * near * torch.sign(h - theta)).requires_grad_()


def thetas() -> torch.Tensor:
    return torch.tensor([0.1, 0.5, 1.0, 0.03], dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("reaches_h", [False, True])
def test_gradients_away_from_the_kinks_are_the_true_ones(reaches_h):
    theta = thetas()
    h = away_from_kinks(theta.detach())
    assert gradcheck(lambda h, t: jumprelu(h, t, EPS, reaches_h), (h, theta))
    assert gradcheck(lambda h, t: heaviside(h, t, EPS, reaches_h), (h, theta))


@pytest.mark.parametrize("reaches_h", [False, True])
def test_gradients_at_the_kinks_are_the_estimators(reaches_h):
    theta = thetas()
    h = (theta.detach() + torch.linspace(-0.6, 0.6, 9, dtype=torch.float64)[:, None]).requires_grad_()
    upstream = torch.randn(9, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    grad_h, grad_theta = torch.autograd.grad((jumprelu(h, theta, EPS, reaches_h) * upstream).sum(), (h, theta))
    want_h, want_theta = torch.zeros_like(h), torch.zeros_like(theta)
    for b in range(9):
        for i in range(4):
            inside = abs((h[b, i] - theta[i]) / EPS) < 0.5
            through = upstream[b, i] * theta[i] / EPS * inside
            want_theta[i] = want_theta[i] - through
            want_h[b, i] = upstream[b, i] * (h[b, i] > theta[i]) + (through if reaches_h else 0)
    assert torch.allclose(grad_h, want_h) and torch.allclose(grad_theta, want_theta)

    grads = torch.autograd.grad((heaviside(h, theta, EPS, reaches_h) * upstream).sum(), (h, theta), allow_unused=True)
    window = rect((h - theta) / EPS) * upstream / EPS
    assert torch.allclose(grads[1], -window.sum(0))
    assert grads[0] is None if not reaches_h else torch.allclose(grads[0], window)


def test_lists_of_entries_get_the_same_gradient():
    theta = thetas()
    h = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    dense = torch.autograd.grad(jumprelu(h, theta, EPS, True).square().sum(), (h, theta))
    flat = torch.autograd.grad(jumprelu(h.flatten(), theta.repeat(5), EPS, True).square().sum(), (h, theta))
    assert all(torch.allclose(a, b) for a, b in zip(dense, flat))


def test_topk_and_batchtopk_choose_the_largest_positive_entries():
    h = torch.tensor([[3.0, 1.0, 2.0, -1.0], [0.5, -2.0, -3.0, -4.0]])
    assert torch.equal(keep_reaching(h, topk_threshold(h, 2)), torch.tensor([[3.0, 0, 2, 0], [0.5, 0, 0, 0]]))
    assert torch.equal(keep_reaching(h, batchtopk_threshold([h], 3)), torch.tensor([[3.0, 1, 2, 0], [0, 0, 0, 0]]))
    assert torch.equal(keep_reaching(h, batchtopk_threshold([h], 7)), h.relu())
    assert batchtopk_threshold([h, h + 10], 2) == 12.0
    assert torch.equal(keep_reaching(h, topk_threshold(h, 9)), h.relu())


def test_sparse_acts_of_silence_are_empty():
    pairs = to_sparse(torch.zeros(3, 5))
    assert pairs.values.shape == (3, 1) and torch.equal(pairs.dense(5), torch.zeros(3, 5))
