"""Groups of features that play one part.

`propose_supernodes` groups features of one position that are alike in some way:

- `tokens`: by what they read, through all of the graph: the tokens that their input goes back to;
- `edges`: by their own inputs and outputs in the graph;
- `decoder`: by what they write;
- `together`: by when they fire, on other text (`circuit.features.Together`);
- `label`: by name.

Groups are joined as long as their members are alike on average (average linkage).
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ...data.errors import UserError, check_choice, check_range
from ...train.transcoder import Transcoder
from .graph import Graph
from .paths import shares

LEAST = {"tokens": 0.75, "edges": 0.4, "decoder": 0.15, "together": 0.15, "label": 0.5}
"""How alike members are on average, by default: what tells the bundled world's concepts apart on prompts that it was
trained on. Of several ways, the mean."""


def propose_supernodes(
    graph: Graph,
    by: str | Sequence[str] = "tokens",
    alike: float | None = None,
    most: int = 400,
    use: bool = False,
    transcoder: Transcoder | None = None,
    acts: Tensor | None = None,
) -> dict[str, list[int]]:
    """Groups of two features or more among the `most` influential ones, the most influential group first; `use` stores
    them in the graph.

    Likeness is a cosine, of several ways their mean. `decoder` takes a transcoder, `together` what each feature of the
    graph did on some text, `acts` [N, features].
    """
    ways = [by] if isinstance(by, str) else list(by)
    for way in ways:
        check_choice("by", way, LEAST)
    least = sum(LEAST[way] for way in ways) / max(1, len(ways)) if alike is None else alike
    check_range("alike", least, 0, 1)
    influence = graph.influence()[: graph.n_features]
    ids = influence.topk(min(most, graph.n_features)).indices.sort().values
    if len(ids) < 2 or not ways:
        return {}
    found = torch.stack([likeness(graph, ids, way, transcoder, acts) for way in ways]).mean(0)
    position = graph.nodes.position[ids]
    groups = average_linkage(found.masked_fill(position[:, None] != position, -torch.inf), least)
    members = [ids[torch.tensor(group, device=ids.device)].tolist() for group in groups if len(group) > 1]
    members.sort(key=lambda group: -float(influence[group].sum()))
    named: dict[str, list[int]] = {}
    for group in members:
        named[free_name(named, group_name(graph, group))] = group
    if use:
        graph.supernodes.update(named)
    return named


def likeness(graph: Graph, ids: Tensor, way: str, transcoder: Transcoder | None, acts: Tensor | None) -> Tensor:
    """How alike some features are in one way, [n, n]."""
    if way == "tokens":
        return cosines(token_profiles(graph, ids))
    if way == "edges":
        return cosines(torch.cat([F.normalize(part, dim=1) for part in own_edges(graph, ids)], 1))
    if way == "label":
        names = [graph.nodes.labels.get(id) for id in ids.tolist()]
        number = torch.tensor([names.index(name) for name in names], device=ids.device)
        bare = torch.tensor([name is None for name in names], device=ids.device)
        return ((number[:, None] == number) & ~bare).float()
    if way == "together":
        if acts is None:
            raise UserError("by=together needs acts, what each feature of the graph did on some text")
        return cosines((acts[:, ids.to(acts.device)] > 0).T).to(ids.device)
    if transcoder is None:
        raise UserError("by=decoder needs the transcoder")
    return decoder_likeness(graph, ids, transcoder)


def free_name(taken: dict[str, list[int]], name: str) -> str:
    """The name, with a number where it is taken."""
    number, free = 1, name
    while free in taken:
        number += 1
        free = f"{name} ({number})"
    return free


def group_name(graph: Graph, group: list[int]) -> str:
    """The label whose members have most influence, or the layers and positions that they span."""
    influence: dict[str, float] = {}
    for id in group:
        if (label := graph.nodes.labels.get(id)) is not None:
            influence[label] = influence.get(label, 0.0) + float(graph.influence()[id])
    if influence:
        return max(sorted(influence), key=influence.__getitem__)
    layers, positions = graph.nodes.layer[group], graph.nodes.position[group]
    spans = [f"{int(c.min())}" if c.min() == c.max() else f"{int(c.min())}-{int(c.max())}" for c in (layers, positions)]
    return f"layer {spans[0]} at {spans[1]}"


def cosines(rows: Tensor) -> Tensor:
    """Cosine of every row with every other."""
    unit = F.normalize(rows.float(), dim=1)
    return unit @ unit.T


def token_profiles(graph: Graph, ids: Tensor) -> Tensor:
    """[n, T] the share of features' input that goes back to each token's embedding, by way of each other."""
    share = shares(graph, ids).abs()  # a feature's row has its own number
    through, own = share[:, ids], share[:, graph.nodes.mask("embedding")]
    return torch.linalg.solve(torch.eye(len(ids)).to(through) - through, own)


def own_edges(graph: Graph, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Shares of features' input from every source [n, N], and of what they give to each other and to logits [n, R]."""
    logits = torch.arange(graph.n_features, len(graph.stored), device=ids.device)
    share = shares(graph, torch.cat([ids, logits]))
    return share[: len(ids)], share[:, ids].T


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
