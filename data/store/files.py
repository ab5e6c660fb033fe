"""The few file operations that a store needs, on a local folder or on any fsspec URL."""

import json
import os
import shutil
import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path
from typing import IO, Any, Protocol

import fsspec
import numpy as np

from ..errors import UserError, out_of_room
from .outfile import LEAST_BYTES, OutFile

_OPEN_FILES = 256
MAX_PARTS = 512  # pieces of one vectored write; systems take 1,024


class Files(Protocol):
    """Names are relative to the root and use `/`. Writes are all or nothing."""

    root: str
    local: bool

    def read(self, name: str) -> bytes | None:
        """All of a file, or None where there is none."""
        ...

    def writing(self, name: str, sync: bool = True, size: int = 0) -> Any:
        """A context with a file to write, which appears under its name only when the context ends well.

        `size` is what it will weigh, where that is known to be much.
        """
        ...

    def read_into(self, name: str, offset: int, buffers: list[np.ndarray]) -> None:
        """Fill uint8 buffers, one after another, from one run of bytes; EOFError where the file is too short."""
        ...

    def sizes(self, folder: str) -> dict[str, int]:
        """Every file below a folder, by name relative to the root, with its size."""
        ...

    def remove(self, name: str) -> None:
        """A file or a folder with all in it; nothing happens where there is none."""
        ...

    def free(self) -> int | None:
        """Bytes of room, or None where nobody can tell."""
        ...


def open_files(path: str | os.PathLike) -> Files:
    path = os.fspath(path)
    if "://" in path and not path.startswith("file://"):
        return RemoteFiles(path)
    return LocalFiles(path.removeprefix("file://"))


def read_json(files: Files, name: str) -> Any | None:
    found = files.read(name)
    return None if found is None else json.loads(found)


def write_json(files: Files, name: str, value: Any, sync: bool = True) -> None:
    with files.writing(name, sync) as out:
        out.write(json.dumps(value, indent=1, sort_keys=True).encode())


@contextmanager
def room(files: Files) -> Iterator[None]:
    """Turn a full disk into a sentence."""
    try:
        yield
    except OSError as cause:
        if not out_of_room(cause):
            raise
        raise UserError(
            f"no room is left for {files.root}: free some and run `crosslace cache` with the same settings, which goes "
            "on where it stopped"
        ) from cause


def write_parts(out: IO[bytes] | OutFile, parts: list[np.ndarray]) -> None:
    """Write uint8 arrays one after another into a file that `Files.writing` gave."""
    if not isinstance(out, FileIO):
        for part in parts:
            out.write(part.data)
        return
    while parts:
        parts = _after(parts, os.writev(out.fileno(), parts[:MAX_PARTS]))  # type: ignore[arg-type]


def read_fully(descriptor: int, name: str, offset: int, buffers: list[np.ndarray]) -> None:
    """Fill uint8 arrays with the bytes of an open file from `offset` on."""
    got = os.preadv(descriptor, buffers, offset)  # type: ignore[arg-type]
    wanted = sum(buffer.nbytes for buffer in buffers)
    while got < wanted:
        # a signal or a network folder may cut a read short
        rest = _after(buffers, got)
        more = os.preadv(descriptor, rest, offset + got)  # type: ignore[arg-type]
        if not more:
            raise EOFError(f"{name} ends at byte {offset + got}")
        got += more


