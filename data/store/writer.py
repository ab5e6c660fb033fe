"""Fills a store so that it may be killed at any instant and goes on to the same bytes.

While a store is being written its folder has a `.progress`: what the processes agreed on, one record for each window
whose shards are all in place, the rows of windows that memory has no room for, and a lock for each writing process.
Windows fall to processes in turn; each finds out by itself which of its windows are done. Whoever sees the last record
writes statistics and `complete`, and removes `.progress`. A store that is whole grows by further windows: `tokens` in
its attributes lists how many rows each split was asked for, time after time.
"""

import json
import re
import tempfile
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from os import PathLike
from pathlib import Path, PurePath
from typing import Any

import numpy as np
from torch import Tensor

from ..errors import UserError
from ..layout import COLUMNS, FORMAT, VERSION, Place, StoreLayout, StoreLock, channel_scale, read_json, room, write_json
from ..memory import host_memory
from .shards import ShardWriter, put_array, window_sizes
from .window import Moments, Window, pack_record, read_record

PROGRESS = ".progress"
HELD_OUT = "held_out"
SHUFFLE_ROWS = 1 << 20
_RECORD = re.compile(rf"{re.escape(PROGRESS)}/(\w+-\d+|before-.*)\.npz").fullmatch
_ASIDE = re.compile(r"\..+\.\d+-\d+\.part|.+\.[0-9a-f]{32}\.partial").fullmatch  # what a killed process was writing


