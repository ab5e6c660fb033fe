"""What a transcoder is: weights, activations, normalisation, its file, and its parts where processes share it."""

from .activations import SparseActs as SparseActs
from .activations import candidates as candidates
from .activations import heaviside as heaviside
from .activations import jumprelu as jumprelu
from .activations import keep_reaching as keep_reaching
from .activations import to_sparse as to_sparse
from .export import save_whole as save_whole
from .normalisation import Normalisation as Normalisation
from .partition import cut_dim as cut_dim
from .partition import new_part as new_part
from .reading import INPUT_NORMS as INPUT_NORMS
from .reading import Reading as Reading
from .reading import check_readable as check_readable
from .reading import read_chosen as read_chosen
from .slices import add_written as add_written
from .slices import all_gather_features as all_gather_features
from .slices import all_slices as all_slices
from .slices import decoder_norms as decoder_norms
from .slices import over_slices as over_slices
from .slices import own_slice as own_slice
from .slices import share_dense as share_dense
from .slices import whole_norms as whole_norms
from .stored_rows import StoredRows as StoredRows
from .transcoder import Transcoder as Transcoder
