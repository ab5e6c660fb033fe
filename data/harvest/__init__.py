"""Model and text to store: what becomes a row, window by window; or a ring of windows ahead of training."""

from .harvest import Harvester as Harvester
from .harvest import harvest as harvest
from .settings import HarvestSettings as HarvestSettings
from .settings import make_layout as make_layout
from .settings import weigh as weigh
from .streaming import open_streaming as open_streaming
