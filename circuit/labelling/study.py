"""Labels and their scores, with the controls in the same table.

    training text --activations [S, T, F]--> examples of each feature            (evidence)
    examples --explainer--> one label a feature                                  (explain, judges)
    labels + held-out text --detection, fuzzing, simulation--> scores            (scoring)

The same is done with the labels dealt at random, with random directions and with the MLP's own neurons (controls).
"""

import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from ...data.errors import Progress, SettingsError, check_choice, check_range, silent
from ..features import Label, Labels, label_from_record
from ..intervals import mean_of
from .controls import NeuronDictionary, RandomDictionary, input_sample, shuffled
from .evidence import Collected, Evidence, EvidenceSettings, View, collect, every
from .explain import Judge, Prompts, label_of_answer, question
from .scoring import (
    Key,
    LabelTokens,
    Score,
    Simulation,
    ask,
    detection,
    fuzzing,
    rank_correlation,
    simulate,
)

Promotes = Callable[[Key], Sequence[str]]
"""The tokens that a feature makes likelier."""

Explainer = Callable[[Iterable[Evidence], Promotes], dict[Key, Label]]


EXPLAINERS = ("tokens", "local", "endpoint")
JUDGES = ("none", "local", "endpoint")


@dataclass(frozen=True)
class LabelSettings:
    explainer: str = "tokens"
    """Who names features: tokens, what they fire on or promote (no model is asked); local, a chat model on this
    machine; endpoint, an address that speaks OpenAI's protocol."""

    judge: str = "none"
    """Who answers the questions of detection and fuzzing: none (simulation alone is scored), local, endpoint."""

    score: bool = False
    """Score labels on held-out text, beside the controls."""

    controls: bool = True
    """Score shuffled labels, random directions and the model's neurons in the same table."""

    features: int = 0
    """Features of a layer that are named and scored, drawn among those that fire; 0 for all."""

    tokens: int = 100_000
    """Tokens of the training text that examples come from."""

    held_out: int = 50_000
    """Tokens of the held-out text that scores come from."""

    model: str = ""
    """The chat model of explainer=local and judge=local: a folder, a name, smollm2; or the endpoint's model."""

    url: str = ""
    """The endpoint's address up to /chat/completions, such as http://127.0.0.1:8000/v1."""

    key: str = ""
    """The environment variable that holds the endpoint's key; empty for an endpoint that takes none."""

    prompts: str = ""
    """A folder with explain.txt, detect.txt or fuzz.txt in place of the package's own."""

    budget_tokens: int = 0
    """Tokens that the endpoint may use, questions and answers; 0 for no limit."""

    budget_money: float = 0.0
    """Money that the endpoint may use, at the two prices; 0 for no limit."""

    price_in: float = 0.0
    """Price of a million tokens of questions."""

    price_out: float = 0.0
    """Price of a million tokens of answers."""

    concurrency: int = 8
    """Questions that wait for the endpoint at once."""

    seed: int = 0
    """Decides which features and windows are drawn."""

    def __post_init__(self) -> None:
        check_choice("labels.explainer", self.explainer, EXPLAINERS)
        check_choice("labels.judge", self.judge, JUDGES)
        for name, low in (("tokens", 1), ("held_out", 1), ("features", 0), ("concurrency", 1), ("budget_tokens", 0)):
            check_range(f"labels.{name}", getattr(self, name), low=low)
        for name in ("budget_money", "price_in", "price_out"):
            check_range(f"labels.{name}", getattr(self, name), low=0)
        asked = {self.explainer, self.judge} & {"local", "endpoint"}
        if asked and not self.model:
            raise SettingsError("labels.model is empty: name the chat model that labels.explainer or labels.judge asks")
        if "endpoint" in asked and not self.url:
            raise SettingsError("labels.url is empty: nothing is asked of an endpoint that you have not named")
        if self.budget_money and not (self.price_in or self.price_out):
            raise SettingsError("labels.budget_money needs labels.price_in and labels.price_out: money is not guessed")
        if len(asked) > 1:
            raise SettingsError("labels.explainer and labels.judge ask one and the same model: local or endpoint")


class Row(NamedTuple):
    """One line of the table: whose features, how many, and the mean scores over them."""

    name: str
    labelled: int
    simulation: float | None
    area: float | None
    detection: float | None
    detection_interval: tuple[float, float] | None
    fuzzing: float | None
    fuzzing_interval: tuple[float, float] | None
    nonsense: int
    unanswered: int


