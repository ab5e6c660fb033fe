"""The transcoder in place of the MLPs, layer by layer as a forward pass goes on."""

from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn

from ...train.transcoder import Transcoder


class TranscoderOutput:
    """A callable for `LanguageModel.overwrite`: the transcoder in place of the MLPs, over one forward pass at a time.

    What a feature writes to later layers is kept until the pass gets there.
    """

    def __init__(self, transcoder: Transcoder, masked: Tensor | None = None, layers: Collection[int] | None = None):
        """`masked` [B, T]: positions that keep the model's own output. `layers`: those overwritten, all covered ones
        by default; the others still encode, since their features may write to overwritten layers."""
        self.transcoder, self.masked = transcoder, masked
        self.layers = frozenset(transcoder.layers if layers is None else layers)
        self._number = {layer: l for l, layer in enumerate(transcoder.layers)}
        self._written: dict[int, Tensor] = {}

    def __call__(self, layer: int, sites: Mapping[str, Tensor]) -> Tensor | None:
        if layer not in self._number:
            return None
        transcoder, l, own = self.transcoder, self._number[layer], sites["mlp_out"]
        if l == 0:
            self._written.clear()
        x = sites[transcoder.settings.read].to(transcoder.dtype)
        acts = transcoder.encode_layer(x, l)
        if self.masked is not None:
            acts = acts * ~self.masked[..., None]
        add_written(self._written, l, transcoder.decode_from(l, acts.flatten(0, -2)).unflatten(0, x.shape[:-1]))
        y = self._written.pop(l) + own_part(transcoder, x, l)
        if layer not in self.layers:
            return None
        y = y.to(own.dtype)
        return y if self.masked is None else torch.where(self.masked[..., None], own, y)


def add_written(written: dict[int, Tensor], l: int, parts: Tensor) -> None:
    """Add what covered layer l writes, [..., reach, D], to the layers that it reaches."""
    for offset, part in enumerate(parts.unbind(-2)):
        written[l + offset] = written[l + offset] + part if l + offset in written else part


def own_part(transcoder: Transcoder, x: Tensor, l: int) -> Tensor:
    """What covered layer l's output holds besides features: its bias and skip connection."""
    bias = transcoder.b_dec[l]
    return bias + nn.functional.linear(x, transcoder.W_skip[l]) if len(transcoder.W_skip) else bias
