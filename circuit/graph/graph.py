"""The attribution graph of one prompt: held, scored, pruned, stored.

An edge A[t, s] is what source s adds to target t's pre-activation. Only features and logits are targets, so a graph
holds their rows alone (`stored`: R rows over N sources, dense or sparse); `adjacency` spreads them over all N nodes.
Influence, scores, pruning, paths and files work on the rows as they are; `rows` makes the matrix for whoever asks.

    stored [R, N] --one pass from the last layer to the first--> influence [N]      (influence.py)
    influence --prune: the fewest nodes, then the fewest edges--> a smaller Graph, what is cut added to its errors
    influence --scores--> replacement_score, completeness
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ...data.errors import UserError, check_range
from ..replacement import Intervention
from .influence import Influence, cumulative_share, fewest_edges, fewest_nodes, find_influence, shares_of
from .nodes import NODE_COLUMNS, Nodes
from .paths import GraphPath, top_paths
from .rows import DenseRows, Rows, rows_of_tensors

FORMAT, VERSION = "crosslace-graph", 2


class Logit(NamedTuple):
    id: int
    """Its node."""
    token: int
    """-1 where the target is not one token."""
    label: str
    probability: float
    """Probability of the token, or the target's weight."""
    value: float
    """Demeaned logit, before any soft cap; a feature target's pre-activation."""
    position: int


class Link(NamedTuple):
    """One edge of a node."""

    id: int
    """The node at its other end."""
    weight: float
    """What the source adds to the target."""
    share: float


