"""All that can be the source of an edge on one prompt: active features, errors, biases and embeddings as vectors.

A feature's edges into a batch of targets are products of its decoder rows, one per layer that it writes to, with the
targets' cotangents there, times its activation. So for each layer the decoder rows of all features that write to it are
gathered once and sorted by position: then those of one position are one matrix, and the features that they belong to
are one run of `run_order`, whatever the reach. On a long prompt, where features fire at many positions, each feature's
row is held once instead, and those of a position are gathered whenever they are asked for.
"""

import itertools
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from ...data.models import LanguageModel
from ...train.transcoder import Transcoder
from ..graph import Nodes
from ..precision import refuse_overflow
from .batching import small_share
from .linear import Recording, fold_reading

GATHERED = 2**30  # at most so many bytes of decoder rows, one for each firing feature, are held; beyond, each row once


class Span(NamedTuple):
    """The features at one position that write to one layer."""

    start: int
    """Where they begin in run order."""
    stop: int
    offset: int
    """Where their decoder rows begin."""


@dataclass
class Writers:
    """What writes into one layer's MLP output."""

    decoders: Tensor
    """[n, D] decoder rows, by position; or the rows of `which`."""
    which: Tensor | None
    """[n] the decoder row of each feature that writes here, by position, where features share rows."""
    runs: list[Span]
    """One per position."""
    error_and_bias: Tensor
    """[2, T, D]: what the transcoder leaves over, and its own bias."""
    skip: Tensor | None
    """[D, D] that pulls cotangents back through the skip connection."""
    skip_scale: Tensor | None
    """[T, 1] by which each position's is multiplied; zero where the model keeps its own output."""

    def rows(self, run: Span) -> Tensor:
        """[n, D] decoder rows of one position's features."""
        here = slice(run.offset, run.offset + run.stop - run.start)
        return self.decoders[here] if self.which is None else self.decoders[self.which[here]]


class ActiveFeatures(NamedTuple):
    """Active features, sorted by (layer, position, index)."""

    layer: Tensor
    """Of the model."""
    position: Tensor
    index: Tensor
    activation: Tensor
    preactivation: Tensor


@dataclass
class Sources:
    """The sources of one prompt."""

    features: ActiveFeatures
    run_order: Tensor
    """[K] features sorted by (position, layer, index)."""
    writers: list[Writers]
    """Per layer of the model."""
    embeddings: Tensor
    """[1 or 2, T, D]: token embeddings, and position embeddings where the model has them."""
    masked: Tensor
    """[T] positions that keep the model's own MLP output."""

    def nodes(self, recording: Recording) -> Nodes:
        """Every node that is a source, in a graph's order (the logits follow)."""
        T, L, device = len(recording.tokens), len(self.writers), recording.tokens.device
        positions = torch.arange(T, device=device)
        none = torch.zeros_like(positions)
        layer_major = (torch.arange(L, device=device).repeat_interleave(T), positions.repeat(L), none.repeat(L))
        f = self.features
        parts = [
            Nodes.of("feature", f.layer, f.position, f.index, f.activation),
            Nodes.of("error", *layer_major).turned(self.masked.repeat(L), "kept"),
            Nodes.of("embedding", none - 1, positions, recording.tokens),
        ]
        if len(self.embeddings) > 1:
            parts.append(Nodes.of("position", none - 1, positions, none))
        return Nodes.join([*parts, Nodes.of("bias", *layer_major)])


def reading(lm: LanguageModel, transcoder: Transcoder, recording: Recording, l: int) -> tuple:
    """What the transcoder reads at covered layer l: the norm that folds into its weights (None for `resid`), that
    norm's denominators [T, 1] and the site's values [T, D]."""
    layer = transcoder.layers[l]
    norm = lm.layers[layer].mlp_norm
    if transcoder.settings.read == "resid" or norm is None:
        return None, torch.ones_like(recording.resid[layer][:, :1]), recording.resid[layer]
    place = "mlp_norm" if (layer, "mlp_norm") in recording.denominators else "attn_norm"
    return norm, recording.denominators[layer, place], recording.mlp_in[layer]


@torch.no_grad()
def active_features(
    lm: LanguageModel, transcoder: Transcoder, recording: Recording, masked: Tensor, dtype: torch.dtype
) -> ActiveFeatures:
    """Features that fire at positions that are replaced, `~masked [T]`."""
    found = []
    for l, layer in enumerate(transcoder.layers):
        x = reading(lm, transcoder, recording, l)[2].to(dtype)
        acts = transcoder.encode_layer(x, l).masked_fill(masked[:, None], 0)
        refuse_overflow({layer: acts}, "transcoder")
        position, index = acts.nonzero(as_tuple=True)
        h = transcoder.preactivation(x, l)[position, index]
        found.append(ActiveFeatures(torch.full_like(position, layer), position, index, acts[position, index], h))
    return ActiveFeatures(*(torch.cat(column) for column in zip(*found)))


