"""One forward pass and its loss, from the stages of the transcoder.

    1. pre-activations     h_l = x_l W_enc_l^T + b_enc_l               one product a layer
    2. active set          a_l = act(h_l)                              who fires
    3. decode              y^  = sum of what sources write + b_dec over all feature ranks (transcoder/slices.py)
    4. losses              train/loss/losses.py, over the entries of 2

`dense_pass` does 1 to 3 on [B, F] tensors and is the reference; `sparse/forward.py` offers the same on the
active entries alone. Step 4 is written once, for both.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ..parallel import SINGLE, Collectives
from ..settings import TOPK
from ..transcoder import (
    Transcoder,
    add_written,
    all_slices,
    decoder_norms,
    keep_reaching,
    over_slices,
    own_slice,
    share_dense,
)
from . import losses


@dataclass(frozen=True)
class Objective:
    """What is minimised: the choices that hold for the whole run."""

    sparsity: str | None
    """tanh, l1, l0, target; None where the activation itself fixes L0."""
    tanh_c: float
    preactivation: bool
    """Whether the pre-activation penalty is on."""
    preactivation_over_dead: bool
    aux_weight: float
    aux_k: int

    @property
    def needs_norms(self) -> bool:
        return self.preactivation or self.sparsity in ("tanh", "l1")


class StepInputs(NamedTuple):
    """What the schedules and the state give to one step; tensors on the device, so that nothing is read back."""

    k: Sequence[float]
    """topk kinds: active features per token, one a layer."""
    lam: Tensor
    """[L]: the sparsity penalty's coefficients."""
    lam_preactivation: float
    dead: Sequence[Tensor]
    """Per layer, bool [F]: silent by the running density."""
    target_l0: Tensor | None = None
    """[L], for the quadratic penalty."""
    norms: Sequence[Tensor] | None = None
    """Per layer [F]: the decoder norms, computed once a step; None computes them here."""
    thresholds: Sequence[Tensor] | None = None
    """batchtopk: thresholds chosen over the whole batch, where this is a part of it."""
    l0_around: Tensor | None = None
    """[L]: the whole batch's L0, where this is a part of it."""
    row_bounds: losses.RowBounds | None = None
    """Beyond what a row does not count in full."""
    use_aux: bool = True
    """Whether any feature was dead when last looked at."""


class StepLoss(NamedTuple):
    """The loss, and what was seen on the way. Tensors stay on the device."""

    loss: Tensor
    """[]: what is differentiated."""
    terms: dict[str, Tensor]
    """Each term [L], with its coefficient, detached: reconstruction (of all rows in full), sparsity, preactivation,
    auxiliary."""
    fired: list[Tensor]
    """Per layer [F]: tokens on which each feature fired."""
    l0: Tensor
    """[L]: active features per token, over all shards."""
    power: Tensor
    """[L]: |y|^2 / D, mean over tokens."""
    row_loss: Tensor
    """[B, L]: |y^ - y|^2 / D of each row."""
    row_size: Tensor
    """[B, L]: |y|^2 / D of each row."""
    capped: Tensor
    """[L]: rows whose loss did not count in full."""


class LayerActs(Protocol):
    """The entries of one layer that matter, dense or as a flat list."""

    @property
    def h(self) -> Tensor: ...
    @property
    def acts(self) -> Tensor: ...
    def gather(self, per_feature: Tensor) -> Tensor: ...
    def counts(self) -> Tensor: ...


class DenseActs(NamedTuple):
    """All entries of a layer, [B, F]."""

    h: Tensor
    acts: Tensor

    def gather(self, per_feature: Tensor) -> Tensor:
        return per_feature

    def counts(self) -> Tensor:
        return (self.acts > 0).sum(0)


class Pass(NamedTuple):
    """Stages 1 to 3."""

    y_hat: Tensor
    """[B, L, D]; where decoders are cut along their width, this rank's slice, here and in y_aux."""
    y_aux: Tensor | None
    layers: Sequence[LayerActs]
    norms: Sequence[Tensor] | None
    preactivation: Callable[[int, Tensor, Tensor, Tensor | None], Tensor]
    """(layer, theta, norms, mask) -> the pre-activation penalty of that layer, mean over tokens."""


def choose(transcoder: Transcoder, h: list[Tensor], k: Sequence[float], comm: Collectives) -> list[Tensor] | None:
    """The thresholds of topk kinds for these tokens; None for the others."""
    if transcoder.settings.activation not in TOPK:
        return None
    if transcoder.settings.activation == "batchtopk" and transcoder.settings.k_scope == "all":
        return transcoder.select(h, comm, sum(k) / len(k))
    return [transcoder.select([h_BF], comm, k_l)[0] for h_BF, k_l in zip(h, k, strict=True)]


def dense_pass(
    transcoder: Transcoder, x: Tensor, inputs: StepInputs, objective: Objective, comm: Collectives = SINGLE
) -> Pass:
    """Stages 1 to 3 with every entry in memory."""
    h = transcoder.preactivations(x)
    acts = transcoder.activate(h, inputs.thresholds or choose(transcoder, h, inputs.k, comm), comm)
    y_hat = decode_own(transcoder, acts, x, comm)
    y_aux = None
    if objective.aux_weight and inputs.use_aux:
        silent = [_aux_acts(h_BF, dead, objective.aux_k, comm) for h_BF, dead in zip(h, inputs.dead, strict=True)]
        y_aux = _written(transcoder, silent, x.dtype, comm)
    norms = inputs.norms
    if norms is None and objective.needs_norms:
        norms = decoder_norms(transcoder, comm)

    def preactivation(l: int, theta: Tensor, n: Tensor, over: Tensor | None) -> Tensor:
        return losses.preactivation_penalty(h[l], theta, n, x.shape[0], over)

    return Pass(y_hat, y_aux, [DenseActs(*pair) for pair in zip(h, acts, strict=True)], norms, preactivation)


