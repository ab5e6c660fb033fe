"""The attribution graph of one prompt: held, scored, pruned, stored.

An edge A[t, s] is what source s adds to target t's pre-activation. Only features and logits are targets, so a graph
holds their rows alone (`rows [R, N]`); `adjacency` spreads them over all N nodes. A graph that was traced with
`edges=top-k` holds them sparse (`stored`): influence, scores, pruning, paths and files work on that, and `rows` makes
the matrix for whoever asks.
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
from . import influence as flow
from .nodes import COLUMNS, Nodes
from .sparse_rows import SparseRows

FORMAT, VERSION = "crosslace-graph", 1
SPARSE_BELOW = 0.25  # share of non-zero edges below which a graph is stored as a list of edges


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


@dataclass(eq=False)
class Graph:
    """Nodes, the edges into them, and how complete the account is."""

    stored: Tensor | SparseRows
    """[R, N] edges into each feature, then into each logit; of a graph of the strongest edges, those alone."""
    nodes: Nodes
    probabilities: Tensor
    """[number of logits] probability of each logit node, or the weight of a target that is not one token."""
    tokens: list[int]
    token_strings: list[str]
    left_out: Tensor
    """[R] absolute input that was moved into the errors and cancels there: scores count it as input from errors."""
    metadata: dict[str, Any] = field(default_factory=dict)
    """Model, transcoder, settings, and `accounting`: active_features, left_out_features, largest_violation."""
    supernodes: dict[str, list[int]] = field(default_factory=dict)
    """Named groups of nodes."""

    # -- looking at it ------------------------------------------------------------------------------------------

    @property
    def rows(self) -> Tensor:
        """[R, N] the edges as a matrix; built on each call where they are stored sparse."""
        return self.stored.dense() if isinstance(self.stored, SparseRows) else self.stored

    @property
    def values(self) -> Tensor:
        """The numbers that are stored, a row per target; each row sums to the target's input."""
        return self.stored.values if isinstance(self.stored, SparseRows) else self.stored

    def rows_of(self, rows: Tensor | slice) -> Tensor:
        """Some rows as a matrix, [C, N]."""
        return self.stored.dense(rows) if isinstance(self.stored, SparseRows) else self.stored[rows]

    @property
    def n_features(self) -> int:
        return len(self.stored) - len(self.probabilities)

    @property
    def targets(self) -> Tensor:
        """[R] the node of each row."""
        ids = torch.arange(len(self.nodes), device=self.values.device)
        return torch.cat([ids[: self.n_features], ids[len(ids) - len(self.probabilities) :]])

    @property
    def adjacency(self) -> Tensor:
        """[targets, sources] over all nodes, built on each call; most of it is rows of zeros of nodes without input."""
        full = self.values.new_zeros(len(self.nodes), len(self.nodes))
        full[self.targets] = self.rows
        return full

    @property
    def logits(self) -> list[Logit]:
        """The targets whose causes the graph shows, most probable first."""
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

    # -- influence and scores -----------------------------------------------------------------------------------

    @property
    def weights(self) -> Tensor:
        """[N] probability on the logits, zero elsewhere."""
        weights = self.values.new_zeros(len(self.nodes))
        weights[len(weights) - len(self.probabilities) :] = self.probabilities.to(weights)
        return weights

    @cached_property
    def influences(self) -> flow.Influence:
        """Influence of nodes and flow through rows; worked out once, as a graph is not changed after it is made."""
        depth = self.nodes.layer[self.targets].clone()
        depth[self.n_features :] = int(self.nodes.layer.max()) + 1
        return flow.influence(self.stored, self.targets, depth, self.weights, self.left_out)

    def influence(self) -> Tensor:
        """[N] influence of every node on the logits, over all paths."""
        return self.influences.nodes

    def cumulative_influence(self) -> Tensor:
        """[N] share of all influence that is reached at each node's rank: small = important."""
        return flow.cumulative_share(self.influence())

    def scores(self) -> dict[str, float]:
        """`replacement_score`, `completeness` (mean over targets) and `completeness_ct` (circuit-tracer's mean, over
        all nodes). A graph without features explains nothing: all are 0."""
        masks = (self.nodes.mask(*kinds) for kinds in (("feature",), ("error",), ("embedding", "position")))
        return flow.scores(self.influences, self.weights, *masks)

    # -- smaller graphs -----------------------------------------------------------------------------------------

    def prune(self, node: float = 0.8, edge: float = 0.98) -> "Graph":
        """Keep the fewest nodes that carry `node` of the influence, then the fewest edges that carry `edge` of it.

        Errors, embeddings, biases and logits stay, and so do the edges from errors; the rest goes to the errors.
        """
        check_range("node", node, 0, 1)
        check_range("edge", edge, 0, 1)
        kept = flow.fewest_nodes(self.influence(), node)
        smaller = self.subgraph(kept.nonzero().squeeze(1).tolist())
        return smaller.cut_edges(edge)._replace_metadata(pruned={"node": node, "edge": edge})

    def subgraph(self, features: Iterable[int]) -> "Graph":
        """The graph with these features alone (other kinds of node always stay); the other features' edges are added
        to the errors of their places."""
        keep = ~self.nodes.mask("feature")
        keep[torch.tensor(sorted(features), dtype=torch.long, device=keep.device)] = True
        ids, gone = keep.nonzero().squeeze(1), (~keep).nonzero().squeeze(1)
        rows_kept = keep[self.targets].nonzero().squeeze(1)
        new_id = torch.full((len(keep),), -1, device=keep.device)
        new_id[ids] = torch.arange(len(ids), device=keep.device)
        if isinstance(self.stored, SparseRows):
            kept = keep[: self.n_features]
            rows, left_out = self.stored.subset(rows_kept, kept, self.left_out, self._errors_of_all())
        else:
            rows, left_out = self.stored[rows_kept][:, ids], self.left_out[rows_kept].clone()
            if len(gone):
                flow.move_to_errors(rows, left_out, self.stored[rows_kept][:, gone], new_id[self.error_of(gone)])
        kept_by_id = dict(zip(ids.tolist(), range(len(ids))))
        groups = {name: [kept_by_id[i] for i in group if i in kept_by_id] for name, group in self.supernodes.items()}
        accounting = self.accounting | {"left_out_features": self.accounting.get("left_out_features", 0) + len(gone)}
        return replace(
            self,
            stored=rows,
            nodes=self.nodes.select(ids),
            left_out=left_out,
            metadata=self.metadata | {"accounting": accounting},
            supernodes={name: group for name, group in groups.items() if group},
        )

    def cut_edges(self, share: float) -> "Graph":
        """The graph with the fewest edges that carry `share` of the influence over all edges but those from errors,
        which stay; what is cut is added to the errors of the sources' places."""
        from_error = self.nodes.mask("error")
        keep = flow.fewest_edges(self.values, self.influences.flow, share)
        if isinstance(self.stored, SparseRows):
            rows, left_out = self.stored.moved_to_errors(
                ~(keep | from_error[self.stored.sources()]), self.left_out, self._errors_of_all()
            )
            return replace(self, stored=rows, left_out=left_out)
        cut = ~keep & ~from_error
        rows, left_out = self.stored.masked_fill(cut, 0), self.left_out.clone()
        sources = (cut.any(0) & (self.stored != 0).any(0)).nonzero().squeeze(1)
        if len(sources):
            moved = self.stored[:, sources] * cut[:, sources]
            flow.move_to_errors(rows, left_out, moved, self.error_of(sources))
        return replace(self, stored=rows, left_out=left_out)

    def _errors_of_all(self) -> Tensor:
        """[N] the error node of every source's place; logits, which are no sources, have the first one."""
        ids = (~self.nodes.mask("logit")).nonzero().squeeze(1)
        errors = torch.full((len(self.nodes),), self.n_features, device=ids.device)
        errors[ids] = self.error_of(ids)
        return errors

    def error_of(self, ids: Tensor) -> Tensor:
        """The error node of each node's (layer, position); an embedding's is that of the first layer."""
        errors = self.nodes.mask("error").nonzero().squeeze(1)
        if len(errors) == 0:
            raise UserError("this graph has no error nodes to add to what is left out of it")
        length = int(self.nodes.position[errors].max()) + 1
        place_of = self.nodes.layer * length + self.nodes.position.clamp(max=length - 1)
        table = torch.full((int(place_of.max()) + 1,), -1, device=ids.device)
        table[place_of[errors]] = errors
        layer = self.nodes.layer[ids].clamp(min=0)
        return table[layer * length + self.nodes.position[ids]]

    def _replace_metadata(self, **entries: Any) -> "Graph":
        return replace(self, metadata=self.metadata | entries)

    def to(self, device: torch.device | str) -> "Graph":
        """The graph on a device."""
        nodes = replace(self.nodes, **{name: getattr(self.nodes, name).to(device) for name in COLUMNS})
        stored = self.stored
        if isinstance(stored, SparseRows):
            stored = replace(stored, values=stored.values.to(device), columns=stored.columns.to(device))
        moved = {name: getattr(self, name).to(device) for name in ("probabilities", "left_out")}
        return replace(self, stored=stored.to(device) if isinstance(stored, Tensor) else stored, nodes=nodes, **moved)

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
    ):
        """The strongest paths from a node (None: any embedding) to another: circuit/graph/paths.py."""
        from .paths import top_paths

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
        tensors = {f"nodes.{name}": getattr(self.nodes, name) for name in COLUMNS}
        tensors |= {"probabilities": self.probabilities, "left_out": self.left_out, **packed(self.stored)}
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
            stored=unpacked(tensors),
            nodes=Nodes(*(tensors[f"nodes.{name}"] for name in COLUMNS), labels=labels),
            probabilities=tensors["probabilities"],
            tokens=header["tokens"],
            token_strings=header["token_strings"],
            left_out=tensors["left_out"],
            metadata=header["metadata"],
            supernodes=header["supernodes"],
        )

    def to_neuronpedia(self, path: str | Path, **options: Any) -> Path:
        """Write the graph as Neuronpedia's JSON: circuit/formats/neuronpedia.py."""
        from ..formats.neuronpedia import write_neuronpedia

        return write_neuronpedia(self, path, **options)

    @classmethod
    def from_adjacency(
        cls,
        adjacency: Tensor,
        nodes: Nodes,
        probabilities: Tensor,
        tokens: list[int],
        token_strings: list[str],
        **more: Any,
    ) -> "Graph":
        """A graph from a full [targets, sources] matrix over nodes that are in the order of `Nodes`."""
        first_logit = len(nodes) - len(probabilities)
        n_features = int(nodes.mask("feature").sum())
        rows = torch.cat([adjacency[:n_features], adjacency[first_logit:]])
        return cls(rows, nodes, probabilities, tokens, token_strings, rows.new_zeros(len(rows)), **more)


