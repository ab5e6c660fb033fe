"""Adam, AdamW, or Muon for the matrices beside AdamW for the rest; clipping and the skip of a bad step folded in.

torch's fused Adam divides each gradient by `grad_scale` and leaves a step out where `found_inf` is 1, both on the
device: that is clipping and the non-finite guard in the same pass, with nothing read back. `rows.adam_rows` does the
same for gradients that are not formed.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ...data.muon import Muon
from ..parallel import SINGLE, Collectives
from ..settings import TrainerSettings
from ..sparse import RowGradients, adam_numbers, adam_rows
from ..transcoder import Transcoder

# The second moment of features that start again, against the others': their steps are some six times as large at first.
_RESET_SECOND = 0.03

MOMENTS = {"adam": ("exp_avg", "exp_avg_sq"), "muon": ("momentum_buffer",)}


class Optimizers:
    """What the step needs of one optimizer or two. Their state exists from the start, so that a checkpoint can be
    read into it in place."""

    def __init__(self, transcoder: Transcoder, settings: TrainerSettings) -> None:
        named = dict(transcoder.named_parameters())
        muon = {n: p for n, p in named.items() if settings.optimizer == "muon" and p.dim() == 2}
        rest = {n: p for n, p in named.items() if n not in muon}
        beta1, beta2 = settings.betas or (0.9, 0.999)
        device = transcoder.device
        self.fused = device.type in ("cpu", "cuda")
        kind = torch.optim.Adam if settings.optimizer == "adam" else torch.optim.AdamW
        decay = 0.0 if settings.optimizer == "adam" else settings.weight_decay
        # Decay would pull thresholds to one (their logarithm to zero) and biases to zero: it acts on matrices alone.
        groups = [
            {"params": [p for n, p in rest.items() if n.startswith("W_") is matrices], "weight_decay": weight_decay}
            for matrices, weight_decay in ((True, decay), (False, 0.0))
        ]
        adam = kind([group for group in groups if group["params"]], betas=(beta1, beta2), fused=self.fused)
        for parameter in rest.values():
            adam.state[parameter]["step"] = torch.zeros((), device=device)
        self.parts: list[tuple[torch.optim.Optimizer, dict[str, torch.nn.Parameter], tuple[str, ...]]] = [
            (adam, rest, MOMENTS["adam"])
        ]
        if muon:
            second = Muon(muon.values(), weight_decay=settings.weight_decay)
            self.parts.append((second, muon, MOMENTS["muon"]))
        for optimizer, parameters, moments in self.parts:
            for parameter in parameters.values():
                for moment in moments:
                    optimizer.state[parameter][moment] = torch.zeros_like(parameter)

    def zero_grad(self) -> None:
        for optimizer, _, _ in self.parts:
            optimizer.zero_grad(set_to_none=True)

    def set_lr(self, lr: float) -> None:
        for optimizer, _, _ in self.parts:
            for group in optimizer.param_groups:
                group["lr"] = lr

    @property
    def by_rows(self) -> list[torch.nn.Parameter]:
        """The matrices that can be updated from gradients that are not formed."""
        _, parameters, _ = self.parts[0]
        matrices = [p for name, p in parameters.items() if name.startswith(("W_enc.", "W_dec."))]
        return matrices if self.fused else []

    def step(self, divisor: Tensor, bad: Tensor, rows: RowGradients | None = None) -> None:
        """One step with gradients / divisor, or none where `bad` is 1 (both [] on the device)."""
        for optimizer, parameters, moments in self.parts:
            if moments is MOMENTS["adam"] and self.fused:
                optimizer.grad_scale, optimizer.found_inf = divisor.float(), bad.float()  # type: ignore[attr-defined]
                optimizer.step()
            elif not bool(bad):
                torch._foreach_div_([p.grad for p in parameters.values() if p.grad is not None], divisor)
                optimizer.step()
        if rows is not None:
            self._step_rows(rows, divisor, bad)

    @torch.no_grad()
    def _step_rows(self, rows: RowGradients, divisor: Tensor, bad: Tensor) -> None:
        adam, _, moments = self.parts[0]
        listed = list(rows.items())
        if not listed:
            return
        steps = [adam.state[parameter]["step"] for parameter, _ in listed]
        numbers = adam_numbers(adam.param_groups[0], torch.stack(steps), divisor, bad)
        for column, (parameter, gradient) in enumerate(listed):
            first, second = (adam.state[parameter][moment].flatten(1) for moment in moments)
            adam_rows(gradient, first, second, numbers[:, column])
        torch._foreach_add_(steps, [(1 - bad).to(steps[0].dtype)] * len(steps))

    def tensors(self) -> dict[str, Tensor]:
        """All state by name, `moment.parameter`: read and written in place."""
        return {
            f"{key}/{name}": value
            for optimizer, parameters, _ in self.parts
            for name, parameter in parameters.items()
            for key, value in optimizer.state[parameter].items()
            if isinstance(value, Tensor)
        }

    def reset_moments(self, name: str, rows: Tensor, comm: Collectives = SINGLE, whole: bool = False) -> None:
        """Begin the moments of some rows anew (features that were resampled): the first at zero; the second at a share
        of the other rows' mean, over all shards unless this rank holds the `whole` tensor's rows.

        From a second moment of zero, Adam would take its first steps at full size whatever the gradient, along every
        coordinate at once: that alone drives most new features off the tokens they were made for, within a few steps.
        At the others' mean, which few features make, they hardly learn.
        """
        for optimizer, parameters, (first, *second) in self.parts:
            if name not in parameters:
                continue
            state = optimizer.state[parameters[name]]
            state[first][rows] = 0
            for scale in (state[moment] for moment in second):
                others = torch.ones(len(scale), dtype=scale.dtype, device=scale.device)
                others[rows] = 0
                total, count = torch.tensordot(others, scale, 1), others.sum()
                if not whole:
                    total, count = comm.all_reduce_features(total), comm.all_reduce_features(count)
                scale[rows] = _RESET_SECOND * total / count.clamp_min(1)


Named = Sequence[tuple[str, Tensor]]


def total_and_layer_norms(sharded: Named, replicated: Named, layers: int, comm: Collectives = SINGLE) -> Tensor:
    """[1 + L]: the 2-norm of all gradients together, and of each layer's (names end in its number): each shard's part
    added up, what every rank holds counted once."""
    squares = [_square_sums(named, layers) for named in (sharded, replicated)]
    if squares[0] is not None:
        squares[0] = comm.all_reduce_features(squares[0])
    parts = [part for part in squares if part is not None]
    return torch.stack(parts).sum(0).sqrt() if parts else torch.zeros(1 + layers)


def _square_sums(named: Named, layers: int) -> Tensor | None:
    if not named:
        return None
    norms = torch._foreach_norm([tensor for _, tensor in named])
    columns: list[list[Tensor]] = [[] for _ in range(layers)]
    for (name, _), norm in zip(named, norms, strict=True):
        columns[int(name.rpartition(".")[2])].append(norm)
    widest, none = max(map(len, columns)), norms[0].new_zeros(())
    grid = torch.stack([norm for column in columns for norm in column + [none] * (widest - len(column))])
    return torch.cat([torch.stack(norms).square().sum()[None], grid.view(layers, widest).square().sum(1)])
