"""Sources carried forwards through the frozen layers: what each changes of the residual stream, layer by layer.

Backwards, one sweep gives what every source adds to a target (`backward`). Forwards, one sweep gives what a source adds
to every place: it is what a head sees of the source. Changes are [n, T', D]: n sources, positions from the first
source's on (nothing flows back).

`freeze_prompt` is what every look at a prompt's attention starts from. Nothing of it is kept with a graph: one forward
pass makes it again from the tokens.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..graph import Node
from ..replacement import LocalModel
from .backward import EdgeColumns, FrozenModel
from .linear import Recording, record
from .sources import Sources, active_features, find_sources

Visit = Callable[[int, Tensor], None]
"""Called with a layer and what sources change of its values, [n, T', KV, hd]; those that begin later are left out at
the end of n."""


Move = Callable[[int, Tensor], Tensor]
"""Called with a layer and what sources change of its input; gives what its attention writes besides (`live`)."""


class FrozenPrompt(NamedTuple):
    """The clean run of one prompt, its sources, and its frozen layers."""

    recording: Recording
    sources: Sources
    model: FrozenModel
    dtype: torch.dtype


@torch.no_grad()
def freeze_prompt(replacement: LocalModel, tokens: Tensor) -> FrozenPrompt:
    """Run tokens [T] once and freeze them."""
    lm, transcoder = replacement.lm, replacement.transcoder
    dtype = torch.promote_types(lm.dtype, transcoder.dtype)
    recording = record(lm, tokens)
    masked = replacement.masked_positions(tokens[None], sites=recording.sites())[0]
    features = active_features(lm, transcoder, recording, masked, dtype)
    sources = find_sources(lm, transcoder, recording, features, masked, dtype)
    return FrozenPrompt(recording, sources, FrozenModel(lm, recording, sources, dtype), dtype)


def by_node(sources: Sources, edges: EdgeColumns) -> Tensor:
    """Edges of a batch in the order of `Sources.nodes`, [S, n]."""
    features = torch.empty_like(edges.features)
    features[sources.run_order] = edges.features
    return torch.cat([features, *(part.flatten(0, 1) for part in edges[1:])])


class Origins(NamedTuple):
    """Sources in the order of the layer where they begin, and where each one's vectors are."""

    nodes: list[Node]
    order: list[int]
    """The caller's number of each."""
    first: int
    """The first position that any stands at."""


def in_order(nodes: Sequence[Node]) -> Origins:
    """Sources sorted by layer."""
    order = sorted(range(len(nodes)), key=lambda number: nodes[number].layer)
    return Origins([nodes[number] for number in order], order, min(node.position for node in nodes))


@torch.no_grad()
def carry(
    frozen: FrozenModel, nodes: Sequence[Node], stop: int, visit: Visit | None = None, move: Move | None = None
) -> tuple[Tensor, int]:
    """What sources change of the residual stream that layer `stop` reads, [n, T', D], and the first of those positions.

    `nodes` are sources of the graph's own kinds, biases too, whose ids are those of the frozen prompt.
    """
    origins, L = in_order(nodes), frozen.n_layers
    first, T = origins.first, frozen.length
    sources, dtype = frozen.sources, frozen.dtype
    rank = torch.empty_like(sources.run_order)
    rank[sources.run_order] = torch.arange(len(rank), device=rank.device)
    ranks = rank.tolist()
    D = sources.embeddings.shape[-1]
    F = torch.zeros(len(nodes), T - first, D, dtype=dtype, device=sources.embeddings.device)
    for n, node in enumerate(origins.nodes):
        if node.kind in ("embedding", "position"):
            F[n, node.position - first] = sources.embeddings[0 if node.kind == "embedding" else 1, node.position]
    for layer in range(min(stop, L)):
        # a bias node begins with the value bias that attention carries; all others with what an MLP writes
        begun = sum(node.layer < layer or (node.layer == layer and node.kind == "bias") for node in origins.nodes)
        written = sum(node.layer <= layer for node in origins.nodes)
        if written:
            _through_layer(frozen, layer, F[:written], begun, origins, ranks, visit, move)
    back = torch.empty_like(F)
    back[torch.tensor(origins.order, device=F.device)] = F
    return back, first


def _through_layer(
    frozen: FrozenModel,
    layer: int,
    F: Tensor,
    begun: int,
    origins: Origins,
    ranks: list[int],
    visit: Visit | None,
    move: Move | None,
) -> None:
    """From a layer's input to its output, in place; the first `begun` of F are there before attention."""
    first, attention, writers = origins.first, frozen.layers[layer], frozen.sources.writers[layer]
    biases = [n for n, node in enumerate(origins.nodes[: len(F)]) if node.kind == "bias" and node.layer == layer]
    reads = F.clone() if frozen.parallel[layer] and writers.skip is not None else F
    # biases of this layer stand among features of it: whatever has begun nowhere is zero and stays so
    begun = max([begun, *(n + 1 for n in biases)])
    if begun:
        values = attention.values(F[:begun])
        for n in biases:
            if attention.value_bias is not None:
                k = origins.nodes[n].position
                values[n, k - first] += attention.of_key_heads(attention.value_bias[k])
        if visit is not None:
            visit(layer, values)
        besides = None if move is None else move(layer, F[:begun])
        F[:begun] += attention.carry(values, first)
        if besides is not None:
            F[:begun] += besides
    for n in biases:
        if attention.written_bias is not None:
            k = origins.nodes[n].position
            F[n, k - first] += attention.written_bias[k]
    through = None
    if writers.skip is not None and writers.skip_scale is not None:
        through = (reads @ writers.skip) * writers.skip_scale[first:]
    for n, node in enumerate(origins.nodes[: len(F)]):
        vector = _written(frozen, layer, node, ranks)
        if vector is not None:
            F[n, node.position - first] += vector
    if through is not None:
        F += through


def _written(frozen: FrozenModel, layer: int, node: Node, ranks: list[int]) -> Tensor | None:
    """What a source writes to the MLP output of a layer, [D]."""
    writers = frozen.sources.writers[layer]
    if node.kind == "feature":
        run, rank = writers.runs[node.position], ranks[node.id]
        return writers.rows(run)[rank - run.start] * node.activation if run.start <= rank < run.stop else None
    if node.layer != layer or node.kind in ("embedding", "position"):
        return None
    return writers.error_and_bias[1 if node.kind == "bias" else 0, node.position]
