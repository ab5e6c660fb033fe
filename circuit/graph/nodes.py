"""What each row and column of an attribution graph is."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

KINDS = ("feature", "error", "embedding", "position", "bias", "logit", "kept")
"""The kinds of node, in the order in which a graph lists them. A `kept` node stands in the place of an error: it is the
model's own MLP output at a position that is left to the model by decree (first, BOS, sink)."""


class Node(NamedTuple):
    id: int
    """Its row and column in the graph."""
    kind: str
    """One of KINDS."""
    layer: int
    """Layer of a feature, error, kept output or bias; -1 of an embedding or position; of a logit, the layer it is read
    after."""
    position: int
    index: int
    """Feature of a feature, token of an embedding or a logit (-1 of a logit that is not one token), else 0."""
    activation: float
    """Activation of a feature; of a logit its value, demeaned and before any soft cap; else 0."""
    label: str


@dataclass
class Nodes:
    """The nodes of a graph as columns: features by (layer, position, index), errors layer-major, embeddings,
    position embeddings, biases layer-major, logits."""

    code: Tensor
    """[N] int8, position of the kind in KINDS."""
    layer: Tensor
    """[N] int64."""
    position: Tensor
    """[N] int64."""
    index: Tensor
    """[N] int64."""
    activation: Tensor
    """[N] float."""
    labels: dict[int, str] = field(default_factory=dict)
    """What nodes are called, where they have a name."""

    def __len__(self) -> int:
        return len(self.code)

    def __getitem__(self, id: int) -> Node:
        id = range(len(self))[id]
        layer, position, index = (int(column[id]) for column in (self.layer, self.position, self.index))
        label = self.labels.get(id, "")
        return Node(id, KINDS[int(self.code[id])], layer, position, index, float(self.activation[id]), label)

    def __iter__(self) -> Iterator[Node]:
        columns = (c.tolist() for c in (self.code, self.layer, self.position, self.index, self.activation))
        for id, (code, layer, position, index, activation) in enumerate(zip(*columns)):
            yield Node(id, KINDS[code], layer, position, index, activation, self.labels.get(id, ""))

    @property
    def kind(self) -> list[str]:
        return [KINDS[code] for code in self.code.tolist()]

    @property
    def token(self) -> Tensor:
        """[N] the token of an embedding or a logit, -1 elsewhere."""
        return torch.where(self.mask("embedding", "logit"), self.index, -1)

    def mask(self, *kinds: str) -> Tensor:
        """[N] which nodes are of these kinds."""
        codes = torch.tensor([KINDS.index(kind) for kind in kinds], dtype=self.code.dtype, device=self.code.device)
        return torch.isin(self.code, codes)

    def ids(
        self, kind: str, layer: int | None = None, position: int | None = None, index: int | None = None
    ) -> list[int]:
        """The nodes of a kind, narrowed down by whatever else is given."""
        found = self.mask(kind)
        for column, wanted in ((self.layer, layer), (self.position, position), (self.index, index)):
            if wanted is not None:
                found = found & (column == wanted)
        return found.nonzero().squeeze(1).tolist()

    def keys(self) -> list[tuple[int, int, int, int | str]]:
        """(kind, layer, position, index) of every node: what makes nodes of two graphs the same. A target that is not
        one token goes by its label."""
        columns = (column.tolist() for column in (self.code, self.layer, self.position, self.index))
        named = zip(range(len(self)), *columns)
        return [(kind, l, t, self.labels.get(id, "") if i < 0 else i) for id, kind, l, t, i in named]

    def select(self, ids: Tensor) -> "Nodes":
        """The nodes with these ids, in their order."""
        labels = {new: self.labels[old] for new, old in enumerate(ids.tolist()) if old in self.labels}
        columns = {name: getattr(self, name)[ids] for name in NODE_COLUMNS}
        return replace(self, **columns, labels=labels)

    def turned(self, mask: Tensor, kind: str) -> "Nodes":
        """The same nodes, those of the mask being of another kind."""
        return replace(self, code=self.code.masked_fill(mask, KINDS.index(kind)))

    @staticmethod
    def of(kind: str, layer: Tensor, position: Tensor, index: Tensor, activation: Tensor | None = None) -> "Nodes":
        """Nodes of one kind."""
        if activation is None:
            activation = torch.zeros(len(layer), device=layer.device)
        code = torch.full((len(layer),), KINDS.index(kind), dtype=torch.int8, device=layer.device)
        return Nodes(code, layer, position, index, activation)

    @staticmethod
    def join(parts: Sequence["Nodes"]) -> "Nodes":
        """The nodes of several tables, one after the other."""
        labels, offset = {}, 0
        for part in parts:
            labels |= {offset + id: label for id, label in part.labels.items()}
            offset += len(part)
        dtype = parts[0].activation.dtype
        columns = {name: torch.cat([getattr(part, name) for part in parts]) for name in NODE_COLUMNS[:-1]}
        return Nodes(**columns, activation=torch.cat([part.activation.to(dtype) for part in parts]), labels=labels)


NODE_COLUMNS = ("code", "layer", "position", "index", "activation")
