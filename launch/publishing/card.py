"""The model card: what was trained on what, the measured figures with their controls, and how to load it."""

from collections.abc import Mapping
from typing import Any

import yaml

FIGURES = {
    "l0": "active features per token and layer",
    "nmse": "NMSE",
    "dead": "dead features",
    "ce_recovered": "cross-entropy recovered",
    "kl": "KL, clean to replaced",
    "top1": "top-1 agreement",
    "replacement_score": "replacement score of graphs",
    "completeness": "completeness of graphs",
}
CONTROLS = ("nmse", "ce_recovered", "kl", "top1")
HERE = """```bash
hf download {place} --local-dir {name}
crosslace trace run={name}/crosslace model={model} prompt="..."
```

```python
from crosslace import ReplacementModel
model = ReplacementModel.from_pretrained("{model}", "hub:{place}")
graph = model.trace("...")
```"""
THERE = """```python
from circuit_tracer import ReplacementModel
model = ReplacementModel.from_pretrained("{model}", "{place}")
```"""


def model_card(
    place: str,
    license: str,
    described: Mapping[str, Any],
    settings: Mapping[str, Any],
    result: Mapping[str, Any],
    elsewhere: str | None,
) -> str:
    """README.md. `described` is transcoder.json, `settings` the run's, `result` its eval.json; `elsewhere` says why
    circuit-tracer does not read the folder, None where it does."""
    model, meta = described["meta"].get("model", {}).get("name") or "unknown", described["meta"]
    head: dict[str, Any] = {"license": license, "library_name": "crosslace"}
    if "/" in model or model == "gpt2":
        head["base_model"] = model
    head["tags"] = ["transcoder", "interpretability", *([] if elsewhere else ["circuit-tracer"])]
    name = place.rpartition("/")[2]
    words = {"place": place, "name": name, "model": model}
    trained, text = meta.get("trained_as", {}), settings.get("dataset", {}).get("name", "unknown")
    kind = {"plt": "per-layer", "clt": "cross-layer"}.get(described["kind"], described["kind"])
    parts = [
        f"---\n{yaml.safe_dump(head, sort_keys=False)}---\n\n# {name}",
        f"A {kind} transcoder of `{model}`: {max(described['features']):,} features in each of "
        f"{len(described['layers'])} layers, {trained.get('activation', described['activation'])}, reading "
        f"`{described['sites']['read']}` and writing the MLPs' output. Trained on {trained.get('tokens', 0):,} "
        f"tokens of {text}. Normalisation is folded into the weights: they act on the model's own activations.",
        f"## Measured\n\nOn {result['tokens']:,} held-out tokens of the same text"
        + (f"; graphs of the prompt set {result['graph']['prompt_set']}." if "graph" in result else "."),
        _figures(result),
    ]
    if "controls" in result:
        parts += ["Beside controls at equal L0:", _controls(result["controls"])]
    if result["verdicts"]:
        parts.append("What the evaluation warns of:\n\n" + "\n".join(f"- {text}" for text in result["verdicts"]))
    parts += ["## Load it with Crosslace", HERE.format(**words), "## Load it with circuit-tracer"]
    parts.append(THERE.format(**words) if elsewhere is None else f"It has no form there: {elsewhere}.")
    return "\n\n".join(parts) + "\n"


def _figures(result: Mapping[str, Any]) -> str:
    rows = []
    for part in (result["overall"], result["behaviour"], result.get("graph", {})):
        for name in FIGURES:
            if part.get(name) is not None:
                low, high = part.get(f"{name}_interval") or (None, None)
                rows.append([FIGURES[name], f"{part[name]:.4g}", "" if low is None else f"{low:.4g} to {high:.4g}"])
    return _table(["figure", "value", "95% interval"], rows)


def _controls(controls: Mapping[str, Mapping[str, float | None]]) -> str:
    shown = lambda value: "" if value is None else f"{value:.4g}"
    return _table(["", *CONTROLS], [[name, *(shown(row.get(f)) for f in CONTROLS)] for name, row in controls.items()])


def _table(heads: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in (heads, ["---"] * len(heads), *rows))
