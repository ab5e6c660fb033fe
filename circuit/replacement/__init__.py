"""A language model with its MLPs replaced: the mathematics of a clean run, and interventions on it."""

from .answer import MODES as MODES
from .answer import Answer as Answer
from .answer import Mode as Mode
from .answer import who_answers as who_answers
from .carry_out import generate_many as generate_many
from .carry_out import intervene_many as intervene_many
from .hooks import READS as READS
from .hooks import WRITES as WRITES
from .hooks import Hooks as Hooks
from .hooks import check_hooks as check_hooks
from .hooks import folded_gain as folded_gain
from .local import CleanRun as CleanRun
from .local import LocalModel as LocalModel
from .memory import memory_named as memory_named
from .requests import Generation as Generation
from .requests import Intervention as Intervention
from .requests import InterventionResult as InterventionResult
from .requests import Prompt as Prompt
from .substitute import TranscoderOutput as TranscoderOutput
