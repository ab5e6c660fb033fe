"""What the foreign weight formats share: careful reading of folders that others wrote, whole or no writing."""

import json
import math
import shutil
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ...data.errors import Progress, UserError, silent
from ...data.models import LanguageModel
from ...train.settings import TranscoderSettings
from ...train.transcoder import StoredRows, Transcoder
from ..replacement import READS, Hooks, check_hooks, folded_gain

DTYPE_NAMES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
SAFETENSORS_DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}
BLOCK = 16 * 2**20  # bytes of a decoder that are read and written together
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

    def dtype(self, key: str) -> torch.dtype:
        """What the tensor's numbers are."""
        found = SAFETENSORS_DTYPES.get(self.file.get_slice(key).get_dtype())
        if found is None:
            raise UserError(
                f"{self.path}: {key} holds {self.file.get_slice(key).get_dtype()}, not floating-point numbers"
            )
        return found

    def read(self, key: str, *shape: int) -> Tensor:
        """The tensor, of that shape, finite, as it is stored."""
        return self.rows(key, *shape).whole()

    def number(self, key: str) -> float:
        """A tensor that is one positive number."""
        self.shape(key, 0)
        self.dtype(key)
        value = float(self.file.get_tensor(key))
        if not 0 < value < float("inf"):
            raise UserError(f"{self.path}: {key} is {value}; it should be positive")
        return value

    def rows(self, key: str, *shape: int, first: int = 0) -> "RowsInFile":
        """The same, to be read a few rows at a time; `first` leaves out what stands before it in the second place."""
        if self.shape(key, len(shape)) != shape:
            found = list(self.shape(key, len(shape)))
            raise UserError(f"{self.path}: {key} has shape {found} where {list(shape)} belongs")
        self.dtype(key)
        return RowsInFile(self.path, key, first)


