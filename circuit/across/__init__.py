"""What graphs of several trainings share: their features paired, and which edges and paths are found again."""

from .held import SEEDS_FILE as SEEDS_FILE
from .held import Held as Held
from .held import held as held
from .held import load_held as load_held
from .matching import Match as Match
from .matching import match_features as match_features
