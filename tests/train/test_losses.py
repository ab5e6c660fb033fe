"""Each term against a direct transcription of its formula in float64, and by gradcheck."""

import math

import torch
from crosslace.train.loss import losses
from torch.autograd import gradcheck

B, L, D, F = 6, 2, 3, 5
G = torch.Generator().manual_seed(0)


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=G)


def test_reconstruction():
    y_hat, y = normal(B, L, D), normal(B, L, D)
    want = [sum((y_hat[b, l] - y[b, l]).pow(2).sum() / D for b in range(B)) / B for l in range(L)]
    assert torch.allclose(losses.reconstruction(y_hat, y), torch.stack(want))
    assert gradcheck(lambda v: losses.reconstruction(v, y), (y_hat.requires_grad_(),))


def test_tanh_and_l1():
    a, n, c = normal(B, F).relu(), normal(F).abs(), 4.0
    want = sum(math.tanh(c * float(n[i]) * float(a[b, i])) for b in range(B) for i in range(F)) / B
    assert math.isclose(float(losses.tanh_penalty(a, n, c, B)), want, rel_tol=1e-12)
    want = sum(float(n[i]) * float(a[b, i]) for b in range(B) for i in range(F)) / B
    assert math.isclose(float(losses.l1_penalty(a, n, B)), want, rel_tol=1e-12)
    inputs = (a.clone().requires_grad_(), n.clone().requires_grad_())
    assert gradcheck(lambda a, n: losses.tanh_penalty(a, n, c, B), inputs)
    assert gradcheck(lambda a, n: losses.l1_penalty(a, n, B), inputs)


def test_l0_and_its_target():
    h, theta = normal(B, F), normal(F).abs()
    l0 = losses.l0_penalty(h, theta, 1.0, True, B)
    assert float(l0) == sum(int(h[b, i] > theta[i]) for b in range(B) for i in range(F)) / B
    target = torch.tensor([2.0, 4.0], dtype=torch.float64)
    l0_L = torch.tensor([3.0, 1.0], dtype=torch.float64, requires_grad=True)
    assert torch.allclose(losses.quadratic_target(l0_L, target), (l0_L / target - 1) ** 2)
    gradient = torch.autograd.grad(losses.quadratic_target(l0_L, target).sum(), l0_L)[0]
    assert torch.allclose(gradient, 2 * (l0_L / target - 1) / target)


def test_parts_of_a_batch_steer_like_the_whole():
    target = torch.tensor([2.0], dtype=torch.float64)
    parts = torch.tensor([[3.0], [7.0]], dtype=torch.float64, requires_grad=True)
    whole = losses.quadratic_target(parts.mean(0), target).sum()
    around = parts.mean(0).detach()
    pieces = torch.stack([losses.quadratic_target(part, target, around).sum() for part in parts]).mean()
    assert torch.allclose(whole, pieces)
    assert torch.allclose(torch.autograd.grad(whole, parts)[0], torch.autograd.grad(pieces, parts)[0])


def test_preactivation():
    h, theta, n = normal(B, F), normal(F).abs(), normal(F).abs()
    over = torch.tensor([True, False, True, False, False])
    terms = [[max(0.0, float(theta[i] - h[b, i])) * float(n[i]) for i in range(F)] for b in range(B)]
    want_all = sum(map(sum, terms)) / B
    want_dead = sum(row[0] + row[2] for row in terms) / B
    assert math.isclose(float(losses.preactivation_penalty(h, theta, n, B)), want_all, rel_tol=1e-12)
    assert math.isclose(float(losses.preactivation_penalty(h, theta, n, B, over)), want_dead, rel_tol=1e-12)
    inputs = tuple(t.clone().requires_grad_() for t in (h, theta, n))
    assert gradcheck(lambda h, t, n: losses.preactivation_penalty(h, t, n, B, over), inputs)


def test_auxiliary_takes_the_error_as_given():
    y_aux, y_hat, y = (normal(B, L, D).requires_grad_() for _ in range(3))
    want = [((y_aux - (y - y_hat))[:, l].pow(2).sum(-1) / D).mean() for l in range(L)]
    result = losses.auxiliary(y_aux, y_hat, y)
    assert torch.allclose(result, torch.stack(want))
    grads = torch.autograd.grad(result.sum(), (y_aux, y_hat, y), allow_unused=True)
    assert grads[1] is None and grads[2] is None
    assert torch.allclose(grads[0], 2 * (y_aux - y + y_hat) / D / B)


def test_no_term_depends_on_the_batch_size():
    a, n, h, theta = normal(B, F).relu(), normal(F).abs(), normal(B, F), normal(F).abs()
    twice = lambda t: torch.cat([t, t])
    assert torch.allclose(losses.tanh_penalty(a, n, 4.0, B), losses.tanh_penalty(twice(a), n, 4.0, 2 * B))
    assert torch.allclose(
        losses.preactivation_penalty(h, theta, n, B), losses.preactivation_penalty(twice(h), theta, n, 2 * B)
    )
    y_hat, y = normal(B, L, D), normal(B, L, D)
    assert torch.allclose(losses.reconstruction(y_hat, y), losses.reconstruction(twice(y_hat), twice(y)))
