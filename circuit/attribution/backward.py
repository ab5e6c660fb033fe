"""Edges of a batch of targets: their cotangents pulled back through the frozen layers, read out at every source.

Targets of a batch are sorted by layer, the last first, so that those which a layer concerns are the leading columns of
one cotangent tensor; a batch holds targets of neighbouring positions, and no position after its last is visited.
"""

from collections.abc import Callable
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor

from ...data.models import LanguageModel
from .linear import FrozenLayer, Recording, readout
from .sources import Sources


class Directions(NamedTuple):
    """Directions whose causes are asked for; columns in any order."""

    layer: Tensor
    """[B] layer of the model whose MLP would read the direction; n_layers: read from the last residual stream."""
    position: Tensor
    """[B]."""
    direction: Tensor
    """[B, D] read from the residual stream: norms folded in, divided by their denominators."""
    own_bias: Tensor
    """[B] what the target adds by itself: encoder bias, shift of the norm that it reads through, unembedding bias."""
    value: Tensor
    """[B] what the model computed: the edges must sum to it."""

    def select(self, ids: Tensor, layers: list[int] | None = None) -> "Directions":
        """Some of the targets; their layers need not be known."""
        return Directions(*(column[ids] for column in self))


class Places(NamedTuple):
    """Where the targets of a batch stand, as numbers at hand on the host: nothing waits for the device."""

    layers: list[int]
    positions: list[int]


class EdgeColumns(NamedTuple):
    """Edges of a batch, transposed: sources by targets."""

    features: Tensor
    """[K, B], features in run order."""
    errors: Tensor
    """[L, T, B]."""
    embeddings: Tensor
    """[1 or 2, T, B]: tokens, then positions."""
    biases: Tensor
    """[L, T, B]."""


Visit = Callable[[int, slice, Tensor | None, Tensor], None]
"""Called with a layer, a slice of targets, their cotangents G [T', D, n] of what attention adds there (None: the
targets' own directions at their own positions alone) and V [T', H * hd, n] of its values."""


