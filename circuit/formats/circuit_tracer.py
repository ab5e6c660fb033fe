"""circuit-tracer folders, both ways.

What circuit-tracer 0.5 reads: `config.yaml` and, for per-layer transcoders, one `layer_{i}.safetensors` a layer; for
cross-layer ones `W_enc_{i}.safetensors` (encoder, biases, thresholds) and `W_dec_{i}.safetensors`, [F, L - i, D].
Weights act on the activations of an unprocessed model; thresholds are linear; a skip is applied as `x @ W_skip.T`.
"""

import re
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor

from ...data.errors import UserError
from ...data.models import LanguageModel
from ...train.transcoder import Transcoder
from ..replacement import READS, WRITES, Hooks
from .folders import (
    Foreign,
    ForeignLayer,
    LayerWeights,
    WeightsFile,
    assemble,
    exportable,
    new_folder,
    stored,
)
from .gemma_scope import gemma_clt, gemma_layer
from .hub import hub_file

PLT, CLT = "transcoder_set", "cross_layer_transcoder"
CONFIG = "config.yaml"
THRESHOLD = "activation_function.threshold"
SAFE_NAME = re.compile(r"(?:[\w-][\w.-]*/)*[\w-][\w.-]*\.(?:safetensors|npz)")
K = ("activation_function.k", "k")  # a number by itself: topk


def export_circuit_tracer(
    transcoder: Transcoder,
    folder: str | Path,
    model_name: str | None = None,
    post_norm: bool = False,
    parallel: bool = False,
) -> Path:
    """Write a transcoder of raw activations as a folder that circuit-tracer loads.

    `post_norm`: the model normalises the MLP's output before adding it; `parallel`: its MLP reads the layer's input.
    """
    transcoder = exportable(transcoder, "circuit-tracer")
    cross_layer = transcoder.kind != "plt"
    if cross_layer and transcoder.settings.skip:
        raise UserError("a cross-layer transcoder with skip has no form in circuit-tracer")
    if len(set(transcoder.features)) > 1:
        raise UserError(f"circuit-tracer takes one width for all layers, and this transcoder has {transcoder.features}")
    if transcoder.layers != list(range(transcoder.n_layers)):
        raise UserError(f"circuit-tracer takes every layer from 0 on, and this transcoder covers {transcoder.layers}")
    config = {
        "model_kind": CLT if cross_layer else PLT,
        "model_name": model_name or model_of(transcoder.meta) or "unknown",
        "feature_input_hook": _input_hook(transcoder.settings.read, parallel),
        "feature_output_hook": "hook_mlp_out" if post_norm else "mlp.hook_out",
    }
    with new_folder(folder) as aside:
        for l in range(transcoder.n_layers):
            for name, tensors in (_clt_files if cross_layer else _plt_files)(transcoder, l).items():
                save_file({key: stored(tensor) for key, tensor in tensors.items()}, aside / name)
        (aside / CONFIG).write_text(yaml.safe_dump(config, sort_keys=False), "utf-8")
    return Path(folder)


def import_circuit_tracer(folder: str | Path, lm: LanguageModel | None = None) -> Transcoder:
    """Read a circuit-tracer folder as a transcoder of raw activations. Nothing in the folder is trusted."""
    return assemble(open_circuit_tracer(folder), lm)


def open_circuit_tracer(folder: str | Path) -> Foreign:
    """A circuit-tracer folder, of which nothing but names and shapes is read yet. The files that it lists may also be
    Gemma Scope's (npz, or safetensors with lower-case names)."""
    folder = Path(folder)
    config = _config(folder)
    for key, known in (("feature_input_hook", READS), ("feature_output_hook", WRITES)):
        if config.get(key) not in known:
            raise UserError(f"{folder / CONFIG}: {key} is {config.get(key)!r}; known are {', '.join(known)}")
    hooks = Hooks(config["feature_input_hook"], config["feature_output_hook"])
    model = str(config.get("model_name", "unknown"))
    if config["model_kind"] == PLT:
        layers = {i: open_layer(path) for i, path in enumerate(_plt_paths(folder, config))}
        reach, k = "1", _k(folder, config)
    elif config.get("transcoders") is not None:  # Gemma Scope 2, a file a layer
        layers = gemma_clt(_listed(folder, config))
        reach, k = "all", None
    else:
        paths = _numbered(folder, r"W_enc_(\d+)\.safetensors")
        layers = {i: _open_clt(folder, i, len(paths)) for i in range(len(paths))}
        reach, k = "all", None
    widths = {layer.shapes["W_enc"] for layer in layers.values()}
    if len(widths) > 1:
        raise UserError(f"{folder}: layers have different shapes {sorted(widths)}, which circuit-tracer does not allow")
    return Foreign("circuit-tracer", layers, hooks, reach, model, k)


