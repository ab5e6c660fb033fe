"""The norm before each MLP, as a store keeps it: what the MLP reads (`mlp_in`) is formed from the residual stream."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .language_model import LanguageModel


class InputNorms(NamedTuple):
    """The norms of some layers side by side: gain * centred(x) / sqrt(mean(centred(x)^2) + eps) + bias."""

    gain: Tensor
    """[L, D], as multiplied."""
    bias: Tensor
    """[L, D]"""
    eps: Tensor
    """[L]"""
    centred: Tensor
    """[L]: 1 for a layer norm, which takes the mean over channels off first, 0 for an RMS norm."""
    none: Tensor
    """[L], bool: the MLP reads the residual stream itself."""

    def __call__(self, resid: Tensor) -> Tensor:
        """[B, L, D] of any dtype -> the MLP's input, at least float32."""
        x = resid.to(torch.promote_types(resid.dtype, torch.float32))
        y = x - self.centred[:, None] * x.mean(-1, keepdim=True)
        y = y * (y.square().mean(-1, keepdim=True) + self.eps[:, None]).rsqrt() * self.gain + self.bias
        return torch.where(self.none[:, None], x, y)

    def to(self, device: torch.device | str) -> "InputNorms":
        return InputNorms(*(tensor.to(device) for tensor in self))

    def select(self, places: Sequence[int]) -> "InputNorms":
        """Some of the layers."""
        return InputNorms(*(tensor[list(places)] for tensor in self))

    @classmethod
    def of(cls, lm: LanguageModel, layers: Sequence[int]) -> "InputNorms":
        """Those of a model's layers."""
        norms = [lm.layers[layer].mlp_norm for layer in layers]
        zeros = torch.zeros(lm.d_model)
        return cls(
            torch.stack([zeros + 1 if n is None else n.weight.detach().float().cpu() for n in norms]),
            torch.stack([zeros if n is None or n.bias is None else n.bias.detach().float().cpu() for n in norms]),
            torch.tensor([0.0 if n is None else n.eps for n in norms]),
            torch.tensor([float(n is not None and n.kind == "layer") for n in norms]),
            torch.tensor([n is None for n in norms]),
        )

    def to_attributes(self) -> dict[str, Any]:
        named = self._asdict() if self.bias.any() else {k: v for k, v in self._asdict().items() if k != "bias"}
        return {name: tensor.tolist() for name, tensor in named.items()}

    @classmethod
    def from_attributes(cls, held: dict[str, Any]) -> "InputNorms":
        parts = {name: torch.tensor(values) for name, values in held.items()}
        return cls(**{"bias": torch.zeros_like(parts["gain"])} | parts)
