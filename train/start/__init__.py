"""Where training begins: random weights, the MLPs' own neurons, another run."""

from .initialisation import PREACTIVATIONS_AT_ONCE as PREACTIVATIONS_AT_ONCE
from .initialisation import initialise as initialise
from .initialisation import quantile_bias as quantile_bias
from .initialisation import rows_for as rows_for
from .neurons import Neurons as Neurons
from .neurons import has_neurons as has_neurons
from .neurons import model_neurons as model_neurons
from .warmstart import FRESH_SHARE as FRESH_SHARE
from .warmstart import start_from as start_from
from .warmstart import start_from_neurons as start_from_neurons