class StoreWriter:
    """One store being written, by this process and perhaps by others beside it; `rows` says how many, by split."""

    def __init__(
        self,
        path: str | PathLike,
        layout: StoreLayout,
        identity: dict[str, Any],
        rows: dict[str, int],
        shuffle_rows: int = SHUFFLE_ROWS,
        memory: int | None = None,
        scratch: str = "",
        process_index: int = 0,
        process_count: int = 1,
        durable: bool = True,
        dtype_open: bool = False,
        facts: dict[str, Any] | None = None,
    ):
        """`dtype_open`: the layout's dtype is a guess, and `settle` will say the true one."""
        self.place, self.layout, self.identity = Place(path), layout, identity
        self.asked = {split: count for split, count in rows.items() if count}
        self.shuffle_rows = layout.shards(shuffle_rows) * layout.shard_rows
        self.memory = host_memory() // 4 // process_count if memory is None else memory
        self.process_index, self.process_count, self.durable = process_index, process_count, durable
        self.dtype_open = dtype_open
        self.facts = facts or {}
        """What the attributes say besides."""
        self.channel_scale: dict[str, Tensor] = {}
        self.complete = False
        self.stages: dict[str, list[int]] = {}
        self._scratch = scratch
        self._temporary: tempfile.TemporaryDirectory | None = None
        self._before: dict[str, tuple[dict[str, Any], Moments]] = {}
        self._shards: dict[str, ShardWriter] = {}
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="crosslace-writer")
        self._writing: Future[None] | None = None
        self._lock = StoreLock(self.place, f"{PROGRESS}/lock-{process_index}")

    def __enter__(self) -> "StoreWriter":
        """Take the lock, and go on with what is there if it is the same store."""
        self._check_folder()
        with room(self.place):
            self._lock.take()
            try:
                self._open()
            except BaseException:
                self._lock.release()
                raise
        return self

    def _open(self) -> None:
        held = self._said()
        if held and not self._goes_on_with(held):
            for name in self.place.sizes(""):
                own = name.startswith(("train/", f"{HELD_OUT}/", f"{PROGRESS}/")) or name == "zarr.json"
                if own and not name.startswith(f"{PROGRESS}/lock-"):
                    self.place.remove(name)
            held = {}
        self.stages = {split: [rows] for split, rows in self.asked.items()}
        if held:
            self._grow(held)
        if self.complete:
            self._tidy()
            return
        whole = {"identity": self.identity, "tokens": self.stages, "complete": False} | self.layout.to_attributes()
        self._say({"format": FORMAT, "version": VERSION} | self.facts | held | whole)
        for split in self.stages:
            if (found := self.place.read(self._before_name(split))) is not None:
                self._before[split] = read_record(self.layout, found)

    def _said(self) -> dict[str, Any]:
        """The attributes of the store, empty where there is none."""
        return (read_json(self.place, "zarr.json") or {}).get("attributes", {})

    def _say(self, attributes: dict[str, Any]) -> None:
        write_json(self.place, "zarr.json", {"zarr_format": 3, "node_type": "group", "attributes": attributes})

    def settle(self, layout: StoreLayout) -> None:
        """The layout with the dtype that the sample told."""
        if layout.dtype != self.layout.dtype:
            self.layout = layout
            with room(self.place):
                self._say(self._said() | layout.to_attributes())

    def _goes_on_with(self, attributes: dict[str, Any]) -> bool:
        """Refuse to go on with another store; False for one that has no finished window yet."""
        held = StoreLayout.from_attributes(attributes, self.place.root)
        if self.dtype_open and held.dtype in ("float16", "bfloat16"):
            self.layout = replace(self.layout, dtype=held.dtype)
        had, wanted = held.to_attributes() | attributes["identity"], self.layout.to_attributes() | self.identity
        had, wanted = _flat(had), _flat(wanted)
        different = sorted(key for key in had.keys() | wanted.keys() if had.get(key) != wanted.get(key))
        if not different:
            return True
        if not attributes["complete"] and not self._begun():
            return False
        key = different[0]
        raise UserError(
            f"{self.place.root} holds a store with {key}={had.get(key)} and this would be {key}={wanted.get(key)}: "
            "choose another path, or remove that store"
        )

    def _grow(self, held: dict[str, Any]) -> None:
        """What is asked for beyond what the store was asked for before."""
        self.stages = {split: list(stages) for split, stages in held["tokens"].items()}
        self.complete = held["complete"]
        more = {split: rows - sum(self.stages.get(split, [])) for split, rows in self.asked.items()}
        grows = {split: rows for split, rows in more.items() if rows > 0}
        if not self.complete:
            other = bool(grows) or more.get("train", 0) < 0
            if other and not self._begun():
                self.stages = {split: [rows] for split, rows in self.asked.items()}
            elif other:
                asked = sum(self.stages["train"])
                raise UserError(
                    f"{self.place.root} is not whole yet: finish it with store.tokens={asked} and store.held_out="
                    f"{sum(self.stages.get(HELD_OUT, []))}, then it can grow"
                )
            return
        if grows:
            # what the first sample told decides which rows are masked in the further windows, too
            scales: dict[str, Any] = {}
            if self.layout.dtype == "int8":
                group: Any = self.place.group("train")
                scales = {site: np.asarray(group[f"{site}_channel_scale"][...]).tolist() for site in self.layout.sites}
            sample = held.get("sample", {}) | {"channel_scale": scales}
            self.place.create(f"{PROGRESS}/sample.json", json.dumps(sample, indent=1, sort_keys=True).encode())
            there = list(self.stages)
            for split, rows in grows.items():
                self.stages.setdefault(split, []).append(rows)
            for split in there:
                self.place.create(self._before_name(split), self._record_of_all(split))
            self.complete = False

    def _begun(self) -> bool:
        """A window has been finished."""
        return any(map(_RECORD, self.place.sizes(PROGRESS)))

    def _record_of_all(self, split: str) -> bytes:
        """All windows of a split that is whole, as one record."""
        group: Any = self.place.group(split)
        windows, moments = np.asarray(group["windows"][...]), Moments(self.layout)
        rows = int(windows[:, 1].sum())
        for site in self.layout.sites:
            moments.total[site] = np.asarray(group[f"{site}_mean"][...]) * rows
            moments.square[site] = np.asarray(group[f"{site}_mean_square"][...]) * rows
        return pack_record({"windows": windows.tolist(), "counts": group.attrs["masked_rows"]}, moments)

    def _before_name(self, split: str) -> str:
        return f"{PROGRESS}/before-{split}-{len(self.stages[split])}.npz"

    def __exit__(self, kind: type | None, *_: Any) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._lock.release()
        if self._temporary is not None:
            self._temporary.cleanup()

    def _check_folder(self) -> None:
        """A store shares its folder with nothing."""
        folder = self.place.folder
        if self.place.local and folder.is_dir():
            other = sorted(path.name for path in folder.iterdir() if path.name != PROGRESS and not _ASIDE(path.name))
            if other and self.place.read("zarr.json") is None:  # read after the look: another process may begin now
                raise UserError(f"{folder} holds other files ({other[0]}) and no store: name a new or an empty folder")

    def agree(self, name: str, find: Callable[[], Any]) -> Any:
        """What the first process to come here found, now and after any restart."""
        name = f"{PROGRESS}/{name}.json"
        if self.place.read(name) is None:
            value = json.dumps(find(), indent=1, sort_keys=True).encode()
            with room(self.place):
                self.place.create(name, value)
        return read_json(self.place, name)

    def sizes(self, split: str) -> list[list[int]]:
        """The rows of every window, for each time that the store was asked to grow."""
        return window_sizes(self.stages.get(split, []), self.shuffle_rows)

    def starts(self, split: str) -> list[int]:
        """Where each window begins, and where the last one's shards end."""
        whole = [self.layout.shards(size) * self.layout.shard_rows for stage in self.sizes(split) for size in stage]
        return np.cumsum([0, *whole]).tolist()

    def mine(self, window: int) -> bool:
        return window % self.process_count == self.process_index

    def done(self, split: str, window: int) -> bool:
        """All shards of this window are in place."""
        return window < self._earlier(split) or self.place.read(_record_name(split, window)) is not None

    def _earlier(self, split: str) -> int:
        """How many windows were in place before the store was asked to grow."""
        return len(self._before[split][0]["windows"]) if split in self._before else 0

    def window(self, split: str, window: int, rows: int) -> Window:
        """An empty window of at most `rows` rows, in memory if two of them fit."""
        fits = 2 * rows * self.layout.row_bytes <= self.memory
        scratch = None if fits else self._folder() / f"{split}-{window}"
        with room(self.place if scratch is None else Place(scratch)):
            return Window(self.layout, rows, self.identity["seed"], window, self.channel_scale, scratch)

    def _folder(self) -> Path:
        """Where rows wait that memory has no room for: `store.scratch`, else beside the shards."""
        if self.place.local and not self._scratch:
            return self.place.folder / PROGRESS / "scratch"
        if self._temporary is None:
            if self._scratch:
                Path(self._scratch).mkdir(parents=True, exist_ok=True)
            self._temporary = tempfile.TemporaryDirectory(prefix="crosslace-", dir=self._scratch or None)
        return Path(self._temporary.name)

    def write(self, split: str, window: int, content: Window) -> None:
        """Write a window's shards, beside whatever the caller does next; one window at a time."""
        self.wait()
        self._writing = self._pool.submit(self._write, split, window, content)

    def _write(self, split: str, window: int, content: Window) -> None:
        content.close()
        start = self.starts(split)[window]
        with room(self.place):
            if split not in self._shards:
                aside = None if self.place.local else self._folder() / "shards"
                self._shards[split] = ShardWriter(self.place, self.layout, split, self.starts(split)[-1], aside)
            self._shards[split].write(start, content.filled, content, self.durable)
            self.place.write(_record_name(split, window), content.record(start))
        content.drop()

    def wait(self) -> None:
        """Wait for the shards that are being written."""
        if self._writing is not None:
            self._writing.result()

    def finish(self, windows: dict[str, int], attributes: dict[str, Any]) -> bool:
        """Close the store if the windows of every split are all in place; False while other processes still write."""
        self.wait()
        closing = StoreLock(self.place, f"{PROGRESS}/closing")
        try:
            closing.take()
        except UserError:
            return False  # another process is closing it
        try:
            with room(self.place):
                self.complete = self._finish(windows, attributes)
        finally:
            closing.release()
        return self.complete

    def _finish(self, windows: dict[str, int], attributes: dict[str, Any]) -> bool:
        records = {}
        for split, count in windows.items():
            earlier = self._earlier(split)
            found = [self.place.read(_record_name(split, window)) for window in range(earlier, count)]
            records[split] = [read_record(self.layout, data) for data in found if data is not None]
            if len(records[split]) < len(found):
                # another process may have closed the store and removed the records since
                return bool(self._said().get("complete"))
        for split, found in records.items():
            if found or split not in self._before:
                self._close(split, found)
        self._say(self._said() | attributes | {"complete": True})
        self._tidy()
        return True

    def _close(self, split: str, records: list[tuple[dict[str, Any], Moments]]) -> None:
        """The windows of one split, its statistics, and the shape that its arrays came to have."""
        before, moments = self._before.get(split, ({"windows": [], "counts": {}}, Moments(self.layout)))
        windows, counts = list(before["windows"]), dict(before["counts"])
        for facts, part in records:
            moments.merge(part)
            windows.append([facts["start"], facts["rows"]])
            for reason, count in facts["counts"].items():
                counts[reason] = counts.get(reason, 0) + count
        group = self.place.group(split, mode="a")
        rows = sum(count for _, count in windows)
        end = max((start + count for start, count in windows), default=0)
        for name, spec in self.layout.arrays.items():
            group[name].resize(spec.shape(end))  # type: ignore[union-attr]
        put_array(group, "windows", np.array(windows, np.int64).reshape(-1, 2), ("window", "first_and_rows"))
        put_array(group, "layer", np.array(self.layout.layers, np.int64), ("layer",))
        means, squares = averages(self.layout, moments, rows)
        for site in self.layout.sites:
            put_array(group, f"{site}_mean", means[site], ("layer", "channel"))
            put_array(group, f"{site}_mean_square", squares[site], ("layer",))
        for site, scale in self.channel_scale.items():
            put_array(group, f"{site}_channel_scale", scale.numpy(), ("layer", "channel"))
        group.attrs.put({"rows": rows, "masked_rows": counts})

    def _tidy(self) -> None:
        for name in self.place.sizes(""):
            if _ASIDE(PurePath(name).name):
                self.place.remove(name)
        self.place.remove(PROGRESS)


