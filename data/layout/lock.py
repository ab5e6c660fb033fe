"""One writer at a time: the system's lock where a folder has one, else a note that its writer keeps fresh."""

import json
import os
import threading
import time
from uuid import uuid4

from ..errors import UserError
from .place import Place, read_json

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

NOTE_SECONDS = 120.0
"""A note of this age was left by a writer that is gone."""


class StoreLock:
    """On a disk the system lets go of it when the process dies. Some network folders refuse such locks, and URLs have
    none: there a note with a time stands for it, and two writers that come in the same second may both get in; what
    they then write is the same."""

    def __init__(self, place: Place, name: str):
        self._place, self._name, self._id = place, name, uuid4().hex
        self._descriptor: int | None = None
        self._ended: threading.Event | None = None

    def take(self) -> None:
        if not self._take_file():
            held = read_json(self._place, f"{self._name}.note")
            if held and time.time() - held["time"] < NOTE_SECONDS:
                self._refuse()
            self._note()
            self._ended = threading.Event()
            threading.Thread(target=self._keep_fresh, daemon=True, name="crosslace-lock").start()

    def _take_file(self) -> bool:
        """False where this place has no such locks."""
        if not self._place.local or fcntl is None:
            return False
        path = self._place.folder / self._name
        path.parent.mkdir(parents=True, exist_ok=True)
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as cause:
            self.release()
            if isinstance(cause, BlockingIOError):
                self._refuse()
            return False
        return True

    def _note(self) -> None:
        note = json.dumps({"id": self._id, "time": time.time()}).encode()
        self._place.write(f"{self._name}.note", note, durable=False)

    def _keep_fresh(self) -> None:
        ended = self._ended
        while ended is not None and not ended.wait(NOTE_SECONDS / 4):
            self._note()

    def release(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
        if self._ended is not None:
            self._ended.set()
            self._ended = None
            self._place.remove(f"{self._name}.note")

    def _refuse(self) -> None:
        raise UserError(f"another process is writing {self._place.root}: wait for it, or choose another path")
