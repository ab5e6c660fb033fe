"""Attention sinks: the few positions with a huge residual stream, which no average and no transcoder should see.

A position is masked when it is the first of its sequence, when it holds the token that begins texts, or when its
residual stream is, at any layer of the store, more than a multiple of that layer's median norm, which is found on a
sample before anything is written and kept with the store.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


def masked_by_token(tokens: Tensor, bos: int | None) -> tuple[Tensor, Tensor]:
    """First positions, and other positions of the token that begins texts: two masks [..., T] of tokens [..., T]."""
    first = torch.zeros_like(tokens, dtype=torch.bool)
    first[..., 0] = True
    begins = torch.zeros_like(first) if bos is None else (tokens == bos) & ~first
    return first, begins


@dataclass(frozen=True)
class SinkRule:
    """What a store masks, and what everything that uses its transcoders has to leave to the model."""

    bos: int | None
    multiple: float
    median_norm: dict[int, float]
    """By layer of the model."""

    def large(self, resid: dict[int, Tensor]) -> Tensor:
        """[...] rows whose residual stream resid[layer] [..., D] is too large at some layer."""
        found: Tensor | None = None
        for layer, median in self.median_norm.items():
            if layer in resid:
                norm = torch.linalg.vector_norm(resid[layer], dim=-1, dtype=torch.float32)
                large = norm > self.multiple * median
                found = large if found is None else found | large
        if found is None:
            raise ValueError(f"no residual stream of layers {list(self.median_norm)} was given")
        return found

    def mask(self, tokens: Tensor, resid: dict[int, Tensor]) -> Tensor:
        """[..., T] positions that are masked for any reason."""
        first, begins = masked_by_token(tokens, self.bos)
        return first | begins | self.large(resid)

    def to_attributes(self) -> dict[str, Any]:
        norms = {str(layer): norm for layer, norm in self.median_norm.items()}
        return {"bos": self.bos, "multiple": self.multiple, "median_norm": norms}

    @classmethod
    def from_attributes(cls, attributes: dict[str, Any]) -> "SinkRule":
        """The rule of a store, from the store's attributes."""
        held = attributes["masked"]
        norms = {int(layer): norm for layer, norm in held["median_norm"].items()}
        return cls(held["bos"], held["multiple"], norms)