def model_of(meta: dict[str, Any]) -> str | None:
    """The model's name in a transcoder's description."""
    model = meta.get("model")
    return model.get("name") if isinstance(model, dict) else model


# --- writing ------------------------------------------------------------------------------------------------


def _input_hook(read: str, parallel: bool) -> str:
    if read == "mlp_in":
        return "mlp.hook_in"
    return "hook_resid_pre" if parallel else "hook_resid_mid"


def _plt_files(transcoder: Transcoder, l: int) -> dict[str, dict[str, Tensor]]:
    tensors = {
        "W_enc": transcoder.W_enc[l],
        "W_dec": transcoder.W_dec[l][:, 0],
        "b_enc": transcoder.b_enc[l],
        "b_dec": transcoder.b_dec[l],
    }
    if transcoder.settings.activation == "jumprelu":
        tensors[THRESHOLD] = transcoder.theta(l)
    if transcoder.settings.skip:
        tensors["W_skip"] = transcoder.W_skip[l]
    return {f"layer_{l}.safetensors": tensors}


def _clt_files(transcoder: Transcoder, l: int) -> dict[str, dict[str, Tensor]]:
    encoder = {
        f"W_enc_{l}": transcoder.W_enc[l],
        f"b_enc_{l}": transcoder.b_enc[l],
        f"b_dec_{l}": transcoder.b_dec[l],
    }
    if transcoder.settings.activation == "jumprelu":
        encoder[f"threshold_{l}"] = transcoder.theta(l)
    # A windowed transcoder writes nothing to the layers beyond its reach.
    W_dec = transcoder.W_dec[l]
    beyond = W_dec.new_zeros(W_dec.shape[0], transcoder.n_layers - l - W_dec.shape[1], W_dec.shape[2])
    return {
        f"W_enc_{l}.safetensors": encoder,
        f"W_dec_{l}.safetensors": {f"W_dec_{l}": torch.cat([W_dec, beyond], dim=1)},
    }


# --- reading ------------------------------------------------------------------------------------------------


