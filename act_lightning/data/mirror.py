"""Whole objects of a store far away on local disk: bounded, shared by all processes of a node.

Such a store is in an object store, or in a folder on a disk that many nodes share.

An object is copied in a thread while those who need it now read ranges of it over the network: of
460 MB in shards of 7 MB, at 20 MB/s and 20 ms latency, the first batch of 16 frames came after 0.8
s, and after 20 s when each frame waited for its shard (at 100 MB/s: 0.8 and 2.3 s). An object is
written as `.part` and renamed, so a name without `.part` is always whole. Whoever copies holds
the kernel's lock on that `.part`: other processes leave the object to it, and a killed process
leaves no lock, and a rest that the next one overwrites.

Layout: `<directory>/mirror/<version of a store>/<object>`, where the version is a hash of endpoint,
bucket and prefix and of every object's name, size and ETag. A store that was changed is thus
another one, and is never served from copies of the old. Each process holds a shared lock on the
versions it reads; only versions that nobody reads give up objects, those untouched for longest
first. So a job that runs never loses its copies, and a store larger than the limit is copied as
far as it fits and is not copied in turns.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import time
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from threading import Lock, Thread
from typing import NamedTuple
from urllib.parse import quote

THREADS = 4
"""Objects copied at once by a process."""
PIECE = 8 * 2**20
"""Bytes a request of a copy; a failed request repeats no more than these."""
KEEP_FREE = 2**30
"""Bytes of the disk that a mirror leaves to others, such as checkpoints."""
IN_USE = "act_lightning_in_use"
"""File of a version on which its readers hold a shared lock."""
RETRY_SECONDS = 60.0
"""After a copy found no room, the next is tried this much later."""


@dataclass(frozen=True, kw_only=True)
class MirrorConfig:
    """Copies of the shards of a store far away, on local disk."""

    directory: str | None = None
    """Folder for the copies; null: act_lightning in $XDG_CACHE_HOME, or in ~/.cache, and only for
    stores at `s3://`. If it is given, also those in folders are copied, as on a shared disk."""
    max_gb: float = 50.0
    """At most so many GB (10^9 bytes) of copies, of all stores together; 0 copies nothing, and
    every frame is read over the network."""

    def __post_init__(self) -> None:
        if not (isfinite(self.max_gb) and self.max_gb >= 0):
            raise ValueError(f"mirror.max_gb={self.max_gb}; give 0 (no mirror) or more")

    @property
    def path(self) -> Path:
        """The folder for the copies."""
        if self.directory is not None:
            return Path(self.directory).expanduser()
        cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        return Path(cache) / "act_lightning"


class Mirror:
    """One process's view of the copies of one version of a store.

    Args:
        config: where, and how much.
        version: names the version of the store; a hash.
        sizes: bytes of each object, by name.
        fetch: reads `size` bytes of an object over the network: `fetch(name, start, size)`.
            Raises OSError.
    """

    def __init__(
        self,
        config: MirrorConfig,
        version: str,
        sizes: dict[str, int],
        fetch: Callable[[str, int, int], bytes],
    ) -> None:
        self._root = config.path / "mirror"
        self.folder = self._root / version
        self._limit = int(config.max_gb * 1e9)
        self._sizes = sizes
        self._fetch = fetch
        self._found: dict[str, str] = {}
        self._copying: set[str] = set()
        self._lock = Lock()
        self._next_try = 0.0
        self._used = 0
        self._next_count = 0.0
        self._off = self._warned = False
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            in_use = os.open(self.folder / IN_USE, os.O_CREAT | os.O_RDWR, 0o666)
            weakref.finalize(self, os.close, in_use)
            fcntl.flock(in_use, fcntl.LOCK_SH)
        except OSError as error:
            self._turn_off(error)

    def find(self, name: str) -> str | None:
        """Name, in `folder`, of an object's copy; None while there is none, and copying begins."""
        return self._found.get(name) or self._find(name)

    def forget(self, name: str) -> None:
        """Says that a copy could not be read; it is looked for, and perhaps made, again."""
        self._found.pop(name, None)

    def _find(self, name: str) -> str | None:
        if self._off:
            return None
        copy = quote(name, safe="")
        path = f"{self.folder}/{copy}"
        try:
            if os.stat(path).st_size == self._sizes[name]:
                os.utime(path)
                self._found[name] = copy
                return copy
            os.unlink(path)  # somebody has cut it
        except OSError:
            pass
        self._begin(name, path)
        return None

    def _begin(self, name: str, path: str) -> None:
        """Starts a thread unless enough run; nothing is queued, as samples come back to it."""
        with self._lock:
            busy = name in self._copying or len(self._copying) >= THREADS
            if busy or time.monotonic() < self._next_try:
                return
            self._copying.add(name)
        # A daemon, so that a program's end does not wait for it.
        Thread(target=self._copy, args=(name, path), daemon=True, name="act-mirror").start()

    def _copy(self, name: str, path: str) -> None:
        try:
            with _locked(f"{path}.part", wait=False) as part:
                if part is None:  # another process copies it
                    return
                try:
                    if not os.path.exists(path):
                        self._fill(name, path, part)
                finally:
                    Path(f"{path}.part").unlink(missing_ok=True)
        except OSError as error:
            self._turn_off(error)
        finally:
            with self._lock:
                self._copying.discard(name)

    def _fill(self, name: str, path: str, part: int) -> None:
        """Writes the locked file and moves it into place."""
        size = self._sizes[name]
        if not self._reserve(part, size):
            self._next_try = time.monotonic() + RETRY_SECONDS
            self._warn("has no room for the whole store", "Raise data.mirror.max_gb, make room")
            return
        for start in range(0, size, PIECE):
            try:
                piece = self._fetch(name, start, min(PIECE, size - start))
            except OSError:
                return  # whoever needs the object meets the same error, and reports it
            if os.pwrite(part, piece, start) < len(piece):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)
        os.fsync(part)
        os.rename(f"{path}.part", path)

    def _reserve(self, part: int, size: int) -> bool:
        """Gives a file its full size if that is within the limit; removes old copies for it."""
        with _locked(f"{self._root}/lock"):
            os.ftruncate(part, 0)
            if not self._make_room(size):
                return False
            os.ftruncate(part, size)
            self._used += size
            return True

    def _make_room(self, size: int) -> bool:
        """Whether `size` more bytes fit, after removing old copies if need be."""
        start = time.monotonic()
        if start < self._next_count and self._excess(size) <= 0:
            return True
        copies = _copies(self._root)
        self._used = sum(copy.size for copy in copies)
        end = time.monotonic()
        # Counting 100,000 files takes part of a second: no more than a twentieth of the time.
        self._next_count = end + 20 * (end - start)
        if (excess := self._excess(size)) <= 0:
            return True
        removed = _evict(copies, excess)
        self._used -= removed
        return removed >= excess

    def _excess(self, size: int) -> int:
        """Bytes by which the limit, or the room on the disk, would be exceeded by `size` more."""
        free = shutil.disk_usage(self._root).free - KEEP_FREE
        return max(self._used + size - self._limit, size - free)

    def _turn_off(self, error: OSError) -> None:
        self._off = True
        self._warn(f"is off ({error})", "Make room")

    def _warn(self, what: str, advice: str) -> None:
        with self._lock:
            first, self._warned = not self._warned, True
        if first:
            warnings.warn(
                f"the mirror in {self._root} {what}; frames without a copy are read where the "
                f"store is, more slowly. {advice}, or set data.mirror.directory to another disk",
                stacklevel=2,
            )


