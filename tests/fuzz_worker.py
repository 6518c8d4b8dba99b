"""Reads damaged data sets in a process of its own: a crash or a hang is seen, and survived."""

from __future__ import annotations

import multiprocessing
import resource
import signal
import traceback
from typing import Any, NamedTuple

TIME_LIMIT_S = 20.0
MEMORY_LIMIT = 6 * 2**30
"""Of address space, so that a size that a file claims cannot bring the machine down."""


class Reading(NamedTuple):
    """What a reader made of a data set."""

    fault: str | None
    """Why it could not be opened."""
    episodes: dict[int, Any]
    """By id: why it could not be read, or its arrays by name."""
    bug: str | None = None
    """Trace of an exception that no reader may raise."""


class DiedError(Exception):
    """The reader crashed or hung."""


class Worker:
    """A process that reads data sets, one after the other."""

    def __init__(self) -> None:
        self._process = None

    def read(self, path, options, format) -> Reading:
        """Opens a data set and reads every episode of it.

        Raises:
            DiedError: the process crashed, or hung.
        """
        if self._process is None:
            context = multiprocessing.get_context("forkserver")
            context.set_forkserver_preload(["act_lightning.ingest.isolate"])
            self._connection, theirs = context.Pipe()
            self._process = context.Process(target=_serve, args=(theirs,), daemon=True)
            self._process.start()
            theirs.close()
            self._connection.recv()  # it is ready: starting costs seconds
        self._connection.send((path, options, format))
        try:
            if self._connection.poll(TIME_LIMIT_S):
                return self._connection.recv()
            self._process.kill()
        except EOFError:
            pass
        self._process.join()
        code, self._process = self._process.exitcode, None
        raise DiedError("hung" if code == -signal.SIGKILL else f"died, exit code {code}")

    def close(self) -> None:
        """Ends the process."""
        if self._process is not None:
            self._connection.close()
            self._process.join()


def _serve(connection) -> None:
    import importlib

    import act_lightning.ingest.formats as formats
    from act_lightning.ingest.source import SourceError

    for name in ("aloha", "robomimic", "diffusion_policy"):
        importlib.import_module(f"act_lightning.ingest.{name}")
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT, MEMORY_LIMIT))
    connection.send("ready")
    while True:
        try:
            path, options, format = connection.recv()
        except EOFError:
            return
        try:
            try:
                source = formats.open_source(path, options, format)
                reading = Reading(None, {id: _read(source, id) for id in source.ids[:100]})
            except SourceError as error:
                reading = Reading(str(error), {})
        except Exception:
            reading = Reading(None, {}, traceback.format_exc())
        connection.send(reading)


def _read(source, id) -> Any:
    """An episode's arrays, or why it is refused: by the reader, or by the store's writer."""
    import numpy as np

    from act_lightning.ingest.source import SourceError

    try:
        episode = source.read(id)
        try:
            arrays = dict(episode.checked_tables(source.spec))
        except ValueError as error:
            return f"{source.provenance['source']['path']}: {source.name(id)}: {error}"
        if episode.frames is not None:
            num_steps, num_cameras = episode.frames.shape[:2]
            for camera in range(num_cameras):
                half = num_steps // 2
                blocks = [(0, half), (half, num_steps)] if half else [(0, num_steps)]
                frames = [episode.frames.read(camera, *block) for block in blocks]
                expected = (*source.spec.image_size, 3)
                for block, part in zip(blocks, frames, strict=True):
                    assert part.shape == (block[1] - block[0], *expected)
                    assert part.dtype == np.uint8
                arrays[f"images_{source.spec.cameras[camera]}"] = np.concatenate(frames)
        return arrays
    except SourceError as error:
        return str(error)