class Study(NamedTuple):
    """Labels, their scores by feature, and the table."""

    labels: dict[Key, Label]
    simulations: dict[Key, Simulation]
    detections: dict[Key, Score]
    fuzzings: dict[Key, Score]
    table: list[Row]

    def share_by_chance(self) -> dict[str, float]:
        """How much of each score a random dictionary gets too, counted from what blind guessing gives."""
        rows = {row.name: row for row in self.table}
        found = {}
        for name, blind in (("simulation", 0.0), ("area", 0.5), ("detection", 0.5), ("fuzzing", 0.5)):
            ours, random_ = (getattr(rows[key], name) if key in rows else None for key in ("transcoder", "random"))
            if ours is not None and random_ is not None and abs(ours - blind) > 1e-9:
                found[name] = (random_ - blind) / (ours - blind)
        return found

    def beside_truth(self) -> dict[str, dict[str, float | int]]:
        """Where truth is known, how each score ranks features beside their F1."""
        scores: dict[str, dict[Key, float]] = {
            "simulation": {key: s.correlation for key, s in self.simulations.items()},
            "detection": {key: s.balanced_accuracy for key, s in self.detections.items()},
            "fuzzing": {key: s.balanced_accuracy for key, s in self.fuzzings.items()},
        }
        found = {name: against_truth(self.labels, by_key) for name, by_key in scores.items()}
        return {name: truth for name, truth in found.items() if truth is not None}

    def as_dict(self) -> dict[str, Any]:
        """For `features/scores.json`: the table, and every feature's scores."""
        by_kind = {"simulation": self.simulations, "detection": self.detections, "fuzzing": self.fuzzings}
        return {
            "table": [row._asdict() for row in self.table],
            "share_by_chance": self.share_by_chance(),
            "beside_truth": self.beside_truth(),
            "features": {
                f"{layer}/{feature}": {
                    "label": label.text,
                    **{
                        kind: found[layer, feature]._asdict()
                        for kind, found in by_kind.items()
                        if (layer, feature) in found
                    },
                }
                for (layer, feature), label in sorted(self.labels.items())
            },
        }


def explain_by_tokens(words: Callable[[Sequence[int]], list[str]]) -> Explainer:
    """Names from the tokens that a feature fires on, or promotes: no model is asked."""

    def explain(evidence: Iterable[Evidence], promotes: Promotes) -> dict[Key, Label]:
        found = {}
        for e in evidence:
            examples = [{"tokens": words(w.tokens), "tokens_acts_list": w.acts} for w in e.strongest]
            record = {"examples_quantiles": [{"examples": examples}], "top_logits": promotes(e[:2])}
            label = label_from_record(record) if examples else None
            if label is not None:
                found[e[:2]] = label
        return found

    return explain


def explain_by_judge(
    judge: Judge,
    prompts: Prompts,
    words: Callable[[Sequence[int]], list[str]],
    progress: Progress = silent,
    batch: int = 64,
) -> Explainer:
    """Names in a judge's words; what is no label leaves the feature without one."""

    def explain(evidence: Iterable[Evidence], promotes: Promotes) -> dict[Key, Label]:
        asked = [(e[:2], question(e, prompts.explain, words, promotes(e[:2]))) for e in evidence if e.strongest]
        found = {}
        for start in range(0, len(asked), batch):
            part = asked[start : start + batch]
            for (key, _), answer in zip(part, judge.ask([prompt for _, prompt in part]), strict=True):
                if (label := label_of_answer(answer)) is not None:
                    found[key] = label
            progress("naming features", start + len(part), len(asked))
        return found

    return explain


