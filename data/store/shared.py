"""One reading of a store for trainings that step in turn: each batch is fetched, and brought to the device, once."""

import time
from collections.abc import Sequence
from typing import Any

import torch

from .batch import Batch, RowSource
from .loader import Loader
from .store import ActivationStore


class SharedStore(ActivationStore):
    """A store whose loaders of one batch size, beginning at one step, go in step with each other."""

    def __init__(
        self,
        source: RowSource,
        layers: Sequence[int] | None = None,
        sites: Sequence[str] | None = None,
        readings: "dict[Any, Reading] | None" = None,
    ) -> None:
        super().__init__(source, layers, sites)
        self._readings: dict[Any, Reading] = {} if readings is None else readings

    def select(self, layers: Sequence[int], sites: Sequence[str]) -> "SharedStore":
        return SharedStore(self.source, layers, sites, self._readings)

    def loader(
        self,
        size: int,
        start_step: int = 0,
        steps: int | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        layers: Sequence[int] | None = None,
        rank: int = 0,
        world: int = 1,
        prefetch: int = 3,
    ) -> Any:
        key = (size, start_step, str(device), dtype, tuple(layers or self.layers), self.sites, rank, world)
        if key not in self._readings:
            own = super().loader(size, start_step, steps, device, dtype, layers, rank, world, prefetch)
            self._readings[key] = Reading(own)
        reading = self._readings[key]
        turn = Turn(reading, start_step, steps, lambda: self._readings.pop(key, None))
        if reading.loader.stop is not None:  # it goes as far as the reader that goes furthest
            reading.loader.stop = None if turn.stop is None else max(reading.loader.stop, turn.stop)
        return turn


class Reading:
    """A loader, and the batch that it gave last."""

    def __init__(self, loader: Loader) -> None:
        self.loader, self.readers = loader, 0
        self.last: Batch | None = None

    def at(self, step: int) -> Batch:
        """The batch of a step: the last one, or the next."""
        if step == self.loader.step:
            self.last = next(self.loader)
        if self.last is None or step != self.loader.step - 1:
            raise ValueError(f"step {step} was asked for, and the readers stand at step {self.loader.step - 1}")
        return self.last


class Turn:
    """One training's way through a reading; what `Loader` is to a training that reads alone."""

    def __init__(self, reading: Reading, start_step: int, steps: int | None, ended: Any) -> None:
        self.reading, self.step, self._ended = reading, start_step, ended
        self.stop = None if steps is None else start_step + steps
        self.stall_seconds = 0.0
        reading.readers += 1

    def __iter__(self) -> "Turn":
        return self

    def __next__(self) -> Batch:
        if self.stop is not None and self.step >= self.stop:
            raise StopIteration
        begun = time.perf_counter()
        batch = self.reading.at(self.step)
        self.stall_seconds += time.perf_counter() - begun
        self.step += 1
        return batch

    def __enter__(self) -> "Turn":
        return self

    def __exit__(self, *_: object) -> None:
        """The last to leave stops the reading."""
        self.reading.readers -= 1
        if self.reading.readers == 0:
            self.reading.loader.close()
            self._ended()
