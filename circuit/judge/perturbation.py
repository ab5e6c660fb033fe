"""How a feature's perturbation grows on its way up: in the model, and in the replacement model that stands for it."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from ...data.models import LanguageModel
from ..model import ReplacementModel
from ..replacement import TranscoderOutput


class _Pushed:
    """Adds a vector to the MLP output of one layer, on top of what stands there."""

    def __init__(self, layer: int, push_BTD: Tensor):
        self.layer, self.push_BTD = layer, push_BTD

    def __call__(self, layer: int, sites: Mapping[str, Tensor]) -> Tensor | None:
        return sites["mlp_out"] + self.push_BTD.to(sites["mlp_out"].dtype) if layer == self.layer else None


@torch.no_grad()
def perturbation_growth(
    rm: ReplacementModel, prompts: Sequence[Tensor], features: int = 4, seed: int = 0
) -> list[dict[str, Any]]:
    """For active features drawn at random, their decoder vector at their own layer is taken away once, and the change
    of the residual stream is followed: `growth` is its norm over the push, in the model; `error` and `cosine` compare
    the replacement model's change with it. One entry per number of layers above the push.
    """
    generator = torch.Generator().manual_seed(seed)
    lm, transcoder = rm.lm, rm.transcoder
    columns: dict[int, list[tuple[float, float, float]]] = {}
    for tokens_T in prompts:
        tokens_BT = tokens_T[None].to(lm.device)
        in_place = TranscoderOutput(transcoder, rm.masked_positions(tokens_BT))
        clean, replaced = _resid(lm, tokens_BT), _resid(lm, tokens_BT, in_place)
        acts = rm.activations(tokens_T)
        for l, layer in enumerate(transcoder.layers[:-1]):
            active = acts[l].nonzero()
            for position, feature in active[torch.randperm(len(active), generator=generator)[:features]].tolist():
                push_BTD = torch.zeros_like(clean[0])
                push_BTD[0, position] = -acts[l][position, feature] * transcoder.W_dec[l][feature, 0]
                pushed = _Pushed(layer, push_BTD)
                in_model = _resid(lm, tokens_BT, pushed)
                in_replacement = _resid(lm, tokens_BT, in_place, pushed)
                for above in range(layer + 1, lm.n_layers):
                    true, stood_for = in_model[above] - clean[above], in_replacement[above] - replaced[above]
                    scale = true.norm().clamp_min(1e-12)
                    cosine = torch.nn.functional.cosine_similarity(true.flatten(), stood_for.flatten(), dim=0)
                    figures = (scale / push_BTD.norm(), (true - stood_for).norm() / scale, cosine)
                    columns.setdefault(above - layer, []).append(tuple(map(float, figures)))  # type: ignore[arg-type]
    return [
        {"layers": distance, "pairs": len(rows), **dict(zip(("growth", "error", "cosine"), _means(rows)))}
        for distance, rows in sorted(columns.items())
    ]


def _means(rows: list[tuple[float, float, float]]) -> list[float]:
    return torch.tensor(rows, dtype=torch.float64).mean(0).tolist()


def _resid(lm: LanguageModel, tokens_BT: Tensor, *changes: Callable[..., Tensor | None]) -> list[Tensor]:
    """The residual stream at every layer under changes of MLP outputs, each on top of the one before."""
    with ExitStack() as stack:
        for change in changes:
            stack.enter_context(lm.overwrite(change))
        found = stack.enter_context(lm.capture(("resid",)))
        lm(tokens_BT)
    return [found.resid[layer].float() for layer in range(lm.n_layers)]
