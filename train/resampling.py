"""Dead features started again, towards tokens that are badly reconstructed."""

import torch
from torch import Tensor

from .collectives import Collectives
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
    gives it the usual firing rate, and fresh moments. It counts as alive until it has had time to prove otherwise."""
    h = transcoder.preactivations(x)
    y_hat = decode_whole(transcoder, transcoder.activate(h, comm=comm), x, comm)
    error_BL = (y - y_hat).square().sum(-1)
    for l in range(transcoder.n_layers):
        dead = inputs.dead[l].nonzero()[:, 0]
        if not len(dead):
            continue
        generator = torch.Generator().manual_seed(hash((seed, l, comm.feature_rank)) & 0x7FFFFFFF)
        weights = error_BL[:, l].square().cpu() + 1e-12
        rows = torch.multinomial(weights, len(dead), replacement=True, generator=generator).to(x.device)
        alive = ~inputs.dead[l]
        usual = transcoder.W_enc[l][alive].norm(dim=1).mean() if bool(alive.any()) else x.new_tensor(1.0)
        directions = torch.nn.functional.normalize(x[rows, l], dim=1)
        transcoder.W_enc[l][dead] = directions * usual * _ENCODER_SHARE
        theta = transcoder.theta(l)[dead]
        h_new = x[:, l] @ transcoder.W_enc[l][dead].T
        rank = max(1, round(rate[l] * len(x)))
        transcoder.b_enc[l][dead] = theta - h_new.topk(rank, dim=0).values[-1]
        transcoder.W_dec[l][dead] = 0
        state.density[l][dead] = rate[l]
        for name in (f"W_enc.{l}", f"b_enc.{l}", f"W_dec.{l}", f"log_theta.{l}"):
            optimizers.forget(name, dead)
