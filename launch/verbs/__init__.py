"""One file a verb: each has `run(job)`, which the command line finds by the verb's name in `conf`."""

from . import evaluate as evaluate
from . import train as train
