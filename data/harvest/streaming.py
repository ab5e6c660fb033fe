"""A store that no disk could hold: a ring of windows, harvested ahead of the training that reads them.

The rows, their windows and their shards are those of a store on disk with the same settings. An epoch takes the
windows in turn, and within each one its blocks in an order of the epoch's own, so a batch is a function of (seed,
epoch, step) here as there: which rows have been seen follows from the step alone, and a training that goes on from a
checkpoint goes on with the very next row. A window that is asked for again, in the next epoch or after a restart, is
harvested again unless the ring still has it.

Each process harvests the windows that fall to it; all read all windows, from one folder. A window stays while any
process may still read it.
"""

import json
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..errors import Progress, SettingsError, UserError, silent
from ..store import (
    HELD_OUT,
    ActivationStore,
    Batch,
    Blocks,
    Order,
    Place,
    ShardedRows,
    ShardWriter,
    Span,
    Statistics,
    StoreLock,
    Window,
    averages,
    read_json,
    read_record,
    room,
    window_sizes,
    write_json,
)
from ..units import format_bytes, parse_bytes
from .harvest import Harvester, cache_split, open_writer
from .window_plan import PlannedWindow

_POLL_SECONDS = 0.2


def open_streaming(
    harvester: Harvester, progress: Progress = silent, process_index: int = 0, process_count: int = 1
) -> tuple[ActivationStore, ActivationStore | None]:
    """The training rows as a ring in the folder `store.path`, and the held-out rows as an ordinary store beside it."""
    settings = harvester.settings
    harvester.lm = harvester.lm.twin()
    if not settings.path or "://" in settings.path:
        raise SettingsError(f"store.path={settings.path!r} is no local folder, which store.mode=streaming needs")
    held_out_path = str(Path(settings.path, HELD_OUT))
    with open_writer(harvester, held_out_path, process_index, process_count, held_out_only=True) as writer:
        if writer.complete or not settings.held_out_rows:
            harvester.learn(_sample_of(held_out_path) if writer.complete else writer.agree("sample", harvester.sample))
        else:
            harvester.take_sample(writer)
            count = cache_split(harvester, writer, HELD_OUT, "train", progress)
            writer.finish({"train": count}, harvester.attributes())
    source = RingSource(harvester, progress, process_index, process_count)
    return ActivationStore(source), ActivationStore.open(held_out_path) if settings.held_out_rows else None


def _sample_of(path: str) -> dict[str, Any]:
    source: Any = ActivationStore.open(path).source
    return source.attributes["sample"] | {"channel_scale": {s: x.tolist() for s, x in source.channel_scale.items()}}


