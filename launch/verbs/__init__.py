"""One file a verb: each has `run(job)`, which the command line finds by the verb's name in `conf`."""

from . import evaluate as evaluate
from . import exchange as exchange
from . import features as features
from . import trace as trace
from . import train as train
