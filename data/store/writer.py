"""Fills a store so that it may be killed at any instant and goes on to the same bytes.

While a store is being written its folder has a `.progress`: what the processes agreed on, one record for each window
whose shards are all in place, the spilled rows of windows that are not, and a lock for each writing process. Shards
and records appear under their names only when they are whole. Windows fall to processes in turn; each finds out by
itself which of its windows are done. Whoever sees the last record writes the arrays' metadata, then the group's with
`complete`, and removes `.progress`.
"""

import fcntl
import os
import re
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from os import PathLike
from pathlib import Path, PurePath
from typing import Any
from uuid import uuid4

import numpy as np
import torch

from ..errors import UserError
from .codecs import GROUP, channel_scale
from .files import Files, LocalFiles, open_files, read_json, room, write_json
from .layout import StoreLayout
from .reader import HELD_OUT
from .window import Moments, SpilledWindow, Window, read_record, window_order

PROGRESS = ".progress"
SHUFFLE_ROWS = 1 << 20
REMOTE_LOCK_SECONDS = 120.0
_THREADS = 2
_RECORD = re.compile(rf"(?:.*/)?{re.escape(PROGRESS)}/window-\d+\.npz").fullmatch
_ASIDE = re.compile(r"\..+\.\d+-\d+\.part").fullmatch  # a file that was being written by a process that was killed