def _config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    if not path.is_file():
        raise UserError(f"{folder} holds no {CONFIG}; it is not a circuit-tracer folder")
    try:
        config = yaml.safe_load(path.read_text("utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"{path} is not readable YAML") from error
    if not isinstance(config, dict) or config.get("model_kind") not in (PLT, CLT):
        raise UserError(f"{path} names no model_kind that is known; it takes {PLT} or {CLT}")
    return config


def _plt_paths(folder: Path, config: dict[str, Any]) -> list[Path]:
    if config.get("transcoders") is None:
        return _numbered(folder, r"layer_(\d+)\.safetensors")
    return _listed(folder, config)


def _listed(folder: Path, config: dict[str, Any]) -> list[Path]:
    """The files that a configuration names, one a layer."""
    names = config["transcoders"]
    if not isinstance(names, list) or not names:
        raise UserError(f"{folder / CONFIG}: transcoders must be a list of file names")
    for name in names:
        if not isinstance(name, str) or not (name.startswith("hf://") or SAFE_NAME.fullmatch(name)):
            raise UserError(
                f"{folder / CONFIG}: transcoders names {name!r}; it takes safetensors or npz files below the folder, or"
                " hf://OWNER/NAME/FILE"
            )
    return [hub_file(name) if name.startswith("hf://") else folder / name for name in names]


def _k(folder: Path, config: dict[str, Any]) -> int | None:
    """Features a token where the activation is topk, from the configuration or the first layer's file."""
    activation, k = config.get("activation_function", config.get("activation")), config.get("k")
    if isinstance(activation, dict):
        activation, k = activation.get("name", activation.get("type")), activation.get("k", k)
    if k is None:
        first = _plt_paths(folder, config)[0]
        keys = [key for key in K if first.suffix == ".safetensors" and key in WeightsFile(first).keys]
        k = int(WeightsFile(first).file.get_tensor(keys[0])) if keys else None
    if k is None and str(activation).lower() == "topk":
        raise UserError(f"{folder / CONFIG} says topk and no k: how many features fire is needed")
    if k is not None and (not isinstance(k, int) or k < 1):
        raise UserError(f"{folder / CONFIG}: k is {k!r}; it takes a number from 1")
    return k


def _numbered(folder: Path, pattern: str) -> list[Path]:
    """The folder's files with a number in their names: 0, 1, 2 ... without a gap."""
    found = {int(match[1]): path for path in folder.iterdir() if (match := re.fullmatch(pattern, path.name))}
    shown = pattern.replace(r"(\d+)", "{i}").replace("\\", "")
    if not found:
        raise UserError(f"{folder} holds no {shown}")
    if missing := sorted(set(range(max(found) + 1)) - set(found)):
        raise UserError(f"{folder} holds no {shown} of layer {missing[0]}, though it has later ones")
    return [found[i] for i in range(len(found))]


def open_layer(path: Path) -> ForeignLayer:
    """One per-layer transcoder's file: circuit-tracer's own, Gemma Scope's npz, or Gemma Scope 2's."""
    if path.suffix == ".npz" or "w_enc" in WeightsFile(path).keys:
        return gemma_layer(path)
    file = WeightsFile(path)
    file.check_keys(["W_enc", "W_dec", "b_enc", "b_dec"], [THRESHOLD, "W_skip", *K])
    F, D = file.shape("W_enc", 2)
    shapes: dict[str, tuple[int, ...]] = {"W_enc": (F, D), "b_enc": (F,), "W_dec": (F, 1, D), "b_dec": (D,)}
    shapes |= {"theta": (F,)} if THRESHOLD in file.keys else {}
    shapes |= {"W_skip": (D, D)} if "W_skip" in file.keys else {}

    def read() -> LayerWeights:
        weights = LayerWeights(
            W_enc=file.read("W_enc", F, D),
            b_enc=file.read("b_enc", F),
            W_dec=file.read("W_dec", F, D)[:, None],
            b_dec=file.read("b_dec", D),
        )
        if "theta" in shapes:
            weights["theta"] = file.read(THRESHOLD, F)
        if "W_skip" in shapes:
            weights["W_skip"] = file.read("W_skip", D, D)
        return weights

    return ForeignLayer(shapes, file.dtype("W_enc"), read)


def _open_clt(folder: Path, i: int, n_layers: int) -> ForeignLayer:
    encoder = WeightsFile(folder / f"W_enc_{i}.safetensors")
    decoder = WeightsFile(folder / f"W_dec_{i}.safetensors")
    encoder.check_keys([f"W_enc_{i}", f"b_enc_{i}", f"b_dec_{i}"], [f"threshold_{i}"])
    decoder.check_keys([f"W_dec_{i}"])
    F, D = encoder.shape(f"W_enc_{i}", 2)
    shapes: dict[str, tuple[int, ...]] = {"W_enc": (F, D), "b_enc": (F,), "W_dec": (F, n_layers - i, D), "b_dec": (D,)}
    shapes |= {"theta": (F,)} if f"threshold_{i}" in encoder.keys else {}

    def read() -> LayerWeights:
        weights = LayerWeights(
            W_enc=encoder.read(f"W_enc_{i}", F, D),
            b_enc=encoder.read(f"b_enc_{i}", F),
            W_dec=decoder.rows(f"W_dec_{i}", F, n_layers - i, D),
            b_dec=encoder.read(f"b_dec_{i}", D),
        )
        if "theta" in shapes:
            weights["theta"] = encoder.read(f"threshold_{i}", F)
        return weights

    return ForeignLayer(shapes, encoder.dtype(f"W_enc_{i}"), read)
