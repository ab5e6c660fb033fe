"""Muon is torch's, in the number format that the processor multiplies fast."""

import pytest
import torch
from crosslace.data.muon import Muon, orthogonal
from torch._subclasses.fake_tensor import FakeTensorMode


@pytest.mark.parametrize("shape", [(24, 60), (60, 24), (32, 32)])
def test_steps_are_those_of_torch_up_to_its_rounding(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    start = torch.randn(shape)
    ours, theirs = (torch.nn.Parameter(start.clone()) for _ in range(2))
    optimizers = [
        Muon([ours], lr=0.02, weight_decay=0.3),
        torch.optim.Muon([theirs], lr=0.02, weight_decay=0.3, adjust_lr_fn="match_rms_adamw"),
    ]
    for _ in range(4):
        ours.grad = torch.randn(shape)
        theirs.grad = ours.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    moved = (theirs - start).norm()
    assert (ours - theirs).norm() < 0.02 * moved  # torch rounds to bfloat16: a percent or so


def test_singular_values_come_near_one() -> None:
    made = torch.linalg.svdvals(orthogonal(torch.randn(30, 80, generator=torch.Generator().manual_seed(1))))
    assert made.min() > 0.5 and made.max() < 1.5


def test_a_cpu_iterates_in_float32_and_a_gpu_in_bfloat16() -> None:
    assert orthogonal(torch.randn(4, 4)).dtype == torch.float32
    with FakeTensorMode():
        assert orthogonal(torch.empty(4, 4, device="cuda")).dtype == torch.bfloat16
