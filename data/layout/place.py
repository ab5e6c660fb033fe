"""Where a store lies: a local folder or an fsspec URL, through Zarr's own stores, and the small files beside arrays."""

import json
import os
import shutil
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from os import cpu_count
from pathlib import Path
from typing import Any, NamedTuple
from uuid import uuid4

import numpy as np
import zarr
from zarr.abc.store import RangeByteRequest, Store, SuffixByteRequest
from zarr.core.buffer import default_buffer_prototype
from zarr.core.buffer.cpu import Buffer
from zarr.core.sync import sync
from zarr.storage import FsspecStore, LocalStore

from ..errors import UserError, out_of_room

_FULL = ("os error 28", "os error 122", "os error 27")  # ENOSPC, EDQUOT, EFBIG as zarrs words them


class Read(NamedTuple):
    """A run of bytes of a file into uint8 buffers, one after another; an offset below zero counts from the end."""

    name: str
    offset: int
    buffers: list[np.ndarray]


class FolderStore(LocalStore):
    """Zarr's folder without its need for hard links, which some network folders lack."""

    async def set_if_not_exists(self, key: str, value: Any) -> None:
        if not await self.exists(key):
            await self.set(key, value)


class Place:
    """Names are relative to the root and use `/`. A small file is written whole or not at all."""

    def __init__(self, path: str | os.PathLike):
        path = os.fspath(path)
        self.local = "://" not in path or path.startswith("file://")
        self.root = path.removeprefix("file://") if self.local else path.rstrip("/")
        self.folder = Path(self.root)
        if not self.local:
            self._remote = self._reach()

    def _reach(self) -> FsspecStore:
        try:
            options = {"auto_mkdir": True} if self.root.startswith("local://") else {}
            return FsspecStore.from_url(self.root, storage_options=options)
        except (ImportError, ValueError) as error:  # a protocol whose package is not installed, or that nobody knows
            raise UserError(f"{self.root} cannot be reached: {error}") from error

    def store(self, read_only: bool = False) -> Store:
        """Zarr's store of this place."""
        return FolderStore(self.folder, read_only=read_only) if self.local else self._remote.with_read_only(read_only)

    def group(self, name: str = "", mode: Any = "r") -> Any:
        """The Zarr group here or below."""
        return zarr.open_group(self.store(mode == "r"), path=name, mode=mode, zarr_format=3)

    def shard_writers(self, group: str, names: Iterable[str]) -> dict[str, Any]:
        """Arrays that are written through zarrs, one thread a call: it then puts the chunks of a shard in order, so
        that the bytes are the same every time and a block lies together."""
        with zarr.config.set({"threading.max_workers": cpu_count() or 1}):  # of Zarr's own threads, made on first use
            opened: Any = zarr.open_group(LocalStore(self.folder), path=group, mode="r+")  # zarrs knows this class
        with zarr.config.set({"codec_pipeline.path": "zarrs.ZarrsCodecPipeline", "threading.max_workers": 1}):
            return {name: opened[name] for name in names}

    def read(self, name: str) -> bytes | None:
        """All of a file, or None where there is none."""
        if not self.local:
            found = sync(self._remote.get(name, default_buffer_prototype()))
            return None if found is None else found.to_bytes()
        try:
            return (self.folder / name).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None

    def write(self, name: str, data: bytes, durable: bool = True) -> None:
        if not self.local:
            sync(self._remote.set(name, Buffer.from_bytes(data)))
            return
        target = self.folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        # one name per process and thread: a second writer, or the rest of a killed one, is never half overwritten
        aside = target.with_name(f".{target.name}.{os.getpid()}-{threading.get_ident()}.part")
        try:
            with open(aside, "wb", buffering=0) as out:
                out.write(data)
                if durable:
                    os.fsync(out.fileno())
            os.replace(aside, target)
        except BaseException:
            aside.unlink(missing_ok=True)
            raise

    def create(self, name: str, data: bytes) -> bool:
        """Write a file unless somebody has; False where it is there already. At a URL the last one wins."""
        if not self.local:
            self.write(name, data)
            return True
        aside = f"{name}.{uuid4().hex}.part"
        self.write(aside, data)
        try:
            os.link(self.folder / aside, self.folder / name)
        except FileExistsError:
            return False
        except OSError:  # no links here: a reader that comes in this very moment may find it half written
            with suppress(FileExistsError), open(self.folder / name, "xb") as out:
                out.write(data)
        finally:
            self.remove(aside)
        return True

    def fill(self, reads: list[Read]) -> None:
        """Carry out reads; at a URL all of them are asked for at once."""
        if self.local:
            for name, offset, buffers in reads:
                descriptor = os.open(os.path.join(self.root, name), os.O_RDONLY)  # sooner than a Path
                try:
                    begin = 0 if offset >= 0 else os.fstat(descriptor).st_size
                    read_fully(descriptor, name, max(0, begin + offset), buffers)
                finally:
                    os.close(descriptor)
            return
        sizes = [sum(buffer.nbytes for buffer in read.buffers) for read in reads]
        requests: list[Any] = [
            (name, SuffixByteRequest(size) if at < 0 else RangeByteRequest(at, at + size))
            for (name, at, _), size in zip(reads, sizes)
        ]
        found = sync(self._remote.get_partial_values(default_buffer_prototype(), requests))
        for read, size, got in zip(reads, sizes, found):
            if got is None:
                raise FileNotFoundError(2, "No such file", read.name)
            data = np.frombuffer(got.to_bytes(), np.uint8)
            if len(data) < size:
                raise EOFError(read.name)
            for buffer in read.buffers:
                buffer[:], data = data[: buffer.nbytes], data[buffer.nbytes :]

    def sizes(self, folder: str = "") -> dict[str, int]:
        """Every file below a folder, by name relative to the root, with its size."""
        found = {}
        if not self.local:
            base = self._remote.path.rstrip("/") + "/"
            listing: Any = sync(self._remote.fs._find(base + folder, detail=True))
            return {name.split(base.lstrip("/"), 1)[-1]: info["size"] for name, info in listing.items()}
        # another process may remove files and folders in the meantime: os.walk passes over the ones that are gone
        for place, _, names in os.walk(self.folder / folder):
            for path in (Path(place, name) for name in names):
                with suppress(FileNotFoundError):
                    found[str(path.relative_to(self.folder))] = path.stat().st_size
        return found

    def remove(self, name: str) -> None:
        """A file or a folder with all in it; nothing happens where there is none."""
        if not self.local:
            for key in self.sizes(name):
                sync(self._remote.delete(key))
            return
        target = self.folder / name
        if target.is_dir():
            while target.exists():
                with suppress(FileNotFoundError):  # another process removes it too
                    shutil.rmtree(target)
        else:
            target.unlink(missing_ok=True)

    def flush(self, name: str) -> None:
        """Wait until a local file is on the disk."""
        if self.local:
            descriptor = os.open(self.folder / name, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)

    def free(self) -> int | None:
        """Bytes of room, or None where nobody can tell."""
        if not self.local:
            return None
        standing = next(p for p in [self.folder.absolute(), *self.folder.absolute().parents] if p.exists())
        return shutil.disk_usage(standing).free


