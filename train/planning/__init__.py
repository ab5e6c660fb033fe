"""What a run will take, worked out before anything is allocated."""

from .plan import MachineSettings as MachineSettings
from .plan import Plan as Plan
from .plan import Shape as Shape
from .plan import choices as choices
from .plan import decided as decided
from .plan import make_plan as make_plan
from .plan import what_fits as what_fits
