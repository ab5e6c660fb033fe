"""`crosslace steer`: set features, and see what the model says then."""

from pathlib import Path
from typing import Any

import torch

from ..data.errors import SettingsError
from .job import Job
from .sources import open_replacement
from .terminal import Closing, table

ENTRY = ("layer", "position", "feature", "value", "times")


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


def intervention(entry: dict[str, Any]):
    """One intervention from an entry of `set`."""
    from ..circuit.interventions import Intervention

    unknown = sorted(set(entry) - set(ENTRY))
    missing = [name for name in ("layer", "position", "feature") if name not in entry]
    if unknown or missing or ("value" in entry) == ("times" in entry):
        raise SettingsError(
            f"set={entry} is not an intervention; it takes layer, position, feature, and value or times"
        )
    position = _position(entry["position"])
    return Intervention(
        layer=_whole(entry, "layer"),
        position=position,
        feature=_whole(entry, "feature"),
        value=_number(entry, "value"),
        times=_number(entry, "times"),
    )


def _position(value: Any) -> int | slice:
    if isinstance(value, int):
        return value
    start, colon, stop = str(value).partition(":")
    try:
        if not colon:
            return int(start)
        return slice(int(start) if start else None, int(stop) if stop else None)
    except ValueError:
        raise SettingsError(f"position={value} is not known; it takes a number, or a range such as 3:7 or 5:") from None


def _whole(entry: dict[str, Any], name: str) -> int:
    if not isinstance(entry[name], int) or isinstance(entry[name], bool):
        raise SettingsError(f"{name}={entry[name]} in set is not of the right type; it takes a whole number")
    return entry[name]


def _number(entry: dict[str, Any], name: str) -> float | None:
    value = entry.get(name)
    if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
        raise SettingsError(f"{name}={value} in set is not of the right type; it takes a number")
    return None if value is None else float(value)
