"""The replacement model: a language model with its MLP outputs overwritten by a transcoder's (SPEC 3).

`replaced_logits` overwrites them all, attention live. `clean` runs one prompt as it is and keeps what a local
replacement model is made of: attention patterns, norm denominators, features and errors; `local_logits` runs that.
Positions that `keep_mask` names keep the model's own output in both, and hold no features.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import DynamicCache

from ...data.errors import UserError
from ...data.models import LanguageModel, ModelSettings, SinkRule, load_model, masked_by_token
from ...train.transcoder.transcoder import Transcoder
from .carry_out import generate_many, intervene_many
from .memory import memory_named
from .requests import Generation, Intervention, InterventionResult, Mode, Prompt
from .substitute import TranscoderOutput, add_written, own_part

if TYPE_CHECKING:
    from ..attribution.trace import TraceSettings
    from ..graph.graph import Graph


@dataclass
class CleanRun:
    """One forward pass as the model makes it, with all that is frozen in a local replacement model. B is 1."""

    tokens: Tensor
    """[B, T]"""
    logits: Tensor
    """[B, T, V]"""
    keep: Tensor
    """[B, T], True where the model keeps its own MLP output."""
    read: dict[int, Tensor]
    """Model layer -> what the transcoder reads there, [B, T, D]."""
    mlp_out: dict[int, Tensor]
    """Model layer -> [B, T, D]."""
    patterns: dict[int, Tensor]
    """Model layer -> attention pattern [B, H, T, S]."""
    denominators: dict[tuple[int, str], Tensor]
    """Norm -> its denominator [B, T, 1], keyed like `LanguageModel.norms`."""


class ReplacementModel:
    """A language model and a transcoder that reads and writes its raw activations."""

    def __init__(self, lm: LanguageModel, transcoder: Transcoder, force: bool = False):
        """`force` accepts a transcoder that was trained on other weights of the same shape."""
        self.lm = lm
        self.transcoder = transcoder.to(lm.device).requires_grad_(False)
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
        masked = transcoder.meta.get("masked") or {}
        self.sinks = SinkRule.from_attributes(transcoder.meta) if masked.get("median_norm") else None

    @classmethod
    def load(
        cls,
        folder: str | Path,
        model: LanguageModel | ModelSettings | str | None = None,
        force: bool = False,
        device: str = "auto",
        lazy_decoders: bool = False,
    ) -> "ReplacementModel":
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
        dtype = torch.float64 if model.dtype == torch.float64 else transcoder.dtype
        return cls(model, transcoder.to(dtype), force)

    # -- which positions are replaced ------------------------------------------------------------------------------

    @torch.no_grad()
    def keep_mask(self, tokens: Tensor, start: int = 0, resid: dict[int, Tensor] | None = None) -> Tensor:
        """Where the model keeps its own MLP output, as in training: the first position (tokens [..., T] begin at
        `start`), BOS, and attention sinks by the store's rule. That one looks at the clean residual stream, which a
        forward pass finds unless it is given."""
        if tokens.dim() == 1:
            return self.keep_mask(tokens[None], start)[0]
        first, begins = masked_by_token(tokens, self.lm.bos)
        keep = begins if start else first | begins
        if self.sinks is None:
            return keep
        if resid is None:
            with self.lm.capture(("resid",), self.sinks.median_norm) as sites:
                self.lm(tokens)
            resid = sites.resid
        # the rule takes norms in float32 at most
        resid = {layer: x.float() if x.dtype == torch.float64 else x for layer, x in resid.items()}
        return keep | (tokens == (-1 if self.sinks.bos is None else self.sinks.bos)) | self.sinks.large(resid)

    # -- whole and local replacement -------------------------------------------------------------------------------

    @torch.no_grad()
    def replaced_logits(
        self,
        tokens: Tensor,
        layers: Collection[int] | None = None,
        keep: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """Logits [B, T, V] with the MLP outputs of `layers` (all covered ones) overwritten, no error added."""
        keep = self.keep_mask(tokens) if keep is None else keep
        with self.lm.overwrite(TranscoderOutput(self.transcoder, keep, layers)):
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
        keep = self.keep_mask(tokens, start, sites.resid)
        return CleanRun(tokens, logits, keep, getattr(sites, read), sites.mlp_out, patterns, denominators)

    @torch.no_grad()
    def features(self, run: CleanRun) -> list[Tensor]:
        """Activations per covered layer, [B, T, F]; none at positions that keep the model's own output."""
        return [
            self.transcoder.encode_layer(run.read[layer].to(self.transcoder.dtype), l) * ~run.keep[..., None]
            for l, layer in enumerate(self.transcoder.layers)
        ]

    @torch.no_grad()
    def activations(self, prompt: Prompt) -> list[Tensor]:
        """Activations per covered layer of one prompt, [T, F]."""
        with memory_named("the prompt"):
            return [acts[0] for acts in self.features(self.clean(self.lm.tokenize(prompt)[None]))]

    @torch.no_grad()
    def errors(self, run: CleanRun, acts: Sequence[Tensor] | None = None) -> list[Tensor]:
        """Per covered layer [B, T, D]: what the MLP wrote less what the transcoder says; all of it where kept."""
        return [
            run.mlp_out[layer].to(y.dtype) - y * ~run.keep[..., None]
            for layer, y in zip(self.transcoder.layers, self.decoded(run, acts))
        ]

    def decoded(self, run: CleanRun, acts: Sequence[Tensor] | None = None) -> list[Tensor]:
        """The transcoder's output per covered layer [B, T, D], from the run's features or others."""
        written: dict[int, Tensor] = {}
        outputs = []
        for l, acts_BTF in enumerate(self.features(run) if acts is None else acts):
            add_written(
                written, l, self.transcoder.decode_from(l, acts_BTF.flatten(0, 1)).unflatten(0, acts_BTF.shape[:2])
            )
            x = run.read[self.transcoder.layers[l]].to(self.transcoder.dtype)
            outputs.append(written.pop(l) + own_part(self.transcoder, x, l))
        return outputs

    @torch.no_grad()
    def local_logits(self, run: CleanRun, acts: Sequence[Tensor] | None = None) -> Tensor:
        """Logits [B, T, V] of the local replacement model of a run: patterns, denominators, skip inputs and errors
        frozen, features at `acts` (their clean activations by default, which give the model's own logits)."""
        errors, decoded = self.errors(run), self.decoded(run, acts)
        outputs = {
            layer: (errors[l] + decoded[l] * ~run.keep[..., None]).to(self.lm.dtype)
            for l, layer in enumerate(self.transcoder.layers)
        }
        frozen = {**run.mlp_out, **outputs}
        with (
            self.lm.freeze_attention(run.patterns),
            self.lm.freeze_norms(run.denominators),
            self.lm.overwrite(lambda layer, sites: frozen[layer]),
        ):
            return self.lm(run.tokens)

    # -- interventions and graphs ----------------------------------------------------------------------------------

    def intervene(
        self,
        prompt: Prompt,
        interventions: Sequence[Intervention],
        mode: Mode = "free",
        layers: Collection[int] | None = None,
        past_range: bool = True,
    ) -> InterventionResult:
        """All interventions at once on one prompt. See `intervening.intervene_many`."""
        return intervene_many(self, prompt, [interventions], mode, layers, past_range)[0]

    def generate(
        self,
        prompt: Prompt,
        interventions: Sequence[Intervention] = (),
        max_new_tokens: int = 20,
        mode: Mode = "free",
        layers: Collection[int] | None = None,
        past_range: bool = True,
        temperature: float = 0.0,
        seed: int = 0,
    ) -> Generation:
        """Go on from a prompt under interventions; slices that are open at their end cover new tokens too."""
        more = max_new_tokens, mode, layers, past_range, temperature, seed
        return generate_many(self, prompt, [interventions], *more)[0]

    # The functions of circuit/replacement/carry_out.py themselves, for several groups of interventions on one prompt.
    intervene_many = intervene_many
    generate_many = generate_many

    def trace(self, prompt: Any, settings: "TraceSettings | None" = None, **named: Any) -> "Graph":
        """The attribution graph of a prompt; `named` are fields of TraceSettings. See `attribution.trace`."""
        from ..attribution.trace import trace  # it needs this module's classes

        return trace(self, prompt, settings, **named)


def _trained_on(transcoder: Transcoder, folder: Path, device: str) -> ModelSettings:
    """The model that a transcoder's description names."""
    model = dict(transcoder.meta.get("model") or {})
    if not model.get("name"):
        raise UserError(f"{folder} does not say which model it was trained on; give one with model=")
    return ModelSettings(model["name"], model.get("revision"), model.get("dtype", "auto"), device)
