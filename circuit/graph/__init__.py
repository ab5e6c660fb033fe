"""The attribution graph itself: nodes, rows, influence and scores, pruning, paths, groups, its file."""

from .compare import Difference as Difference
from .compare import difference as difference
from .graph import Graph as Graph
from .influence import find_influence as find_influence
from .nodes import KINDS as KINDS
from .nodes import Node as Node
from .nodes import Nodes as Nodes
from .paths import GraphPath as GraphPath
from .rows import DenseRows as DenseRows
from .rows import Rows as Rows
from .rows import SparseRows as SparseRows
from .rows import move_to_errors as move_to_errors
from .rows import rows_at_once as rows_at_once
from .supernodes import flow_between as flow_between
from .supernodes import propose_supernodes as propose_supernodes
from .text import account_holds as account_holds
from .text import kept_text as kept_text
from .text import later_place as later_place
from .text import node_text as node_text
from .text import path_text as path_text
from .text import strongest_paths_text as strongest_paths_text
from .text import summary_text as summary_text