def study(
    view: View,
    corpus: Any,
    settings: LabelSettings,
    explain: Explainer,
    words: Callable[[Sequence[int]], list[str]],
    judge: Judge | None = None,
    prompts: Prompts | None = None,
    known: Labels | None = None,
    promotes: Promotes = lambda key: (),
    progress: Progress = silent,
) -> Study:
    """Label and judge a transcoder's features and the controls; `known` labels (hand, truth) are judged too."""
    reading = EvidenceSettings(settings.tokens, settings.held_out, seed=settings.seed)
    layers, tokens_of = list(view.transcoder.layers), LabelTokens(view.lm.tokenizer)
    ours = collect(view, corpus, layers, reading, progress)
    keys = chosen(ours, layers, settings)
    labels = {key: label for key in keys if known is not None and (label := known.label(*key)) is not None
              and label.source in ("truth", "hand")}  # fmt: skip
    labels |= explain((e for e in every(ours, keys) if e[:2] not in labels), promotes)
    simulations = simulate(ours, labels, tokens_of, progress)
    detections, fuzzings = judged(ours, labels, words, judge, prompts, settings.seed, progress)
    table = [row("transcoder", labels, simulations, detections, fuzzings)]
    if settings.controls:
        dealt = shuffled(labels, settings.seed)
        scores = judged(ours, dealt, words, judge, prompts, settings.seed, progress)
        table.append(row("labels shuffled", dealt, simulate(ours, dealt, tokens_of, progress), *scores))
        for name, dictionary in controls(view, ours, settings.seed):
            other = collect(View(view.model, dictionary), corpus, layers, reading, progress)
            named = explain(every(other, chosen(other, layers, settings)), lambda key: ())
            scores = judged(other, named, words, judge, prompts, settings.seed, progress)
            table.append(row(name, named, simulate(other, named, tokens_of, progress), *scores))
    return Study(labels, simulations, detections, fuzzings, table)


def chosen(collected: Collected, layers: Sequence[int], settings: LabelSettings) -> list[Key]:
    """The features that are looked at: those that fire on the text, or so many of each layer."""
    keys: list[Key] = []
    for layer in layers:
        alive = torch.nonzero(collected.explain[layer].fired).squeeze(1).tolist()
        if settings.features and len(alive) > settings.features:
            alive = sorted(random.Random(f"{settings.seed} {layer}").sample(alive, settings.features))
        keys += [(layer, feature) for feature in alive]
    return keys


def judged(
    collected: Collected,
    labels: Mapping[Key, Label],
    words: Callable[[Sequence[int]], list[str]],
    judge: Judge | None,
    prompts: Prompts | None,
    seed: int,
    progress: Progress,
) -> tuple[dict[Key, Score], dict[Key, Score]]:
    """Detection and fuzzing scores; none without a judge."""
    if judge is None or prompts is None:
        return {}, {}
    detect = (q for e in every(collected, labels) for q in detection(e, labels[e[:2]], prompts, words))
    fuzz = (q for e in every(collected, labels) for q in fuzzing(e, labels[e[:2]], prompts, words, seed))
    return ask(judge, detect, progress=progress), ask(judge, fuzz, progress=progress)


def controls(view: View, ours: Collected, seed: int) -> Iterable[tuple[str, Any]]:
    """Random directions that fire as often, and the MLP's neurons at equal L0."""
    densities = {layer: found.density.float() for layer, found in ours.explain.items()}
    sample = input_sample(view, ours.explain_texts)
    yield "random", RandomDictionary(view.transcoder, view.lm.d_model, densities, sample, seed)
    if NeuronDictionary.possible(view.lm, view.transcoder.layers):
        k = [float(densities[layer].sum()) for layer in view.transcoder.layers]
        yield "neurons", NeuronDictionary(view.lm, view.transcoder, k)


def row(
    name: str,
    labels: Mapping[Key, Label],
    simulations: Mapping[Key, Simulation],
    detections: Mapping[Key, Score],
    fuzzings: Mapping[Key, Score],
) -> Row:
    """Means over features, with the interval of a mean over features."""
    scores = [*detections.values(), *fuzzings.values()]
    detection, fuzzing = ([s.balanced_accuracy for s in found.values()] for found in (detections, fuzzings))
    return Row(
        name,
        len(labels),
        _mean([s.correlation for s in simulations.values()]),
        _mean([s.area for s in simulations.values()]),
        _mean(detection),
        mean_of(detection).interval,
        _mean(fuzzing),
        mean_of(fuzzing).interval,
        sum(s.nonsense for s in scores),
        sum(s.unanswered for s in scores),
    )


def against_truth(labels: Mapping[Key, Label], scores: Mapping[Key, float]) -> dict[str, float | int] | None:
    """Where truth is known: how a score ranks features beside the F1 of their truth. None for fewer than ten."""
    both = [(label.f1, scores[key]) for key, label in labels.items() if label.f1 is not None and key in scores]
    if len(both) < 10:
        return None
    return {"features": len(both), "spearman": rank_correlation([f1 for f1, _ in both], [s for _, s in both])}


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
