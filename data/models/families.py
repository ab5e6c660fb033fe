"""Where each family of language models keeps its parts: one entry of a table per family, nothing guessed.

To add a family: give it an entry in `FAMILIES` under its `config.model_type`, and a tiny model in
`tests/tiny_models.py`; the tests then hold it to everything that the others keep.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from operator import attrgetter
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import UserError

NormKind = Literal["rms", "layer"]


@dataclass
class Norm:
    """A norm as a linear map that is divided by a number per position."""

    kind: NormKind
    """`rms`, or `layer` which takes the mean off first."""
    weight: Tensor
    """Scale per channel [D], as multiplied (Gemma's 1 + w is folded in)."""
    bias: Tensor | None
    """Shift per channel [D]."""
    eps: float
    """Added to the mean square before its root."""
    module: nn.Module
    """The module itself, where hooks go."""

    def centred(self, x: Tensor) -> Tensor:
        """x less its mean over channels for a layer norm, x itself otherwise."""
        return x - x.mean(-1, keepdim=True) if self.kind == "layer" else x

    def denominator(self, x: Tensor) -> Tensor:
        """The number [..., 1] that the norm divides x [..., D] by; at least float32."""
        x = self.centred(x.to(torch.promote_types(x.dtype, torch.float32)))
        return (x.square().mean(-1, keepdim=True) + self.eps).sqrt()

    def frozen(self, x: Tensor, denominator: Tensor) -> Tensor:
        """The norm of x [..., D] with its denominator [..., 1] given: affine in x."""
        y = self.centred(x.to(denominator.dtype)) / denominator * self.weight
        return (y if self.bias is None else y + self.bias).to(x.dtype)


class Affine(NamedTuple):
    """A weight [out, in] with its bias."""

    weight: Tensor
    bias: Tensor | None


class MlpWeights(NamedTuple):
    """An MLP with one list of neurons: down(act(gate x) * up x), or down(act(up x)) where it has no gate."""

    gate: Affine | None
    up: Affine
    down: Affine
    act: Callable[[Tensor], Tensor]

    def neurons(self, *seen: Tensor) -> Tensor:
        """What `down` reads, from what gate, where there is one, and up give."""
        return self.act(seen[0]) if self.gate is None else self.act(seen[0]) * seen[1]


@dataclass
class LayerParts:
    """All that a linear map through one layer with frozen attention and norms needs."""

    attn_norm: Norm | None
    """Before attention; None where attention reads the residual stream itself (OLMo 2)."""
    post_attn_norm: Norm | None
    """On what attention adds (Gemma 2 and 3, OLMo 2)."""
    mlp_norm: Norm | None
    """Before the MLP: its input is the site `resid`."""
    post_mlp_norm: Norm | None
    """On what the MLP adds: its output is the site `mlp_out`."""
    parallel: bool
    """The MLP reads the layer's input, not the residual stream after attention."""
    n_heads: int
    n_kv_heads: int
    head_dim: int
    W_V: Tensor
    """[n_kv_heads * head_dim, D], unfused."""
    b_V: Tensor | None
    W_O: Tensor
    """[D, n_heads * head_dim]."""
    b_O: Tensor | None
    query_norm: Norm | None
    """On queries before they are rotated, head by head or over all heads at once (OLMo 2)."""
    key_norm: Norm | None
    attn: nn.Module
    mlp: nn.Module
    """The block that a transcoder stands in for."""
    mlp_down: nn.Module | None
    """The last linear map of the MLP, whose input is its neurons; None for a mixture of experts."""
    mlp_weights: MlpWeights | None
    """The MLP's linear maps, unfused; None for a mixture of experts."""
    layer: nn.Module
    """The whole layer: its input is the residual stream."""

    @property
    def norms(self) -> dict[str, Norm]:
        """The norms that this layer has, by field name. Where two places share one module it appears once."""
        places = ("attn_norm", "post_attn_norm", "mlp_norm", "post_mlp_norm")
        found = {place: norm for place in places if (norm := getattr(self, place)) is not None}
        return {place: norm for place, norm in found.items() if place != "mlp_norm" or norm is not self.attn_norm}

    def attention_output(self, pattern: Tensor, attn_in: Tensor) -> Tensor:
        """What attention writes before any post-norm: pattern [B, H, T, S] over attn_in [B, S, D] -> [B, T, D]."""
        v = nn.functional.linear(attn_in, self.W_V, self.b_V)
        v = v.unflatten(-1, (self.n_kv_heads, self.head_dim)).transpose(-3, -2)
        mixed = pattern.to(v.dtype) @ v.repeat_interleave(self.n_heads // self.n_kv_heads, dim=-3)
        return nn.functional.linear(mixed.transpose(-3, -2).flatten(-2), self.W_O, self.b_O)


def _separate_value(attn: nn.Module, n_heads: int) -> Affine:
    return Affine(attn.v_proj.weight, attn.v_proj.bias)  # type: ignore[union-attr]


def _gpt2_value(attn: nn.Module, n_heads: int) -> Affine:
    """Conv1D [D, 3D] holds q, k, v side by side and transposed."""
    fused: Any = attn.c_attn
    d = fused.weight.shape[0]
    return Affine(fused.weight[:, 2 * d :].T, fused.bias[2 * d :])


def _neox_value(attn: nn.Module, n_heads: int) -> Affine:
    """[H * 3 * head_dim, D]: each head holds its own q, k, v."""
    fused: Any = attn.query_key_value
    weight = fused.weight.unflatten(0, (n_heads, 3, -1))[:, 2].flatten(0, 1)
    return Affine(weight, None if fused.bias is None else fused.bias.unflatten(0, (n_heads, 3, -1))[:, 2].flatten())


def _phi3_value(attn: nn.Module, n_heads: int) -> Affine:
    """[(H + 2 KV) * head_dim, D]: all q, then all k, then all v."""
    fused: Any = attn.qkv_proj
    query = attn.o_proj.weight.shape[1]  # type: ignore[union-attr]
    return Affine(fused.weight[query + (fused.weight.shape[0] - query) // 2 :], None)


def _linear_out(module: nn.Module) -> Affine:
    return Affine(module.weight, module.bias)  # type: ignore[arg-type]


def _conv1d_out(module: nn.Module) -> Affine:
    return Affine(module.weight.T, module.bias)  # type: ignore[arg-type, union-attr]


def _gated(mlp: nn.Module) -> tuple[Affine, Affine]:
    return _linear_out(mlp.gate_proj), _linear_out(mlp.up_proj)  # type: ignore[arg-type]


def _phi3_gated(mlp: nn.Module) -> tuple[Affine, Affine]:
    """[2 * neurons, D]: the gate's rows, then those of up."""
    gate, up = mlp.gate_up_proj.weight.chunk(2)  # type: ignore[union-attr, operator]
    return Affine(gate, None), Affine(up, None)


def _gpt2_up(mlp: nn.Module) -> tuple[None, Affine]:
    return None, _conv1d_out(mlp.c_fc)  # type: ignore[arg-type]


def _neox_up(mlp: nn.Module) -> tuple[None, Affine]:
    return None, _linear_out(mlp.dense_h_to_4h)  # type: ignore[arg-type]


def _phi_up(mlp: nn.Module) -> tuple[None, Affine]:
    return None, _linear_out(mlp.fc1)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Family:
    """Names of the parts inside a `...ForCausalLM` module; the defaults are Llama's."""

    decoder: str = "model"
    layers: str = "layers"
    final_norm: str = "norm"
    position: str | None = None
    """A learned position embedding, inside the decoder."""
    attn: str = "self_attn"
    mlp: str = "mlp"
    mlp_down: str | None = "down_proj"
    mlp_in: Callable[[nn.Module], tuple[Affine | None, Affine]] = _gated
    """The maps that the MLP's input goes through: gate, where there is one, and up."""
    mlp_act: str = "act_fn"
    attn_norm: str | None = "input_layernorm"
    post_attn_norm: str | None = None
    mlp_norm: str | None = "post_attention_layernorm"
    post_mlp_norm: str | None = None
    norm: NormKind = "rms"
    norm_eps: str = "variance_epsilon"
    norm_offset: float = 0.0
    """Added to a norm's stored weight."""
    value: Callable[[nn.Module, int], Affine] = _separate_value
    query_key_norms: Callable[[Any], tuple[str, str] | None] = lambda config: None
    """Names of the norms on queries and keys, inside attention, from the configuration."""
    out_name: str = "o_proj"
    out: Callable[[nn.Module], Affine] = _linear_out
    parallel: Callable[[Any], bool] = lambda config: False
    """Whether the MLP reads the layer's input, from the configuration."""


def _normed(config: Any) -> tuple[str, str]:
    return "q_norm", "k_norm"


_LLAMA = Family()
_EXPERTS = Family(mlp_down=None)
_GEMMA = Family(norm_eps="eps", norm_offset=1.0)
_SANDWICH = replace(
    _GEMMA,
    post_attn_norm="post_attention_layernorm",
    mlp_norm="pre_feedforward_layernorm",
    post_mlp_norm="post_feedforward_layernorm",
)
_OLMO = Family(
    attn_norm=None,
    post_attn_norm="post_attention_layernorm",
    mlp_norm=None,
    post_mlp_norm="post_feedforward_layernorm",
    query_key_norms=_normed,
)

FAMILIES: dict[str, Family] = {
    "gpt2": Family(
        decoder="transformer",
        layers="h",
        final_norm="ln_f",
        position="wpe",
        attn="attn",
        mlp_down="c_proj",
        mlp_in=_gpt2_up,
        mlp_act="act",
        attn_norm="ln_1",
        mlp_norm="ln_2",
        norm="layer",
        norm_eps="eps",
        value=_gpt2_value,
        out_name="c_proj",
        out=_conv1d_out,
    ),
    "gpt_neox": Family(
        decoder="gpt_neox",
        final_norm="final_layer_norm",
        attn="attention",
        mlp_down="dense_4h_to_h",
        mlp_in=_neox_up,
        mlp_act="act",
        norm="layer",
        norm_eps="eps",
        value=_neox_value,
        out_name="dense",
        parallel=lambda config: config.use_parallel_residual,
    ),
    "phi": Family(
        final_norm="final_layernorm",
        mlp_down="fc2",
        mlp_in=_phi_up,
        mlp_act="activation_fn",
        mlp_norm="input_layernorm",  # one norm feeds both attention and the MLP
        norm="layer",
        norm_eps="eps",
        query_key_norms=lambda config: ("q_layernorm", "k_layernorm") if config.qk_layernorm else None,
        out_name="dense",
        parallel=lambda config: True,
    ),
    "phi3": Family(value=_phi3_value, mlp_in=_phi3_gated, mlp_act="activation_fn"),
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "mixtral": _EXPERTS,
    "qwen2": _LLAMA,
    "qwen3": replace(_LLAMA, query_key_norms=_normed),
    "qwen3_moe": replace(_EXPERTS, query_key_norms=_normed),
    "smollm3": _LLAMA,
    "gpt_oss": _EXPERTS,
    "gemma": _GEMMA,
    "gemma2": _SANDWICH,
    "gemma3_text": replace(_SANDWICH, query_key_norms=_normed),
    "gemma3": replace(
        _SANDWICH, query_key_norms=_normed, decoder="model.language_model"
    ),  # with a vision tower, which is left alone
    "olmo2": _OLMO,
    "olmo3": _OLMO,
}
KNOWN_FAMILIES = tuple(FAMILIES)


def find_family(model_type: str) -> Family:
    """The entry for a `config.model_type`, or a refusal that lists the known ones."""
    if model_type not in FAMILIES:
        raise UserError(
            f"models of type {model_type!r} are not supported; known are {', '.join(sorted(FAMILIES))}"
            " (add an entry to FAMILIES in crosslace/data/models/families.py)"
        )
    return FAMILIES[model_type]


def _find_norm(family: Family, parent: nn.Module, name: str | None) -> Norm | None:
    if name is None:
        return None
    module: Any = attrgetter(name)(parent)
    weight = module.weight.detach()
    if family.norm_offset:  # the models add it in float32 too
        weight = weight.to(torch.promote_types(weight.dtype, torch.float32)) + family.norm_offset
    bias = module.bias.detach() if family.norm == "layer" and module.bias is not None else None
    return Norm(family.norm, weight, bias, getattr(module, family.norm_eps), module)


def find_layers(family: Family, model: nn.Module, config: Any) -> list[LayerParts]:
    """The parts of every layer, in order."""
    return [_layer_parts(family, layer, config) for layer in attrgetter(f"{family.decoder}.{family.layers}")(model)]


def _layer_parts(family: Family, layer: nn.Module, config: Any) -> LayerParts:
    attn: Any = attrgetter(family.attn)(layer)
    n_heads = config.num_attention_heads
    W_V, b_V = family.value(attn, n_heads)
    W_O, b_O = family.out(attrgetter(family.out_name)(attn))
    head_dim = W_O.shape[1] // n_heads
    attn_norm = _find_norm(family, layer, family.attn_norm)
    shared = family.mlp_norm == family.attn_norm
    query_norm, key_norm = family.query_key_norms(config) or (None, None)
    return LayerParts(
        attn_norm=attn_norm,
        post_attn_norm=_find_norm(family, layer, family.post_attn_norm),
        mlp_norm=attn_norm if shared else _find_norm(family, layer, family.mlp_norm),
        post_mlp_norm=_find_norm(family, layer, family.post_mlp_norm),
        parallel=family.parallel(config),
        n_heads=n_heads,
        n_kv_heads=W_V.shape[0] // head_dim,
        head_dim=head_dim,
        W_V=W_V.detach(),
        b_V=None if b_V is None else b_V.detach(),
        W_O=W_O.detach(),
        b_O=None if b_O is None else b_O.detach(),
        query_norm=_find_norm(family, attn, query_norm),
        key_norm=_find_norm(family, attn, key_norm),
        attn=attn,
        mlp=(mlp := attrgetter(family.mlp)(layer)),
        mlp_down=None if family.mlp_down is None else attrgetter(family.mlp_down)(mlp),
        mlp_weights=_mlp_weights(family, mlp),
        layer=layer,
    )


def _mlp_weights(family: Family, mlp: nn.Module) -> MlpWeights | None:
    if family.mlp_down is None:
        return None
    gate, up = family.mlp_in(mlp)
    down = family.out(attrgetter(family.mlp_down)(mlp))
    return MlpWeights(_detached(gate) if gate else None, _detached(up), _detached(down), getattr(mlp, family.mlp_act))


def _detached(affine: Affine) -> Affine:
    return Affine(affine.weight.detach(), None if affine.bias is None else affine.bias.detach())


def find_final_norm(family: Family, model: nn.Module) -> Norm:
    """The norm before the unembedding."""
    norm = _find_norm(family, model, f"{family.decoder}.{family.final_norm}")
    assert norm is not None
    return norm


def find_position_embedding(family: Family, model: nn.Module) -> nn.Embedding | None:
    """The learned position embedding, where the family has one."""
    return None if family.position is None else attrgetter(f"{family.decoder}.{family.position}")(model)
