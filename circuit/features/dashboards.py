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
MOST_LAYERS = 1000

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
    """Writes layers, each aside and renamed; `close` writes the index, so that a half-written folder has none.

    Until then a layer's offsets lie beside it, with what else is to be remembered of it: a stopped run goes on with the
    layers that are missing, and several processes write one each.
    """

    def __init__(self, folder: str | Path, n_layers: int):
        self.folder, self.n_layers = Path(folder), n_layers
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / INDEX).unlink(missing_ok=True)

    def write_layer(self, layer: int, records: Iterable[Record], notes: dict[str, Any] | None = None) -> None:
        """A layer's records in order; `notes` are read once they are written."""
        path, offsets = self._file(layer), [0]
        with open(path.with_suffix(".part"), "wb") as file:
            for record in records:
                packed = zlib.compress(json.dumps(record, ensure_ascii=False, separators=(",", ":")).encode(), 6)
                file.write(LENGTH.pack(len(packed)) + packed)
                offsets.append(offsets[-1] + LENGTH.size + len(packed))
        path.with_suffix(".part").replace(path)
        aside = self._notes(layer).with_suffix(".part")
        aside.write_text(json.dumps({"offsets": offsets, **(notes or {})}, ensure_ascii=False), "utf-8")
        aside.replace(self._notes(layer))

    def written(self, layer: int) -> bool:
        return self._notes(layer).is_file()

    def forget(self) -> None:
        """Begin anew: what lies there is of other settings."""
        for layer in range(self.n_layers):
            self._notes(layer).unlink(missing_ok=True)

    def close(self) -> dict[int, dict[str, Any]]:
        """Write the index; gives what was remembered of each layer."""
        notes = {layer: json.loads(self._notes(layer).read_text("utf-8"))
                 for layer in range(self.n_layers) if self.written(layer)}  # fmt: skip
        for layer in range(self.n_layers):
            self._file(layer).touch()
        offsets = [notes[layer].pop("offsets") if layer in notes else [0] for layer in range(self.n_layers)]
        index = [{"filename": self._file(layer).name, "offsets": found} for layer, found in enumerate(offsets)]
        path = self.folder / INDEX
        aside = path.with_suffix(".part")
        aside.write_bytes(gzip.compress(json.dumps(index).encode(), mtime=0))
        aside.replace(path)
        self.forget()
        return notes

    def _file(self, layer: int) -> Path:
        return self.folder / f"layer_{layer}.bin"

    def _notes(self, layer: int) -> Path:
        return self.folder / f"layer_{layer}.notes.json"


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


def pack(source: str | Path, folder: str | Path) -> int:
    """A folder of feature JSON, as `unpack` and Neuronpedia write it, as dashboards; returns how many there were.

    What a file does not say (Neuronpedia's need only examples) is worked out from its examples or left empty.
    """
    found: dict[int, dict[int, Path]] = {}
    for path in Path(source).glob("*.json"):
        if path.stem.isdecimal():
            layer, feature = from_feature_number(int(path.stem))
            found.setdefault(layer, {})[feature] = path
    if not found:
        raise UserError(f"{source} holds no feature JSON; its files are named by Cantor-paired numbers, 1234.json")
    if max(found) >= MOST_LAYERS:
        worst = min(found[max(found)].values())
        raise UserError(f"{worst} would be of layer {max(found)}; its name is no Cantor-paired number of a feature")
    writer = DashboardWriter(folder, max(found) + 1)
    for layer, files in found.items():
        writer.write_layer(layer, (_read_record(files.get(feature), feature) for feature in range(max(files) + 1)))
    writer.close()
    return sum(map(len, found.values()))


def _read_record(path: Path | None, feature: int) -> Record:
    """One file's record, whole; an empty one of a feature that has no file."""
    record: Record = {"examples_quantiles": []}
    try:
        if path is not None:
            record = json.loads(path.read_text("utf-8"))
        groups = [
            {
                **group,
                "quantile_name": str(group["quantile_name"]),
                "examples": [_read_example(one) for one in group["examples"]],
            }
            for group in record["examples_quantiles"]
        ]
        acts = [act for group in groups for one in group["examples"] for act in one["tokens_acts_list"] if act > 0]
        words = {name: [str(word) for word in record.get(name) or []] for name in ("top_logits", "bottom_logits")}
        missing = {"act_min": min(acts, default=0.0), "act_max": max(acts, default=0.0), "histogram": [],
                   "quantile_values": [], "activation_frequency": 0.0}  # fmt: skip
        return {**missing, **record, **words, "index": feature, "examples_quantiles": groups}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path} is no feature JSON ({error})") from error


def _read_example(example: Any) -> dict[str, Any]:
    tokens, acts = [str(token) for token in example["tokens"]], [_number(act) for act in example["tokens_acts_list"]]
    if len(tokens) != len(acts):
        raise ValueError("an example has not one activation a token")
    return {**example, "tokens": tokens, "tokens_acts_list": acts}


def _number(value: Any) -> float | int:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{value!r} is no activation")
    return value


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
