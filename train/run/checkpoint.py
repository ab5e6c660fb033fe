"""Checkpoints: all that exact resume needs, in safetensors and JSON, written aside and renamed.

Tensors go through torch.distributed.checkpoint with its safetensors storage: each rank writes its shards with their
place in the whole, and any number of ranks on any mesh reads them back. Plain numbers, settings and a checksum of
each file stand in state.json. A folder under its final name is complete.
"""

import json
import logging
import os
import shutil
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from ...data.errors import UserError
from ..parallel import SINGLE, Collectives
from ..transcoder import cut_dim

STATE_FILE = "state.json"
FORMAT_VERSION = 1
_CHUNK = 1 << 24

_log = logging.getLogger(__name__)


class Checkpoints:
    """The folder checkpoints/ of one run."""

    def __init__(self, folder: Path, keep: int = 2, comm: Collectives = SINGLE) -> None:
        self.folder, self.keep, self.comm = folder, keep, comm

    def save(self, step: int, tensors: dict[str, Tensor], state: dict[str, Any]) -> Path:
        """Write step-N whole or not at all; then remove the oldest beyond `keep`."""
        final, aside = self.folder / f"step-{step}", self.folder / f".step-{step}.writing"
        try:
            if self.comm.is_main:
                shutil.rmtree(aside, ignore_errors=True)
                aside.mkdir(parents=True)
            self.comm.barrier()
            with quiet():
                storage = dcp.HuggingFaceStorageWriter(str(aside), save_distributed=True)
                dcp.save(self._global(tensors), storage_writer=storage, no_dist=self._alone)
            self.comm.barrier()
            if self.comm.is_main:
                self._seal(aside, final, step, state)
        except (OSError, CheckpointException, SafetensorError) as error:
            shutil.rmtree(aside, ignore_errors=True)
            raise UserError(
                f"the checkpoint of step {step} could not be written to {self.folder} ({_reason(error)}); make room "
                "and run the same command again, it goes on from the newest checkpoint"
            ) from error
        self.comm.barrier()
        if self.comm.is_main:
            for path in self.paths()[self.keep :]:
                shutil.rmtree(path)
        return final

    def newest(self) -> tuple[Path, dict[str, Any]] | None:
        """The newest whole checkpoint and its state; damaged ones are passed over with a warning."""
        found = None
        if self.comm.is_main:
            for leftover in self.folder.glob(".step-*.writing"):
                shutil.rmtree(leftover, ignore_errors=True)
            for path in self.paths():
                problem = damage(path)
                if problem is None:
                    found = str(path)
                    break
                _log.warning("passing over the damaged checkpoint %s: %s", path, problem)
        found = self.comm.broadcast(found)
        return None if found is None else (Path(found), json.loads((Path(found) / STATE_FILE).read_text()))

    def load(self, path: Path, tensors: dict[str, Tensor]) -> None:
        """Read into `tensors` in place, whatever mesh wrote them."""
        with quiet():
            reader = dcp.HuggingFaceStorageReader(str(path))
            if missing := sorted(tensors.keys() - reader.read_metadata().state_dict_metadata.keys()):
                raise UserError(
                    f"{path} was written by another version, which kept no {', '.join(missing)}: finish this run with "
                    "the version that began it, or begin another"
                )
            dcp.load(self._global(tensors), storage_reader=reader, no_dist=self._alone)

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

    def _seal(self, aside: Path, final: Path, step: int, state: dict[str, Any]) -> None:
        files = {path.name: [path.stat().st_size, checksum(path)] for path in sorted(aside.iterdir())}
        content = {"format_version": FORMAT_VERSION, "step": step, "files": files, **state}
        content["checksum"] = _own_checksum(content)
        (aside / STATE_FILE).write_text(json.dumps(content, indent=1))
        for path in [*aside.iterdir(), aside]:
            _sync(path)
        if final.exists():
            shutil.rmtree(final)
        os.replace(aside, final)
        _sync(self.folder)


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint, or None."""
    try:
        state = json.loads((path / STATE_FILE).read_text())
        if state["format_version"] != FORMAT_VERSION:
            return f"it has format {state['format_version']}, this version reads {FORMAT_VERSION}"
        if state.pop("checksum", None) not in (None, _own_checksum(state)):
            return f"{STATE_FILE} is not what was written"
        for name, (size, expected) in state["files"].items():
            if (path / name).stat().st_size != size or checksum(path / name) != expected:
                return f"{name} is not what was written"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{STATE_FILE} or a file that it names cannot be read ({error})"
    return None


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
    return 0 if rest.startswith(("density.", "held_steps.", "write_limit.")) else cut_dim(rest, comm)


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


@contextmanager
def quiet() -> Iterator[None]:
    """torch warns that no process group is there: on one process that is how it should be."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield
