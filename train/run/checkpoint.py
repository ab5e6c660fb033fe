"""Checkpoints: all that exact resume needs, in safetensors and JSON, written aside and renamed.

Tensors go through torch.distributed.checkpoint with its safetensors storage: each rank writes its shards with their
place in the whole, and any number of ranks on any mesh reads them back. Plain numbers, settings and a checksum of
each file stand in state.json. A folder under its final name is complete.
"""

import copy
import io
import json
import logging
import os
import shutil
import warnings
import zlib
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystem

from ...data.errors import UserError
from ..parallel import SINGLE, Collectives
from ..transcoder import cut_dim

STATE_FILE = "state.json"
LATER = tuple(
    f"state/{name}" for name in ("silent.", "held_steps.", "write_limit.", "row_losses", "row_sizes", "sums.capped")
)
"""What older checkpoints lack and a run can do without: all features count as having fired just now, no row was seen
yet and nothing has just been started."""
FORMAT_VERSION = 1
# So it is on one process.
warnings.filterwarnings("ignore", message="torch.distributed is disabled")
_CHUNK = 1 << 24

_log = logging.getLogger(__name__)


class Checkpoints:
    """The folder checkpoints/ of one run. In the `background`, saving holds training up for a copy into host memory
    alone: a thread writes it, and the next checkpoint, or `finish`, waits for that."""

    def __init__(
        self, folder: Path, keep: int = 2, comm: Collectives = SINGLE, keep_every: int = 0, background: bool = False
    ) -> None:
        self.folder, self.keep, self.comm, self.keep_every, self.background = folder, keep, comm, keep_every, background
        self._copies: dict[str, Tensor] = {}
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="crosslace-checkpoint")
        self._saving: Future[None] | None = None

    def save(self, step: int, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Write step-N whole or not at all; then remove the oldest beyond `keep`."""
        self.finish()
        if not self.background:
            self._write(step, tensors, state)
            return
        for name, tensor in tensors.items():
            if name not in self._copies:  # memory that stays: fresh pages would take longer than the copy
                self._copies[name] = torch.empty_like(tensor, device="cpu")
            self._copies[name].copy_(tensor.detach())
        self._saving = self._writer.submit(self._write, step, self._copies, copy.deepcopy(state))

    def finish(self, wait: bool = True) -> None:
        """Wait for what is being written, or only look whether it failed."""
        if self._saving is not None and (wait or self._saving.done()):
            saving, self._saving = self._saving, None
            saving.result()

    def _write(self, step: int, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        final, aside = self.folder / f"step-{step}", self.folder / f".step-{step}.writing"
        try:
            if self.comm.is_main:
                shutil.rmtree(aside, ignore_errors=True)
                aside.mkdir(parents=True)
            self.comm.barrier(files=True)
            storage = dcp.HuggingFaceStorageWriter(str(aside), save_distributed=True)
            storage.fs = written = _Summing()
            dcp.save(self._global(tensors), storage_writer=storage, no_dist=self._alone, process_group=self.comm.files)
            self.comm.barrier(files=True)
            names = sorted(path.name for path in aside.iterdir())
            sums = self.comm.max_all(torch.tensor([written.sums.get(name, -1) for name in names]), files=True).tolist()
            if self.comm.is_main:
                self._seal(aside, final, step, state, dict(zip(names, sums, strict=True)))
        except (OSError, CheckpointException, SafetensorError) as error:
            shutil.rmtree(aside, ignore_errors=True)
            before = next((path.name[5:] for path in self.paths() if path.name != final.name), None)
            raise UserError(
                f"the checkpoint of step {step} could not be written to {self.folder} ({_reason(error)}); make room "
                "and run the same command again, it "
                + ("begins anew: there is no earlier one" if before is None else f"goes on from step {before}")
            ) from error
        self.comm.barrier(files=True)
        if self.comm.is_main:
            for path in self.paths()[self.keep :]:
                if not self.keep_every or int(path.name[5:]) % self.keep_every:
                    shutil.rmtree(path)

    def newest(self) -> tuple[Path, dict[str, Any]] | None:
        """The newest whole checkpoint and its state; damaged ones are passed over with a warning."""
        if self.comm.is_main:
            for leftover in self.folder.glob(".step-*.writing"):
                shutil.rmtree(leftover, ignore_errors=True)
        for name in self.comm.broadcast([path.name for path in self.paths()]):
            path = self.folder / name
            content = self.comm.broadcast(_state_of(path))
            problem = content if isinstance(content, str) else self._damage(path, content)
            if not isinstance(content, str) and problem is None:
                return path, content
            if self.comm.is_main:
                _log.warning("passing over the damaged checkpoint %s: %s", path, problem)
        return None

    def _damage(self, path: Path, state: dict[str, Any]) -> str | None:
        """What is wrong with the files of a checkpoint, which the ranks share out; None if nothing."""
        names = sorted(state["files"])
        sums = self._checksums([path / name for name in names])
        for name, found in zip(names, sums, strict=True):
            if found != state["files"][name][1]:
                return f"{name} is not what was written"
        return None

    def load(self, path: Path, tensors: dict[str, Tensor]) -> None:
        """Read into `tensors` in place, whatever mesh wrote them."""
        reader = dcp.HuggingFaceStorageReader(str(path))
        there = reader.read_metadata().state_dict_metadata.keys()
        tensors = {name: t for name, t in tensors.items() if name in there or not name.startswith(LATER)}
        if missing := sorted(tensors.keys() - there):
            raise UserError(
                f"{path} was written by another version, which kept no {', '.join(missing)}: finish this run with "
                "the version that began it, or begin another"
            )
        dcp.load(self._global(tensors), storage_reader=reader, no_dist=self._alone, process_group=self.comm.files)

    def paths(self) -> list[Path]:
        """Finished checkpoints, newest first."""
        found = [path for path in self.folder.glob("step-*") if path.name[5:].isdecimal() and path.is_dir()]
        return sorted(found, key=lambda path: int(path.name[5:]), reverse=True)

    @property
    def _alone(self) -> bool:
        return self.comm.data_ranks * self.comm.feature_ranks == 1

    def _global(self, tensors: dict[str, Tensor]) -> dict[str, Any]:
        cuts = {name: _cut_dim(name, self.comm) for name in tensors}
        return {n: t.detach() if (dim := cuts[n]) is None else self.comm.shard(t, dim) for n, t in tensors.items()}

    def _checksums(self, paths: list[Path]) -> list[int]:
        """Of each file, read by one rank: they share them out. -1 where one cannot be read."""
        ranks = self.comm.data_ranks * self.comm.feature_ranks
        rank = self.comm.data_rank * self.comm.feature_ranks + self.comm.feature_rank
        own = torch.full((len(paths),), -1, dtype=torch.int64)
        for number in range(rank, len(paths), ranks):
            try:
                own[number] = checksum(paths[number])
            except OSError as error:
                _log.warning("%s cannot be read back (%s)", paths[number], error)
        return self.comm.max_all(own).tolist() if paths else []

    def _seal(self, aside: Path, final: Path, step: int, state: dict[str, Any], sums: dict[str, int]) -> None:
        files = {name: [(aside / name).stat().st_size, value] for name, value in sums.items()}
        content = {"format_version": FORMAT_VERSION, "step": step, "files": files, **state}
        content["checksum"] = _own_checksum(content)
        (aside / STATE_FILE).write_text(json.dumps(content, indent=1))
        for path in (aside / STATE_FILE, aside):
            _sync(path)
        if final.exists():
            shutil.rmtree(final)
        os.replace(aside, final)
        _sync(self.folder)


class _Summed(io.FileIO):
    """A file whose checksum is known when it is written."""

    value = 0

    def write(self, data: Any) -> int:
        written = super().write(data)
        self.value = zlib.crc32(memoryview(data).cast("B")[:written], self.value)
        return written


class _Summing(FileSystem):
    """Where torch writes this rank's files, with their checksums."""

    def __init__(self) -> None:
        self.sums: dict[str, int] = {}

    @contextmanager
    def create_stream(self, path: str | os.PathLike, mode: str) -> Iterator[Any]:
        raw = _Summed(path, mode)
        with io.BufferedWriter(raw) as stream:
            yield stream
        self.sums[Path(path).name] = raw.value


def _state_of(path: Path) -> dict[str, Any] | str:
    """A checkpoint's plain state, or what is wrong with it."""
    try:
        state = json.loads((path / STATE_FILE).read_text())
        if state["format_version"] != FORMAT_VERSION:
            return f"it has format {state['format_version']}, this version reads {FORMAT_VERSION}"
        if state.pop("checksum", None) not in (None, _own_checksum(state)):
            return f"{STATE_FILE} is not what was written"
        for name, (size, _) in state["files"].items():
            if (path / name).stat().st_size != size:
                return f"{name} is not what was written"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{STATE_FILE} or a file that it names cannot be read ({error})"
    return state


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint, or None."""
    state = _state_of(path)
    return state if isinstance(state, str) else Checkpoints(path.parent)._damage(path, state)


def _own_checksum(state: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(state, sort_keys=True).encode())


def checksum(path: Path) -> int:
    value = 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            value = zlib.crc32(chunk, value)
    return value


def _cut_dim(name: str, comm: Collectives) -> int | None:
    """Where this tensor is cut: `weights/W_enc.0`, `exp_avg/b_enc.1`, `state/density.2`; a `step/...` is a number."""
    group, _, rest = name.partition("/")
    if group == "step":
        return None
    if rest.startswith(("density.", "silent.", "held_steps.", "write_limit.")):
        return 0
    return cut_dim(rest, comm)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _reason(error: BaseException) -> str:
    if isinstance(error, CheckpointException):
        error = next(iter(error.failures.values()))[0]
    return getattr(error, "strerror", None) or str(error).splitlines()[0]
