"""What is asked of a transcoder: the terms of the loss, their schedules, and what is remembered between steps."""

from .objective import DenseActs as DenseActs
from .objective import Objective as Objective
from .objective import Pass as Pass
from .objective import StepInputs as StepInputs
from .objective import StepLoss as StepLoss
from .objective import choose as choose
from .objective import decode_whole as decode_whole
from .objective import dense_pass as dense_pass
from .objective import step_loss as step_loss
from .schedules import annealed_k as annealed_k
from .schedules import ramp as ramp
from .schedules import scheduled_lr as scheduled_lr
from .state import Counters as Counters
from .state import Held as Held
from .state import RunningState as RunningState
