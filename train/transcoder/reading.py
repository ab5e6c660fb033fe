"""What a transcoder reads of a batch: a site of the store, or the MLP's input formed from its residual stream."""

import logging
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ...data.errors import UserError
from ...data.models import InputNorms
from ...data.store import ActivationStore, Batch
from ..settings import TranscoderSettings
from .normalisation import Normalisation, normalisation_of

_log = logging.getLogger(__name__)

INPUT_NORMS = "input_norms"
"""Where a store's attributes keep the norms before the MLPs."""
_SAMPLE_ROWS, _AT_ONCE = 65_536, 4096


class Reading:
    """The rows that a transcoder reads."""

    def __init__(self, store: ActivationStore, read: str, layers: Sequence[int]) -> None:
        self.read, self.layers, self.site, self.norms = read, list(layers), read, None
        if read not in store.sites:
            check_readable(store, read)
            held = InputNorms.from_attributes(store.attributes[INPUT_NORMS])
            kept = list(store.source.layers)
            self.site, self.norms = "resid", held.select([kept.index(layer) for layer in layers])

    def of(self, batch: Batch) -> Tensor:
        """[B, L, D], raw, on the batch's device."""
        x = batch.sites[self.site]
        if self.norms is None:
            return x
        if self.norms.gain.device != x.device:
            self.norms = self.norms.to(x.device)
        return self.norms(x)

    def normalisation(self, store: ActivationStore) -> Normalisation:
        """From the store's own statistics over all rows; that of a formed site, whose rows a norm has made alike, over
        a sample of shuffled ones."""
        places = [store.layers.index(layer) for layer in self.layers]
        square = None if self.norms is None else self._mean_square(store)
        return normalisation_of(store.statistics, self.read, places, store.d_model, square)

    def _mean_square(self, store: ActivationStore) -> Tensor:
        """[L]: E|x|^2 of a formed site."""
        rows, total = min(len(store), _SAMPLE_ROWS), torch.zeros(len(self.layers), dtype=torch.float64)
        size = min(rows, _AT_ONCE)
        for step in range(rows // size):
            total += self.of(store.batch(0, step, size, self.layers)).double().square().sum((0, 2)).cpu()
        return (total / (rows // size * size)).float()


def read_chosen(
    shape: TranscoderSettings, store: ActivationStore, init: str | None = None, say: bool = True
) -> TranscoderSettings:
    """What `read=auto` stands for: what `init` reads, else the MLP's input, which left less error on every model
    measured (docs/training.md). The residual stream where every MLP reads that itself, or where the store knows no
    norm."""
    if shape.read != "auto":
        return shape
    if init is not None:
        return replace(shape, read=init)
    held = store.attributes.get(INPUT_NORMS)
    if held is not None and "resid" in store.sites:
        return replace(shape, read="resid" if all(held["none"]) else "mlp_in")
    if "mlp_in" in store.sites or "resid" not in store.sites:
        return replace(shape, read="mlp_in")
    if say and "model" in store.attributes:
        _log.warning(
            "transcoder.read=resid: this store was made before stores kept the norms before the MLPs; cached again, it "
            "serves transcoder.read=mlp_in, which leaves less error"
        )
    return replace(shape, read="resid")


def check_readable(store: ActivationStore, read: str) -> None:
    """Refuse a site that is neither stored nor formed from what is."""
    if read in store.sites or (read == "mlp_in" and "resid" in store.sites and INPUT_NORMS in store.attributes):
        return
    hint = ""
    if read == "mlp_in" and "resid" in store.sites:
        hint = ", and it was made before stores kept the norms by which it is formed: cache it again"
    raise UserError(f"transcoder.read={read} is not in the store, which holds {', '.join(store.sites)}{hint}")
