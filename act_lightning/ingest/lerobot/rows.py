"""Rows of parquet files, a few at a time, and their columns as arrays."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from act_lightning.ingest.source import SourceError


class Rows:
    """Rows of some columns of a parquet file, read forwards through a window of a few.

    Files written by LeRobot have one row group an episode, those that it converted have one in all,
    so neither the file nor its row groups are small; pages are.

    Args:
        path: the file.
        keep: whether to read the column of a name.
        window: rows held in memory.

    Raises:
        SourceError: the file is missing or damaged.
    """

    def __init__(self, path: Path, keep: Callable[[str], bool], window: int) -> None:
        self.path = path
        self._window = window
        try:
            # Not memory-mapped: a file cut short under a map ends the process.
            self._file = pq.ParquetFile(
                path, buffer_size=2**20, pre_buffer=False, page_checksum_verification=True
            )
            self.num_rows = self._file.metadata.num_rows
            self.names: list[str] = self._file.schema_arrow.names
        except FileNotFoundError as error:
            raise SourceError(f"{path} does not exist; the data set is incomplete") from error
        except Exception as error:  # pyarrow raises what it likes
            raise SourceError(f"{path} is damaged ({brief(error)}); fetch it anew") from error
        self._columns = [name for name in self.names if keep(name)]
        self._next = 0
        self._batches: Iterator[pa.RecordBatch] = iter(())
        self._left: pa.RecordBatch | None = None
        self._rewind(0)

    def read(self, start: int, stop: int) -> pa.Table:
        """Rows start .. stop; quick when they follow those read last.

        Raises:
            SourceError: they are not there, or damaged.
        """
        if start < self._next:
            self._rewind(start)
        parts: list[pa.RecordBatch] = []
        try:
            while self._next < stop:
                batch = self._left if self._left is not None else next(self._batches, None)
                if batch is None:
                    break
                used = min(len(batch), stop - self._next)
                if (skipped := max(start - self._next, 0)) < used:
                    parts.append(batch.slice(skipped, used - skipped))
                self._left = batch.slice(used) if used < len(batch) else None
                self._next += used
            table = pa.Table.from_batches(parts) if parts else None
        except Exception as error:  # pyarrow raises what it likes
            raise SourceError(
                f"{self.path}: rows {start} to {stop} are damaged ({brief(error)}); fetch it anew"
            ) from error
        if table is None or len(table) != stop - start:
            raise SourceError(f"{self.path} ends before row {stop}; fetch it anew")
        return table

    def _rewind(self, row: int) -> None:
        """Starts again at the row group that holds `row`."""
        meta = self._file.metadata
        first, group = 0, 0
        while group < meta.num_row_groups and first + meta.row_group(group).num_rows <= row:
            first += meta.row_group(group).num_rows
            group += 1
        self._next, self._left = first, None
        self._batches = self._file.iter_batches(
            self._window,
            row_groups=range(group, meta.num_row_groups),
            columns=self._columns,
            use_threads=False,
        )


def as_array(column: pa.ChunkedArray, width: int) -> NDArray[Any]:
    """A column of numbers, or of lists of `width` numbers however nested, as (T,) or (T, width).

    Raises:
        ValueError: an entry is null, no number, or of another length; and what pyarrow raises.
    """
    array = column.combine_chunks()
    if isinstance(array, pa.ChunkedArray):
        array = array.chunk(0)
    num_rows, nested = len(array), False
    while _is_list(array.type):
        if array.null_count:
            raise ValueError("an entry is null")
        inner = array.flatten()
        sizes = np.diff(np.asarray(array.offsets)) if not _is_fixed(array.type) else np.zeros(0)
        if len(sizes) and np.any(sizes != sizes[0]):
            raise ValueError("its entries differ in length")
        array, nested = inner, True
    if array.null_count:
        raise ValueError("an entry is null")
    values: NDArray[Any] = array.to_numpy(zero_copy_only=False)
    if values.dtype.kind not in "fiub":
        raise ValueError(f"it holds {array.type}, not numbers")
    if len(values) != num_rows * width:
        raise ValueError(f"{len(values)} numbers in {num_rows} rows, info.json says {width} a row")
    return values.reshape(num_rows, width) if nested else values


def _is_fixed(kind: pa.DataType) -> bool:
    return bool(pa.types.is_fixed_size_list(kind))


def _is_list(kind: pa.DataType) -> bool:
    return bool(_is_fixed(kind) or pa.types.is_list(kind) or pa.types.is_large_list(kind))


def brief(error: Exception) -> str:
    """First line of what a library says, not more than a line long."""
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0][:160]}"
