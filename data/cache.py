"""The folder in which Crosslace keeps what it can make again: bundled models, compiled kernels."""

import os
from pathlib import Path


def cache_root() -> Path:
    """CROSSLACE_CACHE, else `crosslace` in XDG_CACHE_HOME or ~/.cache."""
    own = os.environ.get("CROSSLACE_CACHE")
    return Path(own) if own else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "crosslace")
