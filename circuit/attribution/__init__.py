"""From a prompt to its graph: one clean run, then targets pulled back through frozen layers."""

from .targets import Target as Target
from .tracer import TraceSettings as TraceSettings
from .tracer import trace as trace
