"""Held-out evaluation during training: thresholds are calibrated first, then everything is measured as exported."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...data.store import ActivationStore
from ..loss import decode_whole
from ..parallel import SINGLE, Collectives
from ..transcoder import Normalisation, Reading, Transcoder
from .calibration import calibrated_thresholds
from .metrics import ReconstructionMetrics

_ROWS_AT_ONCE = 2048


class Evaluation(NamedTuple):
    """Held-out figures, and what the export needs."""

    report: dict[str, Any]
    """overall, layers, tokens."""
    thresholds: list[Tensor] | None
    """Per layer [F]: calibrated (relu: shifts), where L0 has a target; None where the activation's own are kept. topk
    is measured with its own choice: its thresholds are for foreign formats, which have nothing else."""
    densities: list[Tensor]


class HeldOut:
    """Rows that training never sees, normalised, in pieces: this data rank's part."""

    def __init__(
        self, store: ActivationStore, normalisation: Normalisation, reading: Reading, layers: list[int],
        comm: Collectives = SINGLE,
    ) -> None:  # fmt: skip
        self.store, self.normalisation, self.reading = store, normalisation, reading
        self.layers, self.comm = layers, comm

    def rows(self, tokens: int) -> int:
        """How many rows all ranks take together."""
        return min(tokens, len(self.store))

    def pairs(self, tokens: int, device: torch.device) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """(x, y) normalised and tokens, on the device: the same rows in all, whatever the number of ranks."""
        rank, ranks, left = self.comm.data_rank, self.comm.data_ranks, self.rows(tokens)
        step = 0
        while left > 0:
            rows = min(left, _ROWS_AT_ONCE)
            if rows == _ROWS_AT_ONCE:
                batch, mine = self.store.batch(0, step, rows, self.layers, rank, ranks), slice(None)
            else:
                batch = self.store.batch(0, step, _ROWS_AT_ONCE, self.layers)
                mine = slice(rank * rows // ranks, (rank + 1) * rows // ranks)
            batch = batch.to(device)
            x, y = self.reading.of(batch)[mine], batch.mlp_out[mine]
            yield self.normalisation.x(x), self.normalisation.y(y), batch.token[mine]
            left, step = left - rows, step + 1


@torch.no_grad()
def evaluate(
    transcoder: Transcoder,
    held_out: HeldOut,
    tokens: int,
    targets: list[float] | None,
    comm: Collectives = SINGLE,
) -> Evaluation:
    """Reconstruction on held-out rows, as an export would have it."""
    rows, device = held_out.rows(tokens), transcoder.device
    thresholds = None
    if targets is not None:
        inputs = (x for x, _, _ in held_out.pairs(tokens, device))
        thresholds = calibrated_thresholds(transcoder, inputs, rows, targets, comm)
    metrics = ReconstructionMetrics(transcoder.features, transcoder.d_model, device, comm)
    used = None if transcoder.settings.activation == "topk" else thresholds
    for x, y, token in held_out.pairs(tokens, device):
        acts = transcoder.activate(transcoder.preactivations(x), used, comm)
        metrics.update(y, decode_whole(transcoder, acts, x, comm), acts, token)
    return Evaluation(metrics.compute(), thresholds, metrics.densities())
