"""Gemma Scope's own folders: `layer_{i}/width_*/average_l0_*/params.npz`, one layer after the other.

Its card says where they read and write: after the pre-MLP norm but before its gain, and after the post-MLP norm. Gemma
Scope 2's folders do not say it, and are read by way of a `config.yaml` as circuit-tracer has it.
"""

import re
from pathlib import Path

from ...data.errors import UserError
from ..replacement import Hooks
from .circuit_tracer import open_layer
from .folders import Foreign

PATH = re.compile(r"layer_(\d{1,4})/(width_\w+)/average_l0_(\d+)/params\.npz")


def open_gemma_scope(folder: str | Path, l0: int | None = None) -> Foreign:
    """One transcoder a layer: where there are several, that whose average L0 is nearest to `l0`."""
    folder = Path(folder)
    found: dict[int, list[tuple[int, Path]]] = {}
    widths = set()
    for path in sorted(folder.glob("layer_*/*/*/params.npz")):
        if match := PATH.fullmatch(path.relative_to(folder).as_posix()):
            found.setdefault(int(match[1]), []).append((int(match[3]), path))
            widths.add(match[2])
    if not found:
        raise UserError(f"{folder} holds no layer_{{i}}/width_*/average_l0_*/params.npz; it is not Gemma Scope's")
    if len(widths) > 1:
        raise UserError(f"{folder} holds {', '.join(sorted(widths))}; give a folder with one of them alone")
    several = next((layer for layer, choices in found.items() if len(choices) > 1), None)
    if several is not None and l0 is None:
        choices = ", ".join(str(average) for average, _ in sorted(found[several]))
        raise UserError(f"layer {several} has transcoders of average L0 {choices}; l0= chooses the nearest one a layer")
    chosen = {layer: min(choices, key=lambda one: abs(one[0] - (l0 or 0)))[1] for layer, choices in found.items()}
    layers = {layer: open_layer(path) for layer, path in sorted(chosen.items())}
    return Foreign("gemma-scope", layers, Hooks("ln2.hook_normalized", "hook_mlp_out"), "1", "google/gemma-2-2b")
