"""How the C library hands out memory in a process that computes on the CPU."""

from __future__ import annotations

import ctypes

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""glibc's malloc.h."""
LARGEST = 2**31 - 1


def keep_freed_memory() -> None:
    """Has glibc keep memory that is freed, up to 2 GB, and take pictures and activations from it.

    By default it asks the kernel for each tensor above 32 MB, which has to clear every page before
    its first use: a sixth of a training step at 480x640. Does nothing where the C library is not
    glibc.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for threshold in (M_MMAP_THRESHOLD, M_TRIM_THRESHOLD):
            mallopt(threshold, LARGEST)
