"""What a transcoder has to beat: itself untrained, random features with a decoder fitted to them, the MLP's own neurons
at equal L0, and a linear map alone.

A control is fitted on text of the training split (`Calibration`), never on the text that it is judged by.
"""

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, ExitStack
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...data.models import LanguageModel
from ...train.transcoder import Transcoder
from ..precision import widest
from .behaviour import Condition, TextBatch

RIDGE = 1e-4
"""Added to the diagonal of the inputs' second moment, relative to its mean, so that a rank-deficient one inverts."""
RIDGE_OF_FEATURES = 0.1
"""The same for random features, of which there are as many as rows."""


class LinearSubstitute:
    """The best linear map from each layer's input to its MLP output: what a transcoder's nonlinearity must beat."""

    def __init__(self, read: str, W_LDD: Tensor, b_LD: Tensor):
        self.read, self.W_LDD, self.b_LD = read, W_LDD, b_LD

    def __call__(self, layer: int, sites: Mapping[str, Tensor]) -> Tensor:
        return nn.functional.linear(sites[self.read].to(self.W_LDD.dtype), self.W_LDD[layer], self.b_LD[layer])


@dataclass(frozen=True)
class Calibration:
    """Moments of inputs and outputs over training text, [L, ...] each, and a sample of the inputs."""

    rows: int
    mean_y_LD: Tensor
    mean_square_x_L: Tensor
    mean_square_y_L: Tensor
    W_LDD: Tensor
    b_LD: Tensor
    sample_NLD: Tensor
    """Inputs x of some positions."""
    sample_y_NLD: Tensor
    """And their outputs."""


@torch.no_grad()
def calibrate(
    lm: LanguageModel,
    read: str,
    batches: Iterable[TextBatch],
    masked_positions: Callable[[Tensor], Tensor],
    sample_rows: int = 4096,
) -> Calibration:
    """Pass over training text once; masked positions and padding are left out."""
    L, D = lm.n_layers, lm.d_model
    wide = widest(lm.device)
    xx = torch.zeros(L, D + 1, D + 1, dtype=wide, device=lm.device)
    xy = torch.zeros(L, D + 1, D, dtype=wide, device=lm.device)
    yy = torch.zeros(L, dtype=wide, device=lm.device)
    sample: list[tuple[Tensor, Tensor]] = []
    for batch in batches:
        tokens_BT = batch.tokens_BT.to(lm.device)
        with lm.capture((read, "mlp_out")) as found:
            lm.run(tokens_BT)
        free_BT = batch.real_BT.to(lm.device) & ~masked_positions(tokens_BT)
        x_NLD = found.stacked(read)[free_BT]
        y_NLD = found.stacked("mlp_out")[free_BT]
        if sum(len(x) for x, _ in sample) < sample_rows:
            sample.append((x_NLD[:sample_rows].float(), y_NLD[:sample_rows].float()))
        x_LNE = nn.functional.pad(x_NLD, (0, 1), value=1.0).transpose(0, 1).to(wide)  # a one for the bias
        y_LND = y_NLD.transpose(0, 1).to(wide)
        xx += x_LNE.mT @ x_LNE
        xy += x_LNE.mT @ y_LND
        yy += y_LND.square().sum((1, 2))
    rows = xx[:, -1, -1]
    moment = xx / rows[:, None, None]
    scale = moment.diagonal(dim1=1, dim2=2)[:, :-1].mean(-1)
    ridge = nn.functional.pad(torch.eye(D, dtype=wide, device=lm.device), (0, 1, 0, 1)) * scale[:, None, None] * RIDGE
    solution = torch.linalg.solve(moment + ridge, xy / rows[:, None, None])  # [L, D + 1, D]
    return Calibration(
        rows=int(rows[0].item()),
        mean_y_LD=(xy[:, -1] / rows[:, None]).float(),
        mean_square_x_L=moment.diagonal(dim1=1, dim2=2)[:, :-1].sum(-1).float(),
        mean_square_y_L=(yy / rows).float(),
        W_LDD=solution[:, :-1].mT.float().contiguous(),
        b_LD=solution[:, -1].float(),
        sample_NLD=torch.cat([x for x, _ in sample])[:sample_rows],
        sample_y_NLD=torch.cat([y for _, y in sample])[:sample_rows],
    )


