"""An evaluated run as its files say it: the figures that runs are compared by, and the log of its training."""

import json
from pathlib import Path
from typing import Any, NamedTuple

from ...data.errors import UserError
from ..workspace import device_hours, runs

FIGURES = (
    *("l0", "nmse", "ce_recovered", "kl", "top1", "replacement_score", "completeness", "dead"),
    *("path_length", "steps_skipped", "device_hours"),
)
"""What runs are compared by."""
SMALLER_IS_BETTER = ("nmse", "kl")
LARGER_IS_BETTER = ("ce_recovered", "replacement_score")


class Measured(NamedTuple):
    """One evaluated run."""

    name: str
    kind: str
    """`clt batchtopk` and the like: runs of one kind are joined in a frontier."""
    data: str
    """What it was measured with: only runs of equal data are compared."""
    figures: dict[str, float | None]
    result: dict[str, Any]

    def beats(self, other: "Measured") -> bool:
        """Whether this run is as good in everything, at no more active features, and better in something."""
        if self.data != other.data:
            return False
        margins = [_margin(other, self, "l0")]
        margins += [_margin(other, self, name) for name in SMALLER_IS_BETTER]
        margins += [_margin(self, other, name) for name in LARGER_IS_BETTER]
        known = [margin for margin in margins if margin is not None]
        return bool(known) and min(known) >= 0 and max(known) > 0


def _margin(more: Measured, less: Measured, name: str) -> float | None:
    a, b = more.figures[name], less.figures[name]
    return None if a is None or b is None else a - b


def evaluated_below(folder: Path) -> list[Path]:
    """The folder itself where it was evaluated, and every evaluated run below it."""
    if not folder.is_dir():
        raise UserError(f"there is no run at {folder}")
    found = sorted(path.parent for path in folder.rglob("eval.json") if path.parent.name != "stages")  # the demo's own
    if not found:
        raise UserError(f"no run in {folder} was evaluated; run `crosslace eval run=...` first")
    return found


def read_measured(folder: Path) -> Measured:
    """An evaluated run from its folder."""
    path = folder / "eval.json"
    if not path.is_file():
        raise UserError(f"{folder} was not evaluated yet; `crosslace eval run={folder}` does it")
    result = runs.read_json(path)
    try:
        figures = figures_of(result) | {"device_hours": device_hours(folder)}
        made = result["made_with"]
        data = f"definitions {result['definitions']}, model {made['model']}, text {made['dataset']}, {made['tokens']}"
        kind = made["kind"]
    except (KeyError, TypeError) as missing:
        raise UserError(f"{path} lacks {missing}; evaluate {folder} again with this version") from missing
    return Measured(str(folder), kind, data, figures, result)


def figures_of(result: dict[str, Any]) -> dict[str, float | None]:
    """The figures that runs are compared by."""
    steps = {"steps_skipped": result["steps"]["share"]} if "steps" in result else {}
    parts = (result["overall"], result["behaviour"], result.get("graph", {}), steps)
    return {name: next((part[name] for part in parts if name in part), None) for name in FIGURES}


def read_log(folder: Path) -> list[dict[str, Any]]:
    """The run's metrics.jsonl, empty where there is none; a last line that was cut off is left out."""
    path = folder / "metrics.jsonl"
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").splitlines()
    entries = []
    for number, line in enumerate(lines):
        try:
            entries.append(json.loads(line))
        except ValueError as error:
            if number < len(lines) - 1:
                raise UserError(f"{path} is damaged in line {number + 1} ({error})") from error
    return entries
