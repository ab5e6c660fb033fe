"""Large files past the page cache: the same bytes whatever the system and the file system make of it."""

import errno
import fcntl
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from crosslace.data.errors import UserError
from crosslace.data.store import files, kernels, outfile
from crosslace.data.store.layout import StoreLayout
from crosslace.data.store.outfile import ALIGNMENT, BUFFER_BYTES, OutFile
from crosslace.data.store.store import ActivationStore
from crosslace.data.store.writer import write_store

SITES = ("resid", "mlp_out")
LAYOUT = StoreLayout(SITES, (0, 1, 2), 40, "float16", block_rows=32, shard_rows=512)
DIRECT = getattr(os, "O_DIRECT", 0)
WAYS = ["direct", "no such thing", "refused at open", "refused at write", "cut short"]


def is_direct(descriptor: int) -> bool:
    return bool(fcntl.fcntl(descriptor, fcntl.F_GETFL) & DIRECT)


def take_way(way: str, monkeypatch) -> None:
    opened, written, cut = os.open, os.pwrite, [False]

    def refuse_open(path, flags, *rest, **others):
        if flags & DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return opened(path, flags, *rest, **others)

    def refuse_write(descriptor, data, place):
        if is_direct(descriptor):
            raise OSError(errno.EINVAL, "Invalid argument")
        return written(descriptor, data, place)

    def cut_short(descriptor, data, place):
        if is_direct(descriptor) and not cut[0]:
            # half a block, as a signal or a disk that is nearly full may leave it: the next write is not aligned
            cut[0] = True
            with open(f"/dev/fd/{descriptor}", "r+b", buffering=0) as plain:
                plain.seek(place)
                return plain.write(data[:700])
        if is_direct(descriptor) and place % ALIGNMENT:
            raise OSError(errno.EINVAL, "Invalid argument")  # some file systems would take it
        return written(descriptor, data, place)

    match way:
        case "no such thing":
            monkeypatch.setattr(outfile, "_O_DIRECT", 0)
        case "refused at open":
            monkeypatch.setattr(os, "open", refuse_open)
        case "refused at write":
            monkeypatch.setattr(os, "pwrite", refuse_write)
        case "cut short":
            monkeypatch.setattr(os, "pwrite", cut_short)


@pytest.fixture
def takes_direct(tmp_path) -> bool:
    """Whether files here can be written past the cache at all."""
    if not DIRECT:
        return False
    with OutFile(tmp_path / "try") as out:
        out.write(bytes(ALIGNMENT))
        out.flush()
        return out.direct


@pytest.mark.parametrize("way", WAYS)
def test_a_file_of_any_size_is_what_was_written(tmp_path, monkeypatch, takes_direct, way):
    take_way(way, monkeypatch)
    random = np.random.default_rng(0)
    for size in (0, 1, ALIGNMENT, ALIGNMENT + 1, BUFFER_BYTES - 1, BUFFER_BYTES, 2 * BUFFER_BYTES + 12_345):
        data = random.integers(0, 256, size, dtype=np.uint8).tobytes()
        path = tmp_path / str(size)
        path.write_bytes(bytes(3 * BUFFER_BYTES))  # what stood there before is gone
        with OutFile(path) as out:
            for start in range(0, size, 1_000_003):
                out.write(data[start : start + 1_000_003])
            out.flush()
            direct = out.direct
        assert path.read_bytes() == data
        if way == "direct":
            assert direct == takes_direct
        elif way != "cut short":
            assert not direct or not size


def test_other_errors_are_not_taken_for_a_refusal(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError):
        OutFile(tmp_path / "nowhere" / "x")

    def fail(*_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "pwrite", fail)
    with pytest.raises(OSError, match="Input/output error"), OutFile(tmp_path / "x") as out:
        out.write(b"1")
        out.flush()


def write(path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    rows = {site: torch.randn(1500, 3, 40, generator=generator) for site in SITES}
    number = torch.arange(1500)
    write_store(path, rows, number, number, number, LAYOUT, held_out=203, shuffle_rows=512)


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("way", WAYS)
def test_a_store_has_the_same_bytes_either_way(tmp_path, monkeypatch, way, native):
    monkeypatch.setattr(outfile, "_spare", [])
    write(tmp_path / "cached")
    assert not outfile._spare  # small shards are ordinary files
    monkeypatch.setattr(files, "LEAST_BYTES", 1)
    monkeypatch.setattr(outfile, "BUFFER_BYTES", 2 * ALIGNMENT)  # a shard fills several
    if not native:
        monkeypatch.setattr(kernels, "load", lambda: None)
    take_way(way, monkeypatch)
    write(tmp_path / "s")
    assert outfile._spare
    assert tree(tmp_path / "s") == tree(tmp_path / "cached")
    ActivationStore.open(tmp_path / "s").verify()


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A file system of 4 MB on a disk of its own."""
    image, folder = tmp_path / "image", tmp_path / "disk"
    folder.mkdir()
    with open(image, "wb") as out:
        out.truncate(4 << 20)
    made = shutil.which("mkfs.ext4") and shutil.which("mount")
    for command in (["mkfs.ext4", "-q", str(image)], ["mount", "-o", "loop", str(image), str(folder)]):
        made = made and not subprocess.run(command, capture_output=True).returncode
    if not made:
        pytest.skip("may not mount a file system")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_disk_that_is_full(small_disk, tmp_path, monkeypatch):
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(2_700_000))
    monkeypatch.setattr(files, "LEAST_BYTES", 1)
    with pytest.raises(UserError, match=r"no room is left for .* with the same settings"):
        write(small_disk / "s")
    assert not list(small_disk.rglob("c/**/.*.part"))
    ballast.unlink()
    write(small_disk / "s")
    write(tmp_path / "whole")
    assert tree(small_disk / "s") == tree(tmp_path / "whole")
