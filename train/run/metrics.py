"""Reconstruction metrics, one definition each, accumulated over an evaluation set.

Per layer, over all tokens: nmse = E|y - y^|^2 / E|y|^2; fvu = E|y - y^|^2 / E|y - mean y|^2, the mean over the whole
set; cosine, the mean over tokens; l0; density per feature; dead, the share of features that never fire; dense, the
share that fires on more than a tenth. Overall: the mean over layers (shares: over all features), and l0_total, the sum.
No mean stands alone: nmse_median is the median row's |y - y^|^2 / |y|^2, and worst_share the share of the squared error
that the worst thousandth of the rows has (overall: of the layer where it is largest). Above a half, a few rows make the
mean, and their tokens are named.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...data.device import widest
from ..parallel import SINGLE, Collectives
from ..transcoder import SparseActs

DENSE_ABOVE = 0.1


class ReconstructionMetrics:
    """Streaming: `update` with rows as often as there are, then `compute`. Nothing is read from the device before."""

    def __init__(
        self, features: Sequence[int], d_model: int, device: torch.device | str = "cpu", comm: Collectives = SINGLE
    ) -> None:
        layers = len(features)

        def zeros(*shape: int) -> Tensor:
            # float64 where the device has it: variances are differences of large sums.
            return torch.zeros(shape, dtype=widest(device), device=device)

        self.comm = comm
        self.tokens = zeros()
        self.error, self.power, self.cosine = zeros(layers), zeros(layers), zeros(layers)
        self.y_sum = zeros(layers, d_model)
        self.fired = [zeros(size) for size in features]
        self.row_error: list[Tensor] = []
        self.row_power: list[Tensor] = []
        self.row_token: list[Tensor] = []

    @torch.no_grad()
    def update(
        self, y: Tensor, y_hat: Tensor, acts: Sequence[Tensor | SparseActs], token: Tensor | None = None
    ) -> None:
        """y, y_hat [B, L, D]; acts of each layer, dense or sparse; the rows' tokens [B]. Leave masked rows out
        beforehand."""
        wide = self.error.dtype
        self.tokens += y.shape[0]
        error_BL, power_BL = (y.to(wide) - y_hat.to(wide)).square().sum(2), y.to(wide).square().sum(2)
        self.error += error_BL.sum(0)
        self.power += power_BL.sum(0)
        self.row_error.append(error_BL.float())
        self.row_power.append(power_BL.float())
        self.row_token.append(torch.full_like(error_BL[:, 0], -1) if token is None else token.to(error_BL[:, 0]))
        self.cosine += F.cosine_similarity(y.to(wide), y_hat.to(wide), dim=-1).sum(0)
        self.y_sum += y.to(wide).sum(0)
        for fired_F, layer in zip(self.fired, acts, strict=True):
            if isinstance(layer, SparseActs):
                fired_F.scatter_add_(0, layer.indices.flatten(), (layer.values > 0).flatten().to(wide))
            else:
                fired_F += (layer > 0).sum(0)

    def densities(self) -> list[Tensor]:
        """Per layer [F]: the share of tokens on which each feature fired (this rank's features, all ranks' tokens)."""
        return [self.comm.all_reduce_data(fired_F) / self.comm.all_reduce_data(self.tokens) for fired_F in self.fired]

    def compute(self) -> dict[str, Any]:
        """{"overall": {...}, "layers": [{...}], "tokens": n}."""
        comm = self.comm
        tokens = comm.all_reduce_data(self.tokens)
        error, power = comm.all_reduce_data(self.error), comm.all_reduce_data(self.power)
        variance = power - comm.all_reduce_data(self.y_sum).square().sum(1) / tokens
        densities = self.densities()
        sizes = comm.all_reduce_features(tokens.new_tensor([float(d.numel()) for d in densities]))
        dead = comm.all_reduce_features(torch.stack([(d == 0).sum() for d in densities]).to(error.dtype))
        dense = comm.all_reduce_features(torch.stack([(d > DENSE_ABOVE).sum() for d in densities]).to(error.dtype))
        l0 = comm.all_reduce_features(torch.stack([d.sum() for d in densities]))
        rows = self._rows()
        median, (worst_share, worst) = median_row(*rows[:2]), worst_rows(rows[0])
        columns = {
            "nmse": error / power,
            "nmse_median": median.to(error),
            "worst_share": worst_share.to(error),
            "fvu": error / variance,
            "cosine": comm.all_reduce_data(self.cosine) / tokens,
            "l0": l0,
            "dead": dead / sizes,
            "dense": dense / sizes,
        }
        per_layer = {name: column.tolist() for name, column in columns.items()}
        layers = [dict(zip(per_layer, row, strict=True)) for row in zip(*per_layer.values(), strict=True)]
        overall = {name: sum(values) / len(values) for name, values in per_layer.items()}
        overall["dead"], overall["dense"] = float(dead.sum() / sizes.sum()), float(dense.sum() / sizes.sum())
        overall["worst_share"] = float(worst_share.max())
        overall["l0_total"] = float(l0.sum())
        report = {"overall": overall, "layers": layers, "tokens": int(tokens)}
        named = {l: rows[2][worst[:, l]].long().tolist() for l, share in enumerate(worst_share.tolist()) if share > 0.5}
        return report | ({"worst_tokens": named} if named else {})

    def _rows(self) -> tuple[Tensor, Tensor, Tensor]:
        """Every data rank's rows: errors and powers [N, L], tokens [N]."""
        own = torch.cat([torch.cat(self.row_error), torch.cat(self.row_power), torch.cat(self.row_token)[:, None]], 1)
        if self.comm.data_ranks > 1:
            most = int(self.comm.max_all(own.new_tensor(float(len(own)))))
            slots = own.new_zeros(self.comm.data_ranks, most, own.shape[1] + 1)
            slots[self.comm.data_rank, : len(own), :-1], slots[self.comm.data_rank, : len(own), -1] = own, 1.0
            slots = self.comm.all_reduce_data(slots).flatten(0, 1)
            own = slots[slots[:, -1] > 0, :-1]
        layers = len(self.error)
        return own[:, :layers], own[:, layers:-1], own[:, -1]


def median_row(error_NL: Tensor, power_NL: Tensor) -> Tensor:
    """[L]: the median row's error relative to its own size."""
    return (error_NL / power_NL.clamp_min(1e-30)).median(0).values


def finite_rows(row_loss_LN: Tensor) -> Tensor:
    """[N, L]: the last rows' losses as a step keeps them, those that no step has seen yet as 0."""
    return row_loss_LN.where(row_loss_LN.isfinite(), 0.0).T


def worst_rows(error_NL: Tensor) -> tuple[Tensor, Tensor]:
    """[L]: the share of the squared error in the worst thousandth of the rows; [n, L]: which rows these are."""
    worst = error_NL.topk(max(1, len(error_NL) // 1000), dim=0)
    wide = widest(error_NL.device)
    total = error_NL.sum(0, dtype=wide).clamp_min(torch.finfo(wide).tiny)
    return worst.values.sum(0, dtype=wide) / total, worst.indices
