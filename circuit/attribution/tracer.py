"""From a prompt to its attribution graph.

1. One clean forward pass over tokens [T] keeps residual streams [T, D] a layer, attention patterns [H, T, T] and norm
   denominators [T, 1] (`linear.record`).
2. The K active features, the errors, biases [L, T, D] and embeddings [T, D] become vectors (`sources`).
3. Targets (the likely next tokens, then features) are directions [B, D]. They are pulled back in batches through the
   frozen layers as cotangents [T, D, B], and read out at every source (`backward`): each batch gives whole rows of the
   graph, [B, N] over all N nodes (`row_tables`).
4. Where `max_nodes` is less than what is active, rows are found in phases: after each, the most influential of the
   features that have no row yet are next. Features that get none are added to the errors of their places.
5. The graph is sealed with its accounting: by how much the rows miss what the model computed, what was left out.
"""

import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeGuard, cast, overload

import torch
from torch import Tensor

from ...data.errors import Progress, SettingsError, check_choice, check_range, silent
from ..graph import Graph, Nodes
from ..replacement import LocalModel, Prompt, memory_named
from .backward import Directions, FrozenModel, Places
from .batching import bytes_per_target, fitting_batch, free_memory, row_bytes
from .linear import record
from .row_tables import CappedTable, RowTable, StrongestTable, WholeTable
from .sources import active_features, find_sources
from .targets import Chosen, FeatureTargets, Target, choose_targets

PHASES = 8


@dataclass(frozen=True)
class TraceSettings:
    """How a prompt is traced."""

    max_nodes: int | None = 8192
    """Most features that the graph keeps, the most influential ones; the others' effect goes to the errors. null keeps
    all that are active."""

    max_logits: int = 10
    """Most next tokens that the graph explains."""

    logit_mass: float = 0.95
    """Explain the likeliest next tokens until their probabilities sum to this, at most `max_logits` of them."""

    targets: list[str] | None = None
    """What to explain instead of the likely next tokens: `Austin`, `Austin - Dallas`, `L3:12` (a feature), each with
    `@5` for another position than the last."""

    batch: int | None = None
    """Directions that go through the model together; by default as many as fit in half of an accelerator's free memory,
    128 on a CPU. Fewer take less memory."""

    edges: str = "all"
    """`all`, or `top-k`: only each target's strongest `top_k` edges from features, the rest going to the errors."""

    top_k: int = 256
    """Edges from features that each target keeps under edges=top-k."""

    memory: float | None = None
    """GiB that the rows of a graph may take; by default half of what an accelerator has free, a quarter on a CPU. Where
    `max_nodes` is less than what is active, columns of the least influential features are dropped early to stay
    below; else rows beyond it are mapped from a temporary file."""

    keep: str = "0.99"
    """Share of the influence that the stored graph carries, or `all`: the rest is booked in the errors. For what
    `crosslace trace` writes; in Python `graph.carrying(0.99)`."""

    def __post_init__(self) -> None:
        check_range("trace.max_logits", self.max_logits, 1)
        check_range("trace.logit_mass", self.logit_mass, 0, 1)
        if self.batch is not None:
            check_range("trace.batch", self.batch, 1)
        check_range("trace.top_k", self.top_k, 1)
        if self.memory is not None:
            check_range("trace.memory", self.memory, 0)
        self.share_to_keep()  # says what is wrong with `keep`
        check_choice("trace.edges", self.edges, ["all", "top-k"])
        if self.max_nodes is not None:
            check_range("trace.max_nodes", self.max_nodes, 0)

    def share_to_keep(self) -> float:
        """`keep` as a number."""
        if self.keep == "all":
            return 1.0
        try:
            share = float(self.keep)
        except ValueError as error:
            raise SettingsError(
                f"trace.keep={self.keep} is not known; it takes a share such as 0.99, or all"
            ) from error
        check_range("trace.keep", share, 0, 1)
        return share


@overload
def trace(replacement: LocalModel, prompt: Prompt, settings: TraceSettings | None = None, **named: Any) -> Graph: ...
@overload
def trace(
    replacement: LocalModel, prompt: Sequence[Prompt], settings: TraceSettings | None = None, **named: Any
) -> list[Graph]: ...
def trace(
    replacement: LocalModel, prompt: Prompt | Sequence[Prompt], settings: TraceSettings | None = None, **named: Any
) -> Graph | list[Graph]:
    """The attribution graph of a prompt (text or token ids); of a list of prompts, their graphs.

    `named` overrides single settings; `targets` may then also hold token ids, vectors and `Target`s. `progress` is told
    how many targets are done. `sample=(count, seed)` has a capped graph hold so many features that are drawn at random
    from all active ones; `metadata["sampled"]` names them.
    """
    settings = settings or TraceSettings()
    wanted, progress = named.pop("targets", settings.targets), named.pop("progress", silent)
    sample = named.pop("sample", (0, 0))
    settings = TraceSettings(**(asdict(settings) | named))
    if is_several(prompt):
        return [Tracer(replacement, one, wanted, settings, sample).run(progress) for one in prompt]
    return Tracer(replacement, cast(Prompt, prompt), wanted, settings, sample).run(progress)


