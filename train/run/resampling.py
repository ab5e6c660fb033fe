"""Dead features started again, towards tokens that are badly reconstructed, so that they cannot do harm.

1. The batch's error, by the step's own pass, in its pieces.
2. Tokens are dealt out, drawn by squared error, a token a feature. A large row counts by its error relative to its
   size, and none for more than `_MOST` times the usual row: else all features would be given to a few rows.
3. Each encoder points from the mean token to its own, without the direction in which the largest rows stand out: a row
   of ten times the usual norm would pass the thresholds of all of them. Decoders begin at zero.
4. For the next `HOLD` steps encoders stand still and each decoder is kept within a norm such that all features that
   were started together write no more on any row of the batch than the error that they found there.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ..loss import Held, Objective, Pass, RunningState, StepInputs, dense_pass
from ..parallel import Collectives, whole_batch
from ..transcoder import Transcoder, all_slices
from .optimizers import Optimizers

HOLD = 20
"""Steps for which a feature's writing stays bounded."""
RESTARTED_AT_ONCE = 4
"""At most one feature for so many tokens of the batch is started again in a layer: the rest wait for the next time."""
_ENCODER_SHARE = 0.5
"""The norm of a new encoder against the usual one."""
_LOW, _HIGH = 0.5, 0.9
"""How much of its own token's projection a feature asks for before it fires: more where too many tokens have it."""
_MOST = 10.0
_REST = 0.2
_LOOK = Objective(
    sparsity=None, tanh_c=0.0, preactivation=False, preactivation_over_dead=False, aux_weight=0.0, aux_k=1
)


class _Started(NamedTuple):
    """The features of one layer that are started now, this rank's own."""

    features: Tensor
    """[n]"""
    W_enc: Tensor
    """[n, D]"""
    b_enc: Tensor
    """[n]"""
    threshold: Tensor
    """[] or [n]: what a pre-activation is compared with."""


@torch.no_grad()
def resample(
    transcoder: Transcoder, optimizers: Optimizers, state: RunningState, inputs: StepInputs,
    x: Tensor, y: Tensor, seed: int, comm: Collectives,
    forward: Callable[..., Pass] = dense_pass, pieces: int = 1,
) -> None:  # fmt: skip
    """Start the dead features of `inputs` again on x and y [B, L, D]; they count as alive until they have had time to
    prove otherwise. Over the whole batch of all data ranks: the same features, tokens and weights on any mesh."""
    error_BL, least_L = _errors(transcoder, inputs, x, y, comm, forward, pieces)
    if not bool(error_BL.isfinite().all()):  # a batch that the step will pass over as well
        return
    size_BL = whole_batch(torch.maximum(x.square().mean(-1), y.square().mean(-1)), comm)
    started: list[_Started | None] = []
    for l in range(transcoder.n_layers):
        x_BD = whole_batch(x[:, l], comm)
        started.append(
            _start(transcoder, inputs, l, x_BD, error_BL[:, l], size_BL[:, l], least_L, hash((seed, l)), comm)
        )

    # What all of them do together on each row, before any has written: for each layer that is written to.
    acts_BL = torch.zeros_like(error_BL)
    for l, one in enumerate(started):
        if one is not None:
            acts_BN = _acts(transcoder, one, whole_batch(x[:, l], comm))
            acts_BL[:, l : l + transcoder.reach_at(l)] += acts_BN.sum(1, keepdim=True)
    acts_BL = comm.all_reduce_features(acts_BL)
    bound_BL = torch.maximum(error_BL, error_BL.mean(0)).sqrt() / acts_BL.clamp_min(1e-12)
    for l, one in enumerate(started):
        limit = None
        if one is not None:
            acts_BN = _acts(transcoder, one, whole_batch(x[:, l], comm))  # once more: all layers' at once are many
            targets = bound_BL[:, l : l + transcoder.reach_at(l)].unbind(1)
            limit = torch.stack(
                [bound.masked_fill(~(acts_BN.T > 0), torch.inf).amin(1) for bound in (t[None] for t in targets)], dim=1
            )
        _write(transcoder, optimizers, state, inputs, l, one, limit, comm)
    state.held = None
    take_hold(transcoder, state, comm)


