"""Where a store's bytes are: a folder on disk, or an object store.

Names are relative to the store and joined by "/", as "data/images_top/c/0/0/0/0".
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

from zarr.abc.store import Store as ZarrStore
from zarr.storage import LocalStore

from act_lightning.data.mirror import MirrorConfig

T = TypeVar("T")


class Files(Protocol):
    """Reads a store's files; picklable, and safe in several threads and after a fork.

    `str(files)` is the place, for messages.
    """

    def read(self, name: str) -> bytes:
        """A whole file.

        Raises:
            OSError: it cannot be read; FileNotFoundError if it does not exist.
        """

    def read_range(self, name: str, start: int, size: int) -> bytes:
        """`size` bytes from `start` on, fewer where the file ends.

        Raises:
            OSError: as `read`.
        """

    def read_tail(self, name: str, size: int) -> tuple[bytes, int]:
        """The last `size` bytes, fewer of a shorter file, and the file's length.

        Raises:
            OSError: as `read`.
        """

    def exists(self, name: str = "") -> bool:
        """Whether there is such a file or folder; without a name: anything at all."""

    def for_each(self, function: Callable[[T], None], items: Sequence[T]) -> None:
        """Calls `function`, which reads files, on every item: at once where that is quicker.

        Raises the first exception of `function`.
        """

    def zarr_store(self) -> ZarrStore:
        """The same files for zarr-python, read-only."""


def open_files(location: str | Path, mirror: MirrorConfig | None = None) -> Files:
    """Files at a path or `s3://bucket/prefix`; `mirror` keeps remote shards on local disk."""
    if is_remote(location):
        from act_lightning.data.remote import S3Files  # boto3 is slow to import

        return S3Files(str(location), mirror)
    return LocalFiles(Path(location))


def is_remote(location: str | Path) -> bool:
    """Whether a store's location is an object store's URL."""
    return str(location).startswith("s3://")


@dataclass(frozen=True)
class LocalFiles:
    """Files of a folder. None is kept open, so a deleted store is noticed, and forks are safe."""

    path: Path

    def __str__(self) -> str:
        return str(self.path)

    def __reduce__(self) -> tuple[type[LocalFiles], tuple[Path]]:
        """Pickles the absolute path: loader processes need not start in this directory."""
        return LocalFiles, (self.path.absolute(),)

    def read(self, name: str) -> bytes:
        """A whole file."""
        return (self.path / name).read_bytes()

    def read_range(self, name: str, start: int, size: int) -> bytes:
        """`size` bytes from `start` on, fewer where the file ends."""
        file = os.open(f"{self.path}/{name}", os.O_RDONLY)
        try:
            return os.pread(file, size, start)
        finally:
            os.close(file)

    def read_tail(self, name: str, size: int) -> tuple[bytes, int]:
        """The last `size` bytes, fewer of a shorter file, and the file's length."""
        with (self.path / name).open("rb") as file:
            length = file.seek(0, os.SEEK_END)
            file.seek(max(0, length - size))
            return file.read(), length

    def exists(self, name: str = "") -> bool:
        """Whether there is such a file or folder."""
        return (self.path / name).exists()

    def for_each(self, function: Callable[[T], None], items: Sequence[T]) -> None:
        """Calls `function` on every item, one after the other."""
        for item in items:
            function(item)

    def zarr_store(self) -> ZarrStore:
        """The same files for zarr-python, read-only."""
        return LocalStore(self.path, read_only=True)