def is_several(prompt: Any) -> TypeGuard[Iterable[Prompt]]:
    """Whether this is a list of prompts: of texts, or of lists of token ids; or a tensor with one a row."""
    if isinstance(prompt, Tensor):
        return prompt.dim() > 1
    if not isinstance(prompt, list | tuple) or not prompt:
        return False
    first = prompt[0]
    return isinstance(first, str | list | tuple) or (isinstance(first, Tensor) and first.dim() > 0)


class Tracer:
    """The steps of one graph."""

    def __init__(
        self,
        replacement: LocalModel,
        prompt: str | Sequence[int] | Tensor,
        wanted: Any,
        settings: TraceSettings,
        sample: tuple[int, int] = (0, 0),
    ):
        self.sample = sample
        self.lm, self.transcoder, self.settings = replacement.lm, replacement.transcoder, settings
        self.prompt = prompt
        self.tokens = self.lm.tokenize(prompt)
        self.replacement = replacement
        if isinstance(wanted, str | int | Tensor | Target):  # one alone
            wanted = [wanted]
        self.wanted = None if wanted is None else [Target.parse(one, len(self.tokens)) for one in wanted]
        self.dtype = torch.promote_types(self.lm.dtype, self.transcoder.dtype)
        self.done = 0
        self.batch = 0
        self.largest_violation = self.largest_relative = torch.zeros(())

    def run(self, progress: Progress = silent) -> Graph:
        """Trace the prompt."""
        with memory_named("trace.batch or trace.max_nodes"):
            return self._run(progress)

    @torch.no_grad()
    def _run(self, progress: Progress) -> Graph:
        lm, transcoder, settings, dtype = self.lm, self.transcoder, self.settings, self.dtype
        started = time.perf_counter()
        recording = record(lm, self.tokens)
        masked = self.replacement.masked_positions(self.tokens[None], sites=recording.sites())[0]
        reasons = {str(at): why for at, why in self.replacement.reasons(self.tokens, masked).items()}
        features = active_features(lm, transcoder, recording, masked, dtype)
        chosen = choose_targets(lm, transcoder, recording, self.wanted, settings.max_logits, settings.logit_mass, dtype)
        sources = find_sources(lm, transcoder, recording, features, masked, dtype)
        of_features = FeatureTargets(lm, transcoder, recording, features, dtype)
        frozen = FrozenModel(lm, recording, sources, dtype)
        recording.patterns.clear()  # they are in the frozen layers
        nodes = with_logits(sources.nodes(recording), chosen, lm)
        n_features = len(features.layer)
        most = n_features if settings.max_nodes is None else min(settings.max_nodes, n_features)
        common = nodes, chosen.probabilities, sources.run_order, most, dtype
        rows: RowTable
        if settings.edges == "top-k" and settings.top_k < n_features:
            rows = StrongestTable(*common, top_k=settings.top_k)
        else:
            rows = (CappedTable if most < n_features else WholeTable)(
                *common, most_bytes=row_bytes(settings.memory, lm.device)
            )
        self.batch = settings.batch or self._fitting_batch(len(nodes), rows.total)

        progress("tracing", 0, most + len(chosen.tokens))
        first_logit = len(nodes) - len(chosen.tokens)
        todo = torch.arange(first_logit, len(nodes), device=self.tokens.device)
        self._add(rows, frozen, chosen.targets, todo, todo - first_logit, progress, most)
        drawn = todo[:0]
        count, seed = self.sample
        if rows.capped and count:
            drawn = torch.randperm(n_features, generator=torch.Generator().manual_seed(seed))[: min(count, most)]
            drawn = drawn.to(self.tokens.device)
            self._add(rows, frozen, of_features, drawn, drawn, progress, most)
        sampled = [[int(column[id]) for column in features[:3]] for id in drawn]
        while rows.filled < rows.total:
            if rows.capped:
                left = rows.total - rows.filled
                ids = rows.next_features(min(left, max(self.batch, -(-most // PHASES))))
                if len(ids) == 0:  # no other feature has any influence
                    break
            else:
                ids = torch.arange(n_features, device=self.tokens.device)
            self._add(rows, frozen, of_features, ids, ids, progress, most)

        progress("tracing", self.done, self.done)  # where no other feature has influence, sooner than planned
        nodes, found, cancelled = rows.finish()
        dropped = rows.dropped
        kept = int(nodes.mask("feature").sum())
        return Graph(
            stored=found,
            nodes=nodes,
            probabilities=chosen.probabilities,
            tokens=self.tokens.tolist(),
            token_strings=lm.token_strings(self.tokens),
            cancelled=cancelled,
            metadata=self._metadata(n_features, n_features - kept, dropped, time.perf_counter() - started)
            | {"kept": reasons, **({"sampled": sampled} if sampled else {})},
        )

    def _add(
        self,
        rows: RowTable,
        frozen: FrozenModel,
        targets: Directions | FeatureTargets,
        ids: Tensor,
        columns: Tensor,
        progress: Progress,
        most: int,
    ) -> None:
        """Find the rows of nodes `ids`, which are `columns` of `targets`, in batches of neighbouring positions."""
        # the plan is made on the CPU at once: no batch has to wait for the device to say what it holds
        layer, position = targets.layer[columns].cpu(), targets.position[columns].cpu()
        order = position.argsort(stable=True)
        for some in order.split(self.batch):
            some = some[(position[some] - layer[some] * frozen.length).argsort(stable=True)]  # the last layer first
            places = Places(layer[some].tolist(), position[some].tolist())
            some = some.to(ids.device, non_blocking=True)
            batch = targets.select(columns[some], places.layers)
            sums = rows.add(ids[some], frozen.edges(batch, places), places.layers)
            self._account(sums, batch.value)
            self.done += len(some)
            progress("tracing", self.done, most + len(rows.probabilities))

    def _fitting_batch(self, n_nodes: int, targets: int) -> int:
        """As many targets together as memory allows."""
        lm = self.lm
        heads = max(parts.n_heads * parts.head_dim for parts in lm.layers)
        each = bytes_per_target(len(self.tokens), lm.d_model, heads, n_nodes, self.dtype.itemsize)
        return fitting_batch(each, free_memory(lm.device), targets)

    def _account(self, sums: Tensor, value: Tensor) -> None:
        """Identity 2: edges sum to what the model computed. Stays on the device until the end."""
        violation = (sums - value).abs()
        self.largest_violation = torch.maximum(violation.max(), self.largest_violation.to(violation))
        relative = violation / value.abs().clamp(min=1)
        self.largest_relative = torch.maximum(relative.max(), self.largest_relative.to(violation))

    def _metadata(self, active: int, left_out: int, dropped: int, seconds: float) -> dict[str, Any]:
        lm, transcoder = self.lm, self.transcoder
        prompt = self.prompt if isinstance(self.prompt, str) else "".join(lm.token_strings(self.tokens))
        return {
            "prompt": prompt,
            "model": {"name": lm.name, "revision": lm.revision, "fingerprint": lm.fingerprint, "family": lm.family},
            "n_layers": lm.n_layers,
            "transcoder": {
                "kind": transcoder.kind,
                "reach": transcoder.reach,
                "read": transcoder.settings.read,
                "skip": transcoder.settings.skip,
                "activation": transcoder.settings.activation,
                "layers": transcoder.layers,
                "features": transcoder.features,
            },
            "settings": asdict(self.settings)
            | {"batch": self.batch, "targets": None if self.wanted is None else [str(one) for one in self.wanted]},
            "seconds": round(seconds, 3),
            "accounting": {
                "active_features": active,
                "left_out_features": left_out,
                "largest_violation": float(self.largest_violation),
                "largest_relative_violation": float(self.largest_relative),
                "dropped_early": dropped,
                "dtype": str(self.dtype).removeprefix("torch."),
            },
        }


def with_logits(sources: Nodes, chosen: Chosen, lm: Any) -> Nodes:
    """All nodes of a graph: its sources, then what it explains."""
    targets, device = chosen.targets, chosen.targets.layer.device
    tokens = torch.tensor(chosen.tokens, device=device)
    # a logit stands after the last layer; so does a feature that is a target, which nothing reads from
    layer = torch.full_like(targets.layer, lm.n_layers)
    logits = Nodes.of("logit", layer, targets.position, tokens, targets.value)
    logits.labels = dict(enumerate(chosen.labels))
    return Nodes.join([sources, logits])
