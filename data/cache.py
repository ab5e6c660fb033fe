"""The folder in which Crosslace keeps what it can make again: models, compiled kernels."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock

from .errors import UserError


def cache_root() -> Path:
    """CROSSLACE_CACHE, else `crosslace` in XDG_CACHE_HOME or ~/.cache."""
    own = os.environ.get("CROSSLACE_CACHE")
    return Path(own) if own else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "crosslace")


def build_once(name: str, build: Callable[[Path], None], anew: bool = False) -> Path:
    """The cached folder `name`, built first when it is not there; processes that want it at once wait. With `anew` it
    is built in any case, and takes the place of the one that was there."""
    folder = cache_root() / name
    if folder.exists() and not anew:
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_name(f"{name}.lock")):
            if folder.exists() and not anew:
                return folder
            aside = folder.with_name(f"{name}.partial")
            shutil.rmtree(aside, ignore_errors=True)  # left behind by a build that was killed
            aside.mkdir()
            try:
                build(aside)
                shutil.rmtree(folder, ignore_errors=True)
                aside.rename(folder)
            finally:
                shutil.rmtree(aside, ignore_errors=True)
    except (PermissionError, NotADirectoryError) as error:
        raise UserError(
            f"the cache folder {folder.parent} cannot be written to ({error.strerror}); "
            "set CROSSLACE_CACHE to one that can"
        ) from error
    return folder
