"""The store's inner loops in kernels.cpp, called with numpy arrays and tensors.

Nothing depends on them: where there is no compiler the callers take the plain way, to the same bytes.
"""

import ctypes
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from ..compiler import compiled

SOURCE = Path(__file__).with_name("kernels.cpp")

# kernels.cpp's Kind: numbers that it knows how to widen and narrow; anything else comes as bytes
_BYTES = 0
_KINDS = {torch.float32: 1, torch.float16: 2, torch.bfloat16: 3}

_OUTCOMES = ("fine", "damaged", "short", "failed")


@cache
def load() -> ctypes.CDLL | None:
    """The compiled library, or None where it cannot be had."""
    library = compiled(SOURCE, ["-fopenmp-simd"])
    if library is not None:
        library.crc32c.restype = ctypes.c_uint32
        library.put_rows.restype = ctypes.c_float
        library.read_chunks.restype = library.pack_chunks.restype = ctypes.c_int64
    return library


def _library() -> ctypes.CDLL:
    library = load()
    assert library is not None
    return library


def _address(array: np.ndarray | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if array is None else array.ctypes.data)


_int = ctypes.c_int64


def crc32c(data: np.ndarray) -> int:
    """The checksum of a contiguous array of bytes."""
    return _library().crc32c(_address(data), _int(data.nbytes))


def pack_chunks(chunks: np.ndarray, size: int, done: int, into: np.ndarray) -> int:
    """Fill uint8 memory with chunks [.., stride] of `size` bytes and their checksums, from byte `done` of them all on.

    Returns how many bytes that took. The checksum of a chunk is put behind it in `chunks`, too.
    """
    stride = chunks.shape[-1]
    numbers = chunks.size // stride, stride, size, done
    return _library().pack_chunks(_address(chunks), *map(_int, numbers), _address(into), _int(len(into)))


def puts(source: torch.Tensor, stored: torch.dtype) -> bool:
    """Whether `put_rows` takes numbers like these to that dtype."""
    known = source.dtype in _KINDS and stored in _KINDS
    return known and source.device.type == "cpu" and source.stride(-1) == 1 and load() is not None


def put_rows(
    layers: Sequence[torch.Tensor],
    picked: np.ndarray | None,
    image: np.ndarray,
    places: np.ndarray,
    block_rows: int,
    stored: torch.dtype,
    total: np.ndarray,
    square: np.ndarray,
) -> float:
    """Rows picked[i] (or i) of each layer [.., width] to rows places[i] of an image [blocks, layers, stride] of chunks.

    Adds the sums of each layer's numbers to `total` [layers, width], those of their squares to `square` [layers]. The
    largest absolute value is returned where numbers were narrowed, else 0.
    """
    first = layers[0]
    sources = np.array([layer.data_ptr() for layer in layers], dtype=np.uintp)
    kinds = _KINDS[first.dtype], _KINDS[stored]
    step = first.stride(0) * first.element_size()
    return _put(sources, step, picked, image, places, block_rows, first.shape[-1], kinds, total, square)


def put_bytes(
    values: np.ndarray, picked: np.ndarray | None, image: np.ndarray, places: np.ndarray, block_rows: int
) -> None:
    """The same of contiguous rows [N, layers * width] that are stored as they are."""
    layers = image.shape[1]
    row = values.strides[0]
    sources = values.ctypes.data + np.arange(layers, dtype=np.uintp) * np.uintp(row // layers)
    _put(sources, row, picked, image, places, block_rows, row // layers, (_BYTES, _BYTES), None, None)


def _put(
    sources: np.ndarray,
    row_bytes: int,
    picked: np.ndarray | None,
    image: np.ndarray,
    places: np.ndarray,
    block_rows: int,
    width: int,
    kinds: tuple[int, int],
    total: np.ndarray | None,
    square: np.ndarray | None,
) -> float:
    numbers = block_rows, image.shape[1], image.shape[2], width, *kinds
    return _library().put_rows(
        _address(sources),
        _int(row_bytes),
        _address(picked),
        _int(len(places)),
        _address(image),
        _address(places),
        *map(_int, numbers),
        _address(total),
        _address(square),
    )


class Chunks(NamedTuple):
    """Where chunks lie and where they are to go, one of each per chunk."""

    files: np.ndarray
    """int32 descriptors."""
    offsets: np.ndarray
    """int64 places in the files."""
    into: np.ndarray
    """uintp addresses."""
    trusted: np.ndarray
    """bool: leave the checksum alone."""


def read_chunks(chunks: Chunks, size: int) -> tuple[str, int, int]:
    """Read chunks of `size` bytes, each followed by its checksum; (outcome, the chunk that it is about, errno).

    The outcome is `fine`, `damaged`, `short` where a file ends before, or `failed` with the system's error.
    """
    failed = np.zeros(2, np.int64)
    where = [_address(np.ascontiguousarray(part)) for part in chunks]
    outcome = _library().read_chunks(*where, _int(len(chunks.files)), _int(size), _address(failed))
    return _OUTCOMES[outcome], int(failed[0]), int(failed[1])
