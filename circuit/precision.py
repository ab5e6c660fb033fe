"""How wide numbers are: float32 at least for what is recorded and measured, float64 where sums need it."""

import torch
from torch import Tensor


def widest(device: torch.device) -> torch.dtype:
    """float64; float32 on Apple's MPS, which has no float64."""
    return torch.float32 if device.type == "mps" else torch.float64


def wide(x: Tensor) -> Tensor:
    """The tensor in the widest dtype that its device has."""
    return x.to(widest(x.device))
