"""One optimizer step. The host reads nothing back from the device.

x, y [B, L, D]   this rank's rows, normalised, in `accumulate` pieces
1. schedules     k, lam, which features are dead                          loss/schedules, loss/state
2. the batch     of several pieces: thresholds, L0 over all of them       collect_batch_statistics
3. each piece    loss and gradients, dense [B, F] or by entries [N]       loss/objective, sparse/forward
4. all ranks     gradients averaged over data ranks, one norm over all    parallel/collectives
5. update        clipped, left out where anything is not finite           run/optimizers, sparse/row_gradients
6. averages      densities, L0, the penalty that follows it               loss/state
"""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from .loss import Objective, Pass, StepInputs, StepLoss, annealed_k, choose, dense_pass, ramp, scheduled_lr, step_loss
from .run import StepParts, hold, resample, take_hold, total_and_layer_norms
from .settings import TOPK, TrainerSettings
from .sparse import RowGradients, sparse_pass, use_sparse
from .transcoder import Transcoder, candidates, cut_dim, decoder_norms

_LOOK_ROWS = 256


def objective_of(settings: TrainerSettings, transcoder: Transcoder) -> Objective:
    """Which terms this activation takes."""
    topk_kind = transcoder.settings.activation in TOPK
    return Objective(
        sparsity=None if topk_kind else settings.penalty(),
        tanh_c=settings.tanh_c,
        preactivation=not topk_kind and settings.lam_preactivation > 0,
        preactivation_over_dead=settings.preactivation_over == "dead",
        aux_weight=settings.aux_weight if topk_kind else 0.0,
        aux_k=settings.aux_k or max(1, transcoder.d_model // 2),
    )


def steered(parts: StepParts) -> bool:
    """Whether the penalty's coefficient follows L0."""
    return parts.target_l0 is not None and parts.objective.sparsity in ("tanh", "l1", "l0")


def step_inputs(parts: StepParts) -> StepInputs:
    """What schedules and state say for this step."""
    settings, transcoder, step = parts.settings, parts.transcoder, parts.counters.step
    targets = parts.targets or [float(k) for k in transcoder.settings.ks(transcoder.n_layers)]
    sizes = [size * parts.comm.feature_ranks for size in transcoder.features]
    firsts = [settings.first_k(target, size) for target, size in zip(targets, sizes, strict=True)]
    share = settings.falling_share()
    k = [annealed_k(step, settings.steps, *pair, share) for pair in zip(targets, firsts, strict=True)]
    rising = ramp(step, settings.steps, 1.0, settings.lam_share)
    # A steered coefficient is the controller's: a ramp would work against it.
    if parts.target_l0 is not None and steered(parts):
        lam = parts.state.steered_lam(parts.target_l0)
    else:
        lam = parts.state.log_lam.exp() * rising
    dead = parts.state.dead(step)
    return StepInputs(
        k, lam, settings.lam_preactivation, dead, parts.target_l0, row_bounds=parts.state.row_bounds(),
        use_aux=parts.counters.use_aux,
    )  # fmt: skip


def chosen_pass(parts: StepParts, unformed: RowGradients | None = None) -> Callable[..., Pass]:
    """The dense pass, or the one on active entries: whichever the last look at the densities chose."""
    if parts.counters.use_sparse:
        return partial(sparse_pass, workspace=parts.workspace, unformed=unformed)
    return dense_pass


def train_step(parts: StepParts, x: Tensor, y: Tensor) -> None:
    """x and y: this rank's rows, normalised, [B, L, D]."""
    settings, transcoder, comm = parts.settings, parts.transcoder, parts.comm
    pieces = list(zip(x.chunk(settings.accumulate), y.chunk(settings.accumulate), strict=True))
    inputs = step_inputs(parts)
    take_hold(transcoder, parts.state, comm)
    if len(pieces) > 1:
        inputs = collect_batch_statistics(parts, [x_B for x_B, _ in pieces], inputs)

    # Decoder norms once a step: the pass itself takes them, or for several pieces leaves that collect their gradient.
    norms, leaves = [], None
    if parts.objective.needs_norms and len(pieces) > 1:
        norms = decoder_norms(transcoder, comm)
        leaves = [norm.detach().requires_grad_() for norm in norms]

    # Where nothing else is added to them, the large gradients are never formed: the update makes them row by row.
    rows = RowGradients(parts.optimizers.by_rows) if len(pieces) == 1 and comm.data_ranks == 1 else None

    # Forward and backward, piece by piece; fp16 scales the loss up, and the optimizer's divisor brings it down.
    scale = parts.state.loss_scale.clone()
    parts.optimizers.zero_grad()
    seen = []
    for x_B, y_B in pieces:
        with autocast(settings, x.device):
            given = inputs._replace(norms=leaves)
            loss = step_loss(transcoder, x_B, y_B, given, parts.objective, comm, chosen_pass(parts, rows))
        torch.autograd.backward(loss.loss * (scale / len(pieces)))
        seen.append(loss._replace(loss=loss.loss.detach()))
    if leaves is not None:
        with_gradient = [(norm, leaf.grad) for norm, leaf in zip(norms, leaves) if leaf.grad is not None]
        torch.autograd.backward([norm for norm, _ in with_gradient], [grad for _, grad in with_gradient])

    # Mean over data ranks, norm over all features, one guarded update.
    names = {id(p): name for name, p in transcoder.named_parameters()}
    unformed = [(names[id(p)], norms) for p, norms in rows.settled()] if rows is not None else []
    named = [(name, p.grad) for name, p in transcoder.named_parameters() if p.grad is not None]
    comm.reduce_gradients([grad for _, grad in named])
    cut = [(name, grad) for name, grad in named if cut_dim(name, comm) is not None]
    shared = [(name, grad) for name, grad in named if cut_dim(name, comm) is None]
    norms_1L = total_and_layer_norms([*cut, *unformed], shared, transcoder.n_layers, comm) / scale
    norm = norms_1L[0]
    whole = mean_of(seen)
    bad = comm.max_all((~(norm.isfinite() & whole.loss.isfinite())).float())
    clip = (norm / settings.clip).clamp_min(1.0) if settings.clip else torch.ones_like(norm)
    parts.optimizers.set_lr(scheduled_lr(settings, max(transcoder.features) * comm.feature_ranks, parts.counters.step))
    parts.optimizers.step(clip * scale, bad, rows)
    hold(transcoder, parts.state, comm)

    # Averages for the next steps and for the metrics.
    parts.state.update(whole, x.shape[0], norms_1L, bad, inputs.lam, comm)
    if steered(parts) and parts.target_l0 is not None:
        left = 1 - parts.counters.step / settings.steps
        parts.state.steer(parts.target_l0, settling=min(1.0, max(0.1, left / max(settings.lr_decay, 1e-6))))
    parts.counters.step += 1


def look(parts: StepParts, x: Tensor, y: Tensor) -> None:
    """Now and then, before a step: which step to take, and whether anything is dead. From readings that are the same
    after a resume; but for the break-even of the two steps, which is measured once and kept in the checkpoints."""
    comm, counters = parts.comm, parts.counters
    counters.use_sparse = use_sparse(parts.settings.sparse, _listed(parts, x), x.device, counters.break_even)
    dead = torch.stack([dead_F.any() for dead_F in parts.state.dead(counters.step)]).any()
    counters.use_aux = bool(comm.max_all(dead.float()) > 0)
    alone = comm.data_ranks * comm.feature_ranks == 1
    if parts.settings.sparse == "auto" and x.device.type != "cpu" and alone and not counters.break_even:
        counters.break_even = measured_break_even(parts, x, y)
        counters.use_sparse = use_sparse("auto", _listed(parts, x), x.device, counters.break_even)


@torch.no_grad()
def _listed(parts: StepParts, x: Tensor) -> float:
    """The share of entries that the sparse step would list."""
    transcoder, comm = parts.transcoder, parts.comm
    if transcoder.settings.activation in TOPK:
        return sum(step_inputs(parts).k) / (sum(transcoder.features) * comm.feature_ranks)
    window = transcoder.settings.bandwidth / 2 if transcoder.settings.activation == "jumprelu" else 0.0
    h = transcoder.preactivations(x[:_LOOK_ROWS])
    counts = torch.stack([(h_BF > transcoder.theta(l) - window).sum() for l, h_BF in enumerate(h)])
    entries = sum(h_BF.numel() for h_BF in h) * comm.feature_ranks * comm.data_ranks
    return float(comm.all_reduce_data(comm.all_reduce_features(counts.sum().float()))) / entries


def measured_break_even(parts: StepParts, x: Tensor, y: Tensor, clock: Callable[[], float] = perf_counter) -> float:
    """The share of listed entries at which the two steps should take equally long: loss and gradients are timed by
    each, twice, the second time counts, and the sparse step's time is taken to be in proportion to its list."""
    seconds = {}
    for sparse in (True, False):
        forward = chosen_pass(parts._replace(counters=replace(parts.counters, use_sparse=sparse)))
        for _ in range(2):
            _wait_for(x)
            begun = clock()
            try:
                with autocast(parts.settings, x.device):
                    pieces = zip(x.chunk(parts.settings.accumulate), y.chunk(parts.settings.accumulate), strict=True)
                    piece, inputs = next(pieces), step_inputs(parts)
                    step_loss(parts.transcoder, *piece, inputs, parts.objective, parts.comm, forward).loss.backward()
                _wait_for(x)
                seconds[sparse] = clock() - begun
            except torch.OutOfMemoryError:
                seconds[sparse] = math.inf
            parts.optimizers.zero_grad()
    if math.isinf(seconds[True]):
        return math.inf if math.isinf(seconds[False]) else 1e-9
    return _listed(parts, x) * seconds[False] / seconds[True]


def _wait_for(x: Tensor) -> None:
    if x.is_cuda:
        torch.cuda.synchronize(x.device)


def start_again(parts: StepParts, x: Tensor, y: Tensor) -> None:
    """The dead features, on this batch, as long as it is early enough in the run."""
    settings, step = parts.settings, parts.counters.step
    if step > settings.resample_until * settings.steps:
        return
    inputs, pieces = step_inputs(parts), settings.accumulate
    if pieces > 1:
        inputs = collect_batch_statistics(parts, list(x.chunk(pieces)), inputs)

    def forward(*given: Any) -> Pass:
        with autocast(settings, x.device):
            return chosen_pass(parts)(*given)

    seed = settings.seed * 1_000_003 + step
    resample(
        parts.transcoder, parts.optimizers, parts.state, inputs, x, y, seed, parts.comm, forward, pieces
    )  # fmt: skip


@torch.no_grad()
def collect_batch_statistics(parts: StepParts, x_pieces: list[Tensor], inputs: StepInputs) -> StepInputs:
    """What a step of several pieces must know of its whole batch beforehand: batchtopk's thresholds, the L0."""
    transcoder, comm, settings = parts.transcoder, parts.comm, parts.transcoder.settings
    whole_k = settings.activation == "batchtopk"
    if not whole_k and parts.objective.sparsity != "target":
        return inputs
    rows, layers = sum(x.shape[0] for x in x_pieces), range(transcoder.n_layers)
    room = [max(1, round(k * rows * comm.data_ranks)) for k in inputs.k]
    if settings.k_scope == "all":
        room = [sum(room)] * len(room)
    pools: list[list[Tensor]] = [[] for _ in layers]
    l0 = torch.zeros_like(inputs.lam)
    for x in x_pieces:
        with autocast(parts.settings, x.device):
            h = transcoder.preactivations(x)
        if whole_k:
            for l in layers:
                pools[l].append(candidates(h[l], room[l]))
        else:
            l0 += torch.stack([(h[l] > transcoder.theta(l)).sum() for l in layers]) / rows
    if not whole_k:
        return inputs._replace(l0_around=comm.mean_data(comm.all_reduce_features(l0)))
    # One token's worth of rows: the pools stand in for the batch, and k for the count over it.
    pooled = [torch.cat(pool)[None] for pool in pools]
    thresholds = choose(transcoder, pooled, [k * rows for k in inputs.k], comm)
    return inputs._replace(thresholds=thresholds)


def mean_of(seen: list[StepLoss]) -> StepLoss:
    """The pieces' averages, and the sum of their counts."""
    if len(seen) == 1:
        return seen[0]
    terms = {name: torch.stack([piece.terms[name] for piece in seen]).mean(0) for name in seen[0].terms}
    fired = [torch.stack(counts).sum(0) for counts in zip(*(piece.fired for piece in seen), strict=True)]

    def mean(name: str) -> Tensor:
        return torch.stack([getattr(piece, name) for piece in seen]).mean(0)

    row_loss, row_size = (torch.cat([getattr(piece, name) for piece in seen]) for name in ("row_loss", "row_size"))
    capped = torch.as_tensor(sum(piece.capped for piece in seen))
    return StepLoss(mean("loss"), terms, fired, mean("l0"), mean("power"), row_loss, row_size, capped)


def autocast(settings: TrainerSettings, device: torch.device) -> torch.autocast:
    """The products in half precision where asked; parameters stay float32."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(settings.precision)
    return torch.autocast(device.type, dtype=dtype or torch.bfloat16, enabled=dtype is not None)