@torch.no_grad()
def find_sources(
    lm: LanguageModel,
    transcoder: Transcoder,
    recording: Recording,
    features: ActiveFeatures,
    masked: Tensor,
    dtype: torch.dtype,
) -> Sources:
    """Gather decoder rows, errors, biases and embeddings."""
    T = len(recording.tokens)
    # run order: by position, then by (layer, index), which is the order they have already
    run_order = features.position.argsort(stable=True)
    rank = torch.empty_like(run_order)
    rank[run_order] = torch.arange(len(run_order), device=run_order.device)
    written = _written(transcoder, features, rank, dtype)
    writers = [
        _writers(lm, transcoder, recording, features, rank, written, masked, layer, dtype)
        for layer in range(lm.n_layers)
    ]
    embeddings = [lm.embed(recording.tokens), lm.position_embed(T)]
    stacked = torch.stack([vectors.to(dtype) for vectors in embeddings if vectors is not None])
    return Sources(features, run_order, writers, stacked, masked)


class Written(NamedTuple):
    """What features write to one covered layer."""

    ids: Tensor
    """[n] the features, in run order."""
    decoders: Tensor
    which: Tensor | None
    """As in `Writers`."""


def _written(transcoder: Transcoder, features: ActiveFeatures, rank: Tensor, dtype: torch.dtype) -> list[Written]:
    """For each covered layer, the features that write to it and their decoder rows.

    Each source layer's rows are read once, with all that they write.
    """
    L, D = transcoder.n_layers, transcoder.d_model
    covered = torch.tensor(transcoder.layers, device=rank.device)
    counts = (features.layer[:, None] == covered).sum(0).tolist()
    starts = [0, *itertools.accumulate(counts)]  # features are sorted by layer
    spread = sum(count * transcoder.reach_at(l) for l, count in enumerate(counts))
    shared = spread * D * dtype.itemsize > min(GATHERED, small_share(rank.device))
    index = [features.index[starts[l] : starts[l + 1]] for l in range(L)]
    used = [one.unique(return_inverse=True) if shared else (one, torch.arange(len(one)).to(one)) for one in index]
    first = [max(0, target - transcoder.reach + 1) for target in range(L)]
    begins = [0, *itertools.accumulate(len(rows) for rows, _ in used)]
    into = [rank.new_empty(begins[t + 1] - begins[first[t]], D, dtype=dtype) for t in range(L)]
    for l, (rows, _) in enumerate(used):
        decoders = transcoder.W_dec[l][rows].detach()
        for target in range(l, l + transcoder.reach_at(l)):
            offset = begins[l] - begins[first[target]]
            into[target][offset : offset + len(rows)] = decoders[:, target - l]
    which = torch.cat([place + begins[l] for l, (_, place) in enumerate(used)])
    found = []
    for target, decoders in enumerate(into):
        order = rank[starts[first[target]] : starts[target + 1]].argsort()
        ids = order + starts[first[target]]
        here = which[ids] - begins[first[target]]
        found.append(Written(ids, decoders, here) if shared else Written(ids, decoders[here], None))
        into[target] = decoders[:0]
    return found


def _writers(
    lm: LanguageModel,
    transcoder: Transcoder,
    recording: Recording,
    features: ActiveFeatures,
    rank: Tensor,
    written: list[Written],
    masked: Tensor,
    layer: int,
    dtype: torch.dtype,
) -> Writers:
    """What writes to one layer of the model."""
    mlp_out = recording.mlp_out[layer].to(dtype)
    T, D = mlp_out.shape
    nothing = mlp_out.new_zeros(T, D)
    if layer not in transcoder.layers:
        return Writers(mlp_out[:0], None, [Span(0, 0, 0)] * T, torch.stack([mlp_out, nothing]), None, None)
    l = transcoder.layers.index(layer)
    ids, decoders, which = written[l]
    replaced = (~masked)[:, None].to(dtype)
    bias = transcoder.b_dec[l].detach().to(dtype).expand(T, D)
    runs = _runs(features.position[ids], rank[ids], T)
    skip = skip_scale = None
    writers = Writers(decoders, which, runs, nothing[None], None, None)
    acts = features.activation[ids].to(dtype)
    parts = [acts[run.offset : run.offset + run.stop - run.start] @ writers.rows(run) for run in runs]
    y = torch.stack(parts)
    if len(transcoder.W_skip):
        norm, denominator, x = reading(lm, transcoder, recording, l)
        W_skip = transcoder.W_skip[l].detach().to(dtype)
        y = y + x.to(dtype) @ W_skip.T
        if norm is not None and norm.bias is not None:
            shift = W_skip @ norm.bias.to(dtype)
            bias, y = bias + shift, y - shift
        skip = fold_reading(W_skip, norm, dtype).T.contiguous()
        skip_scale = replaced / denominator.to(dtype)
    error = mlp_out - (y + bias) * replaced
    return replace(writers, error_and_bias=torch.stack([error, bias * replaced]), skip=skip, skip_scale=skip_scale)


def _runs(position: Tensor, rank: Tensor, length: int) -> list[Span]:
    """Where each position's features stand, in run order and among the decoder rows."""
    counts = torch.bincount(position, minlength=length).tolist()
    runs, offset = [], 0
    starts = rank.tolist()
    for count in counts:
        start = starts[offset] if count else 0
        runs.append(Span(start, start + count, offset))
        offset += count
    return runs
