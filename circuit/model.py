"""The replacement model as a user meets it: graphs, interventions and text of one language model and transcoder.

prompt --trace--> graph (`attribution`, `graph`); prompt + changes --intervene, generate--> logits, text (`replacement`)
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, overload

from ..data.cache import cache_root
from ..data.models import LanguageModel, ModelSettings, load_model
from ..train.transcoder import Transcoder
from .attribution import Attention, EdgeHeads, Head, TraceSettings, attention, edge_heads, top_heads, trace
from .formats import cached
from .graph import Graph
from .replacement import (
    Generation,
    Intervention,
    InterventionResult,
    LocalModel,
    Mode,
    Prompt,
    generate_many,
    intervene_many,
)


class ReplacementModel(LocalModel):
    """A language model and a transcoder that reads and writes its raw activations."""

    @classmethod
    def from_pretrained(
        cls, model: LanguageModel | ModelSettings | str, source: str | Path, force: bool = False
    ) -> "ReplacementModel":
        """A language model with somebody's transcoder: a folder, or `hub:OWNER/NAME[@revision][:subfolder]`, in any of
        `formats.PROGRAMS`. It is imported once, a layer at a time, into the cache; its decoders stay in their file."""
        if not isinstance(model, LanguageModel):
            model = load_model(model if isinstance(model, ModelSettings) else ModelSettings(model)).widened(own=True)
        folder = cached(source, cache_root() / "transcoders", model)
        return cls(model, Transcoder.load(folder, lazy_decoders=True), force)

    @overload
    def trace(self, prompt: Prompt, settings: TraceSettings | None = None, **named: Any) -> Graph: ...
    @overload
    def trace(self, prompt: Sequence[Prompt], settings: TraceSettings | None = None, **named: Any) -> list[Graph]: ...
    def trace(self, prompt: Any, settings: TraceSettings | None = None, **named: Any) -> Graph | list[Graph]:
        """The attribution graph of a prompt; `named` are fields of TraceSettings. See `attribution.trace`."""
        return trace(self, prompt, settings, **named)

    def heads(self, graph: Graph, edges: Sequence[tuple[int, int]]) -> list[EdgeHeads]:
        """Through which heads edges (target, source) of a graph of this model go. See `attribution.edge_heads`."""
        return edge_heads(self, graph, edges)

    def top_heads(self, graph: Graph, count: int = 10, edges: int = 500) -> list[Head]:
        """The heads that a graph's strongest edges go through. See `attribution.top_heads`."""
        return top_heads(self, graph, count, edges)

    def attention(self, prompt: Prompt, layer: int, head: int, query: int = -1, *more: Any, **named: Any) -> Attention:
        """Why a head looked where it did from one query. See `attribution.attention`."""
        return attention(self, prompt, layer, head, query, *more, **named)

    def intervene(
        self, prompt: Prompt, interventions: Sequence[Intervention], mode: Mode = "steer", *more: Any, **named: Any
    ) -> InterventionResult:
        """All interventions at once on one prompt. See `replacement.intervene_many`."""
        return intervene_many(self, prompt, [interventions], mode, *more, **named)[0]

    def intervene_many(
        self, prompt: Prompt, groups: Sequence[Sequence[Intervention]], mode: Mode = "steer", *more: Any, **named: Any
    ) -> list[InterventionResult]:
        """Each group of interventions by itself on one prompt. See `replacement.intervene_many`."""
        return intervene_many(self, prompt, groups, mode, *more, **named)

    def generate(
        self,
        prompt: Prompt,
        interventions: Sequence[Intervention] = (),
        max_new_tokens: int = 20,
        mode: Mode = "steer",
        *more: Any,
        **named: Any,
    ) -> Generation:
        """Go on from a prompt under interventions; slices that are open at their end cover new tokens too."""
        return generate_many(self, prompt, [interventions], max_new_tokens, mode, *more, **named)[0]

    def generate_many(
        self,
        prompt: Prompt,
        groups: Sequence[Sequence[Intervention]],
        max_new_tokens: int = 20,
        mode: Mode = "steer",
        *more: Any,
        **named: Any,
    ) -> list[Generation]:
        """The text under each group of interventions. See `replacement.generate_many`."""
        return generate_many(self, prompt, groups, max_new_tokens, mode, *more, **named)
