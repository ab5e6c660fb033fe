"""Why a head looked there: its score, split over what queries and keys are made of.

The score of a query p and a key j is a product of two vectors that are affine in the residual stream,

    s_j = q_p . k_j * scale        q_p = sum over sources of q_p(s) + a constant        k_j likewise

so it is a sum over pairs of sources, one on the query's side and one on the key's. Their marginals come from sweeps
backwards: `row_j(s)`, what s adds on the query's side, and `col_j(s)`, on the key's; each side sums to s_j. Pairs, and
what silencing a source does exactly, come from sweeps forwards of the sources that matter.

Attention is a competition, so a source that raises all scores alike does nothing. Its first-order effect on the
logarithm of a key's share is `c_j - sum_k pattern_k c_k`, c_j = tangent_j * (row_j + col_j), the tangent that of the
soft cap, the sum over all keys that are not masked (a learned sink takes its share and has no sources).
"""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ...data.errors import UserError, check_range
from ...data.models import QueriesAndKeys, listen
from ..graph import Node, Nodes
from ..replacement import LocalModel, Prompt, memory_named
from .forward import FrozenPrompt, by_node, carry, freeze_prompt

CONSTANT = -1
"""The source that stands for all that does not come from the residual stream: biases of norms, queries and keys."""


class Marginal(NamedTuple):
    """What one source adds to a score on one side."""

    source: int
    """Node, or CONSTANT."""
    value: float


class Pair(NamedTuple):
    """What one source on the query's side and one on the key's add to a score together."""

    query: int
    key: int
    value: float


class Silenced(NamedTuple):
    """What happens when a source is silenced and all else is frozen, query and key norms too."""

    source: int
    score: float
    """Change of the key's score: -(row + col) + its pair with itself."""
    first_order: float
    """Change of the logarithm of the key's share of attention, to first order."""
    exact: float
    """The same through the softmax itself."""


