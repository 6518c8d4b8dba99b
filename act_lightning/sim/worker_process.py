"""The pool's side of a worker: starts the process, talks to it, notices its failures, ends it."""

from __future__ import annotations

import os
import pickle
import select
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator
from multiprocessing import Pipe, reduction
from typing import Any

import numpy as np
from numpy.typing import NDArray

from act_lightning.sim.worker import (
    EnvFactory,
    Failure,
    Play,
    Ready,
    Reply,
    Reset,
    map_arrays,
    read_message,
    write_message,
)

_MAIN = "from act_lightning.sim.worker import run_worker; run_worker({fd})"
# There is a worker for each core. 0: Mesa draws in the thread that asks.
_ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "LP_NUM_THREADS": "0"}


class RolloutError(RuntimeError):
    """A worker failed, died or hung; the message names the world it was playing."""


class WorkerProcess:
    """The parent's side: starts a worker, talks to it, ends it.

    A plain subprocess instead of multiprocessing's: it does not import the main module again
    (seconds of torch and Lightning), which then needs no guard, and its thread counts are set
    before numpy reads them.
    """

    def __init__(self, number: int, factory: EnvFactory, num_slots: int) -> None:
        """Starts the worker, and returns without waiting for it."""
        self.name = f"rollout worker {number}"
        self.num_slots = num_slots
        self.observations: dict[str, NDArray[Any]] | None = None
        """Arrays (num_slots, ...) in shared memory; None until `wait_until_ready`."""
        self.dim_action = 0
        self._outbox: list[Reset | Play] = []
        self._unanswered: deque[str] = deque()
        settings = (pickle.dumps(factory), num_slots)
        self.connection, theirs = Pipe()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-c", _MAIN.format(fd=theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                env=os.environ | _ONE_THREAD | {"PYTHONPATH": os.pathsep.join(sys.path)},
                start_new_session=True,  # Ctrl-C in a terminal is the parent's business alone.
            )
        self._inbox = select.poll()
        self._inbox.register(self.connection, select.POLLIN)
        write_message(self.connection, settings)

    @property
    def doing(self) -> str:
        """What the worker is at: the first of its unanswered commands."""
        return self._unanswered[0] if self._unanswered else "waiting"

    def wait_until_ready(self, timeout_s: float) -> None:
        """Waits for the worker's first environment; returns at once when called again.

        Raises:
            RolloutError: if it cannot be made, or takes longer than `timeout_s`.
        """
        if self.observations is not None:
            return
        self._unanswered.append("starting its environment")
        if not self.connection.poll(timeout_s):
            raise RolloutError(f"{self.name} did not start within {timeout_s:g} s")
        ready = self._receive()
        assert isinstance(ready, Ready)
        self._unanswered.clear()
        self.dim_action = ready.dim_action
        self.observations = map_arrays(self._receive_handle(), ready.fields)

    def queue(self, command: Reset | Play, doing: str) -> None:
        """Puts a command among those to be sent, to be described as `doing` should it fail."""
        self._outbox.append(command)
        self._unanswered.append(doing)

    def flush(self) -> None:
        """Sends the queued commands.

        Does not block for long: each slot has at most one command under way, so all replies fit in
        the pipe's buffer, and the worker always comes back to reading.
        """
        if not self._outbox:
            return
        try:
            write_message(self.connection, self._outbox)
        except OSError:
            while True:  # Ends in a RolloutError: the worker's own last words, or that it died.
                self._receive()
        self._outbox = []

    def replies(self) -> Iterator[tuple[Reply, NDArray[np.uint8] | None]]:
        """Yields what has come in so far, and the frames (F, 3, h, w) that came with it."""
        while self._inbox.poll(0):
            reply = self._receive()
            assert isinstance(reply, Reply)
            frames = None
            if reply.frames_shape is not None:
                fields = {"frames": (reply.frames_shape, "|u1")}
                frames = map_arrays(self._receive_handle(), fields)["frames"].copy()
            self._unanswered.popleft()
            yield reply, frames

    def hang_up(self) -> None:
        """Tells the worker to end, and lets go of its memory."""
        self.connection.close()
        self.observations = None

    def end(self, deadline: float) -> None:
        """Waits until `deadline` (of time.monotonic) for it to end, then kills it."""
        try:
            self._process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _receive(self) -> Ready | Reply:
        try:
            message: Ready | Reply | Failure = read_message(self.connection)
        except (EOFError, OSError):
            raise self._died() from None
        if isinstance(message, Failure):
            error = RolloutError(f"{self.name}, {self.doing}: {message.message}")
            error.add_note(f"In the worker:\n{message.details}")
            raise error
        return message

    def _receive_handle(self) -> int:
        try:
            return reduction.recv_handle(self.connection)
        except (EOFError, OSError, RuntimeError):
            raise self._died() from None

    def _died(self) -> RolloutError:
        try:
            ending = f"exit code {self._process.wait(5.0)}"
        except subprocess.TimeoutExpired:
            ending = "no exit code"
        return RolloutError(f"{self.name}, {self.doing}: the process died ({ending})")
