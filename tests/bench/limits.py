"""What bounds a step: the work that it is, and what the machine can do at most.

A roofline of two parts: products and convolutions are bound by arithmetic, all else by memory. So a
step takes at least the FLOPs of the former at the rate of a large matrix product, and the bytes of
the latter at the rate of a large copy. What stays in a cache from one operation to the next may be
quicker than that.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

SIDE = 2048
"""Of the matrices: large enough that their product is bound by arithmetic."""
COPIED = 2**28
"""Bytes of a copy: larger than any cache."""
MOVES_NOTHING = {
    getattr(torch.ops.aten, name)
    for name in ("empty", "empty_like", "empty_strided", "_unsafe_view", "_reshape_alias")
}
"""Operations without work, besides views."""


def matmul_rate(dtype: torch.dtype, repetitions: int = 5) -> float:
    """FLOP/s of a square matrix product on all threads; the best of a few."""
    a, b = (torch.randn(SIDE, SIDE).to(dtype) for _ in range(2))
    return 2 * SIDE**3 / _least_seconds(lambda: a @ b, repetitions)


def copy_rate(repetitions: int = 5) -> float:
    """Bytes/s of a copy from memory to memory, those read and those written."""
    source = torch.ones(COPIED, dtype=torch.uint8)
    target = torch.empty_like(source)
    return 2 * COPIED / _least_seconds(lambda: target.copy_(source), repetitions)


class Work(TorchDispatchMode):
    """Counts the work of what runs within it, backward passes too.

    Attributes:
        flops: of products and convolutions.
        bytes: of the tensors that all other operations read and write.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flops = self.bytes = 0

    @classmethod
    def of(cls, run: Callable[[], object]) -> Work:
        """That of a call."""
        with cls() as work:
            run()
        return work

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        name = func._overloadpacket
        if name not in flop_registry:
            with self:  # linear and conv2d, where there are no gradients, are made of others
                out = func.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
        out = func(*args, **kwargs)
        if name in flop_registry:
            self.flops += flop_registry[name](*args, **kwargs, out_val=out)
        elif not (func.is_view or name in MOVES_NOTHING):
            tensors = (x for x in tree_leaves((args, kwargs, out)) if isinstance(x, Tensor))
            self.bytes += sum(tensor.nbytes for tensor in tensors)
        return out

    def limit(self, dtype: torch.dtype) -> dict[str, float]:
        """The work, rates of the machine, and `seconds`, what it takes at least.

        Args:
            dtype: of the factors of products.
        """
        flop_rate, byte_rate = matmul_rate(dtype), copy_rate()
        return {
            "flops": self.flops,
            "bytes": self.bytes,
            "flops_per_second": flop_rate,
            "bytes_per_second": byte_rate,
            "seconds": self.flops / flop_rate + self.bytes / byte_rate,
        }


def describe(limit: dict[str, float], seconds: float) -> str:
    """A limit in words.

    Args:
        limit: of `Work.limit`.
        seconds: measured.
    """
    return (
        f"{limit['flops'] / 1e9:.1f} GFLOP at {limit['flops_per_second'] / 1e9:.0f} GFLOP/s and "
        f"{limit['bytes'] / 1e9:.2f} GB at {limit['bytes_per_second'] / 1e9:.0f} GB/s take "
        f"{1e3 * limit['seconds']:.0f} ms at least; measured: {1e3 * seconds:.0f} ms, "
        f"{limit['seconds'] / seconds:.0%} of what is possible"
    )


def _least_seconds(run: Callable[[], object], repetitions: int) -> float:
    run()
    seconds = []
    for _ in range(repetitions):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return min(seconds)
