"""C++ kernels: compiled once, into the cache, on first use, and called through ctypes, which lets go of the GIL.

Nothing depends on them: where there is no compiler, `compiled` gives None and plain PyTorch or numpy does the work.
"""

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from .cache import cache_root

FLAGS = ["-O3", "-march=native", "-fno-math-errno", "-std=c++17", "-shared", "-fPIC"]

_logger = logging.getLogger(__name__)


def _processor() -> str:
    """What -march=native depends on: a cache shared between machines must not mix them up."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    features = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return f"{platform.system()} {platform.machine()} {platform.processor()} {features}"


def _build(compiler: str, source: Path, flags: Sequence[str]) -> Path:
    key = hashlib.sha256("\n".join([source.read_text(), compiler, *flags, _processor()]).encode()).hexdigest()[:16]
    library = cache_root() / "native" / f"{source.parent.name}-{key}.so"
    if library.exists():
        return library
    library.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        built = Path(folder) / library.name
        command = [compiler, *flags, str(source), "-o", str(built)]
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)
        os.replace(built, library)  # whole or not at all, whoever else is building
    return library


def compiled(source: Path, flags: Sequence[str] = ()) -> ctypes.CDLL | None:
    """The library of a source file, built with `FLAGS` and these, or None where it cannot be had."""
    compiler = shutil.which(os.environ.get("CXX", "")) or shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        return None
    try:
        return ctypes.CDLL(str(_build(compiler, source, [*FLAGS, *flags])))
    except (subprocess.SubprocessError, OSError) as error:
        place = f"{source.parent.name}/{source.name}"
        _logger.warning("%s could not be built (%s); plain PyTorch or numpy operations take its place", place, error)
        return None
