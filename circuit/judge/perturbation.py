"""How a feature's perturbation grows on its way up: in the model, and in the replacement model that stands for it."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from ...data.models import LanguageModel
from ..graph import Graph
from ..intervals import mean_of
from ..model import ReplacementModel
from ..replacement import TranscoderOutput

_AT_ONCE = 512
"""Tokens of one pass with pushes."""
SMALL = 0.1
"""Of a write: what is added and taken away to see what the layers above make of it."""


class _Pushed:
    """Adds a vector to the MLP output of each row, at a layer and position of the row's own, on top of what stands
    there."""

    def __init__(self, places: Sequence[tuple[int, int]], pushes_RD: Tensor):
        self.places, self.pushes_RD = places, pushes_RD

    def __call__(self, layer: int, sites: Mapping[str, Tensor]) -> Tensor | None:
        rows = [row for row, (own, _) in enumerate(self.places) if own == layer]
        if not rows:
            return None
        changed = sites["mlp_out"].clone()
        changed[rows, [self.places[row][1] for row in rows]] += self.pushes_RD[rows].to(changed.dtype)
        return changed


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
    columns: dict[int, list[list[float]]] = {}
    for tokens_T in prompts:
        tokens_BT = tokens_T[None].to(lm.device)
        in_place = TranscoderOutput(transcoder, rm.masked_positions(tokens_BT))
        clean, replaced = _resid(lm, tokens_BT), _resid(lm, tokens_BT, in_place)
        acts = rm.activations(tokens_T)
        places, pushes = [], []
        for l, layer in enumerate(transcoder.layers[:-1]):
            active = acts[l].nonzero()
            for position, feature in active[torch.randperm(len(active), generator=generator)[:features]].tolist():
                places.append((layer, position))
                pushes.append(-acts[l][position, feature] * transcoder.W_dec[l][feature, 0])
        at_once = max(1, _AT_ONCE // len(tokens_T))
        for begin in range(0, len(places), at_once):
            some = slice(begin, begin + at_once)
            layer_R = torch.tensor([layer for layer, _ in places[some]])
            pushes_RD = torch.stack(pushes[some])
            pushed, rows = _Pushed(places[some], pushes_RD), tokens_BT.expand(len(layer_R), -1)
            in_model, in_replacement = _resid(lm, rows, pushed), _resid(lm, rows, in_place, pushed)
            size_R = pushes_RD.norm(dim=1).float()
            for above in range(int(layer_R.min()) + 1, lm.n_layers):
                below = layer_R < above
                true = (in_model[above] - clean[above])[below].flatten(1)
                stood_for = (in_replacement[above] - replaced[above])[below].flatten(1)
                scale = true.norm(dim=1).clamp_min(1e-12)
                cosine = torch.nn.functional.cosine_similarity(true, stood_for, dim=1)
                figures = torch.stack([scale / size_R[below], (true - stood_for).norm(dim=1) / scale, cosine], 1)
                for distance, row in zip((above - layer_R[below]).tolist(), figures.tolist(), strict=True):
                    columns.setdefault(distance, []).append(row)
    return [
        {"layers": distance, "pairs": len(rows), **dict(zip(("growth", "error", "cosine"), _means(rows)))}
        for distance, rows in sorted(columns.items())
    ]


@torch.no_grad()
def steps_skipped(rm: ReplacementModel, graphs: Sequence[Graph | None], node: float, seed: int = 0) -> dict[str, Any]:
    """Does a cross-layer transcoder answer from an early layer what the model computes in steps?

    What a graph's features write to their own layer is made a tenth stronger and a tenth weaker, a layer at a time, and
    the model's own MLPs above answer. Where they write along with it what the same features write to those layers, the
    model computes it from what stood in the first, and the features' direct writes skip that step; where they do not,
    the layers above read something else, as the transcoder has it. `share` is how much of the features' later writes
    the MLPs make of their first, with its interval over prompts: 0 where nothing, about 1 where all. `control` is the
    same for a random vector as large in place of the first writes; `written_later` is how much of all that the features
    write goes to later layers. (With the first writes wholly taken away, random vectors move the MLPs as much: they
    leave what they were made for.)
    """
    generator = torch.Generator().manual_seed(seed)
    shares, controls, later = [], [], []
    for graph in graphs:
        if graph is None:
            continue
        tokens_T = torch.tensor(graph.tokens)
        own, above = _writes(rm, graph.prune(node=node, edge=1.0), tokens_T)
        energy = float(above.square().sum())
        if energy == 0:
            continue
        random = torch.randn(own.shape, generator=generator).to(own)
        random *= own.norm(dim=-1, keepdim=True) / random.norm(dim=-1, keepdim=True)
        shares.append(_carried_on(rm, tokens_T, own, above) / energy)
        controls.append(_carried_on(rm, tokens_T, random, above) / energy)
        later.append(energy / (energy + float(own.square().sum())))
    share = mean_of(shares)
    return {
        "prompts": len(shares),
        "share": share.value,
        "share_interval": share.interval,
        "control": mean_of(controls).value,
        "written_later": mean_of(later).value,
    }


def _writes(rm: ReplacementModel, graph: Graph, tokens_T: Tensor) -> tuple[Tensor, Tensor]:
    """What a graph's features write: [l, T, D] to their own layer, and [l, m, T, D] from layer l to a later one m."""
    transcoder, n, T = rm.transcoder, rm.transcoder.n_layers, len(tokens_T)
    acts = rm.activations(tokens_T)
    features = graph.nodes.mask("feature")
    places = {layer: l for l, layer in enumerate(transcoder.layers)}
    own = torch.zeros(n, T, transcoder.d_model, device=acts[0].device)
    above = torch.zeros(n, n, T, transcoder.d_model, device=acts[0].device)
    for layer, l in places.items():
        chosen = features & (graph.nodes.layer == layer)
        position, index = graph.nodes.position[chosen].to(own.device), graph.nodes.index[chosen].to(own.device)
        writes = acts[l][position, index][:, None, None] * transcoder.W_dec[l][index]
        own[l].index_add_(0, position, writes[:, 0].to(own))
        for m in range(1, writes.shape[1]):
            above[l, l + m].index_add_(0, position, writes[:, m].to(own))
    return own, above


