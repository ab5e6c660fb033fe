"""`crosslace steer`: set features, and see what the model says then."""

from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ...data.errors import SettingsError
from ..settings import fits
from ..terminal import Closing, table
from ..workspace import Job, open_replacement

if TYPE_CHECKING:
    from ...circuit.replacement import Intervention


STRENGTHS = ("times", "value")  # may be lists in `set`: one group of interventions for each place


def run(job: Job) -> Closing:
    """Show the next tokens, and the text, with and without the interventions; of several strengths, side by side."""
    top = job.top
    groups, prompt = intervention_groups(top.set), top.prompt
    if top.graph:
        prompt, chosen = from_graph(top)
        groups = {f"{top.supernode} times {top.times:g}": chosen} | groups
    if not groups:
        raise SettingsError(
            'set is missing; it takes a list such as set="[{layer: 1, position: 7, feature: 310, times: 0}]"'
        )
    model = open_replacement(job, Path(top.run), top.force, lazy_decoders=True)
    who: dict[str, Any] = {
        "mode": top.mode,
        "layers": range(*top.layers) if top.layers else None,
        "mlps": by_layer(top.mlps),
        "freeze": top.freeze,
    }
    results = model.intervene_many(prompt, list(groups.values()), **who)
    each = [results[0].probabilities(clean=True), *(result.probabilities() for result in results)]
    shown = torch.cat([p.topk(min(top.top, len(p))).indices for p in each]).unique()
    shown = shown[each[-1][shown].argsort(descending=True)]
    names = model.lm.token_strings(shown)
    rows = [(repr(name), *(float(p[id]) for p in each)) for name, id in zip(names, shown.tolist())]
    closing = Closing("steered", tables=[table("next token", ("token", "before", *groups), rows)])
    closing.notes.append(f"mode {results[0].answer}")
    if top.generate:
        before = model.generate(prompt, [], top.generate).text
        texts = model.generate_many(prompt, list(groups.values()), top.generate, **who)
        width = max(map(len, ("before", *groups)))
        lines = {"before": before, **{name: text.text for name, text in zip(groups, texts)}}
        closing.notes += [f"{name + ':':<{width + 1}} {text}" for name, text in lines.items()]
    closing.next = [f'crosslace trace run={top.run} prompt="{prompt}"']
    return closing


def from_graph(top: Any) -> "tuple[str | list[int], list[Intervention]]":
    """The prompt of a graph, and interventions on one of its supernodes."""
    from ...circuit.graph import Graph

    folder = Path(top.graph) if (Path(top.graph) / "graph.json").is_file() else Path(top.run) / "graphs" / top.graph
    graph = Graph.load(folder)
    if not top.supernode:
        known = ", ".join(graph.supernodes) or "it has none"
        raise SettingsError(f"supernode is missing; the groups of {folder} are: {known}")
    return top.prompt or graph.metadata.get("prompt") or graph.tokens, graph.interventions(
        top.supernode, times=top.times
    )


def by_layer(entries: list[dict[str, Any]]) -> dict[range, Any]:
    """Who answers in which layers, from `mlps`."""
    for entry in entries:
        if set(entry) != {"layers", "by"} or not fits(entry["layers"], list[int]) or len(entry["layers"]) != 2:
            raise SettingsError(f"mlps={entry} is not an entry; it takes one such as {{layers: [0, 4], by: clean}}")
    return {range(*entry["layers"]): entry["by"] for entry in entries}


def intervention_groups(entries: list[dict[str, Any]]) -> "dict[str, list[Intervention]]":
    """What `set` asks for: one group of interventions, called `after`; or one for each strength where `times` or
    `value` is a list, called by its strengths. Lists go side by side, so all are of one length."""
    lists = [(name, entry[name]) for entry in entries for name in STRENGTHS if isinstance(entry.get(name), list)]
    if not entries:
        return {}
    if not lists:
        return {"after": [intervention(entry) for entry in entries]}
    count = len(lists[0][1])
    if count == 0 or any(len(values) != count for _, values in lists):
        raise SettingsError("the lists of times and value in set are empty or differ in length; make them equally long")
    groups = {}
    for number in range(count):
        single = [
            {key: of[number] if key in STRENGTHS and isinstance(of, list) else of for key, of in entry.items()}
            for entry in entries
        ]
        name = ", ".join(dict.fromkeys(f"{name}={values[number]}" for name, values in lists))
        groups[name if name not in groups else f"{name} ({number + 1})"] = [intervention(entry) for entry in single]
    return groups


def intervention(entry: dict[str, Any]) -> "Intervention":
    """One intervention from an entry of `set`."""
    from ...circuit.replacement import Intervention

    allowed = [field.name for field in fields(Intervention)]
    unknown = [name for name in entry if name not in allowed]
    missing = [name for name in ("layer", "position", "feature") if name not in entry]
    if unknown or missing:
        wrong = f"{unknown[0]} is not known" if unknown else f"{missing[0]} is missing"
        raise SettingsError(f"set={entry} is not an intervention ({wrong}); it takes {', '.join(allowed)}")
    for name in ("layer", "feature", "value", "times"):
        if not fits(entry.get(name), (float if name in STRENGTHS else int) | None):
            raise SettingsError(f"{name}={entry[name]} in set is not of the right type; it takes a number")
    if not fits(entry.get("patch_from"), str | list[int] | None):
        raise SettingsError(
            f"patch_from={entry['patch_from']} in set is not of the right type; it takes a text or token ids"
        )
    if not fits(entry.get("patch_position"), int | None):
        place = entry["patch_position"]
        raise SettingsError(f"patch_position={place} in set is not of the right type; it takes a whole number")
    return Intervention(**{**entry, "position": str(entry["position"])})