class _Copy(NamedTuple):
    used: float
    size: int
    path: str


def _copies(root: Path) -> list[_Copy]:
    """All copies of all stores, those being made included."""
    copies = []
    for marker in root.glob(f"*/{IN_USE}"):  # a folder without it is not ours
        for entry in os.scandir(marker.parent):
            with suppress(FileNotFoundError):  # another process has just moved it
                stat = entry.stat()
                copies.append(_Copy(stat.st_mtime, stat.st_size, entry.path))
    return copies


def _evict(copies: list[_Copy], excess: int) -> int:
    """Removes `excess` bytes of versions that nobody reads, if there are so many.

    What killed processes left goes as well: nobody copies into a version that nobody reads.

    Returns:
        Bytes removed.
    """
    removed = 0
    unused: dict[str, bool] = {}
    with ExitStack() as locks:
        for _, size, path in sorted(copies):
            folder, name = os.path.split(path)
            if folder not in unused:
                lock = locks.enter_context(_locked(f"{folder}/{IN_USE}", wait=False))
                unused[folder] = lock is not None
            if unused[folder] and name != IN_USE and removed < excess:
                os.unlink(path)
                removed += size
    return removed


@contextmanager
def _locked(path: str, wait: bool = True) -> Iterator[int | None]:
    """Holds the kernel's lock on a file, which is made if missing; a killed process loses it.

    Yields:
        The open file; None if another holds the lock and `wait` is false, or has just removed it.
    """
    file = os.open(path, os.O_CREAT | os.O_RDWR, 0o666)
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            held = os.path.samestat(os.fstat(file), os.stat(path))
        except (BlockingIOError, FileNotFoundError):
            held = False
        yield file if held else None
    finally:
        fcntl.flock(file, fcntl.LOCK_UN)  # closing is not enough: a forked child may have it open
        os.close(file)
