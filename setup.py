"""Compiles the C++ kernels with the package, where a compiler is at hand, and makes the readme that an index shows.
Everything else stands in pyproject.toml.

On another processor, or where there was no compiler, they are compiled on first use (`data/compiler.py`).
"""

import importlib.util
import os
import re
import sys
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py
from setuptools.dist import Distribution

ROOT = Path(__file__).resolve().parent
KERNELS = {"train/sparse/cpu.cpp": ["-fopenmp"]}


class WithKernels(build_py):
    """Copies the package, then compiles into it."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        spec = importlib.util.spec_from_file_location("compiler", ROOT / "data" / "compiler.py")
        assert spec is not None and spec.loader is not None
        compiler = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(compiler)
        program = compiler.find_compiler()
        for name, flags in KERNELS.items():
            if program is None:
                print(f"no C++ compiler: {name} is left for its first use", file=sys.stderr)
                continue
            library = Path(self.build_lib) / "crosslace" / "data" / "built" / compiler.library_name(ROOT / name, flags)
            try:
                compiler.build(program, ROOT / name, flags, library)
            except Exception as error:  # a package without kernels is slower, and works
                print(f"{name} is left for its first use: {error}", file=sys.stderr)


class WithMachineCode(Distribution):
    """A wheel of one platform, where a compiler put machine code into it."""

    def has_ext_modules(self) -> bool:
        return True


def readme(home: str) -> str:
    """README.md with links and pictures at the address where the repository is published; without it, no pictures."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    if not home:
        text = re.sub(r"^!\[.*\n\n?", "", text, flags=re.MULTILINE)
    return re.sub(r"\]\((?!https?://|#)([^)]*)\)", rf"]({home}/\1)" if home else r"]", text)


HOME = os.environ.get("CROSSLACE_HOME", "").rstrip("/")
setup(
    cmdclass={"build_py": WithKernels},
    distclass=WithMachineCode,
    long_description=readme(HOME),
    long_description_content_type="text/markdown",
    project_urls={"Repository": HOME, "Changelog": f"{HOME}/CHANGELOG.md"} if HOME else {},
)
