"""The pool's side of a worker: starts the process, talks to it, notices its failures, ends it."""

from __future__ import annotations

import math
import os
import pickle
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from multiprocessing import Pipe, reduction
from typing import Any

import numpy as np
from numpy.typing import NDArray

from act_lightning.sim.worker import (
    CURRENT_SLOT,
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


START_TIMEOUT_S = 120.0
"""Longest time from the start of a worker to its first environment, in s."""


class LostWorkerError(RuntimeError):
    """A worker failed, died or hung; the message says which, without its name.

    Args:
        message: what happened.
        details: the traceback in the worker, if it raised an exception.
    """

    def __init__(self, message: str, details: str = "") -> None:
        super().__init__(message)
        self.raised = bool(details)
        """Whether the environment raised an exception."""
        if details:
            self.add_note(f"In the worker:\n{details}")


class WorkerProcess:
    """The parent's side: starts a worker, talks to it, ends it, and starts it again.

    A plain subprocess instead of multiprocessing's: it does not import the main module again
    (seconds of torch and Lightning), which then needs no guard, and its thread counts are set
    before numpy reads them.
    """

    def __init__(self, number: int, factory: EnvFactory, num_slots: int) -> None:
        """Starts the worker, and returns without waiting for it."""
        self.name = f"rollout worker {number}"
        self.num_slots = num_slots
        self.ready: Ready | None = None
        """What its environments look like; None until its first start has succeeded."""
        self.observations: dict[str, NDArray[Any]] | None = None
        """Arrays (num_slots, ...) in shared memory; None while it starts."""
        self._settings = (pickle.dumps(factory), num_slots)
        self.start()

    def start(self) -> None:
        """Starts the process, once the former one was ended; returns without waiting for it.

        Raises:
            OSError: the system has no room for another process.
        """
        self._outbox: list[Reset | Play] = []
        self._num_unanswered = 0
        self._current_slot: NDArray[np.int64] | None = None
        self._heard_at = time.monotonic()
        connection, theirs = Pipe()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-c", _MAIN.format(fd=theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                env=os.environ | _ONE_THREAD | {"PYTHONPATH": os.pathsep.join(sys.path)},
                start_new_session=True,  # Ctrl-C in a terminal is the parent's business alone.
            )
        self.connection = connection
        self._inbox = select.poll()
        self._inbox.register(self.connection, select.POLLIN)
        with suppress(OSError):  # If it is dead already, `replies` says so.
            write_message(self.connection, self._settings)

    @property
    def current_slot(self) -> int | None:
        """The slot it is playing, or was when it was lost; None if it was not playing."""
        slot = -1 if self._current_slot is None else int(self._current_slot[0])
        return None if slot < 0 else slot

    def deadline(self, timeout_s: float) -> float:
        """Until when (of time.monotonic) it must be heard of; infinity if it has nothing to do.

        Args:
            timeout_s: longest time for a command; a start may take START_TIMEOUT_S.
        """
        return self._heard_at + self._patience(timeout_s) if self._num_unanswered else math.inf

    def check_deadline(self, timeout_s: float) -> None:
        """Makes sure that it does not hang; only after `replies` had nothing to yield.

        Raises:
            LostWorkerError: the deadline is over.
        """
        if time.monotonic() >= self.deadline(timeout_s):
            raise LostWorkerError(f"no answer for {self._patience(timeout_s):g} s")

    def _patience(self, timeout_s: float) -> float:
        return START_TIMEOUT_S if self.observations is None else timeout_s

    def queue(self, command: Reset | Play) -> None:
        """Puts a command among those to be sent; also while the worker still starts."""
        if not self._num_unanswered:
            self._heard_at = time.monotonic()
        self._outbox.append(command)
        self._num_unanswered += 1

    def flush(self) -> None:
        """Sends the queued commands.

        Does not block for long: each slot has at most one command under way, so all replies fit in
        the pipe's buffer, and the worker comes back to reading. What is sent to the slots of one
        that hangs fits too, up to some 200 KB.
        """
        if self._outbox:
            with suppress(OSError):  # What it said before it died is still to be read: `replies`.
                write_message(self.connection, self._outbox)
            self._outbox = []

    def replies(self) -> Iterator[tuple[Reply, NDArray[np.uint8] | None]]:
        """Yields what has come in so far, and the frames (F, 3, h, w) that came with it.

        Raises:
            LostWorkerError: the worker failed or died.
        """
        while self._inbox.poll(0):
            message = self._receive()
            self._heard_at = time.monotonic()
            if isinstance(message, Ready):
                self.ready = message
                arrays = map_arrays(self._receive_handle(), message.fields | CURRENT_SLOT)
                self._current_slot = arrays.pop("current_slot")
                self.observations = arrays
                continue
            self._num_unanswered -= len(message)
            for reply in message:
                frames = None
                if reply.frames_shape is not None:
                    fields = {"frames": (reply.frames_shape, "|u1")}
                    frames = map_arrays(self._receive_handle(), fields)["frames"].copy()
                yield reply, frames

    def hang_up(self) -> None:
        """Tells the worker to end, and lets go of its memory."""
        self.connection.close()
        self.observations = self._current_slot = None

    def end(self, deadline: float) -> None:
        """Waits until `deadline` (of time.monotonic) for it to end, then kills it."""
        try:
            self._process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            self.kill()

    def kill(self) -> None:
        """Ends it at once, and lets go of its memory."""
        self.hang_up()
        self._process.kill()
        self._process.wait()

    def _receive(self) -> Ready | list[Reply]:
        try:
            message: Ready | list[Reply] | Failure = read_message(self.connection)
        except (EOFError, OSError):
            raise self._died() from None
        if isinstance(message, Failure):
            raise LostWorkerError(message.message, message.details)
        return message

    def _receive_handle(self) -> int:
        try:
            return reduction.recv_handle(self.connection)
        except (EOFError, OSError, RuntimeError):
            raise self._died() from None

    def _died(self) -> LostWorkerError:
        try:
            ending = f"exit code {self._process.wait(1.0)}"
        except subprocess.TimeoutExpired:
            ending = "no exit code"
        return LostWorkerError(f"the process died ({ending})")
