"""A request to stop (SIGTERM from a cluster, Ctrl-C from a person) is kept until the step is over."""

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

import torch

from ..parallel import SINGLE, Collectives

# With several processes all must agree on the step: asking costs a collective, so it is not done at each.
_ASK_EVERY = 10


class StopRequest:
    """While open, SIGTERM and SIGINT set a flag; a second Ctrl-C is not waited for."""

    def __init__(self, comm: Collectives = SINGLE) -> None:
        self.comm, self.signalled, self.by_person = comm, False, False
        self._before: dict[int, Any] = {}

    def requested(self, step: int) -> bool:
        """Whether to save and stop after this step."""
        if self.comm.data_ranks * self.comm.feature_ranks == 1:
            return self.signalled
        return step % _ASK_EVERY == 0 and bool(self.comm.max_all(torch.tensor(float(self.signalled))) > 0)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signalled and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signalled, self.by_person = True, number == signal.SIGINT

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