def _errors(
    transcoder: Transcoder, inputs: StepInputs, x: Tensor, y: Tensor, comm: Collectives,
    forward: Callable[..., Pass], pieces: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """[B, L]: squared errors of the whole batch's rows; [L]: the smallest pre-activation that was active."""
    parts, least = [], x.new_full((transcoder.n_layers,), torch.inf)
    for x_B, y_B in zip(x.chunk(pieces), y.chunk(pieces), strict=True):
        done = forward(transcoder, x_B, inputs, _LOOK, comm)
        parts.append((y_B - all_slices(done.y_hat, comm)).square().sum(-1))
        for l, layer in enumerate(done.layers):
            active = torch.where(layer.acts > 0, layer.h, torch.inf)
            least[l] = torch.minimum(least[l], active.amin().to(least)) if active.numel() else least[l]
    return whole_batch(torch.cat(parts), comm), -comm.max_all(-least)


def _start(
    transcoder: Transcoder, inputs: StepInputs, l: int, x_BD: Tensor, error_B: Tensor, size_B: Tensor, least_L: Tensor,
    seed: int, comm: Collectives,
) -> _Started | None:  # fmt: skip
    """Encoders and biases of a layer's dead features, as many as the batch has tokens for."""
    size, dead_F = transcoder.features[l], inputs.dead[l]
    all_dead = comm.cat_features(dead_F)
    dealt = all_dead & (all_dead.cumsum(0) <= max(1, len(x_BD) // RESTARTED_AT_ONCE))
    own = slice(comm.feature_rank * size, (comm.feature_rank + 1) * size)
    norms = torch.stack([transcoder.W_enc[l][~dead_F].norm(dim=1).sum(), (~dead_F).sum().to(x_BD.dtype)])
    total, count = comm.all_reduce_features(norms)
    if not bool(all_dead.any()):
        return None
    usual_norm = total / count if float(count) else x_BD.new_tensor(1.0)
    features = dealt[own].nonzero()[:, 0]
    tokens = assign_tokens(x_BD, drawing_weights(error_B, size_B), dealt, seed)[own][features]
    towards = x_BD - x_BD.mean(0)
    largest = towards.norm(dim=1).topk(max(1, len(x_BD) // 100)).indices
    apart = normalize(towards[largest].mean(0), dim=0)
    own_ND = towards[tokens]
    rest_ND = own_ND - (own_ND @ apart)[:, None] * apart
    one_of_them = rest_ND.norm(dim=1) < _REST * own_ND.norm(dim=1)  # nothing of such a row would be left
    W_enc = normalize(torch.where(one_of_them[:, None], own_ND, rest_ND), dim=1) * usual_norm * _ENCODER_SHARE

    # A feature fires where the projection is at least half of its own token's, or more if too many tokens have that.
    projected_BN = towards @ W_enc.T
    own_N = projected_BN[tokens, torch.arange(len(tokens), device=tokens.device)].clamp_min(1e-6)
    usual_rate = inputs.k[l] / (size * comm.feature_ranks)
    # halfway between two rows: on one, rounding would say whether it fires
    often = projected_BN.topk(min(len(x_BD), 1 + max(1, round(usual_rate * len(x_BD)))), dim=0).values[-2:].mean(0)
    asked_N = torch.minimum(torch.maximum(often, _LOW * own_N), _HIGH * own_N)
    b_enc = -asked_N - W_enc @ x_BD.mean(0)
    return _Started(features, W_enc, b_enc, _threshold(transcoder, inputs, l, x_BD, tokens, features, least_L, comm))


def _threshold(
    transcoder: Transcoder, inputs: StepInputs, l: int, x_BD: Tensor, tokens: Tensor, features: Tensor, least_L: Tensor,
    comm: Collectives,
) -> Tensor:  # fmt: skip
    """What the activation compares with: its own threshold, or the one that it chose among these tokens."""
    kind = transcoder.settings.activation
    if kind == "batchtopk":
        return least_L[l] if bool(least_L[l].isfinite()) else x_BD.new_zeros(())
    if kind != "topk":
        return transcoder.theta(l)[features]
    tau_F = x_BD.new_zeros(transcoder.features[l] * comm.feature_ranks)  # ranks look at the same tokens, in one order
    everyones = comm.cat_features(_spread(tokens, features, transcoder.features[l]))
    asked = (everyones >= 0).nonzero()[:, 0]
    for part in asked.split(256):
        h = torch.addmm(transcoder.b_enc[l], x_BD[everyones[part]], transcoder.W_enc[l].T)
        tau_F[part] = comm.row_threshold(h, round(inputs.k[l]))[:, 0].clamp_min(0).to(tau_F.dtype)
    return tau_F[comm.feature_rank * transcoder.features[l] + features]


def _spread(values: Tensor, places: Tensor, size: int) -> Tensor:
    """[size]: values at their places, -1 elsewhere."""
    return values.new_full((size,), -1).index_copy(0, places, values)


def _acts(transcoder: Transcoder, one: _Started, x_BD: Tensor) -> Tensor:
    """[B, n]: how strongly each new feature fires on each row."""
    above = torch.addmm(one.b_enc, x_BD, one.W_enc.T)
    h = above.clone() if transcoder.settings.activation == "relu" else above + one.threshold
    return h.masked_fill_(above <= 0, 0.0)


def _write(
    transcoder: Transcoder, optimizers: Optimizers, state: RunningState, inputs: StepInputs, l: int,
    one: _Started | None, limit: Tensor | None, comm: Collectives,
) -> None:  # fmt: skip
    """Put a layer's new features in place, with moments begun anew."""
    if one is None or limit is None:
        return
    transcoder.W_enc[l][one.features] = one.W_enc
    threshold = 0.0 if transcoder.settings.activation == "relu" else one.threshold
    transcoder.b_enc[l][one.features] = one.b_enc + threshold
    state.density[l][one.features] = inputs.k[l] / (transcoder.features[l] * comm.feature_ranks)
    state.silent[l][one.features] = 0
    state.held_steps[l].zero_()
    state.held_steps[l][one.features] = HOLD
    state.write_limit[l][one.features] = limit
    for name in (f"W_enc.{l}", f"b_enc.{l}", f"log_theta.{l}"):
        optimizers.reset_moments(name, one.features, comm)
    steps = state.held_steps[l] if comm.slices == 1 else comm.cat_features(state.held_steps[l])
    written = steps.nonzero()[:, 0]
    transcoder.W_dec[l][written] = 0
    optimizers.reset_moments(f"W_dec.{l}", written, comm, whole=comm.slices > 1)


def drawing_weights(error_B: Tensor, size_B: Tensor) -> Tensor:
    """[B]: by squared error; of a row that is larger than usual, relative to its size; none above its share. `size_B`
    is the mean square of what is read or written, about 1 in a usual row."""
    weight = error_B / size_B.clamp_min(1.0)
    usual = weight.sort().values[: -max(1, len(weight) // 100)].mean() if len(weight) > 1 else weight.mean()
    return torch.minimum(weight, _MOST * usual)


def assign_tokens(x_BD: Tensor, weight_B: Tensor, dead_F: Tensor, seed: int) -> Tensor:
    """[F]: to each dead feature a token of its own, drawn by weight, as long as there are enough (others get any): two
    features with one encoder would stay the same feature for good. Tokens with equal rows count as one."""
    generator = torch.Generator().manual_seed(seed & 0x7FFFFFFF)
    rows_U, of_B = x_BD.unique(dim=0, return_inverse=True)
    numbers = torch.arange(len(of_B), device=x_BD.device)
    first = of_B.new_full((len(rows_U),), len(of_B)).scatter_reduce(0, of_B, numbers, "amin")
    weight_B = torch.zeros_like(weight_B).index_copy(0, first, weight_B[first]).double().cpu()
    share_B = weight_B / weight_B.sum().clamp_min(torch.finfo(torch.float64).tiny)
    order = torch.multinomial(share_B + 1e-12, len(weight_B), generator=generator)
    return order.to(dead_F.device)[(dead_F.cumsum(0) - 1) % len(order)]


@torch.no_grad()
def take_hold(transcoder: Transcoder, state: RunningState, comm: Collectives) -> None:
    """Before the first step after a start, or of a process: find what `hold` is about, and what it is to keep."""
    if state.held is None:
        state.held = [_held(transcoder, state, l, comm) for l in range(transcoder.n_layers)]


@torch.no_grad()
def hold(transcoder: Transcoder, state: RunningState, comm: Collectives) -> None:
    """After a step: features that were started lately read as they did, and write within their bounds."""
    for l, held in enumerate(state.held or []):
        if held is None or not held.steps:
            continue
        for parameter, values in held.fixed:
            parameter.index_copy_(0, held.read, values)
        rows_NRD = transcoder.W_dec[l].index_select(0, held.written)
        square_NR = rows_NRD.square().sum(-1)
        norm_NR = (square_NR if comm.slices == 1 else comm.all_reduce_features(square_NR)).sqrt()
        rows_NRD *= (held.limit / norm_NR.clamp_min(1e-30)).clamp(max=1.0)[..., None]
        transcoder.W_dec[l].index_copy_(0, held.written, rows_NRD)
        state.held_steps[l].sub_(1).clamp_(min=0)
        held.steps -= 1


@torch.no_grad()
def _held(transcoder: Transcoder, state: RunningState, l: int, comm: Collectives) -> Held | None:
    steps, limit = state.held_steps[l], state.write_limit[l]
    read = steps.nonzero()[:, 0]
    if comm.slices > 1:
        steps, limit = comm.cat_features(steps), comm.cat_features(limit)
    left = int(comm.max_all(steps.max()))
    if not left:
        return None
    written = steps.nonzero()[:, 0]
    parameters = [
        transcoder.W_enc[l],
        transcoder.b_enc[l],
        *([transcoder.log_theta[l]] if transcoder.log_theta else []),
    ]
    fixed = [(p.data, p.data.index_select(0, read)) for p in parameters]
    return Held(left, read, fixed, written, limit[written])
