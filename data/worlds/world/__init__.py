"""The bundled world: a small language model that is trained on the spot and whose right circuits are known (SPEC 8)."""

from .build import build_world
from .families import Question
from .settings import WorldSettings
from .world import World

__all__ = ["Question", "World", "WorldSettings", "build_world"]