def averages(layout: StoreLayout, moments: Moments, rows: int) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Mean and mean square of each site, or the sentence that says where a number left its dtype's range."""
    for site in layout.sites:
        if not np.isfinite(moments.square[site]).all():
            layer = layout.layers[int(np.argmin(np.isfinite(moments.square[site])))]
            raise UserError(
                f"{site} of layer {layer} is not finite (in {layout.dtype}, or in the model itself): cache with "
                "store.dtype=bfloat16 or float32, and the model with model.dtype=float32 if that does not help"
            )
    mean = lambda sums: {site: sums[site] / max(rows, 1) for site in layout.sites}
    return mean(moments.total), mean(moments.square)


def write_store(
    path: str | PathLike,
    sites: dict[str, Tensor],
    token: Tensor,
    position: Tensor,
    document: Tensor,
    layout: StoreLayout,
    identity: dict[str, Any] | None = None,
    held_out: int = 0,
    **options: Any,
) -> None:
    """A store of rows [N, L, D] that are at hand, the last `held_out` of them as its held-out split.

    `options` are those of `StoreWriter`.
    """
    count = len(token) - held_out
    parts = {"train": slice(0, count), HELD_OUT: slice(count, None)}
    rows = {"train": count, HELD_OUT: held_out}
    columns = dict(zip(COLUMNS, (token, position, document)))
    with StoreWriter(path, layout, {"seed": 0} | (identity or {}), rows, **options) as writer:
        if writer.complete:
            return
        if layout.dtype == "int8":
            writer.channel_scale = {site: channel_scale(x) for site, x in sites.items()}
        windows = {}
        for split in writer.stages:
            sizes = writer.sizes(split)[0]
            windows[split] = len(sizes)
            for number, (begin, size) in enumerate(zip(np.cumsum([parts[split].start, *sizes]).tolist(), sizes)):
                if not writer.done(split, number):
                    window = writer.window(split, number, size)
                    own = slice(begin, begin + size)
                    window.append({n: x[own] for n, x in sites.items()}, {n: x[own] for n, x in columns.items()})
                    writer.write(split, number, window)
        writer.finish(windows, {})


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Settings in settings by their dotted names."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        found |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return found


def _record_name(split: str, window: int) -> str:
    return f"{PROGRESS}/{split}-{window}.npz"