@dataclass(eq=False)
class Graph:
    """Nodes, the edges into them, and how complete the account is."""

    stored: Rows
    """[R, N] edges into each feature, then into each logit; of a graph of the strongest edges, those alone."""
    nodes: Nodes
    probabilities: Tensor
    """[number of logits] probability of each logit node, or the weight of a target that is not one token."""
    tokens: list[int]
    token_strings: list[str]
    cancelled: Tensor
    """[R] absolute input that was moved into the errors and cancels there: scores count it as input from errors."""
    metadata: dict[str, Any] = field(default_factory=dict)
    """Model, transcoder, settings, and `accounting`: active_features, left_out_features, largest_violation."""
    supernodes: dict[str, list[int]] = field(default_factory=dict)
    """Named groups of nodes."""

    # -- looking at it ------------------------------------------------------------------------------------------

    @property
    def rows(self) -> Tensor:
        """[R, N] the edges as a matrix; built on each call where they are stored sparse."""
        return self.stored.dense()

    @property
    def values(self) -> Tensor:
        """The numbers that are stored, a row per target; each row sums to the target's input."""
        return self.stored.values

    def rows_of(self, rows: Tensor | slice) -> Tensor:
        """Some rows as a matrix, [C, N]."""
        return self.stored.dense(rows)

    @property
    def n_features(self) -> int:
        return len(self.stored) - len(self.probabilities)

    @property
    def row_ids(self) -> Tensor:
        """[R] the node of each row."""
        ids = torch.arange(len(self.nodes), device=self.values.device)
        return torch.cat([ids[: self.n_features], ids[len(ids) - len(self.probabilities) :]])

    @property
    def adjacency(self) -> Tensor:
        """[targets, sources] over all nodes, built on each call; most of it is rows of zeros of nodes without input."""
        full = self.values.new_zeros(len(self.nodes), len(self.nodes))
        full[self.row_ids] = self.rows
        return full

    @property
    def logits(self) -> list[Logit]:
        """The targets whose causes the graph shows: next tokens by their probability, named targets as they were
        named."""
        first = len(self.nodes) - len(self.probabilities)
        shares = self.probabilities.tolist()
        nodes = [self.nodes[first + i] for i in range(len(shares))]
        return [Logit(n.id, n.index, n.label, p, n.activation, n.position) for n, p in zip(nodes, shares)]

    @property
    def weight_name(self) -> str:
        """What the logits' weights are: probabilities where all are tokens, else shares that the targets are given."""
        return "probability" if all(logit.token >= 0 for logit in self.logits) else "weight"

    @property
    def accounting(self) -> dict[str, Any]:
        """How many features were active and are left out, and the largest violation of the sum identity."""
        return self.metadata.get("accounting", {})

    def edge(self, target: int, source: int) -> float:
        """What the source adds to the target."""
        row = target if target < self.n_features else target - len(self.nodes) + len(self.stored)
        if row < 0 or not self.has_row(target):
            return 0.0
        return float(self.rows_of(slice(row, row + 1))[0, source])

    def has_row(self, id: int) -> bool:
        """Whether a node is a target: a feature or a logit."""
        return id < self.n_features or id >= len(self.nodes) - len(self.probabilities)

    # -- through which heads, by the model that it was traced with -----------------------------------------------

    def heads(self, model: Any, edge: Any) -> Any:
        """Through which heads an edge (target, source) went; of a list of edges, a list: `ReplacementModel.heads`."""
        several = len(edge) == 0 or not isinstance(edge[0], int)
        return model.heads(self, edge) if several else model.heads(self, [edge])[0]

    def top_heads(self, model: Any, count: int = 10, edges: int = 500) -> Any:
        """The heads that the strongest edges went through: `ReplacementModel.top_heads`."""
        return model.top_heads(self, count, edges)

    # -- influence and scores -----------------------------------------------------------------------------------

    @property
    def weights(self) -> Tensor:
        """[N] probability on the logits, zero elsewhere."""
        weights = self.values.new_zeros(len(self.nodes))
        weights[len(weights) - len(self.probabilities) :] = self.probabilities.to(weights)
        return weights

    @cached_property
    def _influence(self) -> Influence:
        """Worked out once, as the edges of a graph are not changed after it is made."""
        return self._find_influence()

    def _find_influence(self, counted: Tensor | None = None) -> Influence:
        depth = self.nodes.layer[self.row_ids].clone()
        depth[self.n_features :] = int(self.nodes.layer.max()) + 1
        return find_influence(self.stored, self.row_ids, depth, self.weights, self.cancelled, counted)

    def influence(self) -> Tensor:
        """[N] influence of every node on the logits, over all paths."""
        return self._influence.nodes

    @property
    def influence_per_input(self) -> Tensor:
        """[R] influence that a unit of each row's absolute input carries: times |edge| it is the edge's score."""
        return self._influence.per_input

    def cumulative_influence(self) -> Tensor:
        """[N] share of all influence that is reached at each node's rank: small = important."""
        return cumulative_share(self.influence())

    @property
    def kept(self) -> dict[int, str]:
        """Positions that are left to the model by decree, and why: `first`, `BOS` or `sink`."""
        return {int(position): reason for position, reason in self.metadata.get("kept", {}).items()}

    @property
    def partial(self) -> bool:
        """Whether this was read from a file that holds only part of a graph."""
        return bool(self.metadata.get("partial"))

    def scores(self) -> dict[str, float]:
        """`replacement_score` and `completeness` (mean over targets) of this graph, `kept_share` (influence of what is
        left to the model by decree, which neither counts), and circuit-tracer's two scores on the matrix that it has
        (`_ct`). A graph without features explains nothing: all scores are 0. Of a part that was read from a file,
        the whole graph's scores where the file tells them."""
        return self.metadata.get("scores") or self._scores

    @cached_property
    def _scores(self) -> dict[str, float]:
        names = ("replacement_score", "completeness", "kept_share", "replacement_score_ct", "completeness_ct")
        if self.n_features == 0:
            return dict.fromkeys(names, 0.0)
        nodes = self.nodes
        feature, kept, given = nodes.mask("feature"), nodes.mask("kept"), nodes.mask("embedding", "position")
        own = shares_of(self._influence, self.weights, feature, nodes.mask("error"), kept, given)
        # circuit-tracer knows no biases and no position embeddings; what the model writes at the first position is no
        # source there, and at other positions it is error
        error = nodes.mask("error", "kept") & (nodes.position > 0)
        theirs = self._find_influence(feature | error | nodes.mask("embedding", "logit"))
        ct = shares_of(theirs, self.weights, feature, error, torch.zeros_like(error), nodes.mask("embedding"))
        reached = own.inputs + own.errors + own.kept
        found = (own.replacement, own.completeness, own.kept / reached if reached > 0 else 0.0)
        return dict(zip(names, (*found, ct.replacement, ct.completeness_over_all)))

    # -- smaller graphs -----------------------------------------------------------------------------------------

    def prune(self, node: float = 0.8, edge: float = 0.98) -> "Graph":
        """Keep the fewest nodes that carry `node` of the influence, then the fewest edges that carry `edge` of it, then
        the features that an edge is left of.

        Errors, embeddings, biases and logits stay, and so do the edges from errors; the rest goes to the errors.
        """
        check_range("node", node, 0, 1)
        check_range("edge", edge, 0, 1)
        kept = fewest_nodes(self.influence(), node)
        smaller = self.subgraph(kept.nonzero().squeeze(1).tolist())
        pruned = smaller.cut_edges(edge)
        while not bool((linked := pruned.stored.linked()[: pruned.n_features]).all()):
            pruned = pruned.subgraph(linked.nonzero().squeeze(1).tolist())
        pruned.metadata = pruned.metadata | {"pruned": {"node": node, "edge": edge}}
        return pruned

    def subgraph(self, features: Iterable[int]) -> "Graph":
        """The graph with these features alone (other kinds of node always stay); the other features' edges are added
        to the errors of their places."""
        keep = ~self.nodes.mask("feature")
        keep[torch.tensor(sorted(features), dtype=torch.long, device=keep.device)] = True
        ids = keep.nonzero().squeeze(1)
        rows_kept = keep[self.row_ids].nonzero().squeeze(1)
        stored, cancelled = self.stored.subset(
            rows_kept, keep[: self.n_features], self.cancelled, self._errors_of_all()
        )
        kept_by_id = dict(zip(ids.tolist(), range(len(ids))))
        groups = {name: [kept_by_id[i] for i in group if i in kept_by_id] for name, group in self.supernodes.items()}
        accounting = self.accounting | {
            "left_out_features": self.accounting.get("left_out_features", 0) + int((~keep).sum())
        }
        return replace(
            self,
            stored=stored,
            nodes=self.nodes.select(ids),
            cancelled=cancelled,
            metadata=self._own_metadata() | {"accounting": accounting},
            supernodes={name: group for name, group in groups.items() if group},
        )

    def cut_edges(self, share: float) -> "Graph":
        """The graph with the fewest edges that carry `share` of the influence over all edges but those from errors,
        which stay; what is cut is added to the errors of the sources' places."""
        from_error = self.nodes.mask("error", "kept")
        keep = fewest_edges(self.values, self.influence_per_input, share)
        gone = ~(keep | from_error[self.stored.sources()])
        stored, cancelled = self.stored.moved_to_errors(gone, self.cancelled, self._errors_of_all())
        return self._replaced(stored=stored, cancelled=cancelled, metadata=self._own_metadata())

    def _errors_of_all(self) -> Tensor:
        """[N] the error (or kept) node of every source's (layer, position), an embedding's being that of the first
        layer; -1 where there is none. Logits, which are no sources, have the first error."""
        nodes = self.nodes
        errors = nodes.mask("error", "kept").nonzero().squeeze(1)
        if len(errors) == 0:
            return torch.full((len(nodes),), -1, device=errors.device)
        length = int(nodes.position[errors].max()) + 1
        place_of = nodes.layer.clamp(min=0) * length + nodes.position.clamp(max=length - 1)
        table = torch.full((int(place_of.max()) + 1,), -1, device=errors.device)
        table[place_of[errors]] = errors
        return torch.where(nodes.mask("logit"), self.n_features, table[place_of])

    def _own_metadata(self) -> dict[str, Any]:
        """For a smaller graph: without the scores of the whole, which are not its own."""
        return {name: value for name, value in self.metadata.items() if name != "scores"}

    def _replaced(self, **fields: Any) -> "Graph":
        """A copy with other fields, whose labels and groups are its own."""
        nodes = replace(self.nodes, labels=dict(self.nodes.labels))
        groups = {name: list(group) for name, group in self.supernodes.items()}
        return replace(self, **{"nodes": nodes, "supernodes": groups, **fields})

    def to(self, device: torch.device | str) -> "Graph":
        """The graph on a device."""
        nodes = replace(self.nodes, **{name: getattr(self.nodes, name).to(device) for name in NODE_COLUMNS})
        moved = {name: getattr(self, name).to(device) for name in ("stored", "probabilities", "cancelled")}
        return replace(self, nodes=nodes, **moved)

    def carrying(self, share: float) -> "Graph":
        """The part that carries `share` of the influence, for keeping: the fewest nodes, then the fewest edges of any
        kind. What goes, and what each value loses in being rounded to two bytes, is booked as input from errors, each
        target's in one number, so that a graph of thousands of features takes megabytes; `scores` remain those of the
        whole."""
        check_range("share", share, 0, 1)
        if share == 1:
            return self
        of_features = self.influence() * self.nodes.mask("feature")
        part = self.subgraph(fewest_nodes(of_features, share).nonzero().squeeze(1).tolist())
        edges = part.rows
        gone = ~fewest_edges(edges, part.influence_per_input, share)
        stored = DenseRows(edges.masked_fill(gone, 0)).rounded()
        part = part._replaced(stored=stored, cancelled=part.cancelled + (edges - stored.values).abs().sum(1))
        part.metadata = part.metadata | {"carries": share, "scores": self.scores()}
        return part

    # -- asking -------------------------------------------------------------------------------------------------

    def inputs(self, id: int, count: int = 10) -> list[Link]:
        """The strongest edges into a feature or a logit, and the share of its absolute input that each is."""
        if not self.has_row(id):
            return []
        row = id if id < self.n_features else id - len(self.nodes) + len(self.stored)
        edges = self.rows_of(slice(row, row + 1))[0]
        total = float(edges.abs().sum() + self.cancelled[row])
        best = edges.abs().topk(min(count, len(edges))).indices.tolist()
        return [
            Link(source, float(edges[source]), abs(float(edges[source])) / total) for source in best if edges[source]
        ]

    def outputs(self, id: int, count: int = 10) -> list[Link]:
        """The edges out of a node that carry the most influence, and the share of the node's influence that each is."""
        edges = torch.cat([self.rows_of(some)[:, id] for some in self.stored.blocks()])
        carried = edges.abs() * self.influence_per_input
        total = float(carried.sum()) or 1.0
        best = carried.topk(min(count, len(carried))).indices.tolist()
        ids = self.row_ids.tolist()
        return [Link(ids[row], float(edges[row]), float(carried[row]) / total) for row in best if edges[row]]

    def interventions(
        self, group: str | Iterable[int], times: float | None = None, value: float | None = None
    ) -> list[Intervention]:
        """Interventions on the features of a supernode, or of some nodes: `model.intervene(prompt, these)`."""
        if isinstance(group, str):
            if group not in self.supernodes:
                known = ", ".join(self.supernodes) or "it has none"
                raise UserError(f"the graph has no supernode {group!r}; {known}")
            group = self.supernodes[group]
        nodes = [self.nodes[id] for id in group]
        found = [Intervention(n.layer, n.position, n.index, value, times) for n in nodes if n.kind == "feature"]
        if not found:
            raise UserError("none of these nodes is a feature, and only features can be set")
        return found

    # -- names --------------------------------------------------------------------------------------------------

    def group(self, name: str, ids: Sequence[int]) -> None:
        """Name a group of nodes."""
        check = range(len(self.nodes))
        if not ids or any(id not in check for id in ids):
            raise UserError(f"a supernode takes nodes of the graph, whose ids are 0 to {len(check) - 1}, not {ids}")
        self.supernodes[name] = sorted(set(ids))

    def top_paths(
        self,
        source: int | None,
        target: int,
        count: int = 1,
        through: Sequence[str] = ("feature",),
        direct: bool = True,
    ) -> list[GraphPath]:
        """The strongest paths from a node (None: any embedding) to another: circuit/graph/paths.py."""
        return top_paths(self, source, target, count, through, direct)

    def label_features(self, names: Mapping[tuple[int, int], str]) -> None:
        """Name features by (layer, index)."""
        for id in self.nodes.ids("feature"):
            name = names.get((int(self.nodes.layer[id]), int(self.nodes.index[id])))
            if name:
                self.nodes.labels[id] = name

    # -- on disk ------------------------------------------------------------------------------------------------

    def save(self, folder: str | Path) -> Path:
        """Write graph.safetensors and graph.json into a folder; `load` gives the same graph, to the bit."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {f"nodes.{name}": getattr(self.nodes, name) for name in NODE_COLUMNS}
        tensors |= {"probabilities": self.probabilities, "left_out": self.cancelled}
        tensors |= self.stored.tensors()
        # aside and renamed: a folder never holds a graph that is half written
        save_file({k: v.contiguous() for k, v in tensors.items()}, folder / "graph.safetensors.tmp")
        header = {
            "format": FORMAT,
            "version": VERSION,
            "tokens": self.tokens,
            "token_strings": self.token_strings,
            "labels": {str(id): label for id, label in self.nodes.labels.items()},
            "supernodes": self.supernodes,
            "scores": self.scores(),
            "metadata": self.metadata,
        }
        text = json.dumps(header, ensure_ascii=False, indent=1, allow_nan=False)
        (folder / "graph.json.tmp").write_text(text, encoding="utf-8")
        for name in ("graph.safetensors", "graph.json"):
            (folder / f"{name}.tmp").replace(folder / name)
        return folder

    @classmethod
    def load(cls, folder: str | Path, device: torch.device | str = "cpu") -> "Graph":
        """Read what `save` wrote."""
        folder = Path(folder)
        try:
            header = json.loads((folder / "graph.json").read_text(encoding="utf-8"))
            tensors = load_file(folder / "graph.safetensors", device=str(device))
        except FileNotFoundError as missing:
            raise UserError(f"{folder} holds no graph: {Path(missing.filename).name} is missing") from missing
        except (SafetensorError, json.JSONDecodeError) as damage:
            raise UserError(f"the graph in {folder} is damaged ({damage}); trace it again") from damage
        if header.get("format") != FORMAT or header.get("version") != VERSION:
            raise UserError(f"{folder} holds no graph that this version reads (it reads {FORMAT} version {VERSION})")
        labels = {int(id): label for id, label in header["labels"].items()}
        return cls(
            stored=rows_of_tensors(tensors),
            nodes=Nodes(*(tensors[f"nodes.{name}"] for name in NODE_COLUMNS), labels=labels),
            probabilities=tensors["probabilities"],
            tokens=header["tokens"],
            token_strings=header["token_strings"],
            cancelled=tensors["left_out"],
            metadata=header["metadata"],
            supernodes=header["supernodes"],
        )

    def to_neuronpedia(self, path: str | Path, **options: Any) -> Path:
        """Write the graph as Neuronpedia's JSON: circuit/formats/neuronpedia.py."""
        from ..formats import write_neuronpedia

        return write_neuronpedia(self, path, **options)

    def show(self, labels: Any = None, height: int = 900) -> Any:
        """The graph's page, for a notebook to show: circuit/viewer/saved.py."""
        from ..viewer import show_graph

        return show_graph(self, labels, height)