def step_loss(
    transcoder: Transcoder,
    x: Tensor,
    y: Tensor,
    inputs: StepInputs,
    objective: Objective,
    comm: Collectives = SINGLE,
    forward: Callable[..., Pass] = dense_pass,
) -> StepLoss:
    """The loss of these tokens: x and y normalised, [B, L, D], float32."""
    tokens = x.shape[0]
    done = forward(transcoder, x, inputs, objective, comm)
    fired = [layer.counts() for layer in done.layers]
    l0 = comm.all_reduce_features(torch.stack([counts.sum() for counts in fired]).to(x.dtype)) / tokens
    own_y = own_slice(y, comm)
    row_loss = over_slices(losses.row_losses(done.y_hat, own_y), comm)
    row_size = torch.linalg.vector_norm(y, dim=2).square() / y.shape[2]
    weights = None if inputs.row_bounds is None else losses.row_weights(row_loss, row_size, inputs.row_bounds)
    terms = {"reconstruction": over_slices(losses.reconstruction(done.y_hat, own_y, weights), comm)}
    with torch.autocast(x.device.type, enabled=False):
        if objective.sparsity is not None:
            terms["sparsity"] = inputs.lam * _sparsity(transcoder, done, inputs, objective, tokens, comm)
        if objective.preactivation:
            parts = [
                done.preactivation(l, transcoder.theta(l), n, dead if objective.preactivation_over_dead else None)
                for l, (n, dead) in enumerate(zip(done.norms or [], inputs.dead, strict=True))
            ]
            terms["preactivation"] = inputs.lam_preactivation * comm.all_reduce_features(torch.stack(parts))
        if done.y_aux is not None:
            any_dead = comm.all_reduce_features(torch.stack([dead.any() for dead in inputs.dead]).any().to(x.dtype)) > 0
            auxiliary = over_slices(losses.auxiliary(done.y_aux, done.y_hat, own_y), comm)
            terms["auxiliary"] = objective.aux_weight * any_dead * auxiliary
    loss = torch.stack(list(terms.values())).sum()
    detached = {name: term.detach() for name, term in terms.items()} | {"reconstruction": row_loss.mean(0)}
    capped = torch.zeros_like(l0) if weights is None else (weights < 1).sum(0).to(l0.dtype)
    return StepLoss(loss, detached, fired, l0, row_size.mean(0), row_loss, row_size, capped)


def _sparsity(
    transcoder: Transcoder, done: Pass, inputs: StepInputs, objective: Objective, tokens: int, comm: Collectives
) -> Tensor:
    """[L]: the chosen penalty, without its coefficient, over all shards."""
    settings, parts = transcoder.settings, []
    for l, layer in enumerate(done.layers):
        if objective.sparsity in ("l0", "target"):
            theta = layer.gather(transcoder.theta(l))
            parts.append(losses.l0_penalty(layer.h, theta, settings.bandwidth, settings.ste_reaches_h, tokens))
        elif done.norms is not None:
            n = layer.gather(done.norms[l])
            if objective.sparsity == "tanh":
                parts.append(losses.tanh_penalty(layer.acts, n, objective.tanh_c, tokens))
            else:
                parts.append(losses.l1_penalty(layer.acts, n, tokens))
    penalty = comm.all_reduce_features(torch.stack(parts))
    if objective.sparsity != "target":
        return penalty
    assert inputs.target_l0 is not None
    around = comm.mean_data(penalty.detach()) if inputs.l0_around is None else inputs.l0_around
    return losses.quadratic_target(penalty, inputs.target_l0, around)


def decode_own(transcoder: Transcoder, acts: Iterable[Tensor], x: Tensor, comm: Collectives = SINGLE) -> Tensor:
    """y^ [B, L, D] of dense activations, or this rank's slice of it: what all features write, b_dec and skip once."""
    y_hat = _written(transcoder, acts, x.dtype, comm) + torch.stack(list(transcoder.b_dec))
    return y_hat + transcoder.skip(x).to(x.dtype) if len(transcoder.W_skip) else y_hat


def decode_whole(transcoder: Transcoder, acts: Iterable[Tensor], x: Tensor, comm: Collectives = SINGLE) -> Tensor:
    """The same, whole on every rank; without gradient where it is cut."""
    return all_slices(decode_own(transcoder, acts, x, comm), comm)


def _written(transcoder: Transcoder, acts: Iterable[Tensor], dtype: torch.dtype, comm: Collectives) -> Tensor:
    parts = transcoder.decode_features(share_dense(acts, comm))
    return add_written(torch.stack(parts, dim=-2).to(dtype), comm)


def _aux_acts(h_BF: Tensor, dead_F: Tensor, aux_k: int, comm: Collectives) -> Tensor:
    """The aux_k strongest dead features of each token."""
    silent_BF = h_BF.masked_fill(~dead_F, 0.0)
    return keep_reaching(silent_BF, comm.row_threshold(silent_BF.detach(), aux_k))
