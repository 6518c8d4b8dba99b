"""Low-dimensional arrays of a foreign data set: columns chosen, joined side by side, checked."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from act_lightning.ingest.source import SourceError

MAX_TABLE_BYTES = 2**28
"""Of one episode's low-dimensional array; a larger one is taken for damage."""


@dataclass(frozen=True)
class Columns:
    """A key of a source, and which of its columns to take."""

    key: str
    start: int = 0
    stop: int | None = None

    @classmethod
    def parse(cls, text: str) -> Columns:
        """Reads `KEY`, `KEY[3]`, `KEY[:2]` or `KEY[2:5]`; counting from 0, the end excluded.

        Raises:
            ValueError: it is written another way.
        """
        match = re.fullmatch(r"([^\[\]]+)(?:\[(\d*)(:?)(\d*)\])?", text)
        if match is None or text.endswith("[]"):
            raise ValueError(f"{text!r} is not a key; write KEY, KEY[3], KEY[:2] or KEY[2:5]")
        key, start, colon, stop = match.groups()
        if start and not colon:
            return cls(key, int(start), int(start) + 1)
        return cls(key, int(start or 0), int(stop) if stop else None)

    @property
    def columns(self) -> slice:
        """To index an array's second axis with."""
        return slice(self.start, self.stop)

    def __str__(self) -> str:
        if self.start == 0 and self.stop is None:
            return self.key
        return f"{self.key}[{self.start}:{'' if self.stop is None else self.stop}]"


def join_columns(
    parts: Sequence[Columns], read: Callable[[str], NDArray[Any]], where: str
) -> NDArray[np.float64]:
    """Joins low-dimensional arrays side by side.

    Args:
        parts: keys with their columns.
        read: gives the array of a key, (T,) or (T, ...); axes after the first are flattened.
        where: file and episode, for messages.

    Returns:
        (T, D) float64, all finite.

    Raises:
        SourceError: an array is empty, no real numbers, of another length, or not finite.
    """
    tables: list[NDArray[np.float64]] = []
    for part in parts:
        array = read(part.key)
        if array.ndim < 1 or array.dtype.kind not in "fiub":
            raise SourceError(f"{where}: {part.key} is {array.dtype} {array.shape}, not numbers")
        table = array.reshape(len(array), -1)[:, part.columns] if len(array) else array[:, None]
        with np.errstate(invalid="ignore"):
            table = table.astype(np.float64)
        if table.ndim != 2 or 0 in table.shape:
            raise SourceError(f"{where}: {part} is empty (shape {array.shape})")
        if len(table) != len(tables[0] if tables else table):
            raise SourceError(
                f"{where}: {part} has {len(table)} steps and {parts[0]} {len(tables[0])}"
            )
        # As the store will hold it: what overflows float32 is as bad as what is not finite.
        with np.errstate(over="ignore", invalid="ignore"):
            bad = np.argwhere(~np.isfinite(table.astype(np.float32)))
        if len(bad):
            step, column = bad[0]
            raise SourceError(
                f"{where}: {part} is {table[step, column]} at step {step}, column {column}"
            )
        tables.append(table)
    return np.concatenate(tables, axis=1)
