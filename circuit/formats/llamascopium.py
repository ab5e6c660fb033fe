"""Llamascopium's folders: `config.json` with `sae_weights.safetensors`, one transcoder a layer or one cross-layer one.

Its weights read and write activations scaled to a mean norm of sqrt(D), and features are chosen by activation times the
norm n of all that the feature writes. With s = sqrt(D) / the mean norm of a place, ours are W_enc = n s_in W_E^T,
b_enc = n b_E, W_dec = W_D / (n s_out), b_dec = b_D / s_out: the same choice, the same output.
"""

import json
import re
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...data.errors import UserError
from ..replacement import Hooks
from .folders import Foreign, ForeignLayer, LayerWeights, WeightsFile

CONFIG, WEIGHTS = "config.json", "sae_weights.safetensors"
READS = re.compile(r"blocks\.(\d{1,4})\.(mlp\.hook_in|ln2\.hook_normalized|hook_resid_mid)")
WRITES = re.compile(r"blocks\.(\d{1,4})\.(mlp\.hook_out|hook_mlp_out)")


def is_llamascopium(folder: Path) -> bool:
    """Whether the folder, or one in it, holds what that program saves."""
    return any((path.parent / CONFIG).is_file() for path in folder.glob(f"**/{WEIGHTS}"))


def open_llamascopium(folder: str | Path) -> Foreign:
    """A folder that holds one cross-layer transcoder or, in folders of any name, one transcoder a layer."""
    paths = [path.parent for path in sorted(Path(folder).glob(f"**/{WEIGHTS}"))]
    if not paths:
        raise UserError(f"{folder} holds no {WEIGHTS}; it is not a folder of Llamascopium transcoders")
    configs = [_config(path / CONFIG) for path in paths]
    kinds = {config["sae_type"] for config in configs}
    if kinds == {"clt"} and len(paths) == 1:
        layers, hooks = _cross_layer(paths[0], configs[0])
    elif kinds == {"sae"}:
        found = [_one_layer(path, config) for path, config in zip(paths, configs, strict=True)]
        layers, hooks = {layer: one for layer, one, _ in found}, {place for *_, place in found}
        if len(layers) < len(found):
            raise UserError(f"{folder} holds more than one transcoder of a layer; name a folder with one of each")
    else:
        raise UserError(f"{folder} holds {', '.join(sorted(kinds))}; transcoders of a layer or one clt can be read")
    if len(hooks) > 1 or len({(config["act_fn"], config["top_k"]) for config in configs}) > 1:
        raise UserError(f"{folder}: layers differ in activation, k or place; all must agree")
    k = configs[0]["top_k"] if configs[0]["act_fn"] == "topk" else None
    return Foreign("llamascopium", layers, hooks.pop(), "all" if kinds == {"clt"} else "1", None, k)


def _config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text("utf-8"))
        places = [*config.get("hook_points_in", []), *config.get("hook_points_out", [])]
        places += [config[name] for name in ("hook_point_in", "hook_point_out") if name in config]
        known = {"sae_type", "d_model", "expansion_factor", "act_fn", "top_k", "norm_activation"} <= set(config)
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise UserError(f"{path} is not readable JSON of a transcoder") from error
    if not known or not places:
        raise UserError(f"{path} does not say what a Llamascopium transcoder is: kind, sizes, activation and places")
    if config["act_fn"] not in ("topk", "relu"):
        raise UserError(f"{path}: act_fn is {config['act_fn']!r}; topk and relu have a form here")
    if config["norm_activation"] not in ("dataset-wise", "inference") or config.get("use_glu_encoder"):
        raise UserError(f"{path}: activations scaled token by token, and gated encoders, have no form here")
    return config


def _places(reads: str, writes: str) -> tuple[int, Hooks]:
    """The layer, and where it reads and writes."""
    found, target = READS.fullmatch(reads), WRITES.fullmatch(writes)
    if found is None or target is None or found[1] != target[1]:
        raise UserError(f"a transcoder that reads {reads} and writes {writes} is of another kind than an MLP's")
    return int(found[1]), Hooks(found[2], "mlp.hook_out")


def _shapes(config: dict[str, Any], reach: int) -> dict[str, tuple[int, ...]]:
    D, F = config["d_model"], int(config["d_model"] * config["expansion_factor"])
    return {"W_enc": (F, D), "b_enc": (F,), "W_dec": (F, reach, D), "b_dec": (D,)}


def _one_layer(path: Path, config: dict[str, Any]) -> tuple[int, ForeignLayer, Hooks]:
    layer, hooks = _places(config["hook_point_in"], config["hook_point_out"])
    shapes, file = _shapes(config, 1), WeightsFile(path / WEIGHTS)
    F, D = shapes["W_enc"]

    def read() -> LayerWeights:
        s_in, s_out = (_scale(file, config, config[name]) for name in ("hook_point_in", "hook_point_out"))
        W_dec, b_dec = file.read("W_D", F, D)[:, None], file.read("b_D", D)
        return _ours(config, file.read("W_E", D, F).T, file.read("b_E", F), W_dec, b_dec, s_in, torch.tensor([s_out]))

    return layer, ForeignLayer(shapes, file.dtype("W_E"), read), hooks


def _cross_layer(path: Path, config: dict[str, Any]) -> tuple[dict[int, ForeignLayer], set[Hooks]]:
    reads, writes = config["hook_points_in"], config["hook_points_out"]
    L, file = len(reads), WeightsFile(path / WEIGHTS)
    found = [_places(*places) for places in zip(reads, writes, strict=True)]

    def read(l: int) -> LayerWeights:
        F, D = _shapes(config, 1)["W_enc"]
        s_out = torch.tensor([_scale(file, config, place) for place in writes[l:]])
        W_dec = torch.stack([file.read(f"W_D.{to}", to + 1, F, D)[l] for to in range(l, L)], dim=1)
        W_E, b_E = file.read("W_E", L, D, F)[l], file.read("b_E", L, F)[l]
        return _ours(config, W_E.T, b_E, W_dec, file.read(f"b_D.{l}", D), _scale(file, config, reads[l]), s_out)

    layers = {
        layer: ForeignLayer(_shapes(config, L - l), file.dtype("W_E"), partial(read, l))
        for l, (layer, _) in enumerate(found)
    }
    return layers, {hooks for _, hooks in found}


def _scale(file: WeightsFile, config: dict[str, Any], place: str) -> float:
    """What its training multiplied the activations of a place by; 1 where that is folded into the weights."""
    if config["norm_activation"] == "inference":
        return 1.0
    return config["d_model"] ** 0.5 / file.number(f"dataset_average_activation_norm.{place}")


def _ours(
    config: dict[str, Any], W_enc: Tensor, b_enc: Tensor, W_dec: Tensor, b_dec: Tensor, s_in: float, s_out: Tensor
) -> LayerWeights:
    """Its weights of one layer, W_dec [F, reach, D], under our names and scales (s_out [reach])."""
    n = torch.ones(len(W_enc), 1)
    if config.get("sparsity_include_decoder_norm", True):
        n = W_dec.float().square().sum((1, 2)).sqrt()[:, None].clamp_min(1e-30)
    return LayerWeights(
        W_enc=n * s_in * W_enc,
        b_enc=n[:, 0] * b_enc,
        W_dec=W_dec / (n[..., None] * s_out[:, None]),
        b_dec=b_dec / s_out[0],
    )