class RingSource:
    """Rows of which a part lies on disk, the rest being harvested when its turn comes."""

    def __init__(self, harvester: Harvester, progress: Progress, process_index: int, process_count: int):
        settings = harvester.settings
        self.harvester, self.progress = harvester, progress
        self.process_index, self.process_count = process_index, process_count
        self.layout = harvester.layout
        self.place = Place(Path(settings.path, "ring"))
        self.window_rows = self.layout.shards(settings.shuffle_rows) * self.layout.shard_rows
        self.memory = settings.memory_bytes(process_count)
        self.window_limits = self._plan()
        self.rows = sum(self.window_limits)
        self.capacity = self._capacity(parse_bytes(settings.budget))
        self.windows = [(index * self.window_rows, rows) for index, rows in enumerate(self.window_limits)]
        self._lock = StoreLock(self.place, f"lock-{process_index}")
        self._lock.take()

        end = self.windows[-1][0] + self.layout.shards(self.window_limits[-1]) * self.layout.shard_rows
        self._writer = ShardWriter(self.place, self.layout, "rows", end, None)
        self._shards = ShardedRows(self.place, "rows/", self.layout, self.windows, harvester.channel_scale)
        self.sites, self.layers, self.d_model = self.layout.sites, self.layout.layers, self.layout.d_model
        self.dtype: torch.dtype = self._shards.dtype
        self._order: tuple[int, Order] | None = None

        self._changed = threading.Condition()
        self._reading: Counter[int] = Counter()
        self._waiting = 0
        self._at: int | None = None
        self._failure: BaseException | None = None
        self._closed = False
        self._plans: Iterator[PlannedWindow] | None = None
        self._present = {window for window in range(self.count) if self._on_disk(window)}
        self._clear_remains()
        self._thread = threading.Thread(target=self._refill, name="crosslace-ring", daemon=True)
        self._thread.start()

        self.statistics = self._first_window()
        self.attributes: dict[str, Any] = harvester.identity() | self.layout.to_attributes() | harvester.attributes()

    @property
    def count(self) -> int:
        return len(self.window_limits)

    # -- what the rows are ---------------------------------------------------------------------------------------

    def _plan(self) -> list[int]:
        """The rows of every window, counted over the corpus once and kept."""
        identity = json.loads(json.dumps(self.harvester.identity() | self.layout.to_attributes()))
        held = read_json(self.place, "plan.json")
        if held is None:
            rows = []
            sizes = window_sizes([self.harvester.settings.train_rows], self.window_rows)
            for planned in self.harvester.windows("train", sizes):
                rows.append(self._exact(planned).rows)
                self.progress("counting the corpus", sum(rows), self.harvester.settings.train_rows)
            if not rows:
                raise UserError(
                    "the dataset has no text to train on: check dataset.name, dataset.split, dataset.column"
                )
            held = {"identity": identity, "rows": rows}
            with room(self.place):
                write_json(self.place, "plan.json", held)
        if held["identity"] != identity:
            raise UserError(
                f"{self.place.root} is a ring of other settings or another model: choose another store.path"
            )
        return held["rows"]

    def _exact(self, planned: PlannedWindow) -> PlannedWindow:
        """Every window has a number of rows that is known before the model runs: steps follow from it. Should more
        rows be sinks than was foreseen, some of the others come twice."""
        certain = int(planned.candidates / (1 + self.harvester.margin))
        return planned._replace(rows=max(1, min(planned.rows, certain)))

    def _capacity(self, budget: int) -> int:
        rows = max(self.window_limits)
        weight = self.layout.total_bytes(rows)
        spilled = rows * self.layout.row_bytes > self.memory
        capacity = budget // weight - spilled - (self.process_count > 1)
        if capacity < 2 and self.count > capacity:
            raise SettingsError(
                f"store.budget is too small: a window of {rows} rows weighs {format_bytes(weight)} and the ring needs "
                f"{2 + spilled + (self.process_count > 1)} of them; raise store.budget or lower store.shuffle_rows"
            )
        return capacity

    def _first_window(self) -> Statistics:
        """Statistics of the first window, which stand for all rows: nobody has seen the others yet."""
        while (held := self.place.read("statistics.npz")) is None:
            with self._changed:
                self._raise_failure()
                self._changed.wait(_POLL_SECONDS)
        facts, moments = read_record(self.layout, held)
        means, squares = averages(self.layout, moments, facts["rows"])
        read = lambda values: {site: torch.from_numpy(x).float() for site, x in values.items()}
        return Statistics(read(means), read(squares), self.rows)

    def order(self, epoch: int) -> Order:
        """Windows in turn, the blocks of a window in an order of the epoch."""
        held = self._order
        if held is None or held[0] != epoch:
            seed, size = self.harvester.settings.seed, self.layout.block_rows
            parts = [Blocks.of([w], size).shuffled(seed, epoch, index) for index, w in enumerate(self.windows)]
            lengths = np.concatenate([np.diff(part.ends, prepend=0) for part in parts])
            held = self._order = epoch, Order(np.concatenate([part.blocks for part in parts]), lengths)
        return held[1]

    def stored_order(self) -> Order:
        return self._shards.stored_order()

    # -- reading -------------------------------------------------------------------------------------------------

    def read(self, spans: list[Span], sites: tuple[str, ...], places: list[int], pin: bool = False) -> Batch:
        per_window = self.window_rows // self.layout.block_rows
        wanted = list(dict.fromkeys(min(span.block // per_window, self.count - 1) for span in spans))
        with self._changed:
            self._reading.update(wanted)
            # a thread that is one batch behind the others moves nothing
            if wanted and (self._at is None or wanted[-1] != (self._at - 1) % self.count):
                self._at = wanted[-1]
                self._publish()
            self._changed.notify_all()
        try:
            self._await(wanted)
            return self._shards.read(spans, sites, places, pin)
        finally:
            with self._changed:
                self._reading.subtract(wanted)
                self._changed.notify_all()

    def _await(self, wanted: list[int]) -> None:
        with self._changed:
            self._waiting += 1
            try:
                while not all(self._is_present(window) for window in wanted):
                    self._raise_failure()
                    self._changed.wait(_POLL_SECONDS)
            finally:
                self._waiting -= 1

    def _is_present(self, window: int) -> bool:
        if window % self.process_count != self.process_index and window not in self._present and self._on_disk(window):
            self._present.add(window)
        return window in self._present

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure

    def verify(self, progress: Progress) -> None:
        """Every byte of a ring is checked when it is read."""

    def close(self) -> None:
        """Stop harvesting; what the ring has stays."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join()
        self._lock.release()

    # -- refilling -----------------------------------------------------------------------------------------------

    def _kept(self, at: int) -> set[int]:
        """The windows that a reader at `at` may want: the one before, its own, and those that come."""
        ahead = self.count if self.capacity >= self.count else self.capacity - 1
        return {(at + step) % self.count for step in range(-1, ahead)}

    def _refill(self) -> None:
        try:
            while (window := self._await_work()) is not None:
                self._harvest(window)
                with self._changed:
                    self._present.add(window)
                    self._changed.notify_all()
        except BaseException as failure:
            with self._changed:
                self._failure = failure
                self._changed.notify_all()

    def _await_work(self) -> int | None:
        """The next window to harvest, once there is room for it; None when the ring is closed."""
        with self._changed:
            while not self._closed:
                window, dropped = self._next(), self._drop_unwanted()
                # room comes when a reader has finished with its old window, unless it is waiting for a new one itself
                if window is not None and (dropped or self._waiting):
                    return window
                self._changed.wait(_POLL_SECONDS if self.process_count > 1 else None)
        return None

    def _next(self) -> int | None:
        """The first window of this process that is wanted and not there."""
        if self._at is None:
            first = self.process_index == 0 and self.place.read("statistics.npz") is None
            return 0 if first and 0 not in self._present else None
        at, before = self._at, (self._at - 1) % self.count
        asked = {window for window, readers in self._reading.items() if readers}
        wanted = self._kept(at) - ({before} if self.capacity < self.count else set()) | asked
        mine = [w for w in wanted - self._present if w % self.process_count == self.process_index]
        return min(mine, key=lambda w: (w not in asked, (w - before) % self.count), default=None)

    def _drop_unwanted(self) -> bool:
        """Remove windows that nobody wants; False while one of them is still being read."""
        if self._at is None:
            return True
        kept = {window for at in self._positions(self._at) for window in self._kept(at)}
        done = True
        for window in sorted(self._present - kept):
            if self._reading[window] > 0:
                done = False
                continue
            self._present.discard(window)
            if window % self.process_count == self.process_index:
                self._remove(window)
            self._shards.forget(self._shards_of(window))
        return done

    def _positions(self, own: int) -> list[int]:
        """Where every process reads."""
        if self.process_count == 1:
            return [own]
        held = [read_json(self.place, f"position-{index}.json") for index in range(self.process_count)]
        return [own] + [position for position in held if position is not None]

    def _publish(self) -> None:
        if self.process_count > 1:
            write_json(self.place, f"position-{self.process_index}.json", self._at, durable=False)

    def _harvest(self, window: int) -> None:
        start, rows = self.windows[window]
        # a window that memory has no room for waits beside the ring, or where the user has said
        beside = Path(self.harvester.settings.scratch or self.place.root, f"spill-{window}")
        scratch = beside if rows * self.layout.row_bytes > self.memory else None
        with room(self.place):
            seed, scales = self.harvester.settings.seed, self.harvester.channel_scale
            content = Window(self.layout, rows, seed, window, scales, scratch)
            self.harvester.fill(self._exact(self._planned(window)), content)
            if not content.filled:
                raise UserError(f"every position of window {window} is masked: mask fewer with store.sinks=first")
            content.close(rows)
            self._writer.write(start, rows, content, False)
            record = content.record(start)
            if window == 0 and self.place.read("statistics.npz") is None:
                self.place.write("statistics.npz", record)
            self.place.write(_record_name(window), record, durable=False)
        content.drop()

    def _planned(self, window: int) -> PlannedWindow:
        """The sequences of a window; windows come in turn, and any other one costs reading the corpus up to it."""
        for planned in self._plans or ():
            if planned.index == window:
                return planned
            if planned.index > window:
                break
        sizes = window_sizes([self.harvester.settings.train_rows], self.window_rows)
        self._plans = self.harvester.windows("train", sizes)
        return next(planned for planned in self._plans if planned.index == window)

    # -- files ---------------------------------------------------------------------------------------------------

    def _shards_of(self, window: int) -> range:
        start, rows = self.windows[window]
        first = start // self.layout.shard_rows
        return range(first, first + self.layout.shards(rows))

    def _keys(self, window: int) -> list[str]:
        specs = self.layout.arrays.values()
        return [f"rows/{spec.shard_key(shard)}" for shard in self._shards_of(window) for spec in specs]

    def _on_disk(self, window: int) -> bool:
        return self.place.read(_record_name(window)) is not None

    def _remove(self, window: int) -> None:
        # the record first: a window without one is none
        for name in (_record_name(window), *self._keys(window), f"spill-{window}"):
            self.place.remove(name)

    def _clear_remains(self) -> None:
        """Remove what a killed process left of windows that were being written or removed."""
        for window in range(self.process_index, self.count, self.process_count):
            if window not in self._present:
                self._remove(window)


def _record_name(window: int) -> str:
    return f"window-{window}.npz"
