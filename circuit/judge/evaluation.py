"""How good one transcoder is on held-out text: the parts that `eval.json` holds.

    text [B, T] --clean pass--> reconstruction [tokens, L, D], sums of behaviour [sequences, statistics]
    text [B, T] --one pass a condition--> the same sums, MLP outputs overwritten          (behaviour, controls)
    prompts --trace--> graph scores; interventions --> faithfulness                       (graph_scores, faithfulness)

One clean pass over the text gives reconstruction and the clean behaviour; every condition (a layer spliced, layers
0..l replaced, all replaced, means, controls) takes one more. Graphs and interventions come from a fixed prompt set.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...data.errors import Progress, SettingsError, UserError, check_range, silent
from ...data.models import LanguageModel, described
from ...train.parallel import SINGLE, Collectives
from ...train.run import ReconstructionMetrics, named_tokens
from ...train.transcoder import SparseActs, Transcoder, to_sparse
from ..attribution import trace
from ..model import ReplacementModel
from ..precision import refuse_overflow
from ..replacement import TranscoderOutput
from .behaviour import (
    Condition,
    MeanSubstitute,
    TextBatch,
    ce_recovered,
    measure_behaviour,
    splice_condition,
    summary,
)
from .causal import causal_part
from .controls import (
    Calibration,
    LinearSubstitute,
    calibrate,
    down_norms,
    neuron_condition,
    random_features,
    strongest,
    untrained,
)
from .faithfulness import FaithfulnessPlan, measure_faithfulness
from .frozen_attention import frozen_attention
from .graph_scores import score_graphs
from .health import health
from .perturbation import perturbation_growth, steps_skipped
from .prompts import PromptSet
from .questions import Question

DEFINITIONS = 2
"""Raised whenever a figure comes to mean something else: results of different definitions are not compared."""
GROWTH_PROMPTS = 4
CONTROLS = ("untrained", "random", "neurons", "linear")
LEAST_SKIPPED = 0.1
"""Above this share, that a cross-layer transcoder skips steps is said."""
LEAST_TOKENS = 1000
"""With fewer evaluated tokens, shares such as `dead` say nothing."""


@dataclass(frozen=True)
class EvalSettings:
    """What an evaluation measures, and on how much text."""

    tokens: int = 32768
    """Held-out tokens for reconstruction and behaviour."""

    calibration_tokens: int = 16384
    """Training tokens that the controls and the mean ablation are fitted on."""

    batch: int = 8192
    """Tokens of one forward pass."""

    layers: bool = True
    """Also replace each layer alone, and for each l the layers 0 to l."""

    controls: bool = True
    """Also measure an untrained transcoder, random features with a fitted decoder, the MLP's strongest neurons (as many
    as L0), and a linear map."""

    prompts: int = 20
    """Prompts of the prompt set that graphs are made for; 0 leaves graphs and faithfulness out."""

    prompt_set: str = "auto"
    """auto (the world's questions, stdlib, questions for smollm2, else english), english, stdlib, or questions: prompts
    with known answers, of which those that the model does not answer are left out, and whose circuits are tested."""

    pairs: int = 500
    """Feature-to-logit and feature-to-feature effects that are measured; 0 leaves faithfulness out."""

    max_nodes: int = 4096
    """Feature nodes of a graph, as in `trace.max_nodes`."""

    node: float = 0.8
    """Pruning: the strongest nodes are kept that carry this share of the influence."""

    edge: float = 0.98
    """Pruning: the strongest edges are kept that carry this share of the influence."""

    node_thresholds: list[float] = field(default_factory=lambda: [0.4, 0.6, 0.8, 0.9, 0.95, 1.0])
    """Values of `node` at which size and score of the pruned graphs are measured."""

    seed: int = 0
    """Which features are drawn, which sequences are resampled, and the untrained control's weights."""

    def __post_init__(self) -> None:
        check_range("eval.tokens", self.tokens, LEAST_TOKENS)
        check_range("eval.calibration_tokens", self.calibration_tokens, LEAST_TOKENS)
        check_range("eval.batch", self.batch, 1)
        check_range("eval.prompts", self.prompts, 0)
        check_range("eval.pairs", self.pairs, 0)
        check_range("eval.max_nodes", self.max_nodes, 1)
        for threshold in self.node_thresholds:
            check_range("eval.node_thresholds", threshold, 0, 1)
        if self.pairs and not self.prompts:
            raise SettingsError("eval.pairs needs graphs to predict from: set eval.prompts=1 or more, or eval.pairs=0")


@dataclass(frozen=True)
class EvalText:
    """The text of an evaluation, cut into batches."""

    batches: Sequence[TextBatch]
    """This process's share of the held-out text."""
    sequences: int
    """Held-out sequences over all processes."""
    calibration: Sequence[TextBatch]
    """Training text, the same on every process."""
    prompts: PromptSet | None
    """None leaves graphs and faithfulness out."""
    questions: Sequence[Question] = ()
    """The prompts with their answers, where those are known and the model gives them: their circuits are tested."""
    unanswered: Sequence[str] = ()
    """A sentence about each prompt that was left out because the model does not answer it."""


def evaluate(
    rm: ReplacementModel,
    text: EvalText,
    settings: EvalSettings,
    comm: Collectives = SINGLE,
    progress: Progress = silent,
) -> dict[str, Any]:
    """The measured parts of `eval.json`. Every process calls it with its share of the text and gets the same result."""
    if not text.sequences or not text.calibration:
        raise UserError("the held-out text is empty; give a dataset with more documents, or a larger dataset.held_out")
    calibration = calibrate(rm.lm, rm.transcoder.settings.read, text.calibration, rm.masked_positions)
    reconstruction = Reconstruction(rm, calibration, comm)
    names = _Conditions(rm, calibration, settings)
    sums_CSK = measure_behaviour(
        rm.lm, text.batches, names.before, rm.masked_positions, text.sequences, progress, reconstruction.observe
    )
    found = reconstruction.trained.compute()
    if found["tokens"] < LEAST_TOKENS:
        raise UserError(
            f"the held-out text has {found['tokens']} tokens that count, too few for these statistics; "
            f"{LEAST_TOKENS} or more are needed"
        )
    l0 = [layer["l0"] for layer in found["layers"]]
    controls: list[Condition] = []
    if settings.controls:
        fresh = untrained(rm.transcoder, calibration, l0, settings.seed)
        drawn = {"untrained": fresh, "random": random_features(fresh, calibration)}
        controls = names.after(l0, drawn)
        observe = partial(reconstruction.observe_controls, l0, drawn)
        extra = measure_behaviour(rm.lm, text.batches, controls, rm.masked_positions, text.sequences, progress, observe)
        sums_CSK = torch.cat([sums_CSK, extra[1:]])
    sums = dict(zip(["clean", *(c.name for c in [*names.before, *controls])], comm.all_reduce_data(sums_CSK)))
    result: dict[str, Any] = {
        "definitions": DEFINITIONS,
        "tokens": found["tokens"],
        "overall": found["overall"],
        "layers": found["layers"],
        **({"worst_tokens": found["worst_tokens"]} if "worst_tokens" in found else {}),
        "behaviour": behaviour_part(sums, rm.transcoder.layers, settings.seed),
        "health": health(rm.transcoder, reconstruction.trained.densities()),
    }
    if controls:
        result["controls"] = controls_part(sums, found["overall"], reconstruction.control_nmse(), settings.seed)
    if text.prompts is not None:
        result |= graph_part(rm, text, text.prompts, settings, comm, progress)
    result["verdicts"] = [*verdicts(result), *large_rows(rm, found), *text.unanswered]
    return result


def few_of(acts_NF: Tensor) -> Tensor | SparseActs:
    """The features of each token that fire, where those are few: nothing is decoded that is zero."""
    most = int((acts_NF != 0).sum(1).max()) if len(acts_NF) else 0
    return to_sparse(acts_NF) if 0 < most <= acts_NF.shape[1] // 8 else acts_NF


def large_rows(rm: ReplacementModel, found: dict[str, Any]) -> list[str]:
    """In words: which rows were left out as sinks, and which tokens carry an error that a few rows make."""
    masked = rm.transcoder.meta.get("masked", {})
    said = [f"{what}: {words}" for what, words in described(masked) if "sink" in what or what == "note"]
    for l, tokens in found.get("worst_tokens", {}).items():
        rows = named_tokens(rm.lm.token_strings(tokens))
        said.append(f"layer {rm.transcoder.layers[l]}: more than half of the squared error is in {rows}")
    return said


class Reconstruction:
    """Metrics of the transcoder and of its controls, from what clean passes leave at the sites."""

    def __init__(self, rm: ReplacementModel, calibration: Calibration, comm: Collectives):
        self.rm, self.calibration = rm, calibration
        layers, D, device = rm.transcoder.layers, rm.lm.d_model, rm.lm.device
        fresh = lambda: ReconstructionMetrics([1] * len(layers), D, device, comm)
        self.trained = ReconstructionMetrics(rm.transcoder.features, D, device, comm)
        self.controls = {name: fresh() for name in CONTROLS}
        self.one = torch.ones(1, 1, device=device)

    @contextmanager
    def observe(self, batch: TextBatch, masked_BT: Tensor) -> Iterator[None]:
        """Hooks for a clean pass: the transcoder's metrics."""
        transcoder = self.rm.transcoder
        read = transcoder.settings.read
        with self.rm.lm.capture((read, "mlp_out"), transcoder.layers) as found:
            yield
        x_NLD = found.stacked(read)[~masked_BT].to(transcoder.dtype)
        refuse_overflow(found.mlp_out, "model")
        y_NLD = found.stacked("mlp_out")[~masked_BT].to(transcoder.dtype)
        acts = [transcoder.encode_layer(x_NLD[:, l], l) for l in range(transcoder.n_layers)]
        refuse_overflow(dict(zip(transcoder.layers, acts)), "transcoder")
        y_hat = transcoder.decode([few_of(acts_NF) for acts_NF in acts], x_NLD)
        self.trained.update(y_NLD, y_hat, acts, batch.tokens_BT.to(masked_BT.device)[~masked_BT])

    @contextmanager
    def observe_controls(
        self, l0: Sequence[float], drawn: Mapping[str, Transcoder], batch: TextBatch, masked_BT: Tensor
    ) -> Iterator[None]:
        """Hooks for a clean pass: the controls' metrics."""
        lm, layers, read = self.rm.lm, self.rm.transcoder.layers, self.rm.transcoder.settings.read
        downs = {layer: down for layer in layers if (down := lm.layers[layer].mlp_down) is not None}
        neurons: dict[int, Tensor] = {}
        with ExitStack() as stack:
            for layer, down in downs.items():
                keep = lambda module, args, layer=layer: neurons.__setitem__(layer, args[0])
                stack.callback(down.register_forward_pre_hook(keep).remove)
            found = stack.enter_context(lm.capture((read, "mlp_out"), layers))
            yield
        x_NLD, y_NLD = found.stacked(read)[~masked_BT].float(), found.stacked("mlp_out")[~masked_BT].float()
        acts = [self.one.expand(len(y_NLD), 1)] * len(layers)  # densities of controls are not of interest
        W, b = self.calibration.W_LDD[layers], self.calibration.b_LD[layers]
        self.controls["linear"].update(y_NLD, torch.einsum("nld,led->nle", x_NLD, W) + b, acts)
        for name, dictionary in drawn.items():
            self.controls[name].update(y_NLD, dictionary(x_NLD.to(dictionary.dtype)), acts)
        if len(downs) == len(layers):
            parts = [strongest_neurons(lm, layer, neurons[layer][~masked_BT], l0[l]) for l, layer in enumerate(layers)]
            self.controls["neurons"].update(y_NLD, torch.stack(parts, 1).float(), acts)

    def control_nmse(self) -> dict[str, float]:
        """NMSE of each control that was measured."""
        return {
            name: metrics.compute()["overall"]["nmse"] for name, metrics in self.controls.items() if metrics.tokens > 0
        }


def strongest_neurons(lm: LanguageModel, layer: int, neurons_NF: Tensor, l0: float) -> Tensor:
    """What an MLP writes [N, D] with only its strongest neurons."""
    parts = lm.layers[layer]
    down = parts.mlp_down
    assert down is not None
    y_ND = down(neurons_NF * strongest(neurons_NF, down_norms(down), l0))
    return y_ND if parts.post_mlp_norm is None else parts.post_mlp_norm.module(y_ND)


def replaced_condition(name: str, lm: LanguageModel, transcoder: Transcoder, layers: Sequence[int]) -> Condition:
    """A condition in which a transcoder stands in for the MLPs of `layers`."""
    return Condition(name, lambda masked_BT: lm.overwrite(TranscoderOutput(transcoder, masked_BT, layers)))


class _Conditions:
    """The ways to run the model, by name: those known beforehand, and the controls that need the measured L0."""

    def __init__(self, rm: ReplacementModel, calibration: Calibration, settings: EvalSettings):
        self.rm, self.calibration = rm, calibration
        lm, layers = rm.lm, rm.transcoder.layers
        mean = MeanSubstitute(calibration.mean_y_LD)
        splice = lambda name, chosen: replaced_condition(name, lm, rm.transcoder, chosen)
        ablate = lambda name, chosen: splice_condition(name, lm, mean, chosen)
        self.before: list[Condition] = [ablate("ablated", layers), splice("replaced", layers)]
        if settings.layers:
            for place, layer in enumerate(layers):
                self.before += [splice(f"layer {layer}", [layer]), ablate(f"ablated {layer}", [layer])]
                if place < len(layers) - 1:
                    self.before.append(splice(f"depth {layer}", layers[: place + 1]))

    def after(self, l0: Sequence[float], drawn: Mapping[str, Transcoder]) -> list[Condition]:
        """The controls, at the L0 that was measured."""
        rm, lm, layers = self.rm, self.rm.lm, self.rm.transcoder.layers
        linear = LinearSubstitute(rm.transcoder.settings.read, self.calibration.W_LDD, self.calibration.b_LD)
        found = [
            *(replaced_condition(name, lm, dictionary, layers) for name, dictionary in drawn.items()),
            splice_condition("linear", lm, linear, layers),
        ]
        neurons = neuron_condition(lm, dict(zip(layers, l0)))
        return [*found, neurons] if neurons is not None else found


def behaviour_part(sums: dict[str, Tensor], layers: Sequence[int], seed: int) -> dict[str, Any]:
    """The model's behaviour with all layers replaced, each layer spliced, and layers 0..l replaced."""
    clean = sums["clean"]

    def figures(name: str, ablated: str) -> dict[str, Any]:
        recovered = ce_recovered(clean, sums[ablated], sums[name], seed)
        found = summary(sums[name], seed)
        found["ce_replaced"], found["ce_replaced_interval"] = found.pop("ce"), found.pop("ce_interval")
        return {**found, "ce_recovered": recovered.value, "ce_recovered_interval": [recovered.low, recovered.high]}

    result = {
        "ce_clean": summary(clean, seed)["ce"],
        "ce_ablated": summary(sums["ablated"], seed)["ce"],
        "tokens": int(clean[:, 0].sum()),
        **figures("replaced", "ablated"),
    }
    if f"layer {layers[0]}" in sums:
        result["layers"] = [{"layer": n, **figures(f"layer {n}", f"ablated {n}")} for n in layers]
        depths = [(n, f"depth {n}" if f"depth {n}" in sums else "replaced") for n in layers]
        result["depth"] = [{"layers": f"0..{n}", "last": n, **figures(name, "ablated")} for n, name in depths]
    return result


def controls_part(sums: dict[str, Tensor], overall: dict, nmse: dict[str, float], seed: int) -> dict[str, Any]:
    """The transcoder and its controls side by side."""
    table: dict[str, Any] = {}
    for name in ("replaced", *CONTROLS):
        if name not in sums:
            continue
        found = summary(sums[name], seed)
        recovered = ce_recovered(sums["clean"], sums["ablated"], sums[name], seed).value
        table["transcoder" if name == "replaced" else name] = {
            "nmse": overall["nmse"] if name == "replaced" else nmse.get(name),
            "ce_recovered": recovered,
            **{figure: found[figure] for figure in ("kl", "top1", "top1_hard")},
        }
    return table


def graph_part(
    rm: ReplacementModel,
    text: EvalText,
    prompts: PromptSet,
    settings: EvalSettings,
    comm: Collectives,
    progress: Progress,
) -> dict[str, Any]:
    """Graph scores over the prompt set, faithfulness of the graphs, how perturbations grow, and causal checks."""
    chosen = PromptSet(prompts.name, prompts.version, prompts.prompts[: settings.prompts])
    graphs = []
    each = -(-settings.pairs // len(chosen.prompts))  # a sure prompt has one logit: a pair a feature
    silenced = max(16, each + each // 4)
    for number, prompt in enumerate(chosen.prompts):
        mine = number % comm.data_ranks == comm.data_rank
        sample = (silenced, settings.seed * 1_000_003 + number) if settings.pairs else (0, 0)
        graphs.append(trace(rm, prompt, max_nodes=settings.max_nodes, sample=sample) if mine else None)
        progress("graphs", number + 1, len(chosen.prompts))
    result: dict[str, Any] = {
        "graph": score_graphs(
            graphs, chosen, rm.lm.n_layers, settings.node_thresholds, settings.node, settings.edge, comm.all_reduce_data
        )
    }
    if rm.transcoder.reach_at(0) > 1 and comm.data_ranks == 1:
        result["steps"] = steps_skipped(rm, graphs, settings.node, settings.seed)
    if text.questions and comm.data_ranks == 1:
        own = {prompt: graph for prompt, graph in zip(chosen.prompts, graphs) if graph is not None}
        result["causal"] = causal_part(rm, text.questions[: len(own)], own, progress)
    if settings.pairs:
        plan = FaithfulnessPlan(settings.pairs, per_prompt=silenced, seed=settings.seed)
        effects = measure_faithfulness(rm, graphs, plan, progress, comm)
        tokens = [rm.lm.tokenize(prompt) for prompt in chosen.prompts[:GROWTH_PROMPTS]]
        result["faithfulness"] = {
            **{kind: pairs.agreement() for kind, pairs in effects.items()},
            "growth": perturbation_growth(rm, tokens, seed=settings.seed),
        }
        if comm.data_ranks == 1:
            result["faithfulness"]["attention"] = frozen_attention(
                rm, [None if graph is None else graph.tokens for graph in graphs], seed=settings.seed
            )
    return result


def verdicts(result: dict[str, Any]) -> list[str]:
    """In words: where the transcoder does not beat a control, and what else must not be overlooked."""
    found = list(result["health"]["warnings"])
    table = result.get("controls", {})
    better: dict[str, Callable[[float, float], bool]] = {
        "nmse": lambda own, other: own < other,
        "kl": lambda own, other: own < other,
        "ce_recovered": lambda own, other: own > other,
        "top1": lambda own, other: own > other,
    }
    for name in CONTROLS:
        for figure, beats in better.items():
            own, other = (table.get(row, {}).get(figure) for row in ("transcoder", name))
            if own is not None and other is not None and not beats(own, other):
                found.append(
                    f"the transcoder does not beat the {name} control in {figure} ({own:.4g} against {other:.4g})"
                )
    steps = result.get("steps", {})
    if steps.get("share_interval") and steps["share_interval"][0] > max(LEAST_SKIPPED, steps["control"]):
        low, high = steps["share_interval"]
        found.append(
            f"graphs skip steps: {steps['share']:.0%} (95%: {low:.0%} to {high:.0%}) of what their features write to "
            "later layers the model itself computes there from what they wrote to their own; a per-layer transcoder "
            "(transcoder=plt) shows these steps"
        )
    graph = result.get("faithfulness", {}).get("to_logits", {}).get("graph", {})
    if graph and graph["slope"] is None:
        found.append(f"only {graph['pairs']} feature-to-logit effects could be measured, too few for a slope")
    return found
