"""Queries and keys of one attention layer as affine functions of the residual stream, on one prompt.

The model's own attention module is run up to where it hands queries and keys over, with the denominators of the norms
on its way fixed: what rotates, what has a gain or a bias, and where, is the model's business and stays there.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UserError
from .families import Norm
from .language_model import LanguageModel

AGREES = {torch.float64: 1e-5, torch.float32: 1e-3}
"""By how much a pattern may differ from the model's: most families' softmax is float32, other dtypes round more."""


class QueriesAndKeys:
    """Made by `listen`, filled by one forward pass, then a function of the residual stream that the layer reads."""

    scale: float
    softcap: float | None
    sinks: Tensor | None
    """[H] learned scores that take their share of each query's attention (GPT-OSS)."""
    seen: Tensor
    """[T, T] which keys each query may look at."""

    def __init__(self, lm: LanguageModel, layer: int):
        self.lm, self.layer, self.parts = lm, layer, lm.layers[layer]
        self.called: tuple[tuple, dict[str, Any]] | None = None
        self._handed: tuple[Tensor, Tensor] | None = None
        self._of_input: Tensor | None = None  # until `freeze` says: what is given has passed the norm
        self._denominators: dict[int, Tensor] = {}

    def freeze(self, x: Tensor, denominator: Tensor | None, pattern: Tensor) -> None:
        """Fix what this prompt's run had: the residual stream x [T, D] that the layer read, its norm's denominators
        [T, 1] and its pattern [H, T, T], which what is found here must reproduce."""
        if self.called is None:
            raise UserError(f"layer {self.layer} of {self.lm.name or 'the model'} has no attention that was called")
        self.clean, self._of_input = x[None].detach(), None if denominator is None else denominator[None]
        with torch.no_grad():
            self.queries, self.keys = (handed[0] for handed in self(self.clean))
        wrong = max(float((self.pattern(head) - pattern[head]).abs().max()) for head in range(self.n_heads))
        if wrong > AGREES.get(x.dtype, 0.05):
            raise UserError(
                f"attention of layer {self.layer} is of a kind that is not supported: the softmax of scaled products of"
                f" its queries and keys differs from its pattern by {wrong:.2g}"
            )

    @property
    def n_heads(self) -> int:
        return self.parts.n_heads

    def key_head(self, head: int) -> int:
        """The key head that a query head reads."""
        return head // (self.parts.n_heads // self.parts.n_kv_heads)

    # -- scores --------------------------------------------------------------------------------------------------

    def scores(self, head: int) -> Tensor:
        """[T, T] products of queries and keys, scaled, before any soft cap."""
        return self.queries[head] @ self.keys[self.key_head(head)].T * self.scale

    def capped(self, scores: Tensor) -> Tensor:
        """Scores after the soft cap."""
        return scores if self.softcap is None else self.softcap * torch.tanh(scores / self.softcap)

    def tangent(self, scores: Tensor) -> Tensor:
        """Slope of the soft cap at these scores."""
        return torch.ones_like(scores) if self.softcap is None else 1 - torch.tanh(scores / self.softcap) ** 2

    def pattern(self, head: int) -> Tensor:
        """[T, T] the softmax over unmasked keys, and the head's sink."""
        capped = self.capped(self.scores(head)).masked_fill(~self.seen, -torch.inf)
        if self.sinks is not None:
            capped = torch.cat([capped, self.sinks[head].to(capped).expand(len(capped), 1)], 1)
        return capped.softmax(-1)[:, : len(capped)]

    # -- the affine map ------------------------------------------------------------------------------------------

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Queries [n, H, T, hd] and keys [n, KV, T, hd] for residual streams x [n, T, D], denominators fixed."""
        norm = self.parts.attn_norm
        hidden = x if norm is None or self._of_input is None else norm.frozen(x, self._of_input)
        assert self.called is not None
        args, kwargs = self.called
        if args:
            args = (hidden, *args[1:])
        else:
            kwargs = kwargs | {"hidden_states": hidden}
        with ExitStack() as stack:
            stack.enter_context(self.lm.attend_with(self._hand_over))
            for place in (self.parts.query_norm, self.parts.key_norm):
                if place is not None:
                    stack.callback(place.module.register_forward_hook(self._fixed(place)).remove)
            self.parts.attn(*args, **kwargs)
        handed, self._handed = self._handed, None
        if handed is None:
            raise UserError(f"attention of layer {self.layer} is of a kind that is not supported: it is no softmax")
        return handed

    def linear(self, F: Tensor) -> tuple[Tensor, Tensor]:
        """What changes F [n, T, D] of the residual stream make of queries [n, H, T, hd] and keys [n, KV, T, hd]."""
        with torch.no_grad():
            q, k = self(F)
        q_own, k_own = self.constants()
        return q - q_own, k - k_own

    def constants(self) -> tuple[Tensor, Tensor]:
        """What queries [H, T, hd] and keys [KV, T, hd] hold that does not come from the residual stream."""
        with torch.no_grad():
            q, k = self(torch.zeros_like(self.clean))
        return q[0], k[0]

    def pull_query(self, head: int, query: int, v: Tensor) -> Tensor:
        """Cotangents v [n, hd] of one query, pulled back to the residual stream at its position: [n, D]."""
        with torch.enable_grad():
            x = self.clean.clone().requires_grad_()
            q = self(x)[0][0, head, query]
        return torch.autograd.grad(q, x, v, is_grads_batched=True)[0][:, 0, query]

    def pull_keys(self, head: int, v: Tensor) -> Tensor:
        """Cotangents v [T, hd] of a head's keys, pulled back to the residual stream, each at its position: [T, D]."""
        with torch.enable_grad():
            x = self.clean.clone().requires_grad_()
            k = self(x)[1][0, self.key_head(head)]
        return torch.autograd.grad(k, x, v)[0][0]

    # -- the module's side ---------------------------------------------------------------------------------------

    def _hand_over(self, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any):
        self._handed = query, key
        T = query.shape[-2]
        self.scale = kwargs.get("scaling") or query.shape[-1] ** -0.5
        self.softcap, self.sinks = kwargs.get("softcap"), kwargs.get("s_aux")
        if mask is None:
            self.seen = torch.ones(T, T, dtype=torch.bool, device=query.device).tril()
        else:
            self.seen = mask[0, 0] if mask.dtype == torch.bool else mask[0, 0] == 0
        return torch.zeros_like(query).transpose(1, 2).contiguous(), None

    def _fixed(self, norm: Norm):
        def freeze(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
            if id(module) not in self._denominators:
                self._denominators[id(module)] = norm.denominator(args[0]).detach()
            return norm.frozen(args[0], self._denominators[id(module)])

        return freeze


@contextmanager
def listen(lm: LanguageModel, layer: int) -> Iterator[QueriesAndKeys]:
    """Note what a layer's attention is called with in the forward pass that is run meanwhile."""
    found = QueriesAndKeys(lm, layer)

    def keep(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        found.called = args, kwargs

    handle = found.parts.attn.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        yield found
    finally:
        handle.remove()
