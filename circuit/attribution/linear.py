"""One prompt's model with attention patterns and norm denominators frozen, as a linear map to run backwards.

`record` runs the model once and keeps what freezing needs. `FrozenLayer` folds norms, scales and value and output
matrices into three products, so that pulling cotangents G of a layer's output back to its input is

    U = W_O G        V[q] = sum_p pattern[p, q] U[p]        G += W_V V

with no autograd and nothing computed twice. Cotangents are [T, D, n]: position-major, so that the products of each
position's sources with the cotangents there are plain matrix products, and n targets side by side.

The folding: a norm is `centred(x) * w / d + b` with d frozen, so w and the centring go into the matrix beside it, 1/d
into the pattern, and b (with the attention's own biases) into vectors that are read out against G and V. What those
vectors contribute belongs to the bias node of (layer, position): value biases at the position attended to, the rest at
the position written to.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ...data.errors import UserError
from ...data.models import Captured, LanguageModel, LayerParts, Norm
from ..precision import refuse_overflow

BLOCK = 256  # positions whose values are found together
HEAD_WIDTH = 128  # rows of W_O that a CPU multiplies together


@dataclass
class Recording:
    """A clean forward pass over one prompt, per layer: [T, D] and [H, T, T]."""

    tokens: Tensor
    """[T]."""
    layer_in: list[Tensor]
    """Residual stream before each layer, and after the last one."""
    resid: list[Tensor]
    mlp_in: list[Tensor]
    mlp_out: list[Tensor]
    patterns: list[Tensor]
    denominators: dict[tuple[int, str], Tensor]
    """[T, 1] per norm."""
    logits: Tensor
    """[T, V], soft-capped where the model does."""

    def sites(self) -> Captured:
        """What the pass left at the sites, as a batch of one prompt."""
        named = (self.resid, self.mlp_in, self.mlp_out)
        return Captured(*({layer: x[None] for layer, x in enumerate(by_layer)} for by_layer in named))


@torch.no_grad()
def record(lm: LanguageModel, tokens: Tensor) -> Recording:
    """Run the model once on tokens [T]; what is kept is exactly what the model computed."""
    layer_in: list[Tensor] = []
    handles = [
        module.register_forward_pre_hook(lambda module, args: layer_in.append(args[0][0]))
        for module in (*(parts.layer for parts in lm.layers), lm.final_norm.module)
    ]
    try:
        with (
            lm.freeze_attention() as patterns,
            lm.freeze_norms() as denominators,  # before capturing: what is kept has passed through these norms
            lm.capture(("resid", "mlp_in", "mlp_out")) as sites,
        ):
            logits = lm(tokens[None])[0]
    finally:
        for handle in handles:
            handle.remove()
    if not bool(layer_in[0].isfinite().all()):
        raise UserError("the embedding of the model gives numbers that are not finite on this prompt")
    refuse_overflow(dict(enumerate(layer_in[1:])) | {lm.n_layers: logits}, "model")
    layers = range(lm.n_layers)
    if other := [layer for layer in layers if layer not in patterns]:
        raise UserError(
            f"attention of layer {other[0]} is of a kind that is not supported: it is no softmax over earlier positions"
        )
    resid, mlp_in, mlp_out = (
        [site[layer][0] for layer in layers] for site in (sites.resid, sites.mlp_in, sites.mlp_out)
    )
    frozen = {place: denominator[0] for place, denominator in denominators.items()}
    return Recording(tokens, layer_in, resid, mlp_in, mlp_out, [patterns[layer][0] for layer in layers], frozen, logits)


def fold_reading(weight: Tensor, norm: Norm | None, dtype: torch.dtype) -> Tensor:
    """`weight [n, D]` that reads the norm's output, as one that reads its input times its denominator."""
    weight = weight.to(dtype)
    if norm is None:
        return weight
    weight = weight * norm.weight.to(dtype)
    return weight - weight.mean(-1, keepdim=True) if norm.kind == "layer" else weight


