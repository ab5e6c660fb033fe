"""What a step works on, and what is logged about it."""

from typing import NamedTuple

from torch import Tensor

from ..loss import Counters, Objective, RunningState
from ..parallel import Collectives
from ..settings import TrainerSettings
from ..sparse import Workspace
from ..transcoder import Transcoder
from .optimizers import Optimizers


class StepParts(NamedTuple):
    """Everything that a step works on."""

    settings: TrainerSettings
    objective: Objective
    transcoder: Transcoder
    optimizers: Optimizers
    state: RunningState
    counters: Counters
    target_l0: Tensor | None
    """[L]: what L0 is steered to, or k, on the device."""
    targets: list[float] | None
    """The same, on the host."""
    comm: Collectives
    workspace: Workspace
    """Memory that the sparse step keeps."""
