"""Where training starts: b_dec at the target's mean, and b_enc such that features fire at a chosen rate at first.

weights      drawn at random (Transcoder.reset_parameters)
x [N, L, D]  some thousands of normalised rows  ->  h [N, F] a layer  ->  b_enc [F] by its quantile   this file
then over it, if asked: the MLPs' neurons (neurons.py measures them), or a finished transcoder        warmstart.py
"""

import torch
from torch import Tensor

from ..transcoder import Transcoder

# Pre-activations in memory at once.
PREACTIVATIONS_AT_ONCE = 1 << 27


@torch.no_grad()
def quantile_bias(h_NF: Tensor, theta_F: Tensor, rate: float) -> Tensor:
    """[F]: the bias at which each feature exceeds its threshold on a share `rate` of the rows; h without its bias.

    The threshold falls halfway between two rows: on one, rounding would say whether that row fires.
    """
    rows = h_NF.shape[0]
    rank = min(max(round(rate * rows), 1), rows)
    largest = h_NF.topk(min(rank + 1, rows), dim=0).values
    return theta_F - (largest[rank - 1] + largest[-1]) / 2


@torch.no_grad()
def initialise(transcoder: Transcoder, x_NLD: Tensor, y_mean_LD: Tensor, rate: list[float], decoder: str) -> None:
    """Set biases from normalised rows, some features at a time, and the decoder to zero where asked; the encoder keeps
    its random weights."""
    for l in range(transcoder.n_layers):
        transcoder.b_dec[l].copy_(y_mean_LD[l])
        theta_F, at_once = transcoder.theta(l), max(1, PREACTIVATIONS_AT_ONCE // len(x_NLD))
        for begin in range(0, transcoder.features[l], at_once):
            some = slice(begin, begin + at_once)
            h_NF = torch.nn.functional.linear(x_NLD[:, l], transcoder.W_enc[l][some])
            transcoder.b_enc[l][some] = quantile_bias(h_NF, theta_F[some], rate[l])
            del h_NF  # before the next ones are made
        if decoder == "zero":
            transcoder.W_dec[l].zero_()


def rows_for(rate: float) -> int:
    """How many rows tell a firing rate apart from its neighbours."""
    return int(min(max(32 / rate, 4096), 65536))
