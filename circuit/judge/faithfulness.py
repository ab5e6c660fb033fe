"""Whether a graph says what the model does: effects predicted from its edges against effects that are measured.

For features drawn at random from the active ones of a prompt, the graph predicts what silencing one of them does to
every later feature and logit, over all paths. A capped graph must have drawn them itself (`trace(sample=...)`): those
that it kept for their influence are no random choice. The effects delta solve

    delta_t = - A[t, s] + sum over features f of A[t, f] / a_f * delta_f

since a feature f whose pre-activation moves by delta_f passes on the share delta_f / a_f of its edges, and cannot fall
below silence. The measured effect is what the model itself answers (`steer`), attention, MLPs and norms after the
feature's own layer, the last norm included; logits are taken before any soft cap, as a graph has them. (A single
feature changes nothing up to its layer, so this is mode `constrained` too, in one pass for features of all layers.)
The effects on logits are measured once more with attention frozen, as it is in the graph: the two say what it does.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...data.errors import Progress, silent
from ...train.parallel import SINGLE, Collectives
from ..graph import Graph, total_effects
from ..model import ReplacementModel
from ..precision import wide
from ..replacement import Intervention, InterventionResult
from .behaviour import resampled

KINDS = ("to_logits", "to_features", "to_logits_attention_frozen")
LEAST_PAIRS = 30
"""Below this many pairs a correlation is not printed."""


class Agreement(NamedTuple):
    """How measured effects follow predicted ones."""

    pairs: int
    slope: float | None
    """Of measured on predicted, through the origin: 1 is exact, below 1 the graph promises too much."""
    slope_interval: list[float] | None
    """95%, from resampling prompts: a slope may rest on a few large effects. None of fewer than two prompts."""
    pearson: float | None
    spearman: float | None


class Effects(NamedTuple):
    """Pairs of predicted and measured effects, the predictions of a matched random feature for the same pairs, and the
    number of the prompt that each pair is from."""

    predicted: Tensor
    measured: Tensor
    control: Tensor
    prompt: Tensor

    def agreement(self) -> dict[str, dict[str, Any]]:
        return {
            "graph": compare(self.predicted, self.measured, self.prompt)._asdict(),
            "random": compare(self.control, self.measured, self.prompt)._asdict(),
        }


def compare(predicted: Tensor, measured: Tensor, prompt: Tensor) -> Agreement:
    """Slope through the origin, Pearson and Spearman correlation; None where there are too few pairs or no spread."""
    predicted, measured = wide(predicted).flatten(), wide(measured).flatten()
    n = len(predicted)
    if n < LEAST_PAIRS or not predicted.any():
        return Agreement(n, None, None, None, None)
    _, of_prompt = prompt.unique(return_inverse=True)
    sums_P2 = predicted.new_zeros(int(of_prompt.max()) + 1, 2)
    sums_P2.index_add_(0, of_prompt, torch.stack([predicted * measured, predicted.square()], 1))
    slope = resampled(sums_P2, lambda totals: totals[..., 0] / totals[..., 1])
    interval = None if slope.low is None or slope.high is None else [slope.low, slope.high]
    ranks = _pearson(_ranks(predicted), _ranks(measured))
    return Agreement(n, slope.value, interval, _pearson(predicted, measured), ranks)


def _pearson(x: Tensor, y: Tensor) -> float | None:
    x, y = x - x.mean(), y - y.mean()
    scale = (x.norm() * y.norm()).item()
    return (x @ y).item() / scale if scale > 0 else None


def _ranks(x: Tensor) -> Tensor:
    """Ranks with ties at their mean."""
    _, inverse, counts = x.unique(return_inverse=True, return_counts=True)
    last = wide(counts.cumsum(0))
    return (last - (counts - 1) / 2)[inverse]


@dataclass(frozen=True)
class FaithfulnessPlan:
    """How many effects are measured."""

    pairs: int = 500
    """At least so many feature-to-logit and so many feature-to-feature pairs."""
    per_prompt: int = 16
    """Features silenced in one prompt."""
    targets: int = 8
    """Later features looked at for each silenced one: those with the largest predicted effects."""
    seed: int = 0


@torch.no_grad()
def measure_faithfulness(
    rm: ReplacementModel,
    graphs: Sequence[Graph | None],
    plan: FaithfulnessPlan,
    progress: Progress = silent,
    comm: Collectives = SINGLE,
) -> dict[str, Effects]:
    """Effects of silencing random active features, `to_logits` (and the same with attention frozen) and `to_features`,
    over the graphs' prompts in turn.

    Each process has the graphs of every `data_ranks`-th prompt. They go round by round, and what is drawn for a prompt
    depends on its number alone, so that the pairs are the same whatever the number of processes.
    """
    found: dict[str, list[Tensor]] = {kind: [] for kind in KINDS}
    enough = lambda: min(sum(pairs.shape[1] for pairs in kept) for kept in found.values()) >= plan.pairs
    for first in range(0, len(graphs), comm.data_ranks):
        number = first + comm.data_rank
        graph = graphs[number] if number < len(graphs) else None
        own = {kind: torch.zeros(len(Effects._fields), 0, dtype=torch.float64) for kind in found}
        if graph is not None and graph.n_features > 1:
            generator = torch.Generator().manual_seed(plan.seed * 1_000_003 + number)
            pairs = _one_prompt(rm, graph, plan, generator)
            own = {
                kind: torch.stack([*columns, torch.full_like(columns[0], number)]) for kind, columns in pairs.items()
            }
        rounds = {kind: each_ranks(pairs, comm) for kind, pairs in own.items()}
        for rank in range(comm.data_ranks):
            if not enough():
                for kind, kept in found.items():
                    kept.append(rounds[kind][rank])
        if enough():
            break
        progress("faithfulness", number + 1, len(graphs))
    return {kind: Effects(*torch.cat(kept, dim=1)) for kind, kept in found.items()}


def each_ranks(own: Tensor, comm: Collectives) -> list[Tensor]:
    """[rows, n] of every data rank, n each rank's own, on all of them."""
    longest = int(comm.max_all(torch.tensor(own.shape[1])))
    padded = own.new_zeros(comm.data_ranks, own.shape[0], longest)
    lengths = torch.zeros(comm.data_ranks, dtype=torch.int64)
    padded[comm.data_rank, :, : own.shape[1]] = own
    lengths[comm.data_rank] = own.shape[1]
    together = comm.all_reduce_data(padded)
    return [part[:, :n] for part, n in zip(together, comm.all_reduce_data(lengths).tolist(), strict=True)]


