"""Clipping inside the fused optimizer against clipping before it."""

import pytest
import torch
from crosslace.train.adam import clipped_step
from crosslace.train.collectives import global_norm


def make(seed: int = 0) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((7, 5), (11,))]


@pytest.mark.parametrize("optimizer", [torch.optim.Adam, torch.optim.AdamW])
@pytest.mark.parametrize("max_norm", [0.0, 0.5, 1e6])
def test_equals_clip_then_step(optimizer, max_norm):
    ours, theirs = make(), make()
    fused, plain = optimizer(ours, lr=0.1, fused=True), optimizer(theirs, lr=0.1)
    for step in range(4):
        for pair in zip(ours, theirs, make(step + 1), strict=True):
            pair[0].grad, pair[1].grad = pair[2].detach().clone(), pair[2].detach().clone()
        clipped_step(fused, global_norm([p.grad for p in ours if p.grad is not None], []), max_norm)
        if max_norm:
            torch.nn.utils.clip_grad_norm_(theirs, max_norm)
        plain.step()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_a_gradient_that_is_not_finite_changes_nothing():
    parameters = make()
    optimizer = torch.optim.Adam(parameters, lr=0.1, fused=True)
    for p in parameters:
        p.grad = torch.ones_like(p)
    clipped_step(optimizer, torch.tensor(1.0), 1.0)
    before = [p.detach().clone() for p in parameters]
    state = {key: value.clone() for key, value in optimizer.state[parameters[0]].items()}
    parameters[0].grad = torch.full_like(parameters[0], torch.nan)
    clipped_step(optimizer, torch.tensor(torch.nan), 1.0)
    assert all(torch.equal(a, b) for a, b in zip(before, parameters, strict=True))
    assert all(torch.equal(value, optimizer.state[parameters[0]][key]) for key, value in state.items())
