"""The transcoder in place of the MLPs, layer by layer as a forward pass goes on."""

from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn

from ...train.transcoder import Transcoder

ROWS_AT_ONCE = 4096  # decoder rows that are looked at together: bounds the memory of rows in a wider dtype


class TranscoderOutput:
    """A callable for `LanguageModel.overwrite`: the transcoder in place of the MLPs, over one forward pass at a time.

    What a feature writes to later layers is kept until the pass gets there. Layers whose features write to no
    overwritten layer are not encoded.
    """

    def __init__(self, transcoder: Transcoder, masked: Tensor | None = None, layers: Collection[int] | None = None):
        """`masked` [B, T]: positions that keep the model's own output. `layers`: those overwritten, all covered ones
        by default; earlier ones still encode where their features write to an overwritten layer."""
        self.transcoder, self.masked = transcoder, masked
        self._number = {layer: l for l, layer in enumerate(transcoder.layers)}
        self.layers = frozenset(transcoder.layers if layers is None else layers)
        chosen = {l for layer, l in self._number.items() if layer in self.layers}
        self._writes = [chosen & set(range(l, l + transcoder.reach_at(l))) for l in range(transcoder.n_layers)]
        self._written: dict[int, Tensor] = {}

    def __call__(self, layer: int, sites: Mapping[str, Tensor]) -> Tensor | None:
        if layer not in self._number:
            return None
        transcoder, l, own = self.transcoder, self._number[layer], sites["mlp_out"]
        if l == 0:
            self._written.clear()
        if not self._writes[l]:
            return None
        x = sites[transcoder.settings.read].to(transcoder.dtype)
        acts = transcoder.encode_layer(x, l)
        if self.masked is not None:
            acts = acts * ~self.masked[..., None]
        add_written(self._written, l, written_by(transcoder, l, acts), self._writes[l])
        if layer not in self.layers:
            return None
        y = (self._written.pop(l) + own_part(transcoder, x, l)).to(own.dtype)
        return y if self.masked is None else torch.where(self.masked[..., None], own, y)


def written_by(transcoder: Transcoder, l: int, acts: Tensor) -> Tensor:
    """What activations [..., F] of covered layer l write, [..., reach, D]: the decoder rows of features that are not
    zero everywhere are all that is read."""
    acts_NF = acts.flatten(0, -2)
    written = acts.new_zeros(len(acts_NF), transcoder.reach_at(l) * transcoder.d_model)
    for some in (acts_NF != 0).any(0).nonzero().squeeze(1).split(ROWS_AT_ONCE):
        written.addmm_(acts_NF[:, some], transcoder.W_dec[l][some].to(acts.dtype).flatten(1))
    return written.view(*acts.shape[:-1], transcoder.reach_at(l), transcoder.d_model)


def add_written(written: dict[int, Tensor], l: int, parts: Tensor, into: Collection[int]) -> None:
    """Add what covered layer l writes, [..., reach, D], to those of the layers that it reaches which are in `into`."""
    for target, part in enumerate(parts.unbind(-2), start=l):
        if target in into:
            written[target] = written[target] + part if target in written else part


def own_part(transcoder: Transcoder, x: Tensor, l: int) -> Tensor:
    """What covered layer l's output holds besides features: its bias and skip connection."""
    return transcoder.b_dec[l].to(x.dtype) + skip_part(transcoder, x, l)


def skip_part(transcoder: Transcoder, x: Tensor, l: int) -> Tensor | float:
    """What the skip connection of covered layer l makes of x [..., D]; 0 where there is none."""
    return nn.functional.linear(x, transcoder.W_skip[l].to(x.dtype)) if len(transcoder.W_skip) else 0.0
