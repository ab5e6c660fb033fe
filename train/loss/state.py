"""What changes during training besides weights and moments, all of it part of a checkpoint.

Device tensors are updated without reading them back; plain numbers live in `Counters`.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..parallel import Collectives, whole_batch
from ..settings import TrainerSettings
from ..transcoder import Transcoder
from .losses import RowBounds, alike
from .objective import StepLoss

# How the penalty follows L0: log lam moves by gain * log(L0 / target) a step, and _DAMPING * log(L0 / target) is added
# to it at once, without which L0 would swing about its target. Features that a penalty has silenced come back slowly
# when it falls, so it falls faster than it rises; and as long as L0 stays on one side of its target, the gain grows.
_GAIN_UP, _GAIN_DOWN = 0.02, 0.1
_BOOST, _MOST_BOOST, _CALMING = 1.02, 8.0, 0.3
_DAMPING = 2.0
_L0_MEMORY = 0.95
_FORGETTING = 8.0

# Over the last so many rows: one is outsize if |y|^2 is so many times what all but one in a hundred stay below (words
# were seen to reach 9 times that, docs/training.md); its loss then counts relative to its size. And a row's loss counts
# up to so many times what all but one in a thousand stay below.
QUANTILE_ROWS = 8192
_ABOVE_LARGE, _OUTSIZE = 0.01, 16.0
_ABOVE_QUANTILE = 1e-3
_CAP = 4.0

# fp16: the loss is scaled up so that small gradients survive; halved at an overflow, doubled after many good steps.
_FIRST_LOSS_SCALE = 2.0**13
_GROW_AFTER = 1000


@dataclass
class Counters:
    """Plain numbers of the run."""

    step: int = 0
    use_sparse: bool = False
    """The choice that `sparse: auto` last made."""
    use_aux: bool = False
    """Whether any feature was dead when last looked at."""
    break_even: float = 0.0
    """The density below which the sparse step is faster, as measured; 0 before."""
    best_score: float = math.inf
    best_nmse: float = math.inf
    best_held_out_nmse: float = math.inf
    diverging: bool = False
    """Whether the last look found the error far above its best."""
    rewinds: int = 0
    """How often the run went back to a checkpoint because of that."""
    seconds: float = 0.0
    """Training time before this process."""


@dataclass
class Held:
    """Features of a layer that were started lately: what of them stays as it is after a step, or within a bound."""

    steps: int
    """For how many more steps."""
    read: Tensor
    """[n]: this rank's features."""
    fixed: list[tuple[Tensor, Tensor]]
    """Parameters by feature, and the values that these features keep."""
    written: Tensor
    """[m]: rows of the decoder."""
    limit: Tensor
    """[m, reach]: the largest norm, for each layer that is written to."""


