"""A language model with its MLPs replaced: the mathematics of a clean run, and interventions on it."""

from .carry_out import generate_many as generate_many
from .carry_out import intervene_many as intervene_many
from .local import CleanRun as CleanRun
from .local import LocalModel as LocalModel
from .memory import memory_named as memory_named
from .requests import MODES as MODES
from .requests import Generation as Generation
from .requests import Intervention as Intervention
from .requests import InterventionResult as InterventionResult
from .requests import Mode as Mode
from .requests import Prompt as Prompt
from .substitute import TranscoderOutput as TranscoderOutput
