"""Gemma Scope's own folders, one layer after the other.

The first Gemma Scope has `layer_{i}/width_*/average_l0_*/params.npz`. Its card says where they read and write: after
the pre-MLP norm but before its gain, and after the post-MLP norm. Gemma Scope 2 has
`layer_{i}_width_*_l0_*/params.safetensors` and, for cross-layer transcoders, one folder with
`params_layer_{i}.safetensors`, each beside a `config.json` that names the modules whose outputs they read and write.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...data.errors import UserError
from ..replacement import Hooks
from .folders import Foreign, ForeignLayer, LayerWeights, NumpyFile, WeightsFile

PATH = re.compile(r"layer_(\d{1,4})/(width_\w+)/average_l0_(\d+)/params\.npz")
SECOND = re.compile(r"layer_(\d{1,4})_(width_\w+)")
CROSS_LAYER = re.compile(r"params_layer_(\d{1,4})\.safetensors")
PLACES = {"pre_feedforward_layernorm.output": "mlp.hook_in", "post_feedforward_layernorm.output": "hook_mlp_out"}
"""Modules' outputs as Gemma Scope 2 names them, and the hooks that they are."""
SKIP = "affine_skip_connection"


def is_gemma_scope(folder: Path) -> bool:
    """Whether a folder is one of those above."""
    patterns = ("layer_*/*/*/params.npz", "layer_*_width_*/params.safetensors", "params_layer_*.safetensors")
    return any(any(folder.glob(pattern)) for pattern in patterns)


def open_gemma_scope(folder: str | Path, l0: int | None = None) -> Foreign:
    """A cross-layer transcoder; or one a layer: where there are several, that whose average L0 is nearest to `l0`."""
    folder = Path(folder)
    if found := {int(m[1]): path for path in folder.iterdir() if (m := CROSS_LAYER.fullmatch(path.name))}:
        if missing := sorted(set(range(max(found) + 1)) - set(found)):
            raise UserError(f"{folder} holds no params_layer_{missing[0]}.safetensors, though it has later ones")
        hooks, model = _described([folder])
        return Foreign("gemma-scope", gemma_clt([found[i] for i in range(len(found))]), hooks, "all", model)
    if second := [path for path in sorted(folder.iterdir()) if SECOND.fullmatch(path.name)]:
        return _open_second(folder, second)
    return _open_first(folder, l0)


def _open_second(folder: Path, paths: list[Path]) -> Foreign:
    kinds = sorted({match[2] for path in paths if (match := SECOND.fullmatch(path.name))})
    if len(kinds) > 1:
        raise UserError(f"{folder} holds {', '.join(kinds)}; give a folder with one of them alone, a layer each")
    hooks, model = _described(paths)
    layers = {int(path.name.split("_")[1]): gemma_layer(path / "params.safetensors") for path in paths}
    return Foreign("gemma-scope", dict(sorted(layers.items())), hooks, "1", model)


def _open_first(folder: Path, l0: int | None) -> Foreign:
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
    layers = {layer: gemma_layer(path) for layer, path in sorted(chosen.items())}
    return Foreign("gemma-scope", layers, Hooks("ln2.hook_normalized", "hook_mlp_out"), "1", "google/gemma-2-2b")


def _described(folders: Sequence[Path]) -> tuple[Hooks, str | None]:
    """Where transcoders read and write, and the model that they are for, which all must agree on."""
    told = set()
    for folder in folders:
        path = folder / "config.json"
        try:
            config: Any = json.loads(path.read_text("utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise UserError(f"{path} is needed to know where the transcoder reads, and is not readable") from error
        config = config if isinstance(config, dict) else {}
        names = [str(config.get(f"hf_hook_point_{side}")) for side in ("in", "out")]
        places = [PLACES.get(re.sub(r"^model\.(language_model\.)?layers\.[\w{}]+\.", "", name)) for name in names]
        read, write = places
        if read != "mlp.hook_in" or write != "hook_mlp_out":
            raise UserError(
                f"{path} reads {names[0]} and writes {names[1]}; a transcoder reads pre_feedforward_layernorm.output of"
                " a layer and writes post_feedforward_layernorm.output"
            )
        told.add((Hooks(read, write), config.get("model_name")))
    if len(told) > 1:
        raise UserError(f"{folders[0].parent}: the transcoders are for different models; all must agree")
    return told.pop()


def gemma_clt(paths: Sequence[Path]) -> dict[int, ForeignLayer]:
    """A cross-layer transcoder, a file a layer: each holds what its features write to all layers."""
    return {i: gemma_layer(path, i, len(paths)) for i, path in enumerate(paths)}


def gemma_layer(path: Path, layer: int = 0, n_layers: int | None = None) -> ForeignLayer:
    """One file. Encoders are [D, F], decoders [F, D], or [F, L, D] over all layers of a cross-layer transcoder, where
    those before `layer` mean nothing. Thresholds are linear; a skip is `x @ affine_skip_connection`."""
    file: WeightsFile | NumpyFile = NumpyFile(path) if path.suffix == ".npz" else WeightsFile(path)
    enc, dec = ("W_enc", "W_dec") if "W_enc" in file.keys else ("w_enc", "w_dec")
    file.check_keys([enc, dec, "b_enc", "b_dec", "threshold"], [SKIP] if enc == "w_enc" else [])
    D, F = file.shape(enc, 2)
    reach = 1 if n_layers is None else n_layers - layer
    shapes: dict[str, tuple[int, ...]] = {"W_enc": (F, D), "b_enc": (F,), "W_dec": (F, reach, D), "b_dec": (D,)}
    shapes |= {"theta": (F,)} | ({"W_skip": (D, D)} if SKIP in file.keys else {})

    def read() -> LayerWeights:
        weights = LayerWeights(
            W_enc=file.read(enc, D, F).T,
            b_enc=file.read("b_enc", F),
            b_dec=file.read("b_dec", D),
            theta=file.read("threshold", F),
        )
        if n_layers is None:
            weights["W_dec"] = file.read(dec, F, D)[:, None]
        elif isinstance(file, WeightsFile):
            stored = file.shape(dec, 3)[1]  # all layers, or those from its own on
            weights["W_dec"] = file.rows(dec, F, stored, D, first=layer if stored == n_layers else 0)
        if SKIP in file.keys:
            weights["W_skip"] = file.read(SKIP, D, D).T
        return weights

    return ForeignLayer(shapes, file.dtype(enc), read)
