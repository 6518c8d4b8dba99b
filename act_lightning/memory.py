"""How the C library hands out memory in a process that trains, or predicts at full speed."""

from __future__ import annotations

import ctypes

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""glibc's malloc.h."""
LARGEST = 2**31 - 1
OLD_LARGEST = 2**25
"""Of M_MMAP_THRESHOLD in older glibc, which refuses more."""


def keep_freed_memory() -> None:
    """Has glibc keep memory that is freed, up to 2 GB, and take pictures and activations from it.

    By default it asks the kernel for each tensor above 32 MB, which has to clear every page before
    its first use. Does nothing where the C library is not glibc.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    # The second call alone would fix the first threshold where it is, at 128 kB.
    if mallopt and (mallopt(M_MMAP_THRESHOLD, LARGEST) or mallopt(M_MMAP_THRESHOLD, OLD_LARGEST)):
        mallopt(M_TRIM_THRESHOLD, LARGEST)
