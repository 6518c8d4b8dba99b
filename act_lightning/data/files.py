"""Where a store's bytes are: a folder on disk, or an object store.

Names are relative to the store and joined by "/", as "data/images_top/c/0/0/0/0".
"""

from __future__ import annotations

import os
import resource
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, TypeVar

from zarr.abc.store import Store as ZarrStore
from zarr.storage import LocalStore

from act_lightning.data.mirror import MirrorConfig

T = TypeVar("T")


def _max_open() -> int:
    """A quarter of what this process may have open, often 1024: other stores and code need some."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return 4096 if soft == resource.RLIM_INFINITY else min(4096, soft // 4)


MAX_OPEN = _max_open()
"""Files that a store keeps open."""


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
    """Files at a path or `s3://bucket/prefix`; `mirror` keeps shards on the node's own disk.

    Those of a folder only if `mirror` names a directory: most folders are on that disk already.
    """
    if is_remote(location):
        from act_lightning.data.remote import S3Files  # boto3 is slow to import

        return S3Files(str(location), mirror)
    if mirror is not None and mirror.directory is not None and mirror.max_gb > 0:
        from act_lightning.data.mirrored import MirroredFiles  # which is built of LocalFiles

        return MirroredFiles(Path(location), mirror)
    return LocalFiles(Path(location))


def is_remote(location: str | Path) -> bool:
    """Whether a store's location is an object store's URL."""
    return str(location).startswith("s3://")


@dataclass(frozen=True)
class LocalFiles:
    """Files of a folder.

    Those that ranges are read from stay open: opening one takes as long as half of a small picture.
    One that was deleted, or replaced, since is opened anew, so that a store deleted in use is
    noticed. A fork may share them, as `pread` has no position.
    """

    path: Path
    _open: dict[str, _Descriptor] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

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
        descriptor = self._open.get(name)
        if descriptor is None or os.fstat(descriptor.number).st_nlink == 0:
            if len(self._open) >= MAX_OPEN:
                # In one step, as other threads use it; reads come at random, so any one will do.
                self._open.popitem()
            descriptor = self._open[name] = _Descriptor(f"{self.path}/{name}")
        return os.pread(descriptor.number, size, start)

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


class _Descriptor:
    """An open file, closed when nobody holds it: not while another thread is reading from it."""

    __slots__ = ("number",)

    def __init__(self, path: str) -> None:
        self.number = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        if hasattr(self, "number"):
            os.close(self.number)