@torch.no_grad()
def untrained(transcoder: Transcoder, calibration: Calibration, l0: list[float], seed: int = 0) -> Transcoder:
    """The same transcoder before training: drawn weights, features that fire as often as the trained one's.

    Each feature fires on the l0 / F share of tokens that suit it best; the bias is the mean output, and the drawn
    decoder is kept as the initialisation leaves it.
    """
    layers, D = transcoder.layers, transcoder.d_model
    fresh = Transcoder(transcoder.settings, D, layers, seed=seed, device=transcoder.device, dtype=transcoder.dtype)
    in_scale = (D / calibration.mean_square_x_L[layers]).sqrt()
    out_scale = (D / calibration.mean_square_y_L[layers].clamp_min(1e-30)).sqrt()
    zeros = [0.0] * fresh.n_layers
    raw = fresh.folded(in_scale, out_scale, zeros if fresh.settings.activation in ("topk", "batchtopk") else None)
    for l, layer in enumerate(layers):
        h_NF = raw.preactivation(calibration.sample_NLD[:, layer].to(raw.dtype), l)
        fires = max(1, round(l0[l] / h_NF.shape[1] * len(h_NF)))
        raw.b_enc[l].copy_(raw.theta(l) - h_NF.topk(min(fires + 1, len(h_NF)), dim=0).values[-1])
        raw.b_dec[l].copy_(calibration.mean_y_LD[layer])
    return raw


@torch.no_grad()
def random_features(fresh: Transcoder, calibration: Calibration) -> Transcoder:
    """The untrained transcoder's features, each writing to its own layer what ridge regression on the sample's rows
    gives it: what a dictionary owes to its decoder alone.

    W = A^T (A A^T + r I)^-1 (y - mean), A [N, F] the activations: as many equations as the sample has rows.
    """
    fitted = deepcopy(fresh)
    for l, layer in enumerate(fitted.layers):
        A_NF = fitted.encode_layer(calibration.sample_NLD[:, layer].to(fitted.dtype), l)
        y_ND = (calibration.sample_y_NLD[:, layer] - calibration.mean_y_LD[layer]).to(fitted.dtype)
        gram_NN = A_NF @ A_NF.T
        gram_NN.diagonal().add_(RIDGE_OF_FEATURES * gram_NN.diagonal().mean().clamp_min(1e-30))
        W_FD = A_NF.T @ torch.linalg.solve(gram_NN, y_ND)
        fitted.W_dec[l].zero_()
        fitted.W_dec[l][:, 0] = W_FD
    return fitted


def neuron_condition(lm: LanguageModel, l0_by_layer: Mapping[int, float]) -> Condition | None:
    """Only the strongest neurons of each MLP kept, as many as the transcoder has active features.

    A neuron's strength is its activation times the norm of its output weights. None where a family's MLP has no
    single list of neurons (mixtures of experts).
    """
    downs = {layer: lm.layers[layer].mlp_down for layer in l0_by_layer}
    if any(down is None for down in downs.values()):
        return None

    def install(masked_BT: Tensor) -> AbstractContextManager[Any]:
        stack = ExitStack()
        for layer, down in downs.items():
            assert down is not None
            strength_F = down_norms(down)
            hook = _strongest_only(strength_F, l0_by_layer[layer], masked_BT)
            stack.callback(down.register_forward_pre_hook(hook).remove)
        return stack

    return Condition("neurons", install)


def down_norms(down: nn.Module) -> Tensor:
    """[neurons]: the norm of each neuron's output weights, for nn.Linear ([D, F]) and GPT-2's Conv1D ([F, D])."""
    weight = down.weight
    assert isinstance(weight, Tensor)
    return weight.norm(dim=0 if isinstance(down, nn.Linear) else 1)


def _strongest_only(strength_F: Tensor, k: float, masked_BT: Tensor) -> Callable[..., tuple[Tensor]]:
    def hook(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor]:
        neurons_BTF = args[0]
        chosen = strongest(neurons_BTF, strength_F, k) | masked_BT[..., None]
        return (neurons_BTF * chosen,)

    return hook


def strongest(neurons: Tensor, strength_F: Tensor, k: float) -> Tensor:
    """Which neurons [..., F] are among the k strongest of their token."""
    weight = (neurons * strength_F).abs()
    return weight >= weight.topk(min(max(1, round(k)), weight.shape[-1]), dim=-1).values[..., -1:]
