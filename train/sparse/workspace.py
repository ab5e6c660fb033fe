"""Memory of the sparse step: what is kept from step to step, and where gradients go."""

import weakref
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .entries import Entries, RowGradient
from .row_gradients import RowGradients, decode_backward, form, row_gradient_norms

# Lists have lengths of a multiple of this, and of so much room beyond what was needed.
_ROUND = 4096
MARGIN = 1.5
UNEVEN = 2.0
"""At first a rank, or a layer that competes with others, gets room for so many times its even share."""

# Steps after which counts are looked at.
_STEPS_BEHIND = 2


class Room:
    """How many entries of each layer an accelerator's lists hold, so that none are counted before they are listed.

    The counts of a step reach the host while the next ones run, and are looked at two steps later. Lists get half as
    much room again as was needed. Where that did not suffice the loss becomes NaN (`sparse_pass`): the step is left
    out, like any other that is not finite, and two steps later there is room. A first step counts, and waits for it.
    """

    def __init__(self, sizes: Sequence[int] = ()) -> None:
        self._sizes = list(sizes)
        self._on_the_way: deque[tuple[Tensor, torch.cuda.Event | None]] = deque()

    def of(self, l: int) -> int | None:
        """The length of layer l's list; None where nothing is known yet."""
        return self._sizes[l] if self._sizes else None

    def expect(self, counts: Sequence[int]) -> None:
        """How many there may be at first, where that is known: then not even a first step waits."""
        if not self._sizes:
            self._fit(list(counts))

    def note(self, counts: Tensor) -> None:
        """How many entries each layer [L] had in the step that has been sent off."""
        if not self._sizes:
            self._fit(counts.tolist())
            return
        event = None
        if counts.is_cuda:
            host = torch.empty(counts.shape, dtype=counts.dtype, pin_memory=True)
            counts = host.copy_(counts, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        self._on_the_way.append((counts, event))
        if len(self._on_the_way) > _STEPS_BEHIND:
            counts, event = self._on_the_way.popleft()
            if event is not None:
                event.synchronize()  # two steps old: over long ago
            self._fit(counts.tolist())

    def _fit(self, counts: list[int]) -> None:
        """Lengths change seldom, so that an allocator finds the same sizes again."""
        kept = self._sizes or [0] * len(counts)
        self._sizes = [
            size if 1.2 * count < size < 4 * count + 2 * _ROUND else (int(MARGIN * count) // _ROUND + 1) * _ROUND
            for size, count in zip(kept, counts, strict=True)
        ]


class Workspace:
    """Memory kept from step to step: fresh pages cost more than the arithmetic that fills them.

    For training loops, which call `backward()` and set gradients to None between steps: a first gradient lives in this
    memory until its parameter's `grad` is set to None (whoever wants to keep it longer clones it), and a further one is
    added to `grad` in place, without a temporary.
    """

    def __init__(self) -> None:
        self._gradients: dict[int, Tensor] = {}
        self._lent: dict[int, weakref.ref[Tensor]] = {}
        self._scratch: Tensor | None = None
        self.room, self.silent_room = Room(), Room()

    def clear(self) -> None:
        """Give the memory back; the next step takes it anew."""
        self._gradients.clear()
        self._lent.clear()
        self._scratch, self.room, self.silent_room = None, Room(), Room()

    def gradient(self, parameter: Tensor) -> tuple[Tensor, bool]:
        """Where a gradient is to be written, and whether it is to be added to what is there."""
        if not parameter.is_leaf:
            return torch.empty_like(parameter), False
        if parameter.grad is not None:
            return parameter.grad, True
        key = id(parameter)
        kept, lent = self._gradients.get(key), self._lent.get(key)
        if lent is not None and lent() is not None:  # an earlier pass of the same backward is not yet accumulated
            return torch.empty_like(parameter), False
        if kept is None or not _alike(kept, parameter):
            kept = self._gradients[key] = torch.empty_like(parameter)
        given = kept.detach()  # autograd takes over a tensor that nobody else holds; the memory below it stays here
        self._lent[key] = weakref.ref(given)
        return given, False

    def scratch(self, rows: int, columns: int, like: Tensor) -> Tensor:
        """[rows, columns], overwritten by the next call."""
        kept = self._scratch
        if kept is None or kept.numel() < rows * columns or (kept.dtype, kept.device) != (like.dtype, like.device):
            kept = self._scratch = like.new_empty(rows * columns)
        return kept[: rows * columns].view(rows, columns)


def _alike(a: Tensor, b: Tensor) -> bool:
    return (a.shape, a.dtype, a.device) == (b.shape, b.dtype, b.device)


class Memory(NamedTuple):
    """Where gradients of the matrices go: nowhere if they may stay unformed, to kept memory, or to fresh memory."""

    workspace: Workspace | None
    unformed: RowGradients | None

    def gradient(self, parameter: Tensor, rows: RowGradient) -> Tensor | None:
        """What backward returns for a matrix whose gradient `rows` describes."""
        if self.unformed is not None and self.unformed.take(parameter):
            self.unformed.put(parameter, rows, row_gradient_norms(rows))
            return None
        out, add = self._place(parameter)
        form(rows, out.flatten(1), add)
        return None if add else out

    def gradients(self, parameter: Tensor, rows: RowGradient, entries: Entries) -> tuple[Tensor, Tensor | None]:
        """The same for a decoder; the gradient of its entries' values comes out of the same pass."""
        if self.unformed is not None and self.unformed.take(parameter):
            grad_values, norms = decode_backward(rows, entries, None)
            assert norms is not None
            self.unformed.put(parameter, rows, norms)
            return grad_values, None
        out, add = self._place(parameter)
        grad_values, _ = decode_backward(rows, entries, out.flatten(1), add)
        return grad_values, None if add else out

    def _place(self, parameter: Tensor) -> tuple[Tensor, bool]:
        return (torch.empty_like(parameter), False) if self.workspace is None else self.workspace.gradient(parameter)
