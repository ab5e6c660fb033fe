"""C++ kernels: compiled once and called through ctypes, which lets go of the GIL.

The package's build compiles them where it finds a compiler (`setup.py`); else the first use does, into the cache.
A library belongs to the processor that it was compiled on. A compiler that fails is tried once: what it said is kept
beside where the library would be. Nothing depends on kernels: without them `compiled` gives None, and plain PyTorch
does the work, more slowly.
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

FLAGS = ["-O3", "-march=native", "-fno-math-errno", "-std=c++17", "-shared", "-fPIC"]
BUILT = Path(__file__).parent / "built"
"""What the package's build compiled."""

_logger = logging.getLogger(__name__)


def _processor() -> str:
    """What -march=native depends on: a cache shared between machines must not mix them up."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    features = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return f"{platform.system()} {platform.machine()} {platform.processor()} {features}"


def find_compiler() -> str | None:
    """CXX, c++ or g++."""
    return shutil.which(os.environ.get("CXX", "")) or shutil.which("c++") or shutil.which("g++")


def library_name(source: Path, flags: Sequence[str]) -> str:
    """One for each source, flags and processor."""
    key = hashlib.sha256("\n".join([source.read_text(), *FLAGS, *flags, _processor()]).encode()).hexdigest()[:16]
    return f"{source.parent.name}-{key}.so"


def build(compiler: str, source: Path, flags: Sequence[str], library: Path) -> None:
    """Compile, whole or not at all, whoever else is building; where it fails, keep why, and raise."""
    library.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        built = Path(folder) / library.name
        command = [compiler, *FLAGS, *flags, str(source), "-o", str(built)]
        try:
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)
        except subprocess.SubprocessError as error:
            said = getattr(error, "stderr", None) or str(error)
            failure_of(library, compiler).write_text(f"{' '.join(command)}\n{said}\n", encoding="utf-8")
            raise
        os.replace(built, library)


def failure_of(library: Path, compiler: str) -> Path:
    """Where it is kept that this compiler failed, and what it said."""
    name = hashlib.sha256(compiler.encode()).hexdigest()[:8]
    return library.with_name(f"{library.stem}-{name}.failed.txt")


def compiled(source: Path, flags: Sequence[str] = ()) -> ctypes.CDLL | None:
    """The library of a source file, built with `FLAGS` and these, or None where it cannot be had: said in one line."""
    from .cache import cache_root

    place, name = f"{source.parent.name}/{source.name}", library_name(source, flags)
    slower = "plain PyTorch does the work, several times more slowly on a CPU"
    library = BUILT / name if (BUILT / name).exists() else cache_root() / "native" / name
    try:
        if not library.exists():
            if (compiler := find_compiler()) is None:
                _logger.warning("%s: no C++ compiler was found (c++, g++, or what CXX names); %s", place, slower)
                return None
            failed = failure_of(library, compiler)
            if failed.exists():
                _logger.warning(
                    "%s could not be compiled; %s (%s says why; remove it to try again)", place, slower, failed
                )
                return None
            build(compiler, source, flags, library)
        return ctypes.CDLL(str(library))
    except (subprocess.SubprocessError, OSError) as error:
        _logger.warning("%s could not be built (%s); %s", place, str(error).splitlines()[0], slower)
        return None
