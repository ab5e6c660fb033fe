"""From a prompt to its graph: one clean run, then targets pulled back through frozen layers."""

from .heads import EdgeHeads as EdgeHeads
from .heads import Head as Head
from .heads import edge_heads as edge_heads
from .heads import rank_heads as rank_heads
from .heads import strongest_heads as strongest_heads
from .heads import top_heads as top_heads
from .qk import CONSTANT as CONSTANT
from .qk import Attention as Attention
from .qk import attention as attention
from .targets import Target as Target
from .tracer import TraceSettings as TraceSettings
from .tracer import trace as trace
