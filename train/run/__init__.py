"""What surrounds the steps: checks before, optimizers below, records, evaluation and checkpoints beside them.

settings, store, mesh   -> checks       refused, or fit to begin
gradients               -> optimizers   the update, by parameter or by row
state, counters         -> records      a line of metrics.jsonl, and trackers
held-out rows [B, L, D] -> calibration  thresholds [F] a layer -> evaluation, metrics -> figures
everything              -> checkpoint   a folder from which the run goes on exactly
dead features           -> resampling   new encoders, at tokens that are badly reconstructed
"""

from .calibration import calibrated_thresholds as calibrated_thresholds
from .checkpoint import Checkpoints as Checkpoints
from .checks import check_run as check_run
from .checks import check_same_run as check_same_run
from .checks import store_identity as store_identity
from .evaluation import Evaluation as Evaluation
from .evaluation import HeldOut as HeldOut
from .evaluation import evaluate as evaluate
from .interruption import StopRequest as StopRequest
from .metrics import ReconstructionMetrics as ReconstructionMetrics
from .optimizers import Optimizers as Optimizers
from .optimizers import total_and_layer_norms as total_and_layer_norms
from .parts import StepParts as StepParts
from .records import Records as Records
from .records import training_values as training_values
from .resampling import resample as resample
from .trackers import Tracker as Tracker
