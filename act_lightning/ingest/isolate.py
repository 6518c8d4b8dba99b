"""A source read by a child process, so that no damaged file can take the program down.

libhdf5, the video and the compression libraries are written in C, and a damaged file can crash or
hang them. Such a death is here an error that names the episode, and the next episode is read by a
fresh process. What goes over the pipe, in turns:

    parent                                child
                                      <-  Opened, or a fault
    Read(id)                          ->
                                      <-  (Episode without images, their shape); or a fault
    ReadFrames(camera, start, stop)   ->
                                      <-  shape, then the bytes; or a fault

The child ends when its pipe does, and so does not outlive its parent.
"""

from __future__ import annotations

import multiprocessing
import signal
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from act_lightning.batch import DataSpec
from act_lightning.data.episode import Episode, Frames
from act_lightning.ingest.source import Source, SourceError

TIMEOUT_S = 300.0
"""For one answer: an episode's tables, or at most `PIECE_BYTES` of its frames."""
PIECE_BYTES = 2**24
"""Of frames that the child holds at a time."""


class Opened(NamedTuple):
    """What a source says of itself."""

    format: str
    spec: DataSpec
    units: dict[str, str]
    ids: list[int]
    names: list[str]
    provenance: dict[str, Any]
    unused: tuple[str, ...]


class Read(NamedTuple):
    """Request: an episode."""

    id: int


class ReadFrames(NamedTuple):
    """Request: frames of the episode read last."""

    camera: int
    start: int
    stop: int


class Fault(NamedTuple):
    """Answer: the source is damaged."""

    message: str


class Bug(NamedTuple):
    """Answer: the reader failed in a way that it should not."""

    trace: str


class IsolatedSource:
    """`Source` whose reader runs in a child process; use it as a context manager."""

    def __init__(
        self, opener: Callable[[], Source], path: Path, timeout_s: float = TIMEOUT_S
    ) -> None:
        """Opens the source.

        Args:
            opener: opens it, in the child; picklable.
            path: of the source, for messages.
            timeout_s: after which the reader is taken to hang.

        Raises:
            SourceError: it cannot be opened, or the reader crashed.
        """
        self._opener = opener
        self._path = path
        self._timeout_s = timeout_s
        opened = self._start()
        self.format = opened.format
        self.spec = opened.spec
        self.units = opened.units
        self.ids = opened.ids
        self.provenance = opened.provenance
        self.unused = opened.unused
        self._names = dict(zip(opened.ids, opened.names, strict=True))
        self._current: int | None = None

    def name(self, id: int) -> str:
        """How messages call an episode."""
        return self._names[id]

    def read(self, id: int) -> Episode:
        """Reads an episode; its frames can be read until the next call.

        Raises:
            SourceError: it is damaged, or the reader crashed or hung over it.
        """
        if not self._process.is_alive():
            self._start()
        self._current = id
        episode, shape = self._ask(Read(id), f"{self._path}: {self.name(id)}")
        assert isinstance(episode, Episode)
        return episode if shape is None else replace(episode, images=_Frames(self, id, shape))

    def read_frames(self, id: int, camera: int, start: int, stop: int) -> NDArray[np.uint8]:
        """Frames start .. stop of a camera of the episode read last."""
        name = f"{self._path}: {self.name(id)}"
        if self._current != id or not self._process.is_alive():
            raise RuntimeError(f"{name}: its frames are asked for, but the reader has moved on")
        frames = np.empty((stop - start, *self.spec.image_size, 3), np.uint8)
        piece = max(1, PIECE_BYTES * len(frames) // frames.nbytes)
        for first in range(start, stop, piece):
            last = min(first + piece, stop)
            where = f"{name}: camera {self.spec.cameras[camera]}, steps {first} to {last - 1}"
            shape = self._ask(ReadFrames(camera, first, last), where)
            content = self._receive(where, as_bytes=True)
            frames[first - start : last - start] = np.frombuffer(content, np.uint8).reshape(shape)
        return frames

    def close(self) -> None:
        """Ends the child."""
        self._connection.close()
        self._process.join(1.0)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _start(self) -> Opened:
        # Not forked from here, where threads hold locks. The server imports torch and zarr once, so
        # that a reader that replaces a crashed one starts at once.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__])
        self._connection, theirs = context.Pipe()
        self._process = context.Process(
            target=_serve, args=(theirs, self._opener), name="ingest reader", daemon=True
        )
        self._process.start()
        theirs.close()
        opened = self._receive(str(self._path))
        assert isinstance(opened, Opened)
        return opened

    def _ask(self, request: Read | ReadFrames, where: str) -> Any:
        try:
            self._connection.send(request)
        except OSError:
            raise self._crash(where) from None
        return self._receive(where)

    def _receive(self, where: str, *, as_bytes: bool = False) -> Any:
        """The child's answer.

        Raises:
            SourceError: the source is damaged, or the child crashed or hung.
            RuntimeError: the reader has a bug.
        """
        try:
            if not self._connection.poll(self._timeout_s):
                self._process.kill()
                self._process.join()
                raise SourceError(
                    f"{where}: the reader gave no answer for {self._timeout_s:.0f} s; "
                    "the file is damaged, or its disk does not answer"
                )
            answer = self._connection.recv_bytes() if as_bytes else self._connection.recv()
        except (EOFError, ConnectionError):
            raise self._crash(where) from None
        if isinstance(answer, Fault):
            raise SourceError(answer.message)
        if isinstance(answer, Bug):
            raise RuntimeError(f"{where}: the reader failed. Its own words:\n{answer.trace}")
        return answer

    def _crash(self, where: str) -> SourceError:
        self._process.join()
        code = self._process.exitcode or 0
        how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        return SourceError(f"{where}: the library that reads it crashed ({how}); it is damaged")


@dataclass(frozen=True)
class _Frames:
    """`Frames` of an episode that the child holds."""

    source: IsolatedSource
    id: int
    shape: tuple[int, ...]

    def read(self, camera: int, start: int, stop: int) -> NDArray[np.uint8]:
        """Frames start .. stop of a camera."""
        return self.source.read_frames(self.id, camera, start, stop)


def _serve(connection: Connection, opener: Callable[[], Source]) -> None:
    """Answers requests until the pipe ends; the child's main function."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent is told too, and closes the pipe
    try:
        source = opener()
        names = [source.name(id) for id in source.ids]
        answer: Any = Opened(
            source.format,
            source.spec,
            source.units,
            source.ids,
            names,
            source.provenance,
            source.unused,
        )
    except Exception as error:
        answer = _failure(error)
    try:
        connection.send(answer)
        frames: Frames | None = None
        while isinstance(answer, Opened):
            request = connection.recv()
            try:
                if isinstance(request, ReadFrames):
                    assert frames is not None
                    block = np.ascontiguousarray(frames.read(*request))
                    connection.send(block.shape)
                    connection.send_bytes(block.data.cast("B"))
                    continue
                episode = source.read(request.id)
                frames = episode.frames
                shape = None if frames is None else tuple(frames.shape)
                connection.send((replace(episode, images=None), shape))
            except Exception as error:
                connection.send(_failure(error))
    except (EOFError, ConnectionError):
        return


def _failure(error: Exception) -> Fault | Bug:
    if isinstance(error, EOFError | ConnectionError):
        raise error
    if isinstance(error, SourceError):
        return Fault(str(error))
    if isinstance(error, MemoryError):
        return Fault(f"it claims more than fits in memory ({error}); it is damaged")
    return Bug("".join(traceback.format_exception(error)))