class FrozenModel:
    """Sources and frozen layers of one prompt."""

    def __init__(self, lm: LanguageModel, recording: Recording, sources: Sources, dtype: torch.dtype):
        self.sources = sources
        self.parallel = [parts.parallel for parts in lm.layers]
        self.layers = [FrozenLayer(parts, recording, layer, dtype) for layer, parts in enumerate(lm.layers)]
        self.n_layers, self.length, self.dtype = lm.n_layers, len(recording.tokens), dtype
        self.readers = [self._readers(layer) for layer in range(lm.n_layers)]

    def _readers(self, layer: int) -> Tensor | None:
        """[k, T, H * hd] vectors to be read out against V of a layer: its value bias; at layer 0 the embeddings too,
        which spares pulling V back into the residual stream there."""
        frozen = self.layers[layer]
        vectors = [] if frozen.value_bias is None else [frozen.value_bias[None]]
        if layer == 0:
            vectors.append(self.sources.embeddings @ frozen.W_V)
        return torch.cat(vectors) if vectors else None

    @torch.no_grad()
    def edges(self, targets: Directions, places: Places, visit: Visit | None = None) -> EdgeColumns:
        """All edges into a batch of targets, which must be sorted by layer, the last first, then by position; `visit`
        sees what each layer's heads pass on."""
        n, L = len(targets.layer), self.n_layers
        T_seen = max(places.positions) + 1
        new = {"dtype": self.dtype, "device": targets.direction.device}
        out = self._no_edges(n)
        self._own_bias(targets, out)
        G = torch.empty(T_seen, targets.direction.shape[1], n, **new)
        layers = places.layers
        seen = joined = self._join(G, targets, 0, layers.count(L))
        for layer in reversed(range(L)):
            seen = joined
            joined += layers.count(layer)
            self._through_layer(layer, G, targets, places.positions[seen:joined], seen, out, visit)
        return self._scaled(out)

    @torch.no_grad()
    def edges_into(self, layer: int, G: Tensor) -> EdgeColumns:
        """All edges into what reads the residual stream that a layer reads, with cotangents G [T', D, n], which are
        used up."""
        out = self._no_edges(G.shape[2])
        for below in reversed(range(layer)):
            self._through_layer(below, G, None, [], G.shape[2], out)
        if layer == 0:
            out.embeddings[:, : len(G)] = readout(self.sources.embeddings, G).transpose(0, 1)
        return self._scaled(out)

    def _scaled(self, out: EdgeColumns) -> EdgeColumns:
        """Decoder rows were read out as they are: a feature's edges are those times its activation."""
        out.features.mul_(self.sources.features.activation[self.sources.run_order, None])
        return out

    def _no_edges(self, n: int) -> EdgeColumns:
        sources, T, L = self.sources, self.length, self.n_layers
        new = sources.embeddings.new_zeros
        return EdgeColumns(
            new(len(sources.run_order), n), new(L, T, n), new(len(sources.embeddings), T, n), new(L, T, n)
        )

    def _own_bias(self, targets: Directions, out: EdgeColumns) -> None:
        """What a target adds by itself counts with the bias node of its own place, the last layer's for logits."""
        layer = targets.layer.clamp(max=self.n_layers - 1)
        out.biases[layer, targets.position, torch.arange(len(layer), device=layer.device)] += targets.own_bias

    def _join(self, G: Tensor, targets: Directions, start: int, stop: int) -> int:
        """Directions start .. stop enter as they are, each at its position alone."""
        G[:, :, start:stop] = 0
        columns = torch.arange(start, stop, device=G.device)
        G[targets.position[start:stop], :, columns] = targets.direction[start:stop]
        return stop

    def _through_layer(
        self,
        layer: int,
        G: Tensor,
        targets: Directions | None,
        begin: list[int],
        seen: int,
        out: EdgeColumns,
        visit: Visit | None = None,
    ) -> None:
        """From the layer's output to its input: columns :seen come from above, those after them begin here, at
        positions `begin`."""
        joined = seen + len(begin)
        above = G[:, :, :seen]
        parallel, frozen = self.parallel[layer], self.layers[layer]
        if seen:
            after = self._through_mlp(layer, above, out) if parallel else None
            if not parallel:
                skipped = self._through_mlp(layer, above, out)
                if skipped is not None:
                    above += skipped
            V = frozen.mix(above, by_head=visit is not None)
            self._read_attention(layer, above, V, out)
            if visit is not None:
                visit(layer, slice(0, seen), above, V)
            if after is not None:
                above += after
            if layer > 0:
                frozen.pull(above, V)
            else:
                out.embeddings[:, : len(above), :seen] += readout(self.sources.embeddings, above).transpose(0, 1)
        if joined == seen or targets is None:
            return
        if parallel:  # their MLP reads the layer's input
            self._join(G, targets, seen, joined)
            if layer == 0:
                entered = readout(self.sources.embeddings, G[:, :, seen:joined])
                out.embeddings[:, : len(G), seen:joined] += entered.transpose(0, 1)
        else:
            self._first_step(layer, G, targets, begin, seen, out, visit)

    def _through_mlp(self, layer: int, G: Tensor, out: EdgeColumns) -> Tensor | None:
        """Read out what writes to the layer's MLP output; gives what comes back through a skip connection."""
        writers, n = self.sources.writers[layer], G.shape[2]
        for position, run in enumerate(writers.runs[: len(G)]):
            if run.stop > run.start:
                out.features[run.start : run.stop, :n].addmm_(writers.rows(run), G[position])
        found = readout(writers.error_and_bias, G)
        out.errors[layer, : len(G), :n] += found[:, 0]
        out.biases[layer, : len(G), :n] += found[:, 1]
        if writers.skip is None or writers.skip_scale is None:
            return None
        return torch.bmm(writers.skip.expand(len(G), -1, -1), G) * writers.skip_scale[: len(G), :, None]

    def _read_attention(self, layer: int, G: Tensor, V: Tensor, out: EdgeColumns) -> None:
        """Read out attention's biases; at layer 0 also the embeddings, as far as attention carries them."""
        n, written = G.shape[2], self.layers[layer].written_bias
        if written is not None:
            out.biases[layer, : len(G), :n] += readout(written[None], G)[:, 0]
        vectors = self.readers[layer]
        if vectors is not None:
            if vectors.shape[-1] != V.shape[1]:  # heads that share values are read together
                vectors = self.layers[layer].of_key_heads(vectors).flatten(-2)
            self._book(layer, readout(vectors, V), slice(0, n), out)

    def _book(self, layer: int, found: Tensor, columns: slice, out: EdgeColumns) -> None:
        """What `readers` of a layer found, [T, k, n]."""
        length = len(found)
        if self.layers[layer].value_bias is not None:
            out.biases[layer, :length, columns] += found[:, 0]
            found = found[:, 1:]
        if layer == 0:
            out.embeddings[:, :length, columns] += found.transpose(0, 1)

    def _first_step(
        self,
        layer: int,
        G: Tensor,
        targets: Directions,
        begin: list[int],
        seen: int,
        out: EdgeColumns,
        visit: Visit | None,
    ) -> None:
        """Directions that read after this layer's attention, position by position."""
        frozen, vectors = self.layers[layer], self.readers[layer]
        start = seen
        for position, same in groupby(begin):
            columns = slice(start, start + len(list(same)))
            start = columns.stop
            W = targets.direction[columns].T.contiguous()
            by_head, U = frozen.first(W, position)
            if frozen.written_bias is not None:
                out.biases[layer, position, columns] += frozen.written_bias[position] @ W
            if visit is not None:
                visit(layer, columns, None, frozen.first_values(U, position))
            if vectors is not None:
                self._book(layer, frozen.first_readout(vectors, U, position), columns, out)
            if layer == 0:
                out.embeddings[:, position, columns] += self.sources.embeddings[:, position] @ W
            else:
                G[: position + 1, :, columns] = frozen.spread(by_head, position)
                G[position, :, columns] += W
                G[position + 1 :, :, columns] = 0