class StoreWriter:
    """One store being written, by this process and perhaps by others beside it."""

    def __init__(
        self,
        path: str | PathLike,
        layout: StoreLayout,
        identity: dict[str, Any],
        shuffle_rows: int = SHUFFLE_ROWS,
        memory: int | None = None,
        process_index: int = 0,
        process_count: int = 1,
        sync: bool = True,
        dtype_open: bool = False,
    ):
        """`dtype_open`: the layout's dtype is a guess, and `settle` will say the true one."""
        self.files = open_files(path)
        self.layout = layout
        self.identity = identity
        self.shuffle_rows = layout.shards(shuffle_rows) * layout.shard_rows
        self.memory = default_memory() // process_count if memory is None else memory
        self.process_index, self.process_count = process_index, process_count
        self.sync = sync
        self.dtype_open = dtype_open
        self.channel_scale: dict[str, torch.Tensor] = {}
        self.complete = False
        self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="crosslace-writer")
        self._writing: list[Future[None]] = []
        self._lock = StoreLock(self.files, process_index)
        self._spare: list[dict[str, np.ndarray]] = []
        self._aside: tempfile.TemporaryDirectory | None = None

    def __enter__(self) -> "StoreWriter":
        """Take the lock, and go on with what is there if it is the same store."""
        held = read_json(self.files, "zarr.json")
        if held is None:
            self._check_folder()
        elif self._check_identity(held.get("attributes", {})):
            self.complete = held["attributes"]["complete"]
        else:
            held = None
        with room(self.files):
            self._lock.take()
            if self.complete:
                self._tidy()
            elif held is None:
                self._make_way()
                self._write_beginning()
        return self

    def _make_way(self) -> None:
        """Remove what was begun under other settings and has no finished window."""
        held = read_json(self.files, "zarr.json")
        if held is None or self._check_identity(held["attributes"]):  # nothing, or another process of this harvest
            return
        own = ("zarr.json", *(f"{name}/" for name in (PROGRESS, HELD_OUT, *self.layout.arrays)))
        for name in self.files.sizes(""):
            if name.startswith(own) and not name.startswith(f"{PROGRESS}/lock-"):
                self.files.remove(name)

    def _write_beginning(self) -> None:
        attributes = self.layout.to_attributes() | {"identity": self.identity, "complete": False}
        write_json(self.files, "zarr.json", group_metadata(attributes))

    def settle(self, layout: StoreLayout) -> None:
        """The layout with the dtype that the sample told."""
        if layout.dtype != self.layout.dtype:
            self.layout = layout
            with room(self.files):
                self._write_beginning()

    def __exit__(self, kind: type | None, *_: Any) -> None:
        for future in self._writing:
            future.cancel()
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._lock.release()
        if self._aside is not None:
            self._aside.cleanup()

    def _check_folder(self) -> None:
        """A store shares its folder with nothing."""
        folder = Path(self.files.root)
        if isinstance(self.files, LocalFiles) and folder.is_dir():
            other = sorted(path.name for path in folder.iterdir() if path.name != PROGRESS and not _ASIDE(path.name))
            if other:
                raise UserError(f"{folder} holds other files ({other[0]}) and no store: name a new or an empty folder")

    def _check_identity(self, attributes: dict[str, Any]) -> bool:
        """Refuse to go on with another store; False for one that has no finished window yet."""
        layout = StoreLayout.from_attributes(attributes, self.files.root)
        if self.dtype_open and layout.dtype in ("float16", "bfloat16"):
            self.layout = replace(self.layout, dtype=layout.dtype)
        held, wanted = layout.to_attributes() | attributes["identity"], self.layout.to_attributes() | self.identity
        different = sorted(key for key in held.keys() | wanted.keys() if held.get(key) != wanted.get(key))
        if not different:
            return True
        if not attributes.get("complete") and not any(_RECORD(name) for name in self.files.sizes("")):
            return False
        key = different[0]
        raise UserError(
            f"{self.files.root} holds a store with {key}={held.get(key)} and this would be {key}={wanted.get(key)}"
            ": choose another path, or remove that store"
        )

    def agree(self, name: str, find: Callable[[], Any]) -> Any:
        """What the first process to come here found, now and after any restart."""
        name = f"{PROGRESS}/{name}.json"
        held = read_json(self.files, name)
        if held is None:
            value = find()
            with room(self.files):
                if isinstance(self.files, LocalFiles):
                    _create_first(self.files, name, value)
                else:
                    write_json(self.files, name, value)
            held = read_json(self.files, name)
        return held

    def mine(self, window: int) -> bool:
        return window % self.process_count == self.process_index

    def done(self, split: str, window: int) -> bool:
        """All shards of this window are in place."""
        return self.files.read(_record_name(split, window)) is not None

    def window(self, split: str, window: int, rows: int) -> Window:
        """An empty window of at most `rows` rows, or one that was cut off."""
        order = window_order(rows, self.identity["seed"], window)
        if 2 * rows * self.layout.row_bytes <= self.memory:
            return Window(self.layout, rows, order, self.channel_scale, self._spare.pop() if self._spare else None)
        if isinstance(self.files, LocalFiles):
            files: Files = self.files
        else:
            self._aside = self._aside or tempfile.TemporaryDirectory(prefix="crosslace-")
            files = LocalFiles(self._aside.name)
        with room(files):
            name = f"{_prefix(split)}{PROGRESS}/spill-{window}"
            return SpilledWindow(self.layout, rows, order, self.channel_scale, files, name)

    def write(self, split: str, window: int, content: Window) -> None:
        """Shuffle a window and write its shards, beside whatever the caller does next; one window at a time."""
        self.wait()
        self._writing = [self._pool.submit(self._write, split, window, content)]

    def _write(self, split: str, window: int, content: Window) -> None:
        layout = self.layout
        first_shard = window * self.shuffle_rows // layout.shard_rows
        content.close()

        def write(shard: int, name: str) -> None:
            key = _prefix(split) + layout.arrays[name].shard_key(first_shard + shard)
            content.write_shard(self.files, key, name, shard, self.sync)
            self._lock.refresh()

        with room(self.files):
            with ThreadPoolExecutor(_THREADS, thread_name_prefix="crosslace-shards") as pool:
                shards = range(layout.shards(content.filled))
                tasks = [pool.submit(write, shard, name) for shard in shards for name in layout.arrays]
                for task in tasks:
                    task.result()
            with self.files.writing(_record_name(split, window)) as out:
                out.write(content.record())
        left = content.drop()
        if left:
            self._spare = [left]

    def wait(self) -> None:
        """Wait for the shards that are being written."""
        for future in self._writing:
            future.result()
        self._writing = []

    def finish(self, windows: dict[str, int], attributes: dict[str, Any]) -> bool:
        """Close the store if the windows of every split are all in place; False while other processes still write."""
        self.wait()
        records = {}
        for split, count in windows.items():
            found = [self.files.read(_record_name(split, window)) for window in range(count)]
            records[split] = [read_record(self.layout, data) for data in found if data is not None]
            if len(records[split]) < count:
                # another process may have closed the store and removed the records since
                held = read_json(self.files, "zarr.json")
                self.complete = bool(held and held["attributes"]["complete"])
                return self.complete
        with room(self.files):
            for split in sorted(windows):
                self._close(split, records[split], attributes)
            self._tidy()
        self.complete = True
        return True

    def _close(self, split: str, records: list[tuple[dict[str, Any], Moments]], attributes: dict[str, Any]) -> None:
        """The metadata of one split; `held_out` sorts before `train`, whose group is the root and comes last."""
        rows = sum(facts["filled"] for facts, _ in records)
        counts: dict[str, int] = {}
        moments = Moments(self.layout)
        for facts, part in records:
            moments.merge(part)
            for reason, count in facts["counts"].items():
                counts[reason] = counts.get(reason, 0) + count
        whole = self.layout.to_attributes() | {"identity": self.identity} | self.identity | attributes
        whole["masked"] = {**attributes.get("masked", {}), "rows": counts}
        whole |= {"rows": rows, "statistics": statistics_attributes(self.layout, moments, rows), "complete": True}
        for spec in self.layout.arrays.values():
            write_json(self.files, f"{_prefix(split)}{spec.name}/zarr.json", self.layout.array_metadata(spec, rows))
        write_json(self.files, f"{_prefix(split)}zarr.json", group_metadata(whole))

    def _tidy(self) -> None:
        for name in self.files.sizes(""):
            if _ASIDE(PurePath(name).name):
                self.files.remove(name)
        self.files.remove(f"{HELD_OUT}/{PROGRESS}")
        self.files.remove(PROGRESS)


