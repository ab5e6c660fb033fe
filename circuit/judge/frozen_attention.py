"""What graphs miss by freezing attention, and how much of that queries and keys predict.

A feature is silenced with the MLPs as they were and norms frozen, once with attention frozen and once live: what the
two effects on the likeliest next tokens differ by is what a graph misses. Predicted is the same to first order, through
how the feature moves scores and patterns.
"""

from collections.abc import Sequence
from typing import Any

import torch

from ..attribution import LiveAttention, likely_directions
from ..model import ReplacementModel
from ..replacement import Intervention
from .faithfulness import compare


@torch.no_grad()
def frozen_attention(
    rm: ReplacementModel, prompts: Sequence[Sequence[int] | None], per_prompt: int = 8, seed: int = 0
) -> dict[str, Any]:
    """Over random active features of prompts, the tokens of each (None is passed over).

    `missed`: what is missed over the size of the measured effects; `explained`: the share of its variance about zero
    that is predicted; slope and correlations.
    """
    columns: list[list[torch.Tensor]] = [[], [], [], []]
    for number, prompt_tokens in enumerate(prompts):
        if prompt_tokens is None:
            continue
        live = LiveAttention(rm, torch.tensor(prompt_tokens, device=rm.lm.device))
        features = [node for node in live.prompt.sources.nodes(live.prompt.recording) if node.kind == "feature"]
        random = torch.Generator().manual_seed(seed * 1_000_003 + number)
        nodes = [features[i] for i in torch.randperm(len(features), generator=random)[:per_prompt].tolist()]
        if not nodes:
            continue
        tokens, directions = likely_directions(rm.lm, live.prompt)
        moved = live.carry(nodes, live=True) - live.carry(nodes, live=False)
        columns[0].append(-(moved[:, -1] @ directions.T).flatten())
        silenced = [[Intervention(node.layer, node.position, node.index, times=0.0)] for node in nodes]
        clean = {range(rm.lm.n_layers): "clean"}
        for column, freeze in ((1, ["norms"]), (2, ["norms", "attention"])):
            found = rm.intervene_many(prompt_tokens, silenced, mlps=clean, freeze=freeze)
            changes = [
                rm.lm.before_softcap(one.logits[-1]) - rm.lm.before_softcap(one.clean_logits[-1]) for one in found
            ]
            columns[column].append(torch.stack([(one - one.mean())[tokens] for one in changes]).flatten())
        columns[3].append(torch.full_like(columns[0][-1], number))
    if not columns[0]:
        return {"effects": 0}
    predicted, measured, frozen, prompt = (torch.cat(column).cpu().double() for column in columns)
    missed = measured - frozen
    size = float(missed.square().sum())
    return {
        "effects": len(missed),
        "missed": float(missed.abs().sum() / measured.abs().sum().clamp_min(1e-30)),
        "explained": 1 - float((missed - predicted).square().sum()) / size if size else None,
        "agreement": compare(predicted, missed, prompt)._asdict(),
    }