@dataclass(eq=False)
class Attention:
    """Where one head looked from one query, and which sources made it look there."""

    layer: int
    head: int
    query: int
    tokens: list[int]
    token_strings: list[str]
    nodes: Nodes
    """All sources of the prompt; those at the layer or above it add nothing."""
    keys: Tensor
    """[K] positions that the query may look at."""
    pattern: Tensor
    """[K] share of attention of each; they sum to 1 less what a learned sink takes."""
    scores: Tensor
    """[K] before any soft cap."""
    capped: Tensor
    """[K] after it."""
    explained: list[int]
    """Positions of the keys whose marginals are known, the most attended first."""
    rows: Tensor
    """[S + 1, n] what each source adds to those keys' scores on the query's side; the constant last."""
    cols: Tensor
    """[S + 1, n] on the key's side."""
    log_pattern: Tensor
    """[S + 1, n] first-order effect on the logarithm of each key's share."""
    chosen: list[int]
    """[C] the sources whose pairs are known, the constant among them as CONSTANT."""
    pairs: Tensor
    """[C, C, K] what each two of them add to every key's score, [query's side, key's side, key]."""
    moved: Tensor
    """[C, K] change of every key's score when one of them is silenced."""
    moved_log_pattern: Tensor
    """[C, K] the exact change of the logarithm of every key's share."""

    # -- reading it ----------------------------------------------------------------------------------------------

    def place(self, key: int | None) -> int:
        """Where a key stands among those explained; the most attended by default."""
        if key is None:
            return 0
        if key not in self.explained:
            raise UserError(f"key {key} is not among those explained, {self.explained}; name it with keys=")
        return self.explained.index(key)

    def marginals(self, side: str, key: int | None = None, count: int = 10) -> list[Marginal]:
        """The strongest sources of a key's score on the `query` or the `key` side, or of the logarithm of its share
        (`attention`), both signs."""
        table = {"query": self.rows, "key": self.cols, "attention": self.log_pattern}[side][:, self.place(key)]
        best = table.abs().topk(min(count, len(table))).indices.tolist()
        return [Marginal(i if i < len(self.nodes) else CONSTANT, float(table[i])) for i in best if table[i] != 0]

    def strongest_pairs(self, key: int | None = None, count: int = 10) -> list[Pair]:
        """The strongest pairs of a key's score, both signs, among the sources whose pairs are known."""
        table, C = self.pairs[:, :, self._column(key)].flatten(), len(self.chosen)
        best = table.abs().topk(min(count, len(table))).indices.tolist()
        return [Pair(self.chosen[i // C], self.chosen[i % C], float(table[i])) for i in best if table[i] != 0]

    def silenced(self, key: int | None = None) -> list[Silenced]:
        """What silencing each of the chosen sources does to a key, the strongest effect first."""
        at, column = self.place(key), self._column(key)
        found = [
            Silenced(
                source,
                float(self.moved[c, column]),
                -float(self.log_pattern[source, at]),
                float(self.moved_log_pattern[c, column]),
            )
            for c, source in enumerate(self.chosen)
            if source != CONSTANT
        ]
        return sorted(found, key=lambda one: -abs(one.exact))

    def remainder(self, key: int | None = None, count: int = 10) -> dict[str, float]:
        """What the `count` strongest terms of each kind leave of the key's score."""
        score = float(self.scores[self._column(key)])
        kept = {
            "query": self.marginals("query", key, count),
            "key": self.marginals("key", key, count),
            "pairs": self.strongest_pairs(key, count),
        }
        return {name: score - sum(one.value for one in terms) for name, terms in kept.items()}

    @property
    def violation(self) -> float:
        """By how much the marginals of a side miss the score that they sum to, at most."""
        at = torch.tensor([self._column(key) for key in self.explained], device=self.scores.device)
        both = torch.stack([self.rows.sum(0), self.cols.sum(0)])
        return float((both - self.scores[at]).abs().max())

    def _column(self, key: int | None) -> int:
        return self.keys.tolist().index(self.explained[self.place(key)])


def attention(
    replacement: LocalModel,
    prompt: Prompt,
    layer: int,
    head: int,
    query: int = -1,
    keys: Sequence[int] | None = None,
    most_keys: int = 16,
    sources: int = 24,
) -> Attention:
    """Why a head looked where it did from one query: marginals for `keys` (by default the `most_keys` most attended),
    pairs and the effect of silencing for the `sources` that matter most to the most attended one."""
    tokens = replacement.lm.tokenize(prompt)
    check_head(replacement, len(tokens), layer, head, query)
    check_range("most_keys", most_keys, 1)
    check_range("sources", sources, 1)
    with memory_named("most_keys, sources or the prompt"):
        with listen(replacement.lm, layer) as heard:
            frozen = freeze_prompt(replacement, tokens)
        heard.freeze(
            frozen.recording.layer_in[layer],
            frozen.recording.denominators.get((layer, "attn_norm")),
            frozen.recording.patterns[layer],
        )
        return look(replacement, frozen, heard, head, query % len(tokens), keys, most_keys, sources)


def check_head(replacement: LocalModel, length: int, layer: int, head: int, query: int) -> None:
    """Refuse a layer, head or query that is not there."""
    lm = replacement.lm
    if not 0 <= layer < lm.n_layers:
        raise UserError(f"layer {layer} is not there; the model has layers 0 to {lm.n_layers - 1}")
    if not 0 <= head < (H := lm.layers[layer].n_heads):
        raise UserError(f"head {head} is not there; layer {layer} has heads 0 to {H - 1}")
    if not -length <= query < length:
        raise UserError(f"query {query} is outside the prompt, which has {length} tokens")


@torch.no_grad()
def look(
    replacement: LocalModel,
    frozen: FrozenPrompt,
    heard: QueriesAndKeys,
    head: int,
    query: int,
    wanted: Sequence[int] | None,
    most_keys: int,
    n_sources: int,
) -> Attention:
    """`attention` on a prompt that is frozen already."""
    dtype, layer = frozen.dtype, heard.layer
    keys = heard.seen[query].nonzero().squeeze(1)
    if len(keys) == 0:
        raise UserError(f"query {query} is masked: it may look at no key")
    scores = heard.scores(head)[query, keys].to(dtype)
    capped = heard.capped(scores)
    pattern = heard.pattern(head)[query, keys].to(dtype)
    columns = _explained(keys, pattern, wanted, most_keys, query)
    rows, cols, together = _marginals(frozen, heard, head, query, keys, scores, pattern, columns)
    nodes = frozen.sources.nodes(frozen.recording)
    chosen = _most_telling(rows[:-1, 0], cols[:-1, 0], together[:-1, 0], n_sources)
    pairs, moved = _pairs(frozen, heard, head, query, keys, [nodes[id] for id in chosen])
    change = heard.capped(scores + moved) - capped
    sink = (1 - pattern.sum()).clamp(min=0) if heard.sinks is not None else pattern.new_zeros(())
    total = ((pattern * change.exp()).sum(1) + sink).log()
    return Attention(
        layer=layer,
        head=head,
        query=query,
        tokens=frozen.recording.tokens.tolist(),
        token_strings=replacement.lm.token_strings(frozen.recording.tokens),
        nodes=nodes,
        keys=keys,
        pattern=pattern,
        scores=scores,
        capped=capped,
        explained=keys[columns].tolist(),
        rows=rows,
        cols=cols,
        log_pattern=together,
        chosen=[*chosen, CONSTANT],
        pairs=pairs,
        moved=moved,
        moved_log_pattern=change - total[:, None],
    )


def _explained(keys: Tensor, pattern: Tensor, wanted: Sequence[int] | None, most: int, query: int) -> Tensor:
    """Which of the keys are explained, the most attended first."""
    if wanted is None:
        return pattern.argsort(descending=True, stable=True)[:most]
    there = keys.tolist()
    for key in wanted:
        if key not in there:
            raise UserError(f"key {key} is masked for query {query}, which may look at {there[0]} to {there[-1]}")
    if not wanted:
        raise UserError("keys is empty; name at least one, or leave it out")
    chosen = torch.tensor([there.index(key) for key in dict.fromkeys(wanted)], device=keys.device)
    return chosen[pattern[chosen].argsort(descending=True, stable=True)]


def _marginals(
    frozen: FrozenPrompt,
    heard: QueriesAndKeys,
    head: int,
    query: int,
    keys: Tensor,
    scores: Tensor,
    pattern: Tensor,
    columns: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Rows, columns and log-pattern effects of all sources, [S + 1, n]: 2n + 2 cotangents in one sweep backwards."""
    n, dtype = len(columns), frozen.dtype
    q = heard.queries[head, query]
    k = heard.keys[heard.key_head(head)]
    tangent = heard.tangent(scores)
    # the query's side: each key's own vector, then their mean, each weighed by its share and the soft cap's slope
    mean = (pattern * tangent)[None].to(k) @ k[keys]
    of_query = heard.pull_query(head, query, torch.cat([k[keys[columns]], mean]) * heard.scale).to(dtype)
    # the key's side: the query's vector at each key's own position, then at all of them, weighed likewise
    of_keys = heard.pull_keys(head, (q * heard.scale).expand_as(k)).to(dtype)
    G = of_keys.new_zeros(query + 1, of_keys.shape[1], 2 * n + 2)
    G[query, :, : n + 1] = of_query.T
    own = torch.arange(n, device=keys.device)
    G[keys[columns], :, n + 1 + own] = of_keys[keys[columns]]
    G[keys, :, -1] = of_keys[keys] * (pattern * tangent)[:, None]
    found = by_node(frozen.sources, frozen.model.edges_into(heard.layer, G))
    q_own, k_own = heard.constants()
    q_own, k_own = q_own[head, query], k_own[heard.key_head(head)]
    rows_own = (k[keys] @ q_own) * heard.scale
    cols_own = (k_own[keys] @ q) * heard.scale
    constant = torch.cat(
        [
            rows_own[columns],
            (pattern * tangent * rows_own).sum()[None],
            cols_own[columns],
            (pattern * tangent * cols_own).sum()[None],
        ]
    )
    found = torch.cat([found, constant[None].to(dtype)])
    rows, cols = found[:, :n], found[:, n + 1 : -1]
    together = (rows + cols) * tangent[columns] - (found[:, n] + found[:, -1])[:, None]
    return rows, cols, together


def _most_telling(row: Tensor, col: Tensor, together: Tensor, count: int) -> list[int]:
    """The sources with the largest marginals of either side or effect on the share, in the order of nodes."""
    size = torch.stack([row.abs(), col.abs(), together.abs()]).amax(0)
    best = size.topk(min(count, len(size)))
    return best.indices[best.values > 0].sort().values.tolist()


def _pairs(
    frozen: FrozenPrompt, heard: QueriesAndKeys, head: int, query: int, keys: Tensor, nodes: list[Node]
) -> tuple[Tensor, Tensor]:
    """Pairs [C + 1, C + 1, K] of some sources and the constant, and what silencing each moves of the scores."""
    T, group = frozen.model.length, heard.key_head(head)
    q_all, k_all = heard.queries[head, query], heard.keys[group, keys]
    q_own, k_own = heard.constants()
    q, k = q_own[None, head, query], k_own[None, group, keys]
    if nodes:
        F, first = carry(frozen.model, nodes, heard.layer)
        F = torch.cat([F.new_zeros(len(F), first, F.shape[2]), F], 1)
        assert F.shape[1] == T
        of_q, of_k = heard.linear(F.to(heard.clean))
        q, k = torch.cat([of_q[:, head, query], q]), torch.cat([of_k[:, group, keys], k])
    pairs = torch.einsum("ad,bkd->abk", q, k) * heard.scale
    rows, cols = q @ k_all.T * heard.scale, torch.einsum("bkd,d->bk", k, q_all) * heard.scale
    moved = -(rows + cols) + pairs.diagonal().T
    return pairs.to(frozen.dtype), moved.to(frozen.dtype)


class LiveAttention:
    """What a graph leaves out by freezing attention, to first order: sources carried forwards with attention live.

    A source also moves queries and keys above it, so patterns, so what heads bring: one more linear term in each
    layer's attention, `pattern * dlog pattern` over the clean values. Norms stay frozen, MLPs too but for skips.
    """

    def __init__(self, replacement: LocalModel, tokens: Tensor):
        with ExitStack() as stack:
            heard = [stack.enter_context(listen(replacement.lm, layer)) for layer in range(replacement.lm.n_layers)]
            self.prompt: FrozenPrompt = freeze_prompt(replacement, tokens)
        recording = self.prompt.recording
        for layer, one in enumerate(heard):
            denominator = recording.denominators.get((layer, "attn_norm"))
            one.freeze(recording.layer_in[layer], denominator, recording.patterns[layer])
        self.heard: list[QueriesAndKeys] = heard

    @torch.no_grad()
    def carry(self, nodes: Sequence[Node], live: bool) -> Tensor:
        """What sources change of the last residual stream, [n, T, D]: attention live, to first order, or frozen."""
        F, first = carry(self.prompt.model, nodes, self.prompt.model.n_layers, move=self._moved if live else None)
        return torch.cat([F.new_zeros(len(F), first, F.shape[2]), F], 1)

    def _moved(self, layer: int, F: Tensor) -> Tensor:
        """What moved patterns make a layer's attention write, [n, T', D], for changes F of its input."""
        heard, attention = self.heard[layer], self.prompt.model.layers[layer]
        T, KV = self.prompt.model.length, attention.n_kv_heads
        first = T - F.shape[1]
        whole = torch.cat([F.new_zeros(len(F), first, F.shape[2]), F], 1)
        dq, dk = heard.linear(whole)
        groups = attention.n_heads // KV
        q, k = heard.queries, heard.keys.repeat_interleave(groups, 0)
        scores = torch.stack([heard.scores(head) for head in range(attention.n_heads)])
        ds = (dq @ k.transpose(-1, -2) + q @ dk.repeat_interleave(groups, 1).transpose(-1, -2)) * heard.scale
        ds = (ds * heard.tangent(scores)).masked_fill(~heard.seen, 0)
        pattern = self.prompt.recording.patterns[layer].to(ds)
        moved = attention.pattern * (ds - (pattern * ds).sum(-1, keepdim=True))
        clean = attention.values(self.prompt.recording.layer_in[layer].to(F)[None])[0]
        if attention.value_bias is not None:
            clean = clean + attention.of_key_heads(attention.value_bias)
        mixed = torch.einsum("nhpk,khd->nphd", moved, clean.repeat_interleave(groups, 1))
        return (mixed.flatten(2) @ attention.W_O)[:, first:]