def packed(rows: Tensor | SparseRows) -> dict[str, Tensor]:
    """The rows as they are, or as a list of edges where most are zero."""
    if isinstance(rows, SparseRows):
        sizes = torch.tensor([rows.n_features])
        return {"strongest.values": rows.values, "strongest.columns": rows.columns, "strongest.features": sizes}
    edges = (rows != 0).sum()
    if edges > SPARSE_BELOW * rows.numel():
        return {"rows": rows}
    places = rows.flatten().nonzero().squeeze(1)
    return {
        "rows.shape": torch.tensor(rows.shape),
        "rows.counts": (rows != 0).sum(1),
        "rows.columns": (places % max(1, rows.shape[1])).int(),
        "rows.values": rows.flatten()[places],
    }


def unpacked(tensors: dict[str, Tensor]) -> Tensor | SparseRows:
    """The rows that `packed` stored."""
    if "strongest.values" in tensors:
        features = int(tensors["strongest.features"])
        return SparseRows(tensors["strongest.values"], tensors["strongest.columns"], features)
    if "rows" in tensors:
        return tensors["rows"]
    shape = tensors["rows.shape"].tolist()
    rows = tensors["rows.values"].new_zeros(shape)
    row = torch.arange(shape[0], device=rows.device).repeat_interleave(tensors["rows.counts"])
    rows[row, tensors["rows.columns"].long()] = tensors["rows.values"]
    return rows
