"""The bundled language models and their texts: the world, whose right circuits are known, and Python's own source."""

from . import stdlib as stdlib
from .bundled import is_held_out as is_held_out
from .stdlib import StdlibSettings as StdlibSettings
from .stdlib import build_stdlib as build_stdlib
from .world import FACTS_FILE as FACTS_FILE
from .world import Question as Question
from .world import World as World
from .world import WorldSettings as WorldSettings
from .world import build_world as build_world
from .world import pack_world as pack_world
