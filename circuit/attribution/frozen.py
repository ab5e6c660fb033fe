"""A prompt with everything frozen: what every look at its attention starts from.

Nothing of it is kept with a graph: one forward pass makes it again from the tokens.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ..replacement import LocalModel
from .backward import EdgeColumns, FrozenModel
from .linear import Recording, record
from .sources import Sources, active_features, find_sources


class FrozenPrompt(NamedTuple):
    """The clean run of one prompt, its sources, and its frozen layers."""

    recording: Recording
    sources: Sources
    model: FrozenModel
    dtype: torch.dtype


@torch.no_grad()
def freeze_prompt(replacement: LocalModel, tokens: Tensor) -> FrozenPrompt:
    """Run tokens [T] once and freeze them."""
    lm, transcoder = replacement.lm, replacement.transcoder
    dtype = torch.promote_types(lm.dtype, transcoder.dtype)
    recording = record(lm, tokens)
    masked = replacement.masked_positions(tokens[None], sites=recording.sites())[0]
    features = active_features(lm, transcoder, recording, masked, dtype)
    sources = find_sources(lm, transcoder, recording, features, masked, dtype)
    return FrozenPrompt(recording, sources, FrozenModel(lm, recording, sources, dtype), dtype)


def by_node(sources: Sources, edges: EdgeColumns) -> Tensor:
    """Edges of a batch in the order of `Sources.nodes`, [S, n]."""
    features = torch.empty_like(edges.features)
    features[sources.run_order] = edges.features
    return torch.cat([features, *(part.flatten(0, 1) for part in edges[1:])])
