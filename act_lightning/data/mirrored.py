"""Files of a folder on a disk that many nodes share, with copies on the node's own disk.

The copies are those of `mirror`, as for an object store: bounded, shared by all processes of a
node, never half of a file.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from zarr.abc.store import Store as ZarrStore

from act_lightning.data.files import LocalFiles
from act_lightning.data.mirror import Mirror, MirrorConfig

T = TypeVar("T")


class _Version(NamedTuple):
    size: int
    changed_ns: int


class _Process(NamedTuple):
    """What each process makes for itself, because it does not survive a fork."""

    mirror: Mirror
    copies: LocalFiles


class MirroredFiles:
    """Files of a folder; a file that ranges are read from is copied when it is first needed.

    Pickling sends the listing: a loader process reads the version that its parent opened.

    Args:
        path: the folder.
        mirror: of the copies.
    """

    def __init__(self, path: Path, mirror: MirrorConfig) -> None:
        self.path = path.absolute()
        self.mirror = mirror
        self._files = LocalFiles(self.path)
        self._listing: dict[str, _Version] = {}
        for file in self.path.rglob("*"):
            with suppress(FileNotFoundError):  # a temporary one, just moved into place
                if file.is_file():
                    self._listing[str(file.relative_to(self.path))] = _version(file)
        # Files that are no longer what was listed: these are not copied.
        self._changed: set[str] = set()
        # By process, and those of the parent are kept: to collect them might wait for its threads.
        self._processes: dict[int, _Process] = {}

    def __str__(self) -> str:
        return str(self._files)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_processes": {}}

    def read(self, name: str) -> bytes:
        """A whole file, from where it is: the small ones are read once."""
        return self._files.read(name)

    def read_range(self, name: str, start: int, size: int) -> bytes:
        """`size` bytes from `start` on, fewer where the file ends; from its copy if there is one.

        Otherwise from where it is, and its copy is begun.
        """
        return self._read(name, lambda files, name: files.read_range(name, start, size))

    def read_tail(self, name: str, size: int) -> tuple[bytes, int]:
        """The last `size` bytes, fewer of a shorter file, and the file's length; as `read_range`.

        Of a file that was extended since and has no copy, these are the new ones.
        """
        return self._read(name, lambda files, name: files.read_tail(name, size))

    def exists(self, name: str = "") -> bool:
        """Whether there is such a file or folder."""
        return self._files.exists(name)

    def for_each(self, function: Callable[[T], None], items: Sequence[T]) -> None:
        """Calls `function` on every item, one after the other."""
        self._files.for_each(function, items)

    def zarr_store(self) -> ZarrStore:
        """The same files for zarr-python, read-only, from where they are."""
        return self._files.zarr_store()

    def _read(self, name: str, read: Callable[[LocalFiles, str], T]) -> T:
        mirror, copies = self._processes.get(os.getpid()) or self._open()
        # Not listed is what was added since the store was opened, or is missing.
        is_same = name in self._listing and name not in self._changed
        if is_same and (copy := mirror.find(name)):
            try:
                return read(copies, copy)
            except OSError:
                mirror.forget(name)
        return read(self._files, name)

    def _open(self) -> _Process:
        contents = repr((str(self.path), sorted(self._listing.items())))
        version = f"{self.path.name}-{hashlib.sha256(contents.encode()).hexdigest()[:32]}"
        sizes = {name: file.size for name, file in self._listing.items()}
        mirror = Mirror(self.mirror, version, sizes, self._read_unchanged)
        process = _Process(mirror, LocalFiles(mirror.folder))
        return self._processes.setdefault(os.getpid(), process)  # another thread may be first

    def _read_unchanged(self, name: str, start: int, size: int) -> bytes:
        """Part of a file for its copy.

        Raises:
            OSError: it is not what it was when the store was opened, or cannot be read.
        """
        piece = self._files.read_range(name, start, size)
        if len(piece) < size or _version(self.path / name) != self._listing[name]:
            self._changed.add(name)
            raise OSError(f"{self.path / name} was changed since the store was opened")
        return piece


def _version(file: Path) -> _Version:
    stat = file.stat()
    return _Version(stat.st_size, stat.st_mtime_ns)
