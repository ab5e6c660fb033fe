"""What a feature is called: by a person, by ground truth, by a model, or, failing all, by the tokens it fires on.

Labels of a run lie in `features/labels.json`, keyed by `layer/feature`. A label of a stronger source is never
replaced by one of a weaker: a person's word stands over ground truth, ground truth over a model's name, and that
over a guess from tokens.
"""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ...data.errors import UserError

FORMAT, VERSION = "crosslace-labels", 2
SOURCES = ("tokens", "model", "truth", "hand")  # weakest first


@dataclass(frozen=True)
class Label:
    """One feature's name, and where it comes from."""

    text: str
    source: str = "hand"
    f1: float | None = None
    """How well the feature detects the concept on prompts that did not choose it, where the source is ground truth."""
    also: Mapping[str, float] = field(default_factory=dict, hash=False)
    """Other concepts that it detects well enough for a name, each with its F1: a feature of two states is of both."""

    @property
    def concepts(self) -> dict[str, float | None]:
        """All that it is named after, with the F1 of each, the best first."""
        return {self.text: self.f1, **self.also}


class Labels:
    """The labels of one run, by (model layer, feature)."""

    def __init__(self, labels: Mapping[tuple[int, int], Label] | None = None):
        self._labels = dict(labels or {})

    def __len__(self) -> int:
        return len(self._labels)

    def __contains__(self, key: tuple[int, int]) -> bool:
        return key in self._labels

    def items(self) -> Iterable[tuple[tuple[int, int], Label]]:
        return self._labels.items()

    def get(self, layer: int, feature: int) -> str | None:
        """The text of a label, or None."""
        label = self._labels.get((layer, feature))
        return label.text if label else None

    def label(self, layer: int, feature: int) -> Label | None:
        return self._labels.get((layer, feature))

    def set(self, layer: int, feature: int, label: Label) -> None:
        """Write a label, unless a stronger source has already spoken."""
        old = self._labels.get((layer, feature))
        if old is None or SOURCES.index(label.source) >= SOURCES.index(old.source):
            self._labels[layer, feature] = label

    def replace(self, layer: int, feature: int, label: Label | None) -> None:
        """Write a label, or take it away, whoever has spoken: a person takes back what a person said."""
        self._labels.pop((layer, feature), None)
        if label is not None:
            self._labels[layer, feature] = label

    def update(self, other: "Labels") -> None:
        for (layer, feature), label in other.items():
            self.set(layer, feature, label)

    @classmethod
    def load(cls, run: str | Path) -> "Labels":
        """The labels of a run folder (or of a labels file); none written yet gives none."""
        path = labels_path(run)
        if not path.exists():
            return cls()
        try:
            content = json.loads(path.read_text("utf-8"))
            if content["format"] != FORMAT or content["version"] > VERSION:
                raise UserError(f"{path} is not a labels file that this version reads")
            return cls({_key(key): _label(entry) for key, entry in content["labels"].items()})
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path} is damaged ({error}); delete it and run `crosslace features` again") from error

    def save(self, run: str | Path) -> Path:
        path = labels_path(run)
        path.parent.mkdir(parents=True, exist_ok=True)
        entries = {f"{layer}/{feature}": asdict(label) for (layer, feature), label in sorted(self._labels.items())}
        aside = path.with_suffix(".part")
        aside.write_text(
            json.dumps({"format": FORMAT, "version": VERSION, "labels": entries}, ensure_ascii=False, indent=0), "utf-8"
        )
        aside.replace(path)
        return path


def labels_path(run: str | Path) -> Path:
    run = Path(run)
    return run if run.suffix == ".json" else run / "features" / "labels.json"


def _key(key: str) -> tuple[int, int]:
    layer, feature = key.split("/")
    return int(layer), int(feature)


def _label(entry: dict[str, Any]) -> Label:
    f1 = entry.get("f1")
    if entry["source"] not in SOURCES:
        raise ValueError(f"unknown source {entry['source']!r}")
    text = str(entry["text"])
    if entry["source"] == "truth":
        text = re.sub(r" \(F1 [\d.]+\)$", "", text)  # version 1 wrote the score into the text
    also = {str(name): float(value) for name, value in entry.get("also", {}).items()}
    return Label(text, entry["source"], None if f1 is None else float(f1), also)


# --- a guess from the dashboard --------------------------------------------------------------------------------


def label_from_record(record: Mapping[str, Any], words: int = 3) -> Label | None:
    """A fallback name: the tokens a feature fires on most, or what it says next where those have no pattern."""
    top = [example for group in record["examples_quantiles"][:1] for example in group["examples"]]
    if not top:
        return None
    weight: dict[str, float] = {}
    for example in top:
        acts = example["tokens_acts_list"]
        peak = max(range(len(acts)), key=acts.__getitem__)
        token = example["tokens"][peak]
        weight[token] = weight.get(token, 0.0) + 1 / len(top)
    ranked = sorted(weight, key=weight.__getitem__, reverse=True)
    if weight[ranked[0]] >= 0.25 or not record["top_logits"]:
        return Label("on " + ", ".join(_quoted(token) for token in ranked[:words]), "tokens")
    return Label("says " + ", ".join(_quoted(token) for token in record["top_logits"][:words]), "tokens")


def _quoted(token: str) -> str:
    return "“" + token.replace("\n", "⏎").strip(" ") + "”" if token.strip() else repr(token)


def name_features(graph, labels: Labels) -> None:
    """Give the graph's features their names, and group features of one name and position into a supernode."""
    graph.label_features({key: label.text for key, label in labels.items()})
    groups: dict[tuple[str, int], list[int]] = {}
    for node in graph.nodes:
        if node.kind == "feature":
            label = labels.label(node.layer, node.index)
            if label is not None and label.source != "tokens":
                groups.setdefault((label.text, node.position), []).append(node.id)
    names = [name for name, _ in groups]
    for (name, position), ids in groups.items():
        graph.group(name if names.count(name) == 1 else f"{name} @{position}", ids)
