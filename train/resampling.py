"""Dead features started again, towards tokens that are badly reconstructed."""

import torch
from torch import Tensor

from .collectives import Collectives
from .initialisation import quantile_bias
from .objective import StepInputs, decode_whole
from .optimizers import Optimizers
from .state import RunningState
from .transcoder import Transcoder

_ENCODER_SHARE = 0.5


@torch.no_grad()
def resample(
    transcoder: Transcoder, optimizers: Optimizers, state: RunningState, inputs: StepInputs,
    x: Tensor, y: Tensor, seed: int, rate: list[float], comm: Collectives,
) -> None:  # fmt: skip
    """Point each dead encoder at a token drawn in proportion to its squared error, with a zero decoder, a bias that
    gives it the usual firing rate, and fresh moments. It counts as alive until it has had time to prove otherwise.

    One token is drawn for each feature, dead or not, of the whole batch: so it is the same one on any mesh.
    """
    h = transcoder.preactivations(x)
    y_hat = decode_whole(transcoder, transcoder.activate(h, comm=comm), x, comm)
    error_BL = whole_batch((y - y_hat).square().sum(-1), comm)
    for l, size in enumerate(transcoder.features):
        alive = ~inputs.dead[l]
        dead = inputs.dead[l].nonzero()[:, 0]
        norms = torch.stack([transcoder.W_enc[l][alive].norm(dim=1).sum(), alive.sum().to(x.dtype)])
        total, count = comm.sum_shards(norms)
        if float(count) == size * comm.feature_ranks:
            continue
        generator = torch.Generator().manual_seed(hash((seed, l)) & 0x7FFFFFFF)
        weights = error_BL[:, l].square().cpu() + 1e-12
        drawn = torch.multinomial(weights, size * comm.feature_ranks, replacement=True, generator=generator)
        rows = drawn.to(x.device)[comm.feature_rank * size :][:size][dead]
        usual = total / count if float(count) else x.new_tensor(1.0)
        x_BD = whole_batch(x[:, l], comm)
        transcoder.W_enc[l][dead] = torch.nn.functional.normalize(x_BD[rows], dim=1) * usual * _ENCODER_SHARE
        theta = transcoder.theta(l)[dead]
        transcoder.b_enc[l][dead] = quantile_bias(x_BD @ transcoder.W_enc[l][dead].T, theta, rate[l])
        state.density[l][dead] = rate[l]
        for name in (f"W_enc.{l}", f"b_enc.{l}", f"log_theta.{l}"):
            optimizers.forget(name, dead)
        written = dead if comm.slices == 1 else comm.gather_features(inputs.dead[l]).nonzero()[:, 0]
        transcoder.W_dec[l][written] = 0
        optimizers.forget(f"W_dec.{l}", written)


def whole_batch(x: Tensor, comm: Collectives) -> Tensor:
    """All data ranks' rows in the order of the batch, of which each rank holds one stretch."""
    if comm.data_ranks == 1:
        return x
    slots = x.new_zeros(comm.data_ranks, *x.shape)
    slots[comm.data_rank] = x
    return comm.sum_data(slots).flatten(0, 1)
