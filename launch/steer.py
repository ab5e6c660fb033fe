"""`crosslace steer`: set features, and see what the model says then."""

from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..data.errors import SettingsError
from .job import Job
from .sources import open_replacement
from .terminal import Closing, table

if TYPE_CHECKING:
    from ..circuit.interventions import Intervention


def run(job: Job) -> Closing:
    """Show the next tokens, and the text, with and without the interventions."""
    top = job.top
    interventions = [intervention(entry) for entry in top.set]
    if not interventions:
        raise SettingsError(
            'set is missing; it takes a list such as set="[{layer: 1, position: 7, feature: 310, times: 0}]"'
        )
    model = open_replacement(job, Path(top.run), top.force)
    layers = range(*top.layers) if top.layers else None
    result = model.intervene(top.prompt, interventions, mode=top.mode, layers=layers)
    clean, steered = (logits[-1].float().softmax(-1) for logits in (result.clean_logits, result.logits))
    shown = torch.cat([clean.topk(top.top).indices, steered.topk(top.top).indices]).unique()
    shown = shown[steered[shown].argsort(descending=True)]
    names = model.lm.token_strings(shown)
    rows = [(repr(name), float(clean[id]), float(steered[id])) for name, id in zip(names, shown.tolist())]
    closing = Closing("steered", tables=[table("next token", ("token", "before", "after"), rows)])
    if top.generate:
        before = model.generate(top.prompt, [], top.generate).text
        after = model.generate(top.prompt, interventions, top.generate, mode=top.mode, layers=layers).text
        closing.notes += [f"before: {before}", f"after:  {after}"]
    closing.next = [f'crosslace trace run={top.run} prompt="{top.prompt}"']
    return closing


def intervention(entry: dict[str, Any]) -> "Intervention":
    """One intervention from an entry of `set`."""
    from ..circuit.interventions import Intervention

    allowed = [field.name for field in fields(Intervention)]
    unknown = [name for name in entry if name not in allowed]
    missing = [name for name in ("layer", "position", "feature") if name not in entry]
    if unknown or missing:
        wrong = f"{unknown[0]} is not known" if unknown else f"{missing[0]} is missing"
        raise SettingsError(f"set={entry} is not an intervention ({wrong}); it takes {', '.join(allowed)}")
    for name in ("layer", "feature", "value", "times"):
        kind = int if name in ("layer", "feature") else int | float
        if entry.get(name) is not None and (isinstance(entry[name], bool) or not isinstance(entry[name], kind)):
            raise SettingsError(f"{name}={entry[name]} in set is not of the right type; it takes a number")
    return Intervention(**{**entry, "position": str(entry["position"])})
