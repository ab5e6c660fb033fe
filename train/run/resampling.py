"""Dead features started again, towards tokens that are badly reconstructed."""

import torch
from torch import Tensor

from ..loss import RunningState, StepInputs, choose, decode_whole
from ..parallel import Collectives
from ..start import quantile_bias
from ..transcoder import Transcoder
from .optimizers import Optimizers

# Against the usual feature: the norm of a new encoder, and how often it fires. Rarely, so that the tokens it takes from
# others are those it was made for.
_ENCODER_SHARE = 0.5
_RATE_SHARE = 0.1


@torch.no_grad()
def resample(
    transcoder: Transcoder, optimizers: Optimizers, state: RunningState, inputs: StepInputs,
    x: Tensor, y: Tensor, seed: int, comm: Collectives,
) -> None:  # fmt: skip
    """Point each dead encoder at a token of its own, drawn in proportion to its squared error, with a zero decoder, a
    bias by which some tokens pass the threshold that this batch has, and moments begun anew. It counts as alive until
    it has had time to prove otherwise.

    Tokens are dealt out to the dead features of all shards, over the whole batch: the same ones on any mesh.
    """
    h = transcoder.preactivations(x)
    chosen = choose(transcoder, h, inputs.k, comm)
    y_hat = decode_whole(transcoder, transcoder.activate(h, chosen, comm), x, comm)
    error_BL = whole_batch((y - y_hat).square().sum(-1), comm)
    if not bool(error_BL.isfinite().all()):  # a batch that the step will pass over as well
        return
    for l, size in enumerate(transcoder.features):
        dead = inputs.dead[l].nonzero()[:, 0]
        alive = ~inputs.dead[l]
        norms = torch.stack([transcoder.W_enc[l][alive].norm(dim=1).sum(), alive.sum().to(x.dtype)])
        total, count = comm.all_reduce_features(norms)
        if float(count) == size * comm.feature_ranks:
            continue
        x_BD, usual_rate = whole_batch(x[:, l], comm), inputs.k[l] / (size * comm.feature_ranks)
        usual_norm = total / count if float(count) else x.new_tensor(1.0)
        all_dead = comm.cat_features(inputs.dead[l])
        everyones = assign_tokens(x_BD, error_BL[:, l].square(), all_dead, hash((seed, l)))
        rows = everyones[comm.feature_rank * size :][:size][dead]
        towards = torch.nn.functional.normalize(x_BD[rows], dim=1)
        transcoder.W_enc[l][dead] = towards * usual_norm * _ENCODER_SHARE
        # What the activation compares with: its own threshold, or the one that it chose among these tokens.
        margin = x_BD @ transcoder.W_enc[l][dead].T
        if chosen is not None:
            margin -= whole_batch(chosen[l], comm) if chosen[l].dim() else chosen[l]
        transcoder.b_enc[l][dead] = quantile_bias(margin, transcoder.theta(l)[dead], usual_rate * _RATE_SHARE)
        state.density[l][dead] = usual_rate
        state.silent[l][dead] = 0
        for name in (f"W_enc.{l}", f"b_enc.{l}", f"log_theta.{l}"):
            optimizers.reset_moments(name, dead, comm)
        written = dead if comm.slices == 1 else all_dead.nonzero()[:, 0]
        transcoder.W_dec[l][written] = 0
        optimizers.reset_moments(f"W_dec.{l}", written, comm, whole=comm.slices > 1)


def assign_tokens(x_BD: Tensor, weight_B: Tensor, dead_F: Tensor, seed: int) -> Tensor:
    """[F]: to each dead feature a token of its own, drawn by weight, as long as there are enough (others get any): two
    features with one encoder would stay the same feature for good. Tokens with equal rows count as one."""
    generator = torch.Generator().manual_seed(seed & 0x7FFFFFFF)
    rows_U, of_B = x_BD.unique(dim=0, return_inverse=True)
    numbers = torch.arange(len(of_B), device=x_BD.device)
    first = of_B.new_full((len(rows_U),), len(of_B)).scatter_reduce(0, of_B, numbers, "amin")
    weight_B = torch.zeros_like(weight_B).index_copy(0, first, weight_B[first]).double().cpu()
    order = torch.multinomial(weight_B / weight_B.sum() + 1e-12, len(weight_B), generator=generator)
    return order.to(dead_F.device)[(dead_F.cumsum(0) - 1) % len(order)]


def whole_batch(x: Tensor, comm: Collectives) -> Tensor:
    """All data ranks' rows in the order of the batch, of which each rank holds one stretch."""
    if comm.data_ranks == 1:
        return x
    slots = x.new_zeros(comm.data_ranks, *x.shape)
    slots[comm.data_rank] = x
    return comm.all_reduce_data(slots).flatten(0, 1)
