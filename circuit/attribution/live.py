"""What a graph leaves out by freezing attention, to first order: sources carried forwards with attention live.

A source also moves queries and keys above it, so patterns, so what heads bring. To first order this is one more linear
term in each layer's attention: `pattern * dlog pattern` over the clean values, `dlog pattern` as in `qk`. Norms stay
frozen, MLPs as they were but for skips.
"""

from collections.abc import Sequence
from contextlib import ExitStack

import torch
from torch import Tensor

from ...data.models import QueriesAndKeys, listen
from ..graph import Node
from ..replacement import LocalModel
from .forward import carry
from .frozen import FrozenPrompt, freeze_prompt


class LiveAttention:
    """A frozen prompt with every layer's queries and keys at hand."""

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
