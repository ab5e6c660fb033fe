"""SAELens transcoders, both ways: one folder a layer, `cfg.json` and `sae_weights.safetensors` in each.

SAELens (6.x) knows `transcoder`, `skip_transcoder`, `jumprelu_transcoder` and `jumprelu_skip_transcoder`: W_enc is
[D, F] there, W_dec [F, D], thresholds linear, a skip applied as `x @ W_skip.T`. It has no cross-layer form to write.
"""

import json
import re
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from ...data.errors import UserError
from ...data.models import LanguageModel
from ...train.transcoder import Transcoder
from ..replacement import READS, Hooks
from .circuit_tracer import model_of
from .folders import Foreign, ForeignLayer, LayerWeights, WeightsFile, assemble, exportable, new_folder, stored

CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
ARCHITECTURES = {
    # name: (thresholds, skip)
    "transcoder": (False, False),
    "skip_transcoder": (False, True),
    "jumprelu_transcoder": (True, False),
    "jumprelu_skip_transcoder": (True, True),
}
HOOKS = {"resid": "hook_resid_mid", "mlp_in": "mlp.hook_in"}


def export_saelens(transcoder: Transcoder, folder: str | Path, model_name: str | None = None) -> Path:
    """Write a per-layer transcoder of raw activations as `layer_{i}/` folders that SAELens loads from disk."""
    transcoder = exportable(transcoder, "SAELens")
    if transcoder.kind != "plt":
        raise UserError("SAELens has no form for a transcoder that writes to several layers; it takes reach=1 only")
    kind = (transcoder.settings.activation == "jumprelu", transcoder.settings.skip)
    architecture = next(name for name, has in ARCHITECTURES.items() if has == kind)
    with new_folder(folder) as aside:
        for l, layer in enumerate(transcoder.layers):
            tensors = {
                "W_enc": transcoder.W_enc[l].T,
                "b_enc": transcoder.b_enc[l],
                "W_dec": transcoder.W_dec[l][:, 0],
                "b_dec": transcoder.b_dec[l],
            }
            if kind[0]:
                tensors["threshold"] = transcoder.theta(l)
            if kind[1]:
                tensors["W_skip"] = transcoder.W_skip[l]
            config = {
                "architecture": architecture,
                "d_in": transcoder.d_model,
                "d_sae": transcoder.features[l],
                "d_out": transcoder.d_model,
                "dtype": str(transcoder.dtype).removeprefix("torch."),
                "device": "cpu",
                "apply_b_dec_to_input": False,
                "normalize_activations": "none",
                "reshape_activations": "none",
                "metadata": {
                    "model_name": model_name or model_of(transcoder.meta),
                    "hook_name": f"blocks.{layer}.{HOOKS[transcoder.settings.read]}",
                    "hook_name_out": f"blocks.{layer}.hook_mlp_out",
                },
            }
            (aside / f"layer_{layer}").mkdir()
            save_file({key: stored(tensor) for key, tensor in tensors.items()}, aside / f"layer_{layer}" / WEIGHTS)
            (aside / f"layer_{layer}" / CONFIG).write_text(json.dumps(config, indent=2) + "\n", "utf-8")
    return Path(folder)


def import_saelens(folder: str | Path, lm: LanguageModel | None = None) -> Transcoder:
    """Read one SAELens transcoder, or a folder of them, one a layer. Nothing in the folder is trusted."""
    return assemble(open_saelens(folder), lm)


