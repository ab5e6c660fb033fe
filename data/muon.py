"""Muon: a matrix's momentum, made orthogonal by Newton-Schulz iterations, is its step (Jordan and others, 2024).

The iteration is torch's (`torch.optim.Muon`, with the learning rate adjusted to Adam's: Liu and others, 2025). But
torch always iterates in bfloat16, which a CPU without such instructions emulates, many times slower than float32; here
a CPU iterates in float32.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

QUINTIC = (3.4445, -4.7750, 2.0315)
"""Steep at zero: small singular values rise quickly; all end between about 0.5 and 1.5."""


def orthogonal(update: Tensor, iterations: int = 5, eps: float = 1e-7) -> Tensor:
    """Nearly U V^T, where U S V^T is the update."""
    a, b, c = QUINTIC
    x = update if update.device.type == "cpu" else update.bfloat16()
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    x = x / x.norm().clamp(min=eps)
    for _ in range(iterations):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x


class Muon(torch.optim.Optimizer):
    """For matrices only; everything else is AdamW's."""

    def __init__(self, params: Iterable[Tensor], lr: float = 1e-3, weight_decay: float = 0.1, momentum: float = 0.95):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(parameter)
                averaged = state["momentum_buffer"].lerp_(parameter.grad, 1 - group["momentum"])
                step = orthogonal(parameter.grad.lerp(averaged, group["momentum"]))
                # The entries of an orthogonal matrix are about 1 / sqrt(longer side); those of Adam's steps about 0.2.
                lr = group["lr"] * 0.2 * max(parameter.shape) ** 0.5
                parameter.mul_(1 - group["lr"] * group["weight_decay"]).add_(step, alpha=-lr)
