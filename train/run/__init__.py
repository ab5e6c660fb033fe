"""What surrounds the steps: checks before, optimizers below, records, evaluation and checkpoints beside them.

settings, store, mesh   -> checks       refused, or fit to begin
gradients               -> optimizers   the update, by parameter or by row
state, counters         -> records      a line of metrics.jsonl, and trackers
held-out rows [B, L, D] -> calibration  thresholds [F] a layer -> evaluation, metrics -> figures
everything              -> checkpoint   a folder from which the run goes on exactly
error far above its best -> divergence  said, with its rows; or the run stops or goes back
dead features           -> resampling   new encoders, at tokens that are badly reconstructed
"""

from .calibration import calibrated_thresholds as calibrated_thresholds
from .checkpoint import Checkpoints as Checkpoints
from .checks import check_run as check_run
from .checks import check_same_run as check_same_run
from .checks import store_identity as store_identity
from .divergence import MOST_REWINDS as MOST_REWINDS
from .divergence import Diverged as Diverged
from .divergence import Guard as Guard
from .divergence import eased as eased
from .divergence import named_tokens as named_tokens
from .evaluation import Evaluation as Evaluation
from .evaluation import HeldOut as HeldOut
from .evaluation import evaluate as evaluate
from .interruption import StopRequest as StopRequest
from .metrics import ReconstructionMetrics as ReconstructionMetrics
from .optimizers import Optimizers as Optimizers
from .optimizers import total_and_layer_norms as total_and_layer_norms
from .parts import StepParts as StepParts
from .records import Records as Records
from .records import Tracker as Tracker
from .records import training_values as training_values
from .resampling import RESTARTED_AT_ONCE as RESTARTED_AT_ONCE
from .resampling import hold as hold
from .resampling import resample as resample
from .resampling import take_hold as take_hold
