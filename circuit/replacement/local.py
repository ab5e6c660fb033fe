"""One prompt in a model whose MLPs have a transcoder: whole and local replacement, the mathematics of a clean run.

    tokens [B, T] --lm--> read, mlp_out [B, T, D] a layer, patterns [B, H, T, T], denominators [B, T, 1]     (clean)
    read [B, T, D] --encode--> features [B, T, F] a layer                                                    (features)
    mlp_out - (decoded features + bias + skip) = errors [B, T, D]                                            (errors)

`replaced_logits` overwrites the MLP outputs with what the transcoder says, attention live. `local_logits` runs the
local replacement model of a clean run: patterns and denominators frozen, errors added. Positions that
`masked_positions` names keep the model's own output in both, and hold no features.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Self

import torch
from torch import Tensor
from transformers import DynamicCache

from ...data.errors import UserError
from ...data.models import Captured, LanguageModel, ModelSettings, SinkRule, begin_with, load_model
from ...train.transcoder import Transcoder
from ..precision import refuse_overflow
from .hooks import Hooks, check_hooks
from .memory import memory_named
from .requests import Prompt
from .substitute import TranscoderOutput, add_written, own_part, skip_part, written_by


@dataclass
class CleanRun:
    """One forward pass as the model makes it, with all that is frozen in a local replacement model. B is 1."""

    tokens: Tensor
    """[B, T]"""
    logits: Tensor
    """[B, T, V]"""
    masked: Tensor
    """[B, T], True where the model keeps its own MLP output."""
    read: dict[int, Tensor]
    """Model layer -> what the transcoder reads there, [B, T, D]."""
    mlp_out: dict[int, Tensor]
    """Model layer -> [B, T, D]."""
    patterns: dict[int, Tensor]
    """Model layer -> attention pattern [B, H, T, S]."""
    denominators: dict[tuple[int, str], Tensor]
    """Norm -> its denominator [B, T, 1], keyed like `LanguageModel.norms`."""


class NearThreshold(NamedTuple):
    """A silent feature, and by how much."""

    layer: int
    feature: int
    preactivation: float
    lacks: float
    """What its pre-activation lacks to reach the threshold."""


class LocalModel:
    """A language model and a transcoder that reads and writes its raw activations."""

    def __init__(self, lm: LanguageModel, transcoder: Transcoder, force: bool = False):
        """`force` accepts a transcoder that was trained on other weights of the same shape."""
        self.lm = lm.widened()  # one feature's effect is smaller than what bfloat16 rounds away
        self.transcoder = transcoder.without_gradients(lm.device)
        trained_on = dict(transcoder.meta.get("model") or {})
        if transcoder.d_model != lm.d_model or max(transcoder.layers) >= lm.n_layers:
            raise UserError(
                f"the transcoder is for a model of width {transcoder.d_model} with {max(transcoder.layers) + 1} layers"
                f" or more; {lm.name or 'this model'} has width {lm.d_model} and {lm.n_layers} layers"
            )
        expected = trained_on.get("fingerprint")
        if expected is not None and expected != lm.fingerprint and not force:
            raise UserError(
                f"the transcoder was trained on {trained_on.get('name', 'a model')} with weight fingerprint {expected},"
                f" but {lm.name or 'this model'} has {lm.fingerprint}; force=true uses it all the same"
            )
        if "hooks" in transcoder.meta:  # made by another program
            check_hooks(lm, Hooks(*transcoder.meta["hooks"]), transcoder.layers)
        masked = transcoder.meta.get("masked")
        self.sinks = SinkRule.from_attributes(masked) if masked else SinkRule(lm.bos)

    @classmethod
    def load(
        cls,
        folder: str | Path,
        model: LanguageModel | ModelSettings | str | None = None,
        force: bool = False,
        device: str = "auto",
        lazy_decoders: bool = False,
    ) -> Self:
        """From a run's folder or a transcoder's; the model is the one it was trained on unless another is given.
        `lazy_decoders`: see `Transcoder.load`; for graphs and interventions of transcoders larger than memory."""
        folder = Path(folder)
        folder = folder / "transcoder" if (folder / "transcoder").is_dir() else folder
        if not folder.is_dir():
            raise UserError(f"{folder} is not there; give the folder of a run or of a transcoder")
        transcoder = Transcoder.load(folder, lazy_decoders=lazy_decoders)
        if model is None:
            model = _trained_on(transcoder, folder, device)
        if not isinstance(model, LanguageModel):
            model = load_model(model if isinstance(model, ModelSettings) else ModelSettings(model, device=device))
            model = model.widened(own=True)
            bos = dict(transcoder.meta.get("masked") or {}).get("bos")
            if bos is not None and model.bos is None and model.tokenizer is not None:
                begin_with(model.tokenizer, bos)  # as the texts did on which it was trained
        if model.dtype == torch.float64:
            transcoder = transcoder.to(torch.float64)
        return cls(model, transcoder, force)

    # -- which positions are replaced ------------------------------------------------------------------------------

    @torch.no_grad()
    def masked_positions(self, tokens: Tensor, start: int = 0, sites: Captured | None = None) -> Tensor:
        """Where the model keeps its own MLP output, by the store's rule: the first position (tokens [..., T] begin at
        `start`), BOS, and attention sinks. Those are told by the clean activations, which a forward pass finds unless
        they are given."""
        if tokens.dim() == 1:
            return self.masked_positions(tokens[None], start)[0]
        rule = self.sinks
        if start:  # no token of this step is the first: one before them is
            masked = rule.by_token(torch.nn.functional.pad(tokens, (1, 0), value=-1))[1][..., 1:]
        else:
            first, begins = rule.by_token(tokens)
            masked = first | begins
        if not rule.limits:
            return masked
        if sites is None:
            with self.lm.capture(rule.limits, rule.layers) as sites:
                self.lm.run(tokens)
        large = rule.large(rule.norms({site: getattr(sites, site) for site in rule.limits}))
        return masked if large is None else masked | large

    # -- whole and local replacement -------------------------------------------------------------------------------

    @torch.no_grad()
    def replaced_logits(
        self,
        tokens: Tensor,
        layers: Collection[int] | None = None,
        masked: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """Logits [B, T, V] with the MLP outputs of `layers` (all covered ones) overwritten, no error added."""
        masked = self.masked_positions(tokens) if masked is None else masked
        with self.lm.overwrite(TranscoderOutput(self.transcoder, masked, layers)):
            return self.lm(tokens, attention_mask)

    @torch.no_grad()
    def clean(
        self,
        tokens: Tensor,
        cache: DynamicCache | None = None,
        start: int = 0,
        attention: Collection[int] | None = None,
    ) -> CleanRun:
        """Run tokens [B, T] as they are; with a cache, as those that follow `start` earlier ones. Patterns are kept of
        the layers in `attention`, all by default."""
        read = self.transcoder.settings.read
        with (
            self.lm.freeze_attention(layers=attention) as patterns,
            self.lm.freeze_norms() as denominators,
            self.lm.capture({"resid", read, "mlp_out"}) as sites,
        ):
            logits = self.lm(tokens, cache=cache)
        if not bool(logits.isfinite().all()):
            refuse_overflow({**sites.mlp_out, self.lm.n_layers: logits}, "model")
        masked = self.masked_positions(tokens, start, sites)
        return CleanRun(tokens, logits, masked, getattr(sites, read), sites.mlp_out, patterns, denominators)

    @torch.no_grad()
    def features(self, run: CleanRun) -> list[Tensor]:
        """Activations per covered layer, [B, T, F]; none at positions that keep the model's own output."""
        return [
            self.transcoder.encode_layer(run.read[layer].to(self.transcoder.dtype), l) * ~run.masked[..., None]
            for l, layer in enumerate(self.transcoder.layers)
        ]

    @torch.no_grad()
    def reasons(self, tokens: Tensor, masked: Tensor) -> dict[int, str]:
        """Why the model keeps its own output at each masked position of tokens [T]: `first`, `BOS` or `sink`."""
        first, begins = self.sinks.by_token(tokens)
        return {
            position: "first" if first[position] else "BOS" if begins[position] else "sink"
            for position in masked.nonzero().squeeze(1).tolist()
        }

    @torch.no_grad()
    def activations(self, prompt: Prompt) -> list[Tensor]:
        """Activations per covered layer of one prompt, [T, F]."""
        with memory_named("the prompt"):
            return [acts[0] for acts in self.features(self.clean(self.lm.tokenize(prompt)[None]))]

    @torch.no_grad()
    def near_threshold(self, prompt: Prompt, position: int = -1, count: int = 10) -> list[NearThreshold]:
        """Silent features at a position that lack the least to fire: what a small change of the prompt may wake."""
        run = self.clean(self.lm.tokenize(prompt)[None])
        found: list[NearThreshold] = []
        for l, layer in enumerate(self.transcoder.layers):
            x = run.read[layer][0, position]
            h, acts = self.transcoder.preactivation(x, l), self.transcoder.encode_layer(x, l)
            need = (
                self.transcoder.theta(l).to(h) if self.transcoder.settings.activation != "topk" else h[acts > 0].min()
            )
            lacks = (need - h).masked_fill(acts > 0, torch.inf)
            best = lacks.topk(min(count, len(lacks)), largest=False).indices.tolist()
            found += [NearThreshold(layer, f, float(h[f]), float(lacks[f])) for f in best if lacks[f].isfinite()]
        return sorted(found, key=lambda one: one.lacks)[:count]

    @torch.no_grad()
    def errors(self, run: CleanRun) -> list[Tensor]:
        """Per covered layer [B, T, D]: what the MLP wrote less what the transcoder says; all of it where masked."""
        written: dict[int, Tensor] = {}
        found = []
        for l, (layer, acts) in enumerate(zip(self.transcoder.layers, self.features(run))):
            add_written(written, l, written_by(self.transcoder, l, acts), range(self.transcoder.n_layers))
            y = written.pop(l) + own_part(self.transcoder, run.read[layer].to(acts.dtype), l)
            found.append(run.mlp_out[layer].to(y.dtype) - y * ~run.masked[..., None])
        return found

    def held(self, run: CleanRun, layer: int, sites: Mapping[str, Tensor]) -> Tensor:
        """A layer's MLP output in the local replacement model, before any feature is changed: that of the clean run,
        but that a skip connection follows what it reads, as it does in a graph."""
        out = run.mlp_out[layer].expand_as(sites["mlp_out"])
        if layer not in self.transcoder.layers or not len(self.transcoder.W_skip):
            return out
        moved = sites[self.transcoder.settings.read] - run.read[layer]
        skipped = skip_part(self.transcoder, moved, self.transcoder.layers.index(layer))
        return out + skipped * ~run.masked[..., None]

    @torch.no_grad()
    def local_logits(self, run: CleanRun, acts: Sequence[Tensor] | None = None) -> Tensor:
        """Logits [B, T, V] of the local replacement model of a run: patterns, denominators and errors frozen, features
        at `acts` (their clean activations by default, which give the model's own logits)."""
        changed: dict[int, Tensor] = {}
        for l, (set_to, clean) in enumerate(zip(acts or [], self.features(run) if acts else [])):
            add_written(changed, l, written_by(self.transcoder, l, set_to - clean), range(self.transcoder.n_layers))
        number = {layer: l for l, layer in enumerate(self.transcoder.layers)}

        def overwrite(layer: int, sites: Mapping[str, Tensor]) -> Tensor:
            out = self.held(run, layer, sites)
            change = changed.get(number.get(layer, -1))
            return out if change is None else out + change.to(out.dtype)

        with (
            self.lm.freeze_attention(run.patterns),
            self.lm.freeze_norms(run.denominators),
            self.lm.overwrite(overwrite),
        ):
            return self.lm(run.tokens)


def _trained_on(transcoder: Transcoder, folder: Path, device: str) -> ModelSettings:
    """The model that a transcoder's description names."""
    model = dict(transcoder.meta.get("model") or {})
    if not model.get("name"):
        raise UserError(f"{folder} does not say which model it was trained on; give one with model=")
    return ModelSettings(model["name"], model.get("revision"), model.get("dtype", "auto"), device)
