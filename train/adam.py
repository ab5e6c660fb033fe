"""Clipping folded into the fused optimizer's one pass over the parameters."""

import torch
from torch import Tensor
from torch.optim import Optimizer


def clipped_step(optimizer: Optimizer, norm: Tensor, max_norm: float) -> None:
    """One step with gradients scaled so that their global norm, `norm`, is at most `max_norm` (0: as they are).

    For optimizers made with `fused=True`: they divide by `grad_scale` on the way, and leave everything as it is where
    `found_inf` is set, here by a norm that is not finite. Nothing is read back from the device.
    """
    scale = torch.clamp(norm / max_norm, min=1.0) if max_norm else torch.ones_like(norm)
    optimizer.grad_scale = scale.to(torch.float32).reshape(())  # type: ignore[attr-defined]
    optimizer.found_inf = (~torch.isfinite(norm)).to(torch.float32).reshape(())  # type: ignore[attr-defined]
    try:
        optimizer.step()
    finally:
        del optimizer.grad_scale, optimizer.found_inf  # type: ignore[attr-defined]
