"""Batches fetched ahead of their use, in threads, with the time that the user of them had to wait.

step n -> (epoch, place) -> rows [B, L, D] from the source, in a thread -> on the device, by a copy stream -> the caller
"""

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
        # one stream for as long as the loader lives: memory that the allocator has given a stream stays that stream's
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
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
        if self._stream is not None:
            reader = torch.cuda.current_stream(self._device)
            for values in batch.sites.values():
                values.record_stream(reader)  # the copy stream may not write there before the reader's work is done
        self.step += 1
        self._ask()
        return batch

    def _ask(self) -> None:
        while len(self._ahead) < self._prefetch and (self.stop is None or self._asked < self.stop):
            self._ahead.append(self._pool.submit(self._get, self._asked))
            self._asked += 1

    def _get(self, step: int) -> Batch:
        batch = self._fetch(step)
        if self._stream is None:
            return batch.to(self._device, self._dtype)
        # beside the training step; int8 travels as it is and becomes numbers there. The copy is over before the batch
        # is handed out, and before the pinned memory goes back
        with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            moved = batch.to(self._device, self._dtype, non_blocking=True)
            done = torch.cuda.Event()
            done.record(self._stream)
        done.synchronize()
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