class FrozenLayer:
    """Attention of one layer on one prompt, ready to be run backwards."""

    def __init__(self, parts: LayerParts, recording: Recording, layer: int, dtype: torch.dtype):
        H, hd, D = parts.n_heads, parts.head_dim, parts.W_O.shape[0]
        groups = H // parts.n_kv_heads
        self.n_heads, self.n_kv_heads, self.head_dim = H, parts.n_kv_heads, hd
        # a few heads at once on a CPU, for the memory of U; an accelerator takes all
        self.heads_together = max(1, HEAD_WIDTH // hd) if parts.W_O.device.type == "cpu" else H

        def per_head(of_kv: Tensor) -> Tensor:
            """[n_kv * hd, ...] -> [H * hd, ...]."""
            return of_kv.unflatten(0, (parts.n_kv_heads, hd)).repeat_interleave(groups, 0).flatten(0, 1)

        W_V = per_head(parts.W_V).to(dtype)
        W_O = parts.W_O.to(dtype)
        pattern = recording.patterns[layer].to(dtype)
        values_in = torch.ones(pattern.shape[-1], 1, dtype=dtype, device=pattern.device)

        # what attention writes: after a post-norm its scale goes into W_O and its denominator into the pattern
        written = parts.b_O.to(dtype) if parts.b_O is not None else None
        if parts.post_attn_norm is not None:
            norm = parts.post_attn_norm
            denominator = recording.denominators[layer, "post_attn_norm"].to(dtype)
            W_O = fold_reading(torch.eye(D, dtype=dtype, device=W_O.device), norm, dtype) @ W_O
            pattern = pattern / denominator[None]
            shift = norm.centred(written) * norm.weight.to(dtype) / denominator if written is not None else None
            own = norm.bias.to(dtype) if norm.bias is not None else None
            written = shift if own is None else own if shift is None else shift + own
        self.written_bias = None if written is None else written.expand(pattern.shape[-1], D)
        """[T, D] bias that attention writes at each position."""

        # what attention reads: likewise
        bias = per_head(parts.b_V).to(dtype) if parts.b_V is not None else None
        if parts.attn_norm is not None:
            norm = parts.attn_norm
            values_in = recording.denominators[layer, "attn_norm"].to(dtype)
            if norm.bias is not None:
                read = W_V @ norm.bias.to(dtype)
                bias = read if bias is None else bias + read
            W_V = fold_reading(W_V, norm, dtype)
        self.value_bias = None if bias is None else bias * values_in
        """[T, H * hd] bias of the values, in the scale of V."""

        self.W_O = W_O.T.contiguous()  # [H * hd, D]
        self.W_V = W_V.T.contiguous()  # [D, H * hd]
        self.shared_W_V = self.W_V if groups == 1 else self.of_key_heads(self.W_V).flatten(-2)  # [D, KV * hd]
        self.pattern = pattern / values_in.squeeze(-1)  # [H, T (to), T (from)]

    def mix(self, G: Tensor, by_head: bool = False) -> Tensor:
        """Cotangents G [T, D, n] of what attention writes -> V [T, KV * hd, n] of its values; `by_head`: of each head's
        by itself, [T, H * hd, n], also where heads share them."""
        T, _, n = G.shape
        share = 1 if by_head else self.n_heads // self.n_kv_heads
        V = G.new_empty(T, self.n_heads // share, self.head_dim * n)
        for first in range(0, self.n_heads, self.heads_together):
            heads = range(first, min(first + self.heads_together, self.n_heads))
            W_O = self.W_O[heads.start * self.head_dim : heads.stop * self.head_dim]
            U = torch.bmm(W_O.expand(T, -1, -1), G).view(T, len(heads), -1)
            for h in heads:
                self._attend(self.pattern[h, :T, :T], U[:, h - first], V[:, h // share], add=h % share > 0)
        return V.view(T, -1, n)

    def _attend(self, pattern: Tensor, U: Tensor, V: Tensor, add: bool) -> None:
        """V [T, m] = pattern^T U, or that added, a block of positions at a time: nothing comes back from earlier
        positions."""
        for start in range(0, len(pattern), BLOCK):
            stop = start + BLOCK
            of_later = pattern[start:, start:stop].T
            if add:
                V[start:stop].addmm_(of_later, U[start:])
            else:
                torch.mm(of_later, U[start:], out=V[start:stop])

    def pull(self, G: Tensor, V: Tensor) -> None:
        """Add to cotangents G [T, D, n] what comes back through the values."""
        W_V = self.W_V if V.shape[1] == self.W_V.shape[1] else self.shared_W_V
        if G.is_contiguous():
            G.baddbmm_(W_V.expand(len(G), -1, -1), V)
        else:
            G += torch.bmm(W_V.expand(len(G), -1, -1), V)

    def of_key_heads(self, x: Tensor) -> Tensor:
        """What the heads that share values hold alike, [..., H * hd] -> [..., KV, hd]."""
        return x.unflatten(-1, (self.n_kv_heads, -1, self.head_dim))[..., 0, :]

    def values(self, F: Tensor) -> Tensor:
        """Forwards: what changes F [n, T', D] of the layer's input make of values, [n, T', KV, hd]."""
        return (F @ self.shared_W_V).unflatten(-1, (self.n_kv_heads, self.head_dim))

    def carry(self, values: Tensor, first: int) -> Tensor:
        """Forwards: what attention makes of changed values [n, T', KV, hd], positions from `first` on: [n, T', D]."""
        groups = self.n_heads // self.n_kv_heads
        pattern = self.pattern[:, first:, first:].unflatten(0, (self.n_kv_heads, groups))
        mixed = torch.einsum("ghpk,nkgd->npghd", pattern, values)
        return mixed.flatten(2) @ self.W_O

    def first(self, W: Tensor, position: int) -> tuple[Tensor, Tensor]:
        """`mix` and `pull` of cotangents that stand at one position alone, W [D, n].

        Every position then gets a weighted sum of the same H vectors, one a head, which costs a fraction of the
        general step. Gives them [H, D, n], and the heads' own cotangents U [H, hd, n].
        """
        U = (self.W_O @ W).view(self.n_heads, self.head_dim, -1)
        W_V = self.W_V.view(-1, self.n_heads, self.head_dim).transpose(0, 1)  # [H, D, hd]
        return torch.bmm(W_V, U), U

    def spread(self, by_head: Tensor, position: int) -> Tensor:
        """What `first` found, [H, D, n], at positions 0 .. position: [position + 1, D, n]."""
        weights = self.pattern[:, position, : position + 1].T
        return (weights @ by_head.flatten(1)).view(position + 1, *by_head.shape[1:])

    def first_values(self, U: Tensor, position: int) -> Tensor:
        """The V that belongs to U [H, hd, n]: [position + 1, H * hd, n]."""
        weights = self.pattern[:, position, : position + 1].T
        return (weights[:, :, None, None] * U).flatten(1, 2)

    def first_readout(self, vectors: Tensor, U: Tensor, position: int) -> Tensor:
        """V . vectors [k, T, H * hd] for the V that belongs to U [H, hd, n]: [position + 1, k, n]."""
        k, T = len(vectors), position + 1
        heads = vectors[:, :T].reshape(k * T, self.n_heads, self.head_dim).transpose(0, 1)  # [H, kT, hd]
        dots = torch.bmm(heads, U).view(self.n_heads, k, T, -1)
        weighted = dots * self.pattern[:, position, :T][:, None, :, None]
        return weighted.sum(0).transpose(0, 1)


def readout(vectors: Tensor, G: Tensor) -> Tensor:
    """Products of vectors [k, T', D] with cotangents G [T, D, n] at each position: [T, k, n]."""
    return torch.bmm(vectors[:, : len(G)].transpose(0, 1), G)
