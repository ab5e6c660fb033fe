"""The CPU kernels in cpu.cpp, called with tensors.

Nothing depends on them: with no compiler the step runs on plain PyTorch operations.
"""

import ctypes
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from ...data.compiler import compiled

SOURCE = Path(__file__).with_name("cpu.cpp")
_SUFFIX = {torch.float32: "f32", torch.float64: "f64"}

_KNOWN = (*_SUFFIX, torch.int64)


@cache
def load() -> ctypes.CDLL | None:
    """The compiled library, or None where it cannot be had."""
    return compiled(SOURCE, ["-fopenmp"])


def usable(tensor: Tensor) -> bool:
    """Whether the kernels work on tensors like this one."""
    return tensor.device.type == "cpu" and tensor.dtype in _KNOWN and load() is not None


def call(name: str, *arguments: Tensor | int | float | None) -> None:
    """Run one kernel; its name gets the suffix of the first floating tensor's type."""
    library = load()
    assert library is not None
    kind = next((a.dtype for a in arguments if isinstance(a, Tensor) and a.is_floating_point()), None)
    number = ctypes.c_double if kind == torch.float64 else ctypes.c_float
    converted = []
    for argument in arguments:
        if argument is None or isinstance(argument, Tensor):
            converted.append(ctypes.c_void_p(None if argument is None else argument.data_ptr()))
        else:
            converted.append(number(argument) if isinstance(argument, float) else ctypes.c_int64(argument))
    getattr(library, name if kind is None else f"{name}_{_SUFFIX[kind]}")(*converted)
