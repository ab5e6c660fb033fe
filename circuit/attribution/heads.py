"""Through which heads an edge goes: its part by way of each head's values and outputs.

With attention frozen a layer's heads are a sum of linear maps, so of what source s adds to target t,

    head[m, h] = sum over k <= p of pattern_h[p, k] * G_m[p] . P_m O_h V_h N_m F_m[k]

went through head h of layer m: F_m is what the source changes of the layer's input (`forward`), G_m the target's
cotangent where m's attention joins the residual stream (`backward`). What went past m's attention is its `bypass`;
both together are the edge. Each layer splits the same edge anew: the splits of two layers are alternatives.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ...data.errors import UserError, check_range
from ...data.models import LanguageModel
from ..graph import Graph, Node
from ..replacement import LocalModel, memory_named
from .backward import Directions, Places
from .forward import FrozenPrompt, by_node, carry, freeze_prompt, in_order
from .sources import ActiveFeatures
from .targets import Target, choose_targets, feature_targets, likely_tokens, next_token_targets, token_directions

TOGETHER = 64  # sources or targets in one sweep
VALUES = 2**30  # bytes of sources' values that are kept while targets are swept


class EdgeHeads(NamedTuple):
    """One edge, split over the heads of each layer that lies between its ends."""

    target: int
    """Node of the graph."""
    source: int
    value: float
    """What the source adds to the target, read out anew: a graph that leaves features out holds them in its error
    columns, where the stored edge is more than this."""
    heads: Tensor
    """[L, H] the part through each head; 0 at layers that are not between."""
    bypass: Tensor
    """[L] the part past each layer's attention; all of it at layers that are not between."""
    between: range
    """The layers whose attention lies between source and target."""

    def strongest(self, count: int = 3) -> list[tuple[int, int, float]]:
        """The heads with the largest parts, (layer, head, part)."""
        flat = self.heads.flatten()
        best = flat.abs().topk(min(count, len(flat))).indices.tolist()
        H = self.heads.shape[1]
        return [(i // H, i % H, float(flat[i])) for i in best if flat[i] != 0]


class Head(NamedTuple):
    """How much of a graph's influence goes through one head; to be compared within its layer."""

    layer: int
    head: int
    signed: float
    """Sum over edges of their targets' influence a unit of input, times the head's part with the edge's sign."""
    absolute: float
    """The same with absolute parts."""
    share: float
    """`absolute` over that of all heads of the layer and of what went past them."""


def edge_heads(replacement: LocalModel, graph: Graph, edges: Sequence[tuple[int, int]]) -> list[EdgeHeads]:
    """The heads of edges (target, source); one sweep backwards for each target and one forwards for each source."""
    for target, source in edges:
        check_edge(graph, target, source)
    with memory_named("the number of edges or the prompt"):
        prompt = freeze_prompt(replacement, torch.tensor(graph.tokens, device=replacement.lm.device))
        return heads_of(replacement, graph, prompt, edges)


def check_edge(graph: Graph, target: int, source: int) -> None:
    """Refuse what is no edge, and edges from biases."""
    for id in (target, source):
        if not 0 <= id < len(graph.nodes):
            raise UserError(f"node {id} is not in the graph, whose nodes are 0 to {len(graph.nodes) - 1}")
    if not graph.has_row(target):
        kind = graph.nodes[target].kind
        raise UserError(f"node {target} is a node of kind {kind}, into which no edge goes; an edge is (target, source)")
    if (kind := graph.nodes[source].kind) in ("bias", "logit"):
        raise UserError(f"node {source} is a node of kind {kind}: heads are told of features, errors and embeddings")


@torch.no_grad()
def heads_of(
    replacement: LocalModel, graph: Graph, prompt: FrozenPrompt, edges: Sequence[tuple[int, int]]
) -> list[EdgeHeads]:
    """`edge_heads` on a prompt that is frozen already."""
    lm = replacement.lm
    ids = sorted({target for target, _ in edges})
    targets = targets_of(replacement, graph, prompt, ids)
    sources = sorted({source for _, source in edges})
    nodes = dict(zip(sources, own_nodes(graph, prompt, sources)))
    sources.sort(key=lambda id: nodes[id].position)
    column = {id: number for number, id in enumerate(ids)}
    H = lm.layers[0].n_heads
    found = torch.zeros(len(edges), lm.n_layers, H, dtype=prompt.dtype, device=lm.device)
    value = found.new_zeros(len(edges))
    order = targets.position.argsort(stable=True)  # a batch holds neighbouring positions
    for block in _blocks(prompt, [nodes[id] for id in sources]):
        there = {id: number for number, id in enumerate(sources[block])}
        kept = _Values(prompt, [nodes[id] for id in sources[block]])
        for some in order.split(TOGETHER):
            some = by_layer(targets, some, prompt.model.length)
            place = {number: i for i, number in enumerate(some.tolist())}
            mine = [
                (number, place[column[target]], there[source])
                for number, (target, source) in enumerate(edges)
                if source in there and column[target] in place
            ]
            if mine:
                _sweep(prompt, targets.select(some), kept, torch.tensor(mine, device=lm.device), found, value)
    layers = targets.layer.tolist()
    parallel = prompt.model.parallel
    split = []
    for number, (target, source) in enumerate(edges):
        last = layers[column[target]]  # a sequential block's MLP reads what its attention wrote
        stop = last if last == lm.n_layers or parallel[last] else last + 1
        between = range(nodes[source].layer + 1, stop)
        bypass = value[number] - found[number].sum(1)
        split.append(EdgeHeads(target, source, float(value[number]), found[number], bypass, between))
    return split


def own_nodes(graph: Graph, prompt: FrozenPrompt, ids: Sequence[int]) -> list[Node]:
    """A graph's nodes as those of the frozen prompt, which has all that a smaller graph leaves out."""
    all_nodes = prompt.sources.nodes(prompt.recording)
    number = {key: id for id, key in enumerate(all_nodes.keys())}
    keys = graph.nodes.keys()
    found = []
    for id in ids:
        if keys[id] not in number:
            raise UserError(f"node {id} of the graph is not there when this model reads the prompt; trace it again")
        found.append(all_nodes[number[keys[id]]])
    return found


def targets_of(replacement: LocalModel, graph: Graph, prompt: FrozenPrompt, ids: Sequence[int]) -> Directions:
    """A graph's features and logits as targets again, one a column."""
    lm, transcoder, dtype = replacement.lm, replacement.transcoder, prompt.dtype
    device, first_logit = lm.device, len(graph.nodes) - len(graph.probabilities)
    parts = []
    features = [id for id in ids if id < graph.n_features]
    if features:
        own = torch.tensor([node.id for node in own_nodes(graph, prompt, features)], device=device)
        chosen = ActiveFeatures(*(column[own] for column in prompt.sources.features))
        parts.append(feature_targets(lm, transcoder, prompt.recording, chosen, dtype))
    for id in (id for id in ids if id >= first_logit):
        node = graph.nodes[id]
        if node.index >= 0:
            directions, bias = token_directions(lm, torch.tensor([node.index], device=device), dtype)
            where = torch.tensor([node.position], device=device)
            one = next_token_targets(lm, prompt.recording, directions, where)
            one = one._replace(own_bias=one.own_bias + bias, value=one.value + bias)
        else:
            wanted = [_named_target(graph, id - first_logit)]
            one = choose_targets(lm, transcoder, prompt.recording, wanted, 1, 1.0, dtype).targets
        parts.append(one)
    return Directions(*(torch.cat(column) for column in zip(*parts)))


def likely_directions(lm: LanguageModel, prompt: FrozenPrompt) -> tuple[Tensor, Tensor]:
    """The likeliest next tokens of a prompt, at most 10 that reach 0.95, and the directions [n, D] that they read."""
    last = prompt.recording.logits[-1].float().softmax(-1)
    tokens = likely_tokens(last, 10, 0.95)
    directions = token_directions(lm, tokens, prompt.dtype)[0]
    where = torch.full_like(tokens, prompt.model.length - 1)
    return tokens, next_token_targets(lm, prompt.recording, directions, where).direction


def _named_target(graph: Graph, rank: int) -> Target:
    """A target that is not one token, as it was named when the graph was traced."""
    named = (graph.metadata.get("settings") or {}).get("targets") or []
    if rank >= len(named) or named[rank].partition("@")[0] == "vector":
        raise UserError("a target that was given as a vector is not kept with its graph; name a token or a feature")
    return Target.parse(named[rank], len(graph.tokens))


def by_layer(targets: Directions, some: Tensor, length: int) -> Tensor:
    """Some targets as `FrozenModel.edges` takes them: the last layer first, then by position."""
    return some[(targets.position[some] - targets.layer[some] * length).argsort(stable=True)]


def _blocks(prompt: FrozenPrompt, nodes: list[Node]) -> list[slice]:
    """Sources, by position, cut where what is kept of them would take more than is allowed."""
    model = prompt.model
    a_place = prompt.dtype.itemsize * model.layers[0].n_kv_heads * model.layers[0].head_dim
    cuts, taken = [0], 0
    for number, node in enumerate(nodes):
        takes = (model.n_layers - max(0, node.layer)) * (model.length - node.position) * a_place
        if taken and taken + takes > VALUES:
            cuts.append(number)
            taken = 0
        taken += takes
    return [slice(start, stop) for start, stop in zip(cuts, [*cuts[1:], len(nodes)])]


class _Values:
    """What sources make of every layer's values, [n, T', KV, hd] a layer."""

    def __init__(self, prompt: FrozenPrompt, nodes: list[Node]):
        self.prompt = prompt
        self.batches: list[tuple[int, dict[int, Tensor]]] = []
        batch_of: list[int] = []
        row_of: list[int] = []
        for start in range(0, len(nodes), TOGETHER):
            some = nodes[start : start + TOGETHER]
            seen: dict[int, Tensor] = {}
            first = carry(prompt.model, some, prompt.model.n_layers, seen.__setitem__)[1]
            rows = {number: row for row, number in enumerate(in_order(some).order)}
            batch_of += [len(self.batches)] * len(some)
            row_of += [rows[number] for number in range(len(some))]
            self.batches.append((first, seen))
        device = prompt.sources.embeddings.device
        self.batch_of, self.row_of = torch.tensor(batch_of, device=device), torch.tensor(row_of, device=device)
        self.ids = torch.tensor([node.id for node in nodes], device=device)


def _sweep(
    prompt: FrozenPrompt, targets: Directions, kept: _Values, mine: Tensor, found: Tensor, value: Tensor
) -> None:
    """One sweep backwards: edges `mine` [E, 3] are (number, column of `targets`, source)."""
    number, column, source = mine.T
    batch, row = kept.batch_of[source], kept.row_of[source]

    def visit(layer: int, columns: slice, G: Tensor | None, V: Tensor) -> None:
        for b, (first, seen) in enumerate(kept.batches):
            if layer not in seen or len(V) <= first:
                continue
            values = seen[layer]
            here = (batch == b) & (row < len(values)) & (column >= columns.start) & (column < columns.stop)
            some = here.nonzero().squeeze(1)
            if len(some) == 0:
                continue
            # the sources and targets of these edges, each with each: one product for every key head
            rows, of_row = row[some].unique(return_inverse=True)
            picked, of_column = (column[some] - columns.start).unique(return_inverse=True)
            T, KV, hd = len(V) - first, *values.shape[2:]
            of_sources = values[rows, :T].permute(2, 0, 1, 3).flatten(2)  # [KV, s, T' * hd]
            of_targets = V[first:, :, picked].view(T, KV, -1, hd, len(picked)).permute(1, 0, 3, 2, 4)
            parts = torch.bmm(of_sources, of_targets.reshape(KV, T * hd, -1)).unflatten(2, (-1, len(picked)))
            found[number[some], layer] = parts[:, of_row, :, of_column].flatten(1)

    edges = prompt.model.edges(targets, Places(targets.layer.tolist(), targets.position.tolist()), visit)
    value[number] = by_node(prompt.sources, edges)[kept.ids[source], column]


@torch.no_grad()
def head_places(replacement: LocalModel, graph: Graph, edge: tuple[int, int], layer: int, head: int) -> Tensor:
    """One head's part of an edge, split over the places at which it looked: [T, T] queries by keys."""
    check_edge(graph, *edge)
    prompt = freeze_prompt(replacement, torch.tensor(graph.tokens, device=replacement.lm.device))
    targets = targets_of(replacement, graph, prompt, [edge[0]])
    kept = _Values(prompt, own_nodes(graph, prompt, [edge[1]]))
    first, seen = kept.batches[0]
    attention, T = prompt.model.layers[layer], prompt.model.length
    hd = attention.head_dim
    places = torch.zeros(T, T, dtype=prompt.dtype, device=replacement.lm.device)

    def visit(at: int, columns: slice, G: Tensor | None, V: Tensor) -> None:
        if at != layer or at not in seen:
            return
        of_source = seen[at][0, : len(V) - first, head * attention.n_kv_heads // attention.n_heads]
        mine = slice(head * hd, (head + 1) * hd)
        if G is None:  # the target begins after this layer's attention, and looks from its own position alone
            places[targets.position[0], first : len(V)] = (V[first:, mine, 0] * of_source).sum(1)
        else:
            U = G[..., 0] @ attention.W_O[mine].T
            looks = attention.pattern[head, : len(V), first : len(V)]
            places[: len(V), first : len(V)] = looks * (U @ of_source.T)

    prompt.model.edges(targets, Places(targets.layer.tolist(), targets.position.tolist()), visit)
    return places


def top_heads(replacement: LocalModel, graph: Graph, count: int = 10, edges: int = 500) -> list[Head]:
    """The heads through which the graph's strongest edges go, over `edges` of them that come from no bias."""
    check_range("count", count, 1)
    found, flow = strongest_heads(replacement, graph, edges)
    return rank_heads(found, flow)[:count]


def strongest_heads(replacement: LocalModel, graph: Graph, edges: int = 500) -> tuple[list[EdgeHeads], list[float]]:
    """The heads of a graph's strongest edges that come from no bias, and each target's influence a unit of input."""
    check_range("edges", edges, 1)
    is_bias = graph.nodes.mask("bias").tolist()
    listed = graph.stored.strongest(graph.influence_per_input, 4 * edges)[0]
    targets, flow = graph.row_ids[listed.row].tolist(), graph.influence_per_input[listed.row].tolist()
    chosen = [
        ((target, source), each)
        for target, source, each in zip(targets, listed.source.tolist(), flow)
        if not is_bias[source]
    ][:edges]
    if not chosen:
        return [], []
    return edge_heads(replacement, graph, [edge for edge, _ in chosen]), [each for _, each in chosen]


def rank_heads(found: Sequence[EdgeHeads], flow: Sequence[float]) -> list[Head]:
    """All heads that any of the edges goes through, those with the largest absolute parts first."""
    if not found:
        return []
    weight = torch.tensor(flow, dtype=torch.float64)
    heads = torch.stack([edge.heads for edge in found]).cpu().double()
    past = torch.stack([edge.bypass for edge in found]).cpu().double()
    sign = torch.tensor([edge.value for edge in found], dtype=torch.float64).sign()
    between = torch.tensor([[l in edge.between for l in range(heads.shape[1])] for edge in found])
    signed = torch.einsum("e,elh->lh", weight * sign, heads)
    absolute = torch.einsum("e,elh->lh", weight, heads.abs())
    total = absolute.sum(1) + torch.einsum("e,el->l", weight, past.abs() * between)
    order = absolute.flatten().argsort(descending=True, stable=True).tolist()
    H = heads.shape[2]
    return [
        Head(i // H, i % H, float(signed[i // H, i % H]), size, size / float(total[i // H]))
        for i in order
        if (size := float(absolute[i // H, i % H])) > 0
    ]
