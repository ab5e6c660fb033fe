"""Running out of memory, said in a sentence that names what to make smaller."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ...data.errors import UserError


@contextmanager
def memory_named(setting: str) -> Iterator[None]:
    """Turn running out of memory into a sentence that says what to make smaller."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise UserError(f"out of memory: make {setting} smaller, or use a machine with more") from error
    except (RuntimeError, OSError) as error:
        # how the CPU allocator says it, and how a mapping does
        if "can't allocate memory" not in str(error) and getattr(error, "errno", None) != errno.ENOMEM:
            raise
        raise UserError(f"out of memory: make {setting} smaller, or use a machine with more") from error
