"""From the words on the command line to checked settings, through Hydra."""

from .compose import Config as Config
from .compose import compose_config as compose_config
from .compose import fits as fits
from .compose import preset as preset
from .compose import tidy as tidy
from .grid import choices as choices
from .grid import grid as grid
from .grid import single_values as single_values
