"""The step that never touches a zero, and the kernels behind it."""

from .forward import sparse_pass as sparse_pass
from .forward import use_sparse as use_sparse
from .row_gradients import RowGradients as RowGradients
from .row_gradients import adam_numbers as adam_numbers
from .row_gradients import adam_rows as adam_rows
from .workspace import MARGIN as MARGIN
from .workspace import UNEVEN as UNEVEN
from .workspace import Workspace as Workspace
