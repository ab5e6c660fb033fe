"""The bundled world: a small language model whose right circuits are known; shipped, or trained for other settings."""

from .build import build_world as build_world
from .questions import Question as Question
from .shipped import pack_world as pack_world
from .sizes import WorldSettings as WorldSettings
from .world import FACTS_FILE as FACTS_FILE
from .world import World as World
