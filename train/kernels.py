"""Triton kernels (placeholder until the kernels below are in)."""

from torch import Tensor


def usable(tensor: Tensor) -> bool:
    return False
