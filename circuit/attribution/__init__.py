"""From a prompt to its graph: one clean run, then targets pulled back through frozen layers."""

from .explained import HEADS_FILE as HEADS_FILE
from .explained import attention_record as attention_record
from .explained import attention_text as attention_text
from .explained import edge_record as edge_record
from .explained import explain_attention as explain_attention
from .explained import explain_head as explain_head
from .explained import load_heads as load_heads
from .explained import path_heads as path_heads
from .explained import save_heads as save_heads
from .heads import EdgeHeads as EdgeHeads
from .heads import Head as Head
from .heads import edge_heads as edge_heads
from .heads import likely_directions as likely_directions
from .heads import rank_heads as rank_heads
from .heads import strongest_heads as strongest_heads
from .heads import top_heads as top_heads
from .qk import CONSTANT as CONSTANT
from .qk import Attention as Attention
from .qk import LiveAttention as LiveAttention
from .qk import attention as attention
from .targets import Target as Target
from .tracer import TraceSettings as TraceSettings
from .tracer import trace as trace
