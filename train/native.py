"""The CPU kernels in native.cpp: compiled once into the cache on first use, called through ctypes.

Nothing depends on them: with no compiler the step runs on plain PyTorch operations.
"""

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

SOURCE = Path(__file__).with_name("native.cpp")
FLAGS = ["-O3", "-march=native", "-fopenmp", "-fno-math-errno", "-std=c++17", "-shared", "-fPIC"]
_SUFFIX = {torch.float32: "f32", torch.float64: "f64"}

_KNOWN = (*_SUFFIX, torch.int64)

_logger = logging.getLogger(__name__)


def _cache_folder() -> Path:
    return Path(os.environ.get("CROSSLACE_CACHE") or Path.home() / ".cache" / "crosslace")


def _processor() -> str:
    """What -march=native depends on: a cache shared between machines must not mix them up."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    features = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return f"{platform.system()} {platform.machine()} {platform.processor()} {features}"


def _build(compiler: str) -> Path:
    key = hashlib.sha256("\n".join([SOURCE.read_text(), compiler, *FLAGS, _processor()]).encode()).hexdigest()[:16]
    library = _cache_folder() / "native" / f"kernels-{key}.so"
    if library.exists():
        return library
    library.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        built = Path(folder) / library.name
        command = [compiler, *FLAGS, str(SOURCE), "-o", str(built)]
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)
        os.replace(built, library)  # whole or not at all, whoever else is building
    return library


@cache
def load() -> ctypes.CDLL | None:
    """The compiled library, or None where it cannot be had."""
    compiler = shutil.which(os.environ.get("CXX", "")) or shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        return None
    try:
        return ctypes.CDLL(str(_build(compiler)))
    except (subprocess.SubprocessError, OSError) as error:
        _logger.warning("the CPU kernels could not be built (%s); plain PyTorch operations take their place", error)
        return None


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
