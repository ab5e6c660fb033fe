"""Feature dashboards on disk: one record a feature, packed per layer, read by one range read.

`features/layer_{i}.bin` holds, for every feature in turn, a little-endian u32 length and that many bytes of
deflated JSON; `features/index.json.gz` holds `[{filename, offsets}]`, one entry a model layer, where feature i lies
at `offsets[i]:offsets[i+1]` (layers that no feature reads have one offset and an empty file).
"""

import gzip
import json
import math
import struct
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from ...data.errors import UserError

INDEX = "index.json.gz"
LENGTH = struct.Struct("<I")

Record = dict[str, Any]


def feature_number(layer: int, feature: int) -> int:
    """One number for (layer, feature), by Cantor's pairing: what Neuronpedia's graphs call a feature."""
    return (layer + feature) * (layer + feature + 1) // 2 + feature


def from_feature_number(number: int) -> tuple[int, int]:
    """(layer, feature) of a Cantor-paired number."""
    # the exact integer square root: floats go wrong above 2^53
    diagonal = (math.isqrt(8 * number + 1) - 1) // 2
    feature = number - diagonal * (diagonal + 1) // 2
    return diagonal - feature, feature


class DashboardWriter:
    """Writes the records of a layer in order; `close` writes the index, so that a half-written folder has none."""

    def __init__(self, folder: str | Path, n_layers: int):
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / INDEX).unlink(missing_ok=True)
        self.index = [{"filename": f"layer_{layer}.bin", "offsets": [0]} for layer in range(n_layers)]

    def write_layer(self, layer: int, records: Iterable[Record]) -> None:
        entry = self.index[layer]
        offsets = [0]
        with open(self.folder / entry["filename"], "wb") as file:
            for record in records:
                packed = zlib.compress(json.dumps(record, ensure_ascii=False, separators=(",", ":")).encode(), 6)
                file.write(LENGTH.pack(len(packed)) + packed)
                offsets.append(offsets[-1] + LENGTH.size + len(packed))
        entry["offsets"] = offsets

    def close(self) -> Path:
        for entry in self.index:
            (self.folder / entry["filename"]).touch()
        path = self.folder / INDEX
        aside = path.with_suffix(".part")
        aside.write_bytes(gzip.compress(json.dumps(self.index).encode(), mtime=0))
        aside.replace(path)
        return path


class DashboardReader:
    """Random access to the records of a features folder."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        path = self.folder / INDEX
        if not path.exists():
            raise UserError(f"{self.folder} holds no feature dashboards; `crosslace features run=...` writes them")
        try:
            index = json.loads(gzip.decompress(path.read_bytes()))
            self.files = [_plain_name(entry["filename"]) for entry in index]
            self.offsets = [[int(offset) for offset in entry["offsets"]] for entry in index]
        except (ValueError, KeyError, TypeError, OSError, EOFError, zlib.error) as error:
            raise UserError(f"{path} is damaged ({error}); run `crosslace features` again") from error

    @property
    def features(self) -> list[int]:
        """How many features each layer has records of."""
        return [len(offsets) - 1 for offsets in self.offsets]

    def record(self, layer: int, feature: int) -> Record:
        if not 0 <= layer < len(self.files) or not 0 <= feature < len(self.offsets[layer]) - 1:
            raise UserError(f"there is no dashboard of feature {feature} in layer {layer}")
        start, end = self.offsets[layer][feature], self.offsets[layer][feature + 1]
        path = self.folder / self.files[layer]
        with open(path, "rb") as file:
            file.seek(start)
            packed = file.read(end - start)
        return _unpack(packed, end - start, path, feature)

    def layer(self, layer: int) -> Iterator[Record]:
        """Every record of a layer, read in order."""
        for feature in range(self.features[layer]):
            yield self.record(layer, feature)

    def unpack(self, folder: str | Path, layers: Iterable[int] | None = None) -> int:
        """One JSON a feature, named by its Cantor-paired number, as Neuronpedia fetches them; returns how many."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        count = 0
        for layer in range(len(self.files)) if layers is None else layers:
            for feature, record in enumerate(self.layer(layer)):
                number = feature_number(layer, feature)
                record = {**record, "index": number}
                (folder / f"{number}.json").write_text(json.dumps(record, ensure_ascii=False), "utf-8")
                count += 1
        return count


def _plain_name(name: Any) -> str:
    """The index is data: a name in it may not lead out of the folder."""
    if not isinstance(name, str) or not name or Path(name).name != name or name in (".", ".."):
        raise ValueError(f"{name!r} is not a plain file name")
    return name


def _unpack(packed: bytes, expected: int, path: Path, feature: int) -> Record:
    try:
        (length,) = LENGTH.unpack(packed[: LENGTH.size])
        if len(packed) != expected or length != expected - LENGTH.size:
            raise ValueError("the record is cut off")
        return json.loads(zlib.decompress(packed[LENGTH.size :]))
    except (ValueError, struct.error, zlib.error) as error:
        raise UserError(f"{path} is damaged at feature {feature} ({error}); run `crosslace features` again") from error
