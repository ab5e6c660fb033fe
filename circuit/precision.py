"""How wide numbers are: float32 at least for what is recorded and measured, float64 where sums need it."""

from collections.abc import Mapping

from torch import Tensor

from ..data.device import widest as widest
from ..data.errors import UserError


def wide(x: Tensor) -> Tensor:
    """The tensor in the widest dtype that its device has."""
    return x.to(widest(x.device))


def refuse_overflow(by_layer: Mapping[int, Tensor], whose: str) -> None:
    """Say at which layer numbers stop being finite, if they do: what comes after means nothing."""
    for layer in sorted(by_layer):
        if not bool(by_layer[layer].isfinite().all()):
            raise UserError(
                f"layer {layer} of the {whose} gives numbers that are not finite on this text; look at its weights, or"
                " take a wider dtype"
            )