class LocalFiles:
    """A folder. Reads go straight from the page cache into the caller's buffers."""

    local = True

    def __init__(self, root: str):
        self.root = root
        self.folder = Path(root)
        self._descriptors: OrderedDict[str, int] = OrderedDict()
        self._lock = threading.Lock()

    def read(self, name: str) -> bytes | None:
        try:
            return (self.folder / name).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None

    @contextmanager
    def writing(self, name: str, sync: bool = True, size: int = 0) -> Iterator[FileIO | OutFile]:
        target = self.folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        # one name per process and thread: a second writer, or the rest of a killed one, is never half overwritten
        aside = target.with_name(f".{target.name}.{os.getpid()}-{threading.get_ident()}.part")
        try:
            with OutFile(aside) if size >= LEAST_BYTES else open(aside, "wb", buffering=0) as out:
                yield out
                out.flush()
                if sync:
                    os.fsync(out.fileno())
            os.replace(aside, target)
        except BaseException:
            aside.unlink(missing_ok=True)
            raise

    def read_into(self, name: str, offset: int, buffers: list[np.ndarray]) -> None:
        with self.descriptors([name]) as (descriptor,):
            read_fully(descriptor, name, offset, buffers)

    @contextmanager
    def descriptors(self, names: list[str]) -> Iterator[list[int]]:
        """Open files, duplicated for the time of one read so that another thread may drop them from the cache."""
        own: list[int] = []
        try:
            with self._lock:
                for name in names:
                    own.append(os.dup(self._descriptor(name)))
            yield own
        finally:
            for descriptor in own:
                os.close(descriptor)

    def _descriptor(self, name: str) -> int:
        descriptor = self._descriptors.get(name)
        if descriptor is None:
            descriptor = self._descriptors[name] = os.open(self.folder / name, os.O_RDONLY)
            if len(self._descriptors) > _OPEN_FILES:
                os.close(self._descriptors.popitem(last=False)[1])
        self._descriptors.move_to_end(name)
        return descriptor

    def sizes(self, folder: str) -> dict[str, int]:
        found = {}
        # another process may remove files and folders in the meantime: os.walk passes over the ones that are gone
        for place, _, names in os.walk(self.folder / folder):
            for path in (Path(place, name) for name in names):
                with suppress(FileNotFoundError):
                    found[str(path.relative_to(self.folder))] = path.stat().st_size
        return found

    def forget(self, name: str) -> None:
        """Let go of a file that was read, so that its room is free once it is removed."""
        with self._lock:
            for held in [held for held in self._descriptors if held == name or held.startswith(f"{name}/")]:
                os.close(self._descriptors.pop(held))

    def remove(self, name: str) -> None:
        self.forget(name)
        target = self.folder / name
        if target.is_dir():
            while target.exists():
                with suppress(FileNotFoundError):  # another process removes it too
                    shutil.rmtree(target)
        else:
            target.unlink(missing_ok=True)

    def free(self) -> int | None:
        standing = next(p for p in [self.folder.absolute(), *self.folder.absolute().parents] if p.exists())
        return shutil.disk_usage(standing).free

    def __del__(self, close=os.close):  # when Python ends, `os` may be gone before this is
        for descriptor in self._descriptors.values():
            close(descriptor)


def _after(buffers: list[np.ndarray], skip: int) -> list[np.ndarray]:
    rest = []
    for buffer in buffers:
        if skip < buffer.nbytes:
            rest.append(buffer[skip:])
        skip = max(0, skip - buffer.nbytes)
    return rest


class RemoteFiles:
    """An fsspec URL. Object stores show an object only when it is whole, which makes each write all or nothing."""

    local = False

    def __init__(self, root: str):
        self.root = root.rstrip("/")
        self.system, self.base = fsspec.core.url_to_fs(self.root)

    def _at(self, name: str) -> str:
        return f"{self.base}/{name}" if name else self.base

    def read(self, name: str) -> bytes | None:
        try:
            return self.system.cat_file(self._at(name))
        except FileNotFoundError:
            return None

    @contextmanager
    def writing(self, name: str, sync: bool = True, size: int = 0) -> Iterator[Any]:
        self.system.makedirs(self._at(name).rsplit("/", 1)[0], exist_ok=True)
        out = self.system.open(self._at(name), "wb", autocommit=False)
        try:
            yield out
            out.close()
        except BaseException:
            out.discard()
            raise
        out.commit()

    def read_into(self, name: str, offset: int, buffers: list[np.ndarray]) -> None:
        wanted = sum(buffer.nbytes for buffer in buffers)
        got = self.system.cat_file(self._at(name), start=offset, end=offset + wanted)
        if len(got) < wanted:
            raise EOFError(f"{name} ends at byte {offset + len(got)}")
        place, source = 0, np.frombuffer(got, np.uint8)
        for buffer in buffers:
            buffer[:] = source[place : place + buffer.nbytes]
            place += buffer.nbytes

    def sizes(self, folder: str) -> dict[str, int]:
        if not self.system.exists(self._at(folder)):
            return {}
        found = self.system.find(self._at(folder), detail=True)
        base = self.base.rstrip("/") + "/"
        return {name.split(base, 1)[1]: info["size"] for name, info in found.items()}

    def remove(self, name: str) -> None:
        if self.system.exists(self._at(name)):
            self.system.rm(self._at(name), recursive=True)
            self.system.invalidate_cache()

    def free(self) -> int | None:
        return None