def _one_prompt(
    rm: ReplacementModel, graph: Graph, plan: FaithfulnessPlan, generator: torch.Generator
) -> Mapping[str, tuple[Tensor, Tensor, Tensor]]:
    """The pairs of one prompt: (predicted, measured, control) by kind."""
    n = graph.n_features
    sampled = [graph.nodes.ids("feature", *place)[0] for place in graph.metadata.get("sampled", [])]
    sources = (sampled or torch.randperm(n, generator=generator).tolist())[: plan.per_prompt]
    matched = [_matched(graph, source, generator) for source in sources]
    predicted_RS = total_effects(graph, [*sources, *matched]).cpu()
    activation_N = graph.nodes.activation.cpu().double()
    predicted_RS[:n] = torch.maximum(predicted_RS[:n], -activation_N[:n, None])  # no feature falls below silence
    logit_ids = [(logit.token, logit.position) for logit in graph.logits if logit.token >= 0]
    logit_rows = [n + row for row, logit in enumerate(graph.logits) if logit.token >= 0]

    pairs: dict[str, list[list[Tensor]]] = {kind: [[], [], []] for kind in KINDS}
    nodes = [graph.nodes[source] for source in sources]
    silenced = [[Intervention(node.layer, node.position, node.index, times=0.0)] for node in nodes]
    live = rm.intervene_many(graph.tokens, silenced)
    frozen = rm.intervene_many(graph.tokens, silenced, freeze=("attention",))
    for column, result in enumerate(live):
        for kind, answer in (("to_logits", result), ("to_logits_attention_frozen", frozen[column])):
            _add(pairs[kind], predicted_RS, logit_rows, column, len(sources), _moved(rm, answer, logit_ids))

        later = (graph.nodes.layer[:n] > nodes[column].layer).nonzero()[:, 0].cpu()
        if len(later) == 0:
            continue
        strongest = later[predicted_RS[later, column].abs().argsort(descending=True)[: plan.targets]].tolist()
        places = [
            (int(graph.nodes.layer[t]), int(graph.nodes.position[t]), int(graph.nodes.index[t])) for t in strongest
        ]
        after = torch.stack([result.activation(*place) for place in places]).cpu().double()
        _add(pairs["to_features"], predicted_RS, strongest, column, len(sources), after - activation_N[strongest])
    empty = torch.zeros(0, dtype=torch.float64)
    return {
        kind: tuple(torch.cat([empty, *column]) for column in columns)  # type: ignore[misc]
        for kind, columns in pairs.items()
    }


def _moved(rm: ReplacementModel, result: InterventionResult, logit_ids: list[tuple[int, int]]) -> Tensor:
    """How far each demeaned logit moved, before any soft cap."""
    change_V: dict[int, Tensor] = {}
    for position in {position for _, position in logit_ids}:
        after, before = (rm.lm.before_softcap(logits[position]) for logits in (result.logits, result.clean_logits))
        change = (after - before).cpu().double()
        change_V[position] = change - change.mean()
    return torch.stack([change_V[position][token] for token, position in logit_ids])


def _add(columns: list[list[Tensor]], predicted_RS: Tensor, rows: list[int], source: int, n: int, measured: Tensor):
    columns[0].append(predicted_RS[rows, source])
    columns[1].append(measured)
    columns[2].append(predicted_RS[rows, n + source])


def _matched(graph: Graph, source: int, generator: torch.Generator) -> int:
    """Another active feature, of the same layer and position where there is one, then of the same layer, then any."""
    n = graph.n_features
    others = torch.arange(n) != source
    layer, position = graph.nodes.layer[:n].cpu(), graph.nodes.position[:n].cpu()
    same_layer = others & (layer == layer[source])
    for group in (same_layer & (position == position[source]), same_layer, others):
        members = group.nonzero()[:, 0]
        if len(members):
            return int(members[torch.randint(len(members), (1,), generator=generator)])
    return source