def read_json(place: Place, name: str) -> Any | None:
    found = place.read(name)
    return None if found is None else json.loads(found)


def write_json(place: Place, name: str, value: Any, durable: bool = True) -> None:
    place.write(name, json.dumps(value, indent=1, sort_keys=True).encode(), durable)


@contextmanager
def room(place: Place) -> Iterator[None]:
    """Turn a full disk, or one that may not be written to, into a sentence."""
    try:
        yield
    except (OSError, RuntimeError) as cause:
        if isinstance(cause, PermissionError) or "Read-only file system" in str(cause):
            raise UserError(f"{place.root} cannot be written to ({cause}): choose another store.path") from cause
        full = out_of_room(cause) if isinstance(cause, OSError) else any(word in str(cause) for word in _FULL)
        if not full:
            raise
        raise UserError(
            f"no room is left for {place.root}: free some and run `crosslace cache` with the same settings, which goes "
            "on where it stopped"
        ) from cause


def read_fully(descriptor: int, name: str, offset: int, buffers: list[np.ndarray]) -> None:
    """Fill uint8 arrays with the bytes of an open file from `offset` on."""
    got = os.preadv(descriptor, buffers, offset)  # type: ignore[arg-type]
    wanted = sum(buffer.nbytes for buffer in buffers)
    while got < wanted:
        # a signal or a network folder may cut a read short
        rest, skip = [], got
        for buffer in buffers:
            if skip < buffer.nbytes:
                rest.append(buffer[skip:])
            skip = max(0, skip - buffer.nbytes)
        more = os.preadv(descriptor, rest, offset + got)  # type: ignore[arg-type]
        if not more:
            raise EOFError(name)
        got += more
