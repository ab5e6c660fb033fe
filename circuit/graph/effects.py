"""What a graph foretells, and what of it comes true: effects over all paths, predicted beside measured."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...data.errors import UserError
from ..precision import wide, widest
from .graph import Graph


def total_effects(graph: Graph, sources: Sequence[int]) -> Tensor:
    """[R, sources]: what silencing each source feature does to every row's pre-activation or logit, over all paths."""
    n = graph.n_features
    rows = wide(graph.rows)
    direct = -rows[:, list(sources)]
    share = rows[:, :n] / wide(graph.nodes.activation[:n]).clamp_min(1e-12)
    # features come in order of layer, so that the features' block is strictly lower triangular
    eye = torch.eye(n, dtype=widest(rows.device), device=rows.device)
    moved = torch.linalg.solve_triangular(eye - share[:n], direct[:n], upper=False, unitriangular=True)
    return torch.cat([moved, direct[n:] + share[n:] @ moved])


class Check(NamedTuple):
    """What silencing a feature does to one logit."""

    label: str
    predicted: float
    """By the graph, over all paths; demeaned, before any soft cap."""
    measured: float
    """In the model."""


def check_node(graph: Graph, model: Any, id: int, mode: str = "constrained") -> list[Check]:
    """Silence a feature of the graph's prompt in a `ReplacementModel`, and compare each next token's logit with what
    the graph predicts; `mode` says who answers. In mode `direct` its edges alone are tested."""
    node = graph.nodes[id]
    if node.kind != "feature":
        raise UserError(f"node {id} is of kind {node.kind}; only a feature can be silenced")
    result = model.intervene(graph.tokens, graph.interventions([id], times=0.0), mode)
    before, after = (wide(model.lm.before_softcap(logits)) for logits in (result.clean_logits, result.logits))
    change_TV = after - before
    change_TV = change_TV - change_TV.mean(-1, keepdim=True)
    predicted_R = -wide(graph.rows[:, id]) if mode == "direct" else total_effects(graph, [id])[:, 0]
    return [
        Check(logit.label, float(predicted_R[graph.n_features + row]), float(change_TV[logit.position, logit.token]))
        for row, logit in enumerate(graph.logits)
        if logit.token >= 0
    ]
