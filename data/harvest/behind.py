"""Work beside the device's: on one pass's tensors while the next runs, and on the text of the next window."""

import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch

_PASSES_AHEAD = 2
_END: Any = object()


def ahead(items: Iterator[Any]) -> Iterator[Any]:
    """The same items, each made in a thread while the one before is used."""
    pool = ThreadPoolExecutor(1, thread_name_prefix="crosslace-ahead")
    try:
        coming = pool.submit(next, items, _END)
        while (item := coming.result()) is not _END:
            coming = pool.submit(next, items, _END)
            yield item
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


class Behind:
    """A thread that deals with one pass's sites while the device computes the next."""

    def __init__(self, device: torch.device):
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="crosslace-harvest")
        self._pending: deque[Future[None]] = deque()
        self._device = device
        self._local = threading.local()

    def do(self, work: Any, *args: Any) -> None:
        while len(self._pending) >= _PASSES_AHEAD:
            self._pending.popleft().result()
        ready = None
        if self._device.type == "cuda":
            ready = torch.cuda.Event()
            ready.record(torch.cuda.current_stream(self._device))
        self._pending.append(self._pool.submit(self._run, ready, work, args))

    def _run(self, ready: Any, work: Any, args: tuple) -> None:
        if ready is None:
            work(*args)
            return
        if not getattr(self._local, "stream", None):
            self._local.stream = torch.cuda.Stream(self._device)
        # `work` ends by copying to the host, which waits for this stream: no tensor dies before its last use
        with torch.cuda.device(self._device), torch.cuda.stream(self._local.stream):
            self._local.stream.wait_event(ready)
            work(*args)

    def wait(self) -> None:
        while self._pending:
            self._pending.popleft().result()

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)
