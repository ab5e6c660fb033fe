"""Model and text to store: what becomes a row, window by window; or a ring of windows ahead of training."""

from .harvest import Harvester as Harvester
from .harvest import HarvestSettings as HarvestSettings
from .harvest import harvest as harvest
from .streaming import open_streaming as open_streaming
