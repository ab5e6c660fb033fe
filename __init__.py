"""Crosslace: from a language model to an attribution graph, in one tested piece."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .circuit.graph import Graph
    from .circuit.model import ReplacementModel
    from .circuit.replacement import Intervention
    from .data.store import ActivationStore
    from .train.transcoder import Transcoder

__version__ = "0.1.0"
__all__ = ["ActivationStore", "Graph", "Intervention", "ReplacementModel", "Transcoder"]

# Public names load on first use: `import crosslace` costs nothing.
_HOMES = {
    "ActivationStore": ".data.store",
    "Transcoder": ".train.transcoder.transcoder",
    "ReplacementModel": ".circuit.model",
    "Intervention": ".circuit.replacement",
    "Graph": ".circuit.graph",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