class RunningState:
    """Density averages, the steered penalty, bad steps, and sums since the last metric line."""

    def __init__(self, transcoder: Transcoder, settings: TrainerSettings) -> None:
        device, layers = transcoder.device, transcoder.n_layers

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, device=device)

        self.decay = math.exp(-_FORGETTING * settings.batch / settings.tokens_to_die())
        self.steps_to_judge = settings.tokens_to_die() / settings.batch
        self.density = [zeros(size) for size in transcoder.features]
        self.silent = [torch.zeros(size, dtype=torch.int32, device=device) for size in transcoder.features]
        """Steps since each feature fired."""
        # Features started again: for how many more steps they are held, and the norms that their decoders may have.
        self.held_steps = [zeros(size) for size in transcoder.features]
        self.write_limit = [
            zeros(size, transcoder.reach_at(l)).to(transcoder.dtype) for l, size in enumerate(transcoder.features)
        ]
        self.held: list[Held | None] | None = None
        self.row_losses = zeros(layers, QUANTILE_ROWS).to(transcoder.dtype) + math.inf
        self.row_sizes = zeros(layers, QUANTILE_ROWS).to(transcoder.dtype)
        lam = settings.coefficients(layers)
        self.log_lam = torch.tensor([math.log(max(value, 1e-12)) for value in lam], device=device)
        self.l0 = zeros(layers)
        self.side, self.boost = zeros(layers), zeros(layers) + 1
        self.bad_in_row, self.bad_total = zeros(), zeros()
        self.fp16 = settings.precision == "fp16"
        self.loss_scale = torch.full((), _FIRST_LOSS_SCALE if self.fp16 else 1.0, device=device)
        self.good_in_row = zeros()
        self.sums: dict[str, Tensor] = {
            name: zeros(layers)
            for name in ("reconstruction", "sparsity", "preactivation", "auxiliary", "l0", "power", "lam", "capped")
        }
        self.sums |= {"steps": zeros(), "grad_norms": zeros(1 + layers)}

    def dead(self, step: int) -> list[Tensor]:
        """Per layer, bool [F]: silent for `dead_after` tokens."""
        return [silent >= self.steps_to_judge for silent in self.silent]

    def densities(self, step: int) -> list[Tensor]:
        """The running averages, corrected for having started at zero."""
        return [density / max(1 - self.decay**step, 1e-12) for density in self.density]

    @torch.no_grad()
    def update(
        self, seen: StepLoss, tokens: int, grad_norms: Tensor, bad: Tensor, lam: Tensor, comm: Collectives
    ) -> None:
        """After a step; a bad one leaves averages and sums as they were. `grad_norms`: of all, then of each layer."""
        good = 1 - bad
        # An overflow that a smaller loss scale will cure is no bad step.
        curable = self.loss_scale > 1
        self.bad_in_row.copy_((self.bad_in_row + 1) * bad * ~curable)
        self.bad_total += bad * ~curable
        if self.fp16:
            self.good_in_row.copy_((self.good_in_row + 1) * good)
            grow = (self.good_in_row > 0) & (self.good_in_row % _GROW_AFTER == 0)
            self.loss_scale.copy_(
                (self.loss_scale * torch.where(bad > 0, 0.5, torch.where(grow, 2.0, 1.0))).clamp_min(1)
            )
        for density, silent, fired in zip(self.density, self.silent, seen.fired, strict=True):
            now = comm.mean_data(fired.to(density.dtype)) / tokens
            density.lerp_(torch.where(bad > 0, density, now), 1 - self.decay)
            silent.copy_(torch.where(bad > 0, silent, torch.where(now > 0, 0, silent + 1)))
        l0 = comm.mean_data(seen.l0.to(self.l0.dtype))
        self.l0.copy_(torch.where(bad > 0, self.l0, torch.where(self.l0 == 0, l0, self.l0.lerp(l0, 1 - _L0_MEMORY))))
        finite = {name: torch.where(bad > 0, 0, value) for name, value in seen.terms.items()}
        for name, value in (finite | {"power": seen.power, "l0": l0, "lam": lam}).items():
            self.sums[name] += comm.mean_data(value.to(self.l0.dtype)) * good
        self.sums["capped"] += comm.all_reduce_data(seen.capped) * good
        rows_BL2 = whole_batch(torch.stack([seen.row_loss, seen.row_size], dim=2), comm)
        for kept_LN, last_BL in zip((self.row_losses, self.row_sizes), rows_BL2.unbind(2), strict=True):
            last_LN = last_BL.T[:, -QUANTILE_ROWS:].to(kept_LN.dtype)
            moved = torch.cat([kept_LN[:, last_LN.shape[1] :], last_LN], dim=1)
            kept_LN.copy_(torch.where(bad > 0, kept_LN, moved))
        self.sums["steps"] += good
        self.sums["grad_norms"] += torch.where(bad > 0, 0, grad_norms)

    def row_bounds(self) -> RowBounds:
        """From the last rows; the cap is no bound until enough of them were seen."""
        large = self.row_sizes.topk(round(_ABOVE_LARGE * QUANTILE_ROWS) + 1).values[:, -1]
        bounds = RowBounds(torch.full_like(large, torch.inf), _OUTSIZE * large, large)
        bounds = bounds._replace(outsize=bounds.outsize.masked_fill(large == 0, torch.inf))
        losses_LN = self.row_losses * alike(self.row_sizes.T, bounds).T
        above = round(_ABOVE_QUANTILE * QUANTILE_ROWS)
        return bounds._replace(cap=_CAP * losses_LN.topk(above + 1).values[:, -1])

    def steered_lam(self, target: Tensor) -> Tensor:
        """[L]: the coefficient that steering gives now."""
        offset = (self.l0.clamp_min(1e-3) / target).log() * (self.l0 > 0)
        return (self.log_lam + _DAMPING * offset).exp()

    @torch.no_grad()
    def steer(self, target: Tensor, settling: float) -> None:
        """Move log lam so that L0 approaches its target; `settling` in (0, 1] slows it down at the end."""
        offset = (self.l0.clamp_min(1e-3) / target).log().clamp(-1, 1)
        self.boost.mul_(torch.where(offset.sign() == self.side, _BOOST, _CALMING)).clamp_(1.0, _MOST_BOOST)
        self.side.copy_(offset.sign())
        self.log_lam += torch.where(offset > 0, _GAIN_UP, _GAIN_DOWN) * self.boost * settling * offset

    def read_sums(self) -> dict[str, Tensor]:
        """Means since the last reading, on the CPU in one transfer's worth of reads; the sums start again."""
        steps = self.sums["steps"].clamp_min(1)
        means = {name: (value / steps).cpu() for name, value in self.sums.items() if name != "steps"}
        for value in self.sums.values():
            value.zero_()
        return means

    def tensors(self) -> dict[str, Tensor]:
        """All device state by name, in place."""
        named = {f"density.{l}": density for l, density in enumerate(self.density)}
        named |= {f"silent.{l}": silent for l, silent in enumerate(self.silent)}
        for l, (steps, limit) in enumerate(zip(self.held_steps, self.write_limit, strict=True)):
            named |= {f"held_steps.{l}": steps, f"write_limit.{l}": limit}
        named |= {"row_losses": self.row_losses, "row_sizes": self.row_sizes}
        named |= {"log_lam": self.log_lam, "l0": self.l0, "side": self.side, "boost": self.boost}
        named |= {"bad_in_row": self.bad_in_row, "bad_total": self.bad_total}
        named |= {"loss_scale": self.loss_scale, "good_in_row": self.good_in_row}
        return named | {f"sums.{name}": value for name, value in self.sums.items()}
