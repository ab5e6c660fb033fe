"""What the foreign weight formats share: careful reading of folders that others wrote, whole or no writing."""

import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ...data.errors import UserError
from ...train.settings import TranscoderSettings
from ...train.transcoder import Transcoder

LEAST_THETA = 1e-30
"""A threshold of zero is a ReLU: this stands for it, because thresholds are kept as logarithms."""


@contextmanager
def new_folder(folder: str | Path) -> Iterator[Path]:
    """A folder that appears only when everything in it is written."""
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} exists and is not empty; name another folder, or remove it first")
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = folder.with_name(folder.name + ".part")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    try:
        yield aside
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    if folder.exists():
        folder.rmdir()
    aside.rename(folder)


class WeightsFile:
    """One safetensors file from outside: keys and shapes are checked before a tensor is read."""

    def __init__(self, path: Path, device: str = "cpu"):
        if not path.is_file():
            raise UserError(f"{path} is missing")
        self.path = path
        try:
            self.file = safe_open(str(path), framework="pt", device=device)
            self.keys = set(self.file.keys())
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path} is not a readable safetensors file ({error})") from error

    def check_keys(self, needed: Sequence[str], optional: Sequence[str] = ()) -> None:
        if missing := [key for key in needed if key not in self.keys]:
            raise UserError(f"{self.path} lacks {', '.join(missing)}")
        if foreign := sorted(self.keys - set(needed) - set(optional)):
            raise UserError(f"{self.path} holds {', '.join(foreign)}, which has no meaning in this format")

    def shape(self, key: str, dimensions: int) -> tuple[int, ...]:
        shape = tuple(self.file.get_slice(key).get_shape())
        if len(shape) != dimensions or 0 in shape:
            raise UserError(
                f"{self.path}: {key} has shape {list(shape)}; it should have {dimensions} dimensions, none 0"
            )
        return shape

    def read(self, key: str, *shape: int) -> Tensor:
        """The tensor, of that shape, finite, in float32 or better."""
        if self.shape(key, len(shape)) != shape:
            found = list(self.shape(key, len(shape)))
            raise UserError(f"{self.path}: {key} has shape {found} where {list(shape)} belongs")
        tensor = self.file.get_tensor(key)
        if not tensor.is_floating_point():
            raise UserError(f"{self.path}: {key} holds {tensor.dtype}, not floating-point numbers")
        tensor = tensor if tensor.dtype == torch.float64 else tensor.float()
        if not torch.isfinite(tensor).all():
            raise UserError(f"{self.path}: {key} holds numbers that are not finite")
        return tensor


class LayerWeights(dict[str, Tensor]):
    """W_enc [F, D], b_enc [F], W_dec [F, reach, D], b_dec [D]; theta [F] and W_skip [D, D] where there are."""


def assemble(layers: Mapping[int, LayerWeights], reach: str, read: str, meta: dict) -> Transcoder:
    """A raw-reading transcoder from the weights of its layers."""
    order = sorted(layers)
    weights = [layers[layer] for layer in order]
    for key, what in (("theta", "thresholds"), ("W_skip", "a skip connection")):
        have = [key in layer_weights for layer_weights in weights]
        if any(have) and not all(have):
            raise UserError(f"layer {order[have.index(False)]} has no {what} while others do: all layers must agree")
    sizes = [len(layer_weights["b_enc"]) for layer_weights in weights]
    settings = TranscoderSettings(
        features=sizes[0],
        features_per_layer=sizes if len(set(sizes)) > 1 else None,
        reach=reach,
        activation="jumprelu" if "theta" in weights[0] else "relu",
        skip="W_skip" in weights[0],
        read=read,
        layers=order,
    )
    first = weights[0]["W_enc"]
    transcoder = Transcoder(
        settings, first.shape[1], order, device=first.device, dtype=_common_dtype(weights), meta=meta
    )
    with torch.no_grad():
        for l, layer_weights in enumerate(weights):
            for name in ("W_enc", "b_enc", "W_dec", "b_dec"):
                getattr(transcoder, name)[l].copy_(layer_weights[name])
            if "theta" in layer_weights:
                transcoder.log_theta[l].copy_(_log_theta(layer_weights["theta"], order[l]))
            if "W_skip" in layer_weights:
                transcoder.W_skip[l].copy_(layer_weights["W_skip"])
    return transcoder


def _common_dtype(weights: Sequence[LayerWeights]) -> torch.dtype:
    doubles = all(tensor.dtype == torch.float64 for layer_weights in weights for tensor in layer_weights.values())
    return torch.float64 if doubles else torch.float32


def _log_theta(theta: Tensor, layer: int) -> Tensor:
    if (theta < 0).any():
        raise UserError(
            f"layer {layer} has negative thresholds, which let negative activations through; they have no form here"
        )
    return theta.double().clamp_min(LEAST_THETA).log()


def exportable(transcoder: Transcoder, target: str) -> Transcoder:
    """The transcoder itself, or topk with the thresholds that its training calibrated in place of its choice: what
    depends on the other tokens or features of a batch has no form in a foreign folder."""
    activation, thresholds = transcoder.settings.activation, transcoder.meta.get("thresholds")
    if activation == "topk" and thresholds is not None:
        ones = torch.ones(transcoder.n_layers)
        return transcoder.folded(ones, ones, thresholds)
    if activation in ("topk", "batchtopk"):
        raise UserError(
            f"an uncalibrated {activation} transcoder has no form in {target}: export the calibrated transcoder of a "
            "finished run"
        )
    return transcoder


def stored(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu").contiguous()
