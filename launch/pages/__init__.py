"""Reports: what evaluated runs are compared by, their pages, and the charts on them."""

from .demo_report import write_demo_report as write_demo_report
from .demo_report import write_model_demo_report as write_model_demo_report
from .measured import FIGURES as FIGURES
from .measured import Measured as Measured
from .measured import evaluated_below as evaluated_below
from .measured import read_measured as read_measured
from .report import write_report as write_report
