"""What follows a training, in the same command: measured, described, traced, and looked at over its checkpoints."""

from .follow import follow as follow
from .follow import refuse_unready as refuse_unready
