"""Memory that is freed and wanted again at once: kept by the process, where the C library would hand it back.

glibc gives every block above 32 MB its own pages and returns them when it is freed. A step over many layers frees and
takes such blocks dozens of times, and fresh pages cost more than the arithmetic that fills them: on two AVX2 cores the
loss of a 30 x 576 model took 136 ms a step with them and 33 ms without.
"""

import ctypes
import platform

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3
"""mallopt's numbers for what is kept at the heap's end, and from which size a block has pages of its own."""
KEPT, LARGE = (1 << 31) - 1, 1 << 30
"""Up to 2 GB stay with the process; blocks from 1 GB on still go back."""


def keep_pages() -> bool:
    """From now on, keep freed blocks for the next ones; False where there is no glibc, and nothing happens."""
    if platform.libc_ver()[0] != "glibc":
        return False
    library = ctypes.CDLL(None)
    return bool(library.mallopt(MMAP_THRESHOLD, LARGE)) and bool(library.mallopt(TRIM_THRESHOLD, KEPT))
