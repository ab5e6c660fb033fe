"""A large local file being written, past the system's page cache.

A page that the cache has not had before must be found and cleared, on a virtual machine by its host, too: that takes
more processor time than all else that a store does to its bytes, and they are on the disk only after a long `fsync`.
Here bytes are gathered in a buffer of a few MB that goes round, and go from there straight to the disk (O_DIRECT).
Where the system or the file system refuses that, the same bytes go through the cache.
"""

import errno
import fcntl
import mmap
import os
from pathlib import Path

import numpy as np

LEAST_BYTES = 8 << 20
"""What a file must weigh to be written like this."""
BUFFER_BYTES = 4 << 20
ALIGNMENT = 4096  # of memory, places and lengths: a multiple of every disk's block
_O_DIRECT: int = getattr(os, "O_DIRECT", 0)  # some systems have none
_NEW = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
_KEEP = 4

_spare: list[np.ndarray] = []  # without a lock: the operations of a list are atomic


class OutFile:
    """A new file that takes bytes in order, as a file of `open(path, "wb")` does."""

    def __init__(self, path: Path):
        self._descriptor, self.direct = _open(path)
        # memory of its own pages, aligned as O_DIRECT wants it
        self._buffer = _spare.pop() if _spare else np.frombuffer(mmap.mmap(-1, BUFFER_BYTES), np.uint8)
        self._held = self._place = 0

    def room(self) -> np.ndarray:
        """Memory for what comes next, never empty; `took` says how much of it was used."""
        if self._held == len(self._buffer):
            self._drain()
        return self._buffer[self._held :]

    def took(self, count: int) -> int:
        self._held += count
        return count

    def write(self, data: bytes | memoryview) -> int:
        left = np.frombuffer(data, np.uint8)
        while len(left):
            room = self.room()[: len(left)]
            room[:] = left[: len(room)]
            left = left[self.took(len(room)) :]
        return len(data)

    def fileno(self) -> int:
        return self._descriptor

    def flush(self) -> None:
        """Write what waits in the buffer; once, at the end."""
        length = self._place + self._held
        # a whole number of blocks, and what is too much cut off
        filled = -(-self._held // ALIGNMENT) * ALIGNMENT
        self._buffer[self._held : filled] = 0
        self._held = filled
        self._drain()
        os.ftruncate(self._descriptor, length)

    def _drain(self) -> None:
        left = self._buffer.data[: self._held]
        while left:
            done = self._put(left)
            left, self._place = left[done:], self._place + done
        self._held = 0

    def _put(self, data: memoryview) -> int:
        try:
            return os.pwrite(self._descriptor, data, self._place)
        except OSError as cause:
            if not self.direct or cause.errno != errno.EINVAL:
                raise
            # a file system that finds out only now, or a write that was cut short in the middle of a block
            self.direct = False
            fcntl.fcntl(self._descriptor, fcntl.F_SETFL, fcntl.fcntl(self._descriptor, fcntl.F_GETFL) & ~_O_DIRECT)
            return os.pwrite(self._descriptor, data, self._place)

    def __enter__(self) -> "OutFile":
        return self

    def __exit__(self, *_) -> None:
        os.close(self._descriptor)
        if len(_spare) < _KEEP:
            _spare.append(self._buffer)


def _open(path: Path) -> tuple[int, bool]:
    """A descriptor, and whether it goes past the cache."""
    if _O_DIRECT:
        try:
            return os.open(path, _NEW | _O_DIRECT, 0o666), True
        except OSError as cause:
            if cause.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
                raise
    return os.open(path, _NEW, 0o666), False
