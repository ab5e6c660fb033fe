"""Batches fetched ahead of their use, in threads, with the time that the user of them had to wait."""

import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from .batch import Batch

_THREADS = 2


class Loader:
    """An iterator of batches. `step` is the next one's number; `stall_seconds` grows while the caller waits."""

    def __init__(
        self,
        fetch: Callable[[int], Batch],
        start_step: int,
        steps: int | None,
        prefetch: int,
        device: torch.device,
        dtype: torch.dtype | None,
    ):
        self.step = start_step
        self.stop = None if steps is None else start_step + steps
        self.stall_seconds = 0.0
        self._fetch = fetch
        self._device, self._dtype = device, dtype
        self._ahead: deque[Future[Batch]] = deque()
        self._asked = start_step
        self._prefetch = max(1, prefetch)
        self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="crosslace-loader")

    def __iter__(self) -> "Loader":
        return self

    def __next__(self) -> Batch:
        if self.stop is not None and self.step >= self.stop:
            self.close()
            raise StopIteration
        self._ask()
        begun = time.perf_counter()
        batch = self._ahead.popleft().result()
        self.stall_seconds += time.perf_counter() - begun
        self.step += 1
        self._ask()
        return batch

    def _ask(self) -> None:
        while len(self._ahead) < self._prefetch and (self.stop is None or self._asked < self.stop):
            self._ahead.append(self._pool.submit(self._get, self._asked))
            self._asked += 1

    def _get(self, step: int) -> Batch:
        batch = self._fetch(step)
        if self._device.type != "cuda":
            return batch.to(self._device, self._dtype)
        # a stream of its own, so that the copy runs beside the training step; it is over before the batch is handed
        # out and before the pinned memory goes back to its pool
        with torch.cuda.device(self._device), torch.cuda.stream(torch.cuda.Stream(self._device)):
            moved = batch.to(self._device, self._dtype, non_blocking=True)
            torch.cuda.current_stream().synchronize()
        return moved

    def close(self) -> None:
        """Stop reading ahead."""
        for future in self._ahead:
            future.cancel()
        self._ahead.clear()
        self._pool.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> "Loader":
        return self

    def __exit__(self, *_) -> None:
        self.close()
