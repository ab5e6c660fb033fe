"""Groups of features that play one part.

`propose_supernodes` groups features that look alike in one of three ways: they write in the same direction, they fire
on the same positions of the prompt, they have the same inputs and outputs in the graph. Groups are joined as long as
their members are alike on average (average linkage).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ...data.errors import check_range
from ...train.transcoder import Transcoder
from .graph import Graph
from .paths import shares


def propose_supernodes(
    graph: Graph,
    transcoder: Transcoder | None = None,
    alike: float = 0.7,
    most: int = 400,
    use: bool = False,
) -> dict[str, list[int]]:
    """Groups of two features or more among the `most` influential ones; `use` stores them in the graph.

    Likeness is the mean of up to three cosines: of edges in and out, of activations over the prompt's positions, and,
    where a transcoder is given, of decoders.
    """
    check_range("alike", alike, 0, 1)
    influence = graph.influence()[: graph.n_features]
    ids = influence.topk(min(most, graph.n_features)).indices.sort().values
    if len(ids) < 2:
        return {}
    parts = [edge_likeness(graph, ids), activation_likeness(graph, ids)]
    if transcoder is not None:
        parts.append(decoder_likeness(graph, ids, transcoder))
    groups = average_linkage(torch.stack(parts).mean(0), alike)
    members = [ids[torch.tensor(group, device=ids.device)].tolist() for group in groups if len(group) > 1]
    members.sort(key=lambda group: -float(influence[group].sum()))
    named: dict[str, list[int]] = {}
    for group in members:
        named[free_name(named, group_name(graph, group))] = group
    if use:
        graph.supernodes.update(named)
    return named


def free_name(taken: dict[str, list[int]], name: str) -> str:
    """The name, with a number where it is taken."""
    number, free = 1, name
    while free in taken:
        number += 1
        free = f"{name} ({number})"
    return free


def group_name(graph: Graph, group: list[int]) -> str:
    """The label that most members have, or the layers and positions that they span."""
    labels = [graph.nodes.labels[id] for id in group if id in graph.nodes.labels]
    if labels:
        return max(sorted(set(labels)), key=labels.count)
    layers, positions = graph.nodes.layer[group], graph.nodes.position[group]
    spans = [f"{int(c.min())}" if c.min() == c.max() else f"{int(c.min())}-{int(c.max())}" for c in (layers, positions)]
    return f"layer {spans[0]} at {spans[1]}"


def cosines(rows: Tensor) -> Tensor:
    """Cosine of every row with every other."""
    unit = F.normalize(rows.float(), dim=1)
    return unit @ unit.T


def edge_likeness(graph: Graph, ids: Tensor) -> Tensor:
    """Cosines of features' edges: shares of their input beside the effect that they have on targets."""
    shares_RN = shares(graph, slice(None)).float()
    into = F.normalize(shares_RN[ids], dim=1)
    out_of = F.normalize((shares_RN * (graph.influence_per_input > 0)[:, None])[:, ids].T, dim=1)
    return cosines(torch.cat([into, out_of], 1))


def activation_likeness(graph: Graph, ids: Tensor) -> Tensor:
    """Cosines of features' activations over the positions of the prompt."""
    nodes, n = graph.nodes, graph.n_features
    place, feature = torch.unique(torch.stack([nodes.layer[:n], nodes.index[:n]], 1), dim=0, return_inverse=True)
    over_positions = torch.zeros(len(place), len(graph.tokens), device=ids.device)
    over_positions[feature, nodes.position[:n]] = nodes.activation[:n].float()
    return cosines(over_positions[feature[ids]])


def decoder_likeness(graph: Graph, ids: Tensor, transcoder: Transcoder) -> Tensor:
    """Cosines of what features write, all layers together, each layer in its own place."""
    rows = torch.zeros(len(ids), transcoder.n_layers, transcoder.d_model, device=ids.device)
    for row, id in enumerate(ids.tolist()):
        l = transcoder.layers.index(int(graph.nodes.layer[id]))
        decoder = transcoder.W_dec[l][int(graph.nodes.index[id])].detach()
        rows[row, l : l + len(decoder)] = decoder.to(rows)
    return cosines(rows.flatten(1))


def average_linkage(alike: Tensor, least: float) -> list[list[int]]:
    """Join the two groups that are most alike on average until none are by `least`."""
    alike = alike.clone().fill_diagonal_(-torch.inf)
    groups: dict[int, list[int]] = {row: [row] for row in range(len(alike))}
    while len(groups) > 1:
        best, where = alike.flatten().max(0)
        if float(best) < least:
            break
        a, b = divmod(int(where), len(alike))
        size_a, size_b = len(groups[a]), len(groups[b])
        joined = (size_a * alike[a] + size_b * alike[b]) / (size_a + size_b)
        joined[a] = -torch.inf
        alike[a], alike[:, a] = joined, joined
        alike[b], alike[:, b] = -torch.inf, -torch.inf
        groups[a] += groups.pop(b)
    return list(groups.values())


def flow_between(graph: Graph, groups: dict[str, list[int]] | None = None) -> Tensor:
    """[G, G] signed influence on the logits that runs from group to group along single edges: [target, source]."""
    groups = graph.supernodes if groups is None else groups
    member = graph.values.new_zeros(len(graph.nodes), len(groups))
    for column, ids in enumerate(groups.values()):
        member[ids, column] = 1
    of_row = member[graph.row_ids]
    rows = of_row.any(1).nonzero().squeeze(1)
    weighted = graph.rows_of(rows) * graph.influence_per_input[rows, None]
    return of_row[rows].T @ (weighted @ member)
