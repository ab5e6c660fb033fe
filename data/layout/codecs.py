"""How one activation becomes bytes: the four dtypes of a store, int8 by row and channel group."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from ..errors import UserError

GROUP = 32  # channels that share one scale of an int8 row
FLOAT16_MAX = 65504.0


@dataclass(frozen=True)
class Codec:
    """What a store's dtype means to numpy (and Zarr) and to torch."""

    name: str
    stored: np.dtype
    """What lies in the Zarr array; bfloat16 lies there as its 16 bits."""
    read: torch.dtype
    """What a batch comes in."""
    says: str
    """What its numbers are, for whoever opens the array without Crosslace."""

    def to_stored(self, x: torch.Tensor) -> np.ndarray:
        """The bytes of activations, for every dtype but int8."""
        if self.name == "float16" and x.dtype != torch.float16 and x.numel():
            largest = max(abs(float(end)) for end in x.aminmax())
            if largest > FLOAT16_MAX:
                raise UserError(
                    f"an activation of {largest:.3g} is beyond float16: cache with store.dtype=bfloat16 or float32"
                )
        x = x.detach().to(dtype=self.read).cpu().contiguous()
        return (x.view(torch.uint16) if self.name == "bfloat16" else x).numpy()

    def to_torch(self, stored: np.ndarray) -> torch.Tensor:
        """The same bytes as activations, without a copy."""
        tensor = torch.from_numpy(stored)
        return tensor.view(torch.bfloat16) if self.name == "bfloat16" else tensor


CODECS = {
    codec.name: codec
    for codec in (
        Codec("float32", np.dtype("<f4"), torch.float32, "float32"),
        Codec("float16", np.dtype("<f2"), torch.float16, "float16"),
        Codec("bfloat16", np.dtype("<u2"), torch.bfloat16, "bfloat16: the upper halves of float32s"),
        Codec(
            "int8",
            np.dtype("i1"),
            torch.float32,
            f"int8: number * SITE_scale[row, layer, channel // {GROUP}] * SITE_channel_scale[layer, channel]",
        ),
    )
}
DTYPES = tuple(CODECS)


def group_count(width: int) -> int:
    return -(-width // GROUP)


class Int8Rows(NamedTuple):
    """Activations as int8, and what it takes to read them: on the device a quarter of float32 has to travel."""

    values: torch.Tensor
    """[B, L, D] int8"""
    scale: torch.Tensor
    """[B, L, groups] float16"""
    channel_scale: torch.Tensor
    """[L, D] float32"""

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None, non_blocking: bool = False):
        """[B, L, D] activations on a device, by default as float32."""
        values, scale, channel = (part.to(device, non_blocking=non_blocking) for part in self)
        spread = scale.transpose(0, 1).float().repeat_interleave(GROUP, -1)[..., : values.shape[-1]]
        x = values.transpose(0, 1).float().mul_(spread).mul_(channel.unsqueeze(-2))
        return x.to(dtype or torch.float32).transpose(0, 1)


def channel_scale(x: torch.Tensor) -> torch.Tensor:
    """[L, D] typical size of each channel of rows [N, L, D], for int8."""
    scale = x.float().square().mean(0).sqrt()
    return scale.clamp(min=1e-6 * scale.amax(-1, keepdim=True)).clamp(min=2.0**-60)


def quantise(x: torch.Tensor, channel_scale: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """int8 values [.., L, D] and float16 scales [.., L, groups] of activations [.., L, D].

    `channel_scale` [L, D] is the typical size of each channel, measured before anything is written: it takes an outlier
    channel to the size of the others, so that it costs its group nothing. What is left of a row's own size is then the
    largest value of each group of channels.
    """
    x = x.detach().float() / channel_scale.to(x.device)
    width = x.shape[-1]
    padded = torch.nn.functional.pad(x, (0, group_count(width) * GROUP - width))
    grouped = padded.unflatten(-1, (-1, GROUP))
    # rounded up to a float16 before use: exactly what a reader multiplies by, and nothing clips
    scale = (grouped.abs().amax(-1) / 127 * (1 + 2**-10)).clamp(min=2.0**-24).half()
    values = (grouped / scale.float().unsqueeze(-1)).round().clamp(-127, 127).to(torch.int8)
    return values.flatten(-2)[..., :width].cpu().contiguous().numpy(), scale.cpu().numpy()