def open_saelens(folder: str | Path) -> Foreign:
    """One SAELens transcoder, or a folder of them, of which nothing but names and shapes is read yet."""
    folder = Path(folder)
    if (folder / CONFIG).is_file():
        folders = [folder]
    else:
        folders = sorted(path.parent for path in folder.glob(f"*/{CONFIG}")) if folder.is_dir() else []
    if not folders:
        raise UserError(f"{folder} holds no {CONFIG}, nor do its folders; it is not a SAELens transcoder")
    layers: dict[int, ForeignLayer] = {}
    configs = [_config(path) for path in folders]
    for path, config in zip(folders, configs, strict=True):
        layer, _ = _hook(path, config)
        if layer in layers:
            raise UserError(f"{folder} holds two transcoders of layer {layer}; name the folder of the one to read")
        layers[layer] = _open(path, config)
    reads = {_hook(path, config)[1] for path, config in zip(folders, configs, strict=True)}
    if len(reads) > 1:
        raise UserError(f"{folder}: its transcoders read different sites ({', '.join(sorted(reads))}); all must agree")
    writes = {str(_metadata(config).get("hook_name_out") or "x.x.hook_mlp_out").split(".", 2)[2] for config in configs}
    if len(writes) > 1:
        raise UserError(
            f"{folder}: its transcoders write different sites ({', '.join(sorted(writes))}); all must agree"
        )
    model = _metadata(configs[0]).get("model_name")
    return Foreign("saelens", layers, Hooks(reads.pop(), writes.pop()), "1", model)


def _config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    try:
        config = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not readable JSON") from error
    if not isinstance(config, dict) or config.get("architecture") not in ARCHITECTURES:
        found = config.get("architecture") if isinstance(config, dict) else None
        raise UserError(f"{path}: architecture is {found!r}; known are {', '.join(ARCHITECTURES)}")
    for setting, usual in (("normalize_activations", "none"), ("reshape_activations", "none")):
        if config.get(setting, usual) != usual:
            raise UserError(
                f"{path}: {setting} is {config[setting]!r}, which rests on data that the folder lacks; "
                "fold it in SAELens first"
            )
    if config.get("apply_b_dec_to_input"):
        raise UserError(f"{path}: apply_b_dec_to_input has no meaning for a transcoder")
    return config


def _metadata(config: dict[str, Any]) -> dict[str, Any]:
    metadata = config.get("metadata")
    return metadata if isinstance(metadata, dict) else config


def _hook(folder: Path, config: dict[str, Any]) -> tuple[int, str]:
    """(layer, site) that the transcoder reads, from its hook's name."""
    name = str(_metadata(config).get("hook_name"))
    match = re.fullmatch(r"blocks\.(\d{1,4})\.([\w.]+)", name)
    if match is None or match[2] not in READS:
        raise UserError(
            f"{folder / CONFIG}: hook_name is {name!r}; it takes blocks.{{i}}. and one of {', '.join(READS)}"
        )
    written = str(_metadata(config).get("hook_name_out", ""))
    if written and re.fullmatch(rf"blocks\.{match[1]}\.(hook_mlp_out|mlp\.hook_out)", written) is None:
        raise UserError(f"{folder / CONFIG}: hook_name_out is {written!r}; it takes blocks.{match[1]}.hook_mlp_out")
    return int(match[1]), match[2]


def _open(folder: Path, config: dict[str, Any]) -> ForeignLayer:
    thresholds, skip = ARCHITECTURES[config["architecture"]]
    file = WeightsFile(folder / WEIGHTS)
    file.check_keys(
        ["W_enc", "W_dec", "b_enc", "b_dec", *(["threshold"] if thresholds else []), *(["W_skip"] if skip else [])]
    )
    D, F = file.shape("W_enc", 2)
    shapes: dict[str, tuple[int, ...]] = {"W_enc": (F, D), "b_enc": (F,), "W_dec": (F, 1, D), "b_dec": (D,)}
    shapes |= ({"theta": (F,)} if thresholds else {}) | ({"W_skip": (D, D)} if skip else {})

    def read() -> LayerWeights:
        weights = LayerWeights(
            W_enc=file.read("W_enc", D, F).T,
            b_enc=file.read("b_enc", F),
            W_dec=file.read("W_dec", F, D)[:, None],
            b_dec=file.read("b_dec", D),
        )
        if thresholds:
            weights["theta"] = file.read("threshold", F)
        if skip:
            weights["W_skip"] = file.read("W_skip", D, D)
        return weights

    return ForeignLayer(shapes, file.dtype("W_enc"), read)