class RowsInFile:
    """A weight in a safetensors file, of which memory holds a few rows at a time: a cross-layer decoder is as large as
    many encoders."""

    def __init__(self, path: Path, key: str, first: int = 0):
        self.path, self.key, self.first = path, key, first
        self.rows = StoredRows(path, key)

    def __iter__(self) -> Iterator[Tensor]:
        count, *rest = self.rows.shape
        step = max(1, BLOCK // (self.rows.stored.itemsize * math.prod(rest)))
        for start in range(0, count, step):
            block = self.rows[start : start + step]
            if not torch.isfinite(block).all():
                raise UserError(f"{self.path}: {self.key} holds numbers that are not finite")
            yield block[:, self.first :] if self.first else block

    def whole(self) -> Tensor:
        """All of it, in memory."""
        return torch.cat(list(self))


class NumpyFile:
    """One npz file from outside, like `WeightsFile`: shapes come from its headers, a member when it is asked for."""

    def __init__(self, path: Path, device: str = "cpu"):
        self.path, self.device = path, device
        try:
            self.headers = npz_headers(path)
            self.file = np.load(path, allow_pickle=False)
        except (OSError, ValueError, zipfile.BadZipFile, KeyError) as error:
            raise UserError(f"{path} is not a readable npz file ({error})") from error
        self.keys = set(self.headers)

    check_keys = WeightsFile.check_keys

    def shape(self, key: str, dimensions: int) -> tuple[int, ...]:
        shape = self.headers[key][0]
        if len(shape) != dimensions or 0 in shape:
            raise UserError(
                f"{self.path}: {key} has shape {list(shape)}; it should have {dimensions} dimensions, none 0"
            )
        return shape

    def dtype(self, key: str) -> torch.dtype:
        kind = self.headers[key][1]
        if kind.kind != "f" or kind.itemsize not in (2, 4, 8):
            raise UserError(f"{self.path}: {key} holds {kind}, not floating-point numbers")
        return {2: torch.float16, 4: torch.float32, 8: torch.float64}[kind.itemsize]

    def read(self, key: str, *shape: int) -> Tensor:
        if self.shape(key, len(shape)) != shape:
            raise UserError(f"{self.path}: {key} has shape {list(self.headers[key][0])} where {list(shape)} belongs")
        self.dtype(key)
        tensor = torch.from_numpy(self.file[key]).to(self.device)
        if not torch.isfinite(tensor).all():
            raise UserError(f"{self.path}: {key} holds numbers that are not finite")
        return tensor


def npz_headers(path: Path) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """Shape and dtype of each member of an npz file, without reading the members."""
    found = {}
    with zipfile.ZipFile(path) as archive:
        for name in archive.namelist():
            with archive.open(name) as member:
                version = np.lib.format.read_magic(member)
                header = (
                    np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
                )
                shape, _, dtype = header(member)
                found[name.removesuffix(".npy")] = (shape, dtype)
    return found


class LayerWeights(dict[str, Any]):
    """W_enc [F, D], b_enc [F], W_dec [F, reach, D], b_dec [D]; theta [F] and W_skip [D, D] where there are. W_dec may
    still be in its file."""


@dataclass(frozen=True)
class ForeignLayer:
    """One layer of a foreign transcoder, which is not read yet."""

    shapes: dict[str, tuple[int, ...]]
    """Of the weights that there are, by the names of `LayerWeights`."""
    dtype: torch.dtype
    """What encoders and decoders are stored in."""
    read: Callable[[], LayerWeights]


@dataclass(frozen=True)
class Foreign:
    """A transcoder in a foreign format, whose layers are read one at a time."""

    program: str
    layers: dict[int, ForeignLayer]
    """By layer of the model."""
    hooks: Hooks
    reach: str = "1"
    model: str | None = None
    k: int | None = None
    """For topk: features a token and layer."""

    def settings(self) -> TranscoderSettings:
        order = sorted(self.layers)
        shapes = [self.layers[layer].shapes for layer in order]
        for key, what in (("theta", "thresholds"), ("W_skip", "a skip connection")):
            have = [key in shape for shape in shapes]
            if any(have) and not all(have):
                raise UserError(
                    f"layer {order[have.index(False)]} has no {what} while others do: all layers must agree"
                )
        sizes = [shape["b_enc"][0] for shape in shapes]
        return TranscoderSettings(
            features=sizes[0],
            features_per_layer=sizes if len(set(sizes)) > 1 else None,
            reach=self.reach,
            activation="topk" if self.k is not None else "jumprelu" if "theta" in shapes[0] else "relu",
            k=self.k or 16,
            skip="W_skip" in shapes[0],
            read=READS[self.hooks.read],
            layers=order,
        )

    def empty(self) -> Transcoder:
        """The transcoder without its numbers."""
        order = sorted(self.layers)
        first = self.layers[order[0]]
        meta = {"imported_from": self.program, "hooks": list(self.hooks)}
        meta |= {"model": {"name": self.model}} if self.model else {}
        width = first.shapes["W_enc"][1]
        return Transcoder(self.settings(), width, order, seed=None, device="meta", dtype=first.dtype, meta=meta)


def assemble(foreign: Foreign, lm: LanguageModel | None = None) -> Transcoder:
    """A raw-reading transcoder in memory, in float32 or better."""
    transcoder = foreign.empty()
    tensors = {
        name: tensor for l in range(transcoder.n_layers) for name, tensor in layer_tensors(foreign, transcoder, l, lm)
    }
    wide = torch.promote_types(transcoder.dtype, torch.float32)
    whole = {name: w.whole() if isinstance(w, RowsInFile) else w for name, w in tensors.items()}
    transcoder.load_state_dict({name: tensor.to(wide) for name, tensor in whole.items()}, assign=True)
    return transcoder


def stream(foreign: Foreign, folder: Path, lm: LanguageModel | None = None, progress: Progress = silent) -> None:
    """Write the transcoder's files a layer at a time, encoders and decoders in the dtype in which they are stored;
    decoders a few rows at a time."""
    transcoder = foreign.empty()
    expected = transcoder.state_dict()
    names = [name for l in range(transcoder.n_layers) for name in expected if name.rpartition(".")[2] == str(l)]
    header: dict[str, Any] = {}
    end = 0
    for name in names:
        large = name.startswith(("W_enc", "W_dec", "W_skip"))
        dtype = foreign.layers[transcoder.layers[int(name.rpartition(".")[2])]].dtype if large else torch.float32
        begin, end = end, end + expected[name].numel() * dtype.itemsize
        header[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(expected[name].shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    folder.mkdir(parents=True, exist_ok=True)
    aside = folder / "transcoder.safetensors.tmp"
    with open(aside, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for l in range(transcoder.n_layers):
            found = dict(layer_tensors(foreign, transcoder, l, lm))
            for name in (name for name in names if name.rpartition(".")[2] == str(l)):
                weight = found.pop(name)
                for part in weight if isinstance(weight, RowsInFile) else [weight]:
                    part = part.detach().to("cpu", SAFETENSORS_DTYPES[header[name]["dtype"]]).contiguous()
                    file.write(part.view(torch.uint8).numpy().data)
            progress("importing", l + 1, transcoder.n_layers)
    aside.replace(folder / "transcoder.safetensors")
    transcoder.describe(folder / "transcoder.json")


def layer_tensors(
    foreign: Foreign, transcoder: Transcoder, l: int, lm: LanguageModel | None
) -> Iterator[tuple[str, Any]]:
    """One layer's weights under our names, its site folded where it lies before a norm's gain."""
    layer = transcoder.layers[l]
    weights = foreign.layers[layer].read()
    if foreign.hooks.read == "ln2.hook_normalized":
        if lm is None:
            raise UserError(
                "the transcoder reads ln2.hook_normalized, which lies before the norm's gain: the model is needed to"
                " fold the gain in; name it with model="
            )
        check_hooks(lm, foreign.hooks, [layer])
        for name, bias in (("W_enc", "b_enc"), ("W_skip", "b_dec")):
            if name in weights:
                weights[name], shift = folded_gain(lm, layer, weights[name])
                weights[bias] = weights[bias].float() + shift
    for name, tensor in weights.items():
        if name == "theta":
            yield f"log_theta.{l}", _log_theta(tensor, layer)
        else:
            yield f"{name}.{l}", tensor


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