def write_store(
    path: str | PathLike,
    sites: dict[str, torch.Tensor],
    token: torch.Tensor,
    position: torch.Tensor,
    document: torch.Tensor,
    layout: StoreLayout,
    identity: dict[str, Any] | None = None,
    held_out: int = 0,
    **options: Any,
) -> None:
    """A store of rows [N, L, D] that are at hand, the last `held_out` of them as its held-out split.

    `options` are those of `StoreWriter`.
    """
    rows = len(token) - held_out
    splits = {"train": slice(0, rows)} | ({"held_out": slice(rows, None)} if held_out else {})
    with StoreWriter(path, layout, {"seed": 0} | (identity or {}), **options) as writer:
        extra: dict[str, Any] = {}
        if layout.dtype == "int8":
            writer.channel_scale = {site: channel_scale(x) for site, x in sites.items()}
            extra["int8"] = int8_attributes(writer.channel_scale)
        windows = {}
        for split, part in splits.items():
            places = range(len(token))[part]
            # the last window takes what would be too few for one of its own
            starts = [
                *range(places.start, max(places.start + 1, places.stop - writer.shuffle_rows + 1), writer.shuffle_rows)
            ]
            windows[split] = len(starts)
            for index, (start, stop) in enumerate(zip(starts, [*starts[1:], places.stop])):
                if not writer.done(split, index):
                    window = writer.window(split, index, stop - start)
                    if not window.batches:
                        chosen = {site: x[start:stop] for site, x in sites.items()}
                        window.append(chosen, token[start:stop], position[start:stop], document[start:stop])
                    writer.write(split, index, window)
        writer.finish(windows, extra)


def int8_attributes(scales: dict[str, torch.Tensor]) -> dict[str, Any]:
    """How to read int8: value * SITE_scale[row, layer, channel // group] * channel_scale[layer, channel]."""
    return {"group": GROUP, "channel_scale": {site: scale.tolist() for site, scale in scales.items()}}


def _prefix(split: str) -> str:
    return "" if split == "train" else f"{split}/"


def _record_name(split: str, window: int) -> str:
    return f"{_prefix(split)}{PROGRESS}/window-{window}.npz"


def group_metadata(attributes: dict[str, Any]) -> dict[str, Any]:
    """The `zarr.json` of a group."""
    return {"zarr_format": 3, "node_type": "group", "attributes": attributes}


def statistics_attributes(layout: StoreLayout, moments: Moments, rows: int) -> dict[str, Any]:
    """Mean and mean square of each site, or the sentence that says where a number left its dtype's range."""
    found = {}
    for site in layout.sites:
        if not np.isfinite(moments.square[site]).all():
            layer = layout.layers[int(np.argmin(np.isfinite(moments.square[site])))]
            raise UserError(
                f"{site} of layer {layer} is not finite (in {layout.dtype}, or in the model itself): cache with "
                "store.dtype=bfloat16 or float32, and the model with model.dtype=float32 if that does not help"
            )
        found[site] = {
            "mean": (moments.total[site] / max(rows, 1)).astype(np.float32).tolist(),
            "mean_square": (moments.square[site] / max(rows, 1)).astype(np.float32).tolist(),
        }
    return found


def default_memory() -> int:
    """A quarter of the machine's memory: what windows may take before they spill to disk."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 4


def _create_first(files: LocalFiles, name: str, value: Any) -> None:
    """Write a file unless somebody has written it: a hard link cannot replace one."""
    aside = f"{name}.{uuid4().hex}.part"
    write_json(files, aside, value)
    try:
        os.link(files.folder / aside, files.folder / name)
    except FileExistsError:
        return
    finally:
        files.remove(aside)


class StoreLock:
    """Keeps a second writer out. On a disk the system lets go of it when the process dies; at a URL it is a note that
    grows old."""

    def __init__(self, files: Files, process_index: int):
        self._files = files
        self._name = f"{PROGRESS}/lock-{process_index}"
        self._descriptor: int | None = None
        self._id = uuid4().hex
        self._written = 0.0

    def take(self) -> None:
        if isinstance(self._files, LocalFiles):
            path = Path(self._files.root, self._name)
            path.parent.mkdir(parents=True, exist_ok=True)
            self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT)
            try:
                fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                self.release()
                self._refuse()
            return
        held = read_json(self._files, self._name)
        if held and held["id"] != self._id and time.time() - held["time"] < REMOTE_LOCK_SECONDS:
            self._refuse()
        self.refresh()

    def refresh(self) -> None:
        if not self._files.local and time.time() - self._written > REMOTE_LOCK_SECONDS / 4:
            self._written = time.time()
            write_json(self._files, self._name, {"id": self._id, "time": self._written})

    def release(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
        elif not self._files.local and self._written:
            self._files.remove(self._name)

    def _refuse(self) -> None:
        raise UserError(f"another process is writing {self._files.root}: wait for it, or choose another path")