def _carried_on(rm: ReplacementModel, tokens_T: Tensor, pushes: Tensor, above: Tensor) -> float:
    """How the MLPs above answer along `above` when layer l's output is pushed, each l in a run of its own: what a push
    a little to one side gives beyond one to the other, for the whole push."""
    lm, layers = rm.lm, rm.transcoder.layers
    rows = tokens_T[None].to(lm.device).expand(len(layers), -1)

    def answers(size: float) -> list[Tensor]:
        def push(layer: int, sites: Mapping[str, Tensor]) -> Tensor | None:
            if layer not in layers:
                return None
            changed = sites["mlp_out"].clone()
            changed[layers.index(layer)] += size * pushes[layers.index(layer)].to(changed)
            return changed

        with lm.overwrite(push), lm.capture(("mlp_out",)) as found:
            lm.run(rows)
        return [found.mlp_out[layer].float() for layer in layers]

    more, less = answers(SMALL), answers(-SMALL)
    return sum(
        float(((more[m][l] - less[m][l]) * above[l, m]).sum()) / (2 * SMALL)
        for l in range(len(layers))
        for m in range(l + 1, len(layers))
    )


def _means(rows: list[list[float]]) -> list[float]:
    return torch.tensor(rows, dtype=torch.float64).mean(0).tolist()


def _resid(lm: LanguageModel, tokens_BT: Tensor, *changes: Callable[..., Tensor | None]) -> list[Tensor]:
    """The residual stream at every layer under changes of MLP outputs, each on top of the one before."""
    with ExitStack() as stack:
        for change in changes:
            stack.enter_context(lm.overwrite(change))
        found = stack.enter_context(lm.capture(("resid",)))
        lm.run(tokens_BT)
    return [found.resid[layer].float() for layer in range(lm.n_layers)]
