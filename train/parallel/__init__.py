"""Many processes as one: the mesh, and what its ranks ask of each other."""

from .collectives import SINGLE as SINGLE
from .collectives import Collectives as Collectives
from .collectives import whole_batch as whole_batch
from .collectives import whole_rows as whole_rows
from .mesh import BUCKET_BYTES as BUCKET_BYTES
from .mesh import EXCHANGES as EXCHANGES
from .mesh import FirstFailure as FirstFailure
from .mesh import ParallelSettings as ParallelSettings
from .mesh import PeerLost as PeerLost
from .mesh import join as join
from .mesh import leave as leave
from .mesh import processes as processes
