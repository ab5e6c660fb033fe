"""EleutherAI's sparsify folders (skip-transcoders too): `layers.{i}.mlp/` with `cfg.json` and `sae.safetensors`.

Encoders are `encoder.weight` [F, D] with a bias, followed by a relu; the k largest of a token stay. `W_dec` is [F, D],
and a skip is applied as `x @ W_skip.T`. It reads what the MLP module reads and predicts what that module gives.
"""

import json
import re
from pathlib import Path
from typing import Any

from ...data.errors import UserError
from ..replacement import Hooks
from .folders import Foreign, ForeignLayer, LayerWeights, WeightsFile

CONFIG, WEIGHTS = "cfg.json", "sae.safetensors"
FOLDER = re.compile(r"(?:.*\.)?(?:layers|h)\.(\d{1,4})\.mlp")


def open_sparsify(folder: str | Path) -> Foreign:
    """A folder of transcoders, one a layer, of which nothing but names and shapes is read yet."""
    folder = Path(folder)
    found = {int(m[1]): path for path in sorted(folder.iterdir()) if (m := FOLDER.fullmatch(path.name))}
    if not found:
        raise UserError(f"{folder} holds no layers.{{i}}.mlp; it is not a folder of sparsify transcoders")
    configs = {layer: _config(path / CONFIG) for layer, path in found.items()}
    ks = {config["k"] for config in configs.values()}
    if len(ks) > 1:
        raise UserError(f"{folder}: layers have different k ({sorted(ks)}); all must agree")
    layers = {layer: _open(path / WEIGHTS, configs[layer]) for layer, path in found.items()}
    return Foreign("sparsify", layers, Hooks("mlp.hook_in", "mlp.hook_out"), "1", None, ks.pop())


def _config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is not readable JSON") from error
    if not isinstance(config, dict) or not isinstance(config.get("k"), int) or config["k"] < 1:
        raise UserError(f"{path} names no k, how many features of a token stay")
    if not config.get("transcode", config.get("skip_connection", False)):
        raise UserError(f"{path} is of an autoencoder, not of a transcoder: it reads and writes the same place")
    if config.get("activation", "topk") != "topk":
        raise UserError(f"{path}: activation is {config['activation']!r}; topk alone has a form here")
    return config


def _open(path: Path, config: dict[str, Any]) -> ForeignLayer:
    file = WeightsFile(path)
    skip = "W_skip" in file.keys
    file.check_keys(["encoder.weight", "encoder.bias", "W_dec", "b_dec"], ["W_skip"])
    if skip != bool(config.get("skip_connection")):
        raise UserError(f"{path} and its {CONFIG} do not agree on whether there is a skip connection")
    F, D = file.shape("encoder.weight", 2)
    shapes: dict[str, tuple[int, ...]] = {"W_enc": (F, D), "b_enc": (F,), "W_dec": (F, 1, D), "b_dec": (D,)}
    shapes |= {"W_skip": (D, D)} if skip else {}

    def read() -> LayerWeights:
        weights = LayerWeights(
            W_enc=file.read("encoder.weight", F, D),
            b_enc=file.read("encoder.bias", F),
            W_dec=file.read("W_dec", F, D)[:, None],
            b_dec=file.read("b_dec", D),
        )
        return LayerWeights(weights, W_skip=file.read("W_skip", D, D)) if skip else weights

    return ForeignLayer(shapes, file.dtype("encoder.weight"), read)
