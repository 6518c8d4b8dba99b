"""HDF5 files that others wrote, read such that every fault names file and field.

h5py and libhdf5 raise what they like on a damaged file; here that becomes `SourceError`. Files are
opened for one read and closed again, so nothing is held open between two blocks of frames.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from act_lightning.ingest.columns import MAX_TABLE_BYTES
from act_lightning.ingest.source import SourceError

MAX_CHUNK_BYTES = 2**28
"""Of a dataset's chunk, which is decoded whole; a larger one is taken for damage."""


@contextmanager
def open_hdf5(path: Path) -> Iterator[h5py.File]:
    """Opens a file to read.

    Raises:
        SourceError: whatever goes wrong, here or in the block; the message names the file.
    """
    try:
        with h5py.File(path, "r") as file:
            yield file
    except SourceError:
        raise
    except Exception as error:  # h5py raises what it likes
        raise SourceError(
            f"{path} cannot be read ({type(error).__name__}: {error}); "
            "it is damaged, or no HDF5 file"
        ) from error


def children(file: h5py.File, name: str, where: str) -> dict[str, Any]:
    """Members of a group by name, those that can be opened.

    Raises:
        SourceError: there is no such group.
    """
    group = file.get(name)
    if not isinstance(group, h5py.Group):
        raise SourceError(f"{where} has no group {name}; is it of another format?")
    members = {key: group.get(key) for key in group}
    return {key: member for key, member in members.items() if member is not None}


def find_dataset(file: h5py.File, name: str, where: str) -> h5py.Dataset:
    """A dataset that was wholly written, has a first axis, and chunks that fit in memory.

    Raises:
        SourceError: it is not there, or not so.
    """
    dataset = file.get(name)
    if not isinstance(dataset, h5py.Dataset):
        group, _, _ = name.rpartition("/")
        beside = file.get(group) if group else file
        listed = ", ".join(beside) if isinstance(beside, h5py.Group) else ""
        raise SourceError(f"{where} has no {name}; there is {listed or 'nothing'}")
    if dataset.shape is None or dataset.ndim < 1:
        raise SourceError(f"{where}: {name} has shape {dataset.shape}; a first axis of time lacks")
    # Unwritten chunks would be read as zeros: a recorder that was stopped leaves such.
    if dataset.size and dataset.id.get_space_status() != h5py.h5d.SPACE_STATUS_ALLOCATED:
        raise SourceError(f"{where}: {name} was not wholly written")
    chunk_bytes = int(np.prod(dataset.chunks or (1,), dtype=object)) * dataset.dtype.itemsize
    if chunk_bytes > MAX_CHUNK_BYTES:
        raise SourceError(f"{where}: {name} has chunks of {chunk_bytes} bytes; it is damaged")
    return dataset


def read_table(file: h5py.File, name: str, where: str) -> NDArray[Any]:
    """A whole low-dimensional dataset.

    Raises:
        SourceError: it is not there, or impossibly large.
    """
    dataset = find_dataset(file, name, where)
    size = int(np.prod(dataset.shape, dtype=object)) * dataset.dtype.itemsize
    if size > MAX_TABLE_BYTES:
        raise SourceError(f"{where}: {name} claims shape {dataset.shape}; it is damaged")
    return np.asarray(dataset[...])


def read_rows(path: Path, name: str, where: str, start: int, stop: int) -> NDArray[Any]:
    """Rows start .. stop of a dataset.

    Raises:
        SourceError: the file or the dataset is damaged, or shorter.
    """
    with open_hdf5(path) as file:
        rows = np.asarray(find_dataset(file, name, where)[start:stop])
    if len(rows) != stop - start:
        raise SourceError(f"{where}: {name} ends before step {stop}")
    return rows
