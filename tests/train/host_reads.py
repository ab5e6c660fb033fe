"""What would make the host wait for an accelerator, counted."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Reads(TorchDispatchMode):
    """Counts what would make the host wait for an accelerator: a number read, a length that depends on numbers."""

    waits = ("_local_scalar_dense", "is_nonzero", "nonzero.default", "masked_select", "unique", "equal.default")

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func).removeprefix("aten.")
        masks = isinstance(args[1], (list, tuple)) and any(
            isinstance(index, torch.Tensor) and index.dtype == torch.bool for index in args[1]
        ) if name.startswith("index.") else False  # fmt: skip
        if masks or name.startswith(self.waits):
            self.seen.append(name)
        return func(*args, **(kwargs or {}))
