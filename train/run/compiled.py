"""The dense pass under torch.compile (`trainer.compile`), and the time that compiling takes."""

import functools
import time
from collections.abc import Callable
from typing import Any

import torch

from ..loss.objective import Pass, choose, dense_pass


class CompileClock:
    """Seconds that this process has spent compiling; a graph's backward is compiled when it is first called."""

    def __init__(self) -> None:
        self.seconds, self._begun = 0.0, 0.0

    def start(self) -> None:
        """Listen to the compiler, whose import takes a while: only where something is compiled."""
        from torch._dynamo.callback import on_compile_end, on_compile_start

        on_compile_start(self._starts)
        on_compile_end(self._ends)

    def _starts(self, *_: Any) -> None:
        self._begun = time.perf_counter()

    def _ends(self, *_: Any) -> None:
        self.seconds += time.perf_counter() - self._begun


def compiled_pass() -> Callable[..., Pass]:
    """`dense_pass`, compiled all but the choice of topk kinds: k falls from step to step, and each value of it would
    be compiled anew."""
    plain: Any = torch.compiler.disable(choose)
    return functools.partial(torch.compile(dense_pass), chosen_by=plain)
