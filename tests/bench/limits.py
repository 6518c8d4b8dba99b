"""What the machine can do at most: its measured rates of matrix products and of copies."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch.utils.flop_counter import FlopCounterMode

SIDE = 2048
"""Of the matrices: large enough that their product is bound by arithmetic."""
COPIED = 2**28
"""Bytes of a copy: larger than any cache."""


def matmul_rate(dtype: torch.dtype, repetitions: int = 5) -> float:
    """FLOP/s of a square matrix product on all threads; the best of a few."""
    a, b = (torch.randn(SIDE, SIDE).to(dtype) for _ in range(2))
    return 2 * SIDE**3 / _least_seconds(lambda: a @ b, repetitions)


def copy_rate(repetitions: int = 5) -> float:
    """Bytes/s of a copy from memory to memory, those read and those written."""
    source = torch.ones(COPIED, dtype=torch.uint8)
    target = torch.empty_like(source)
    return 2 * COPIED / _least_seconds(lambda: target.copy_(source), repetitions)


def count_flops(run: Callable[[], object]) -> int:
    """Of the matrix products and convolutions of a call, forwards and backwards."""
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def _least_seconds(run: Callable[[], object], repetitions: int) -> float:
    run()
    seconds = []
    for _ in range(repetitions):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return min(seconds)
