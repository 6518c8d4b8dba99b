"""Ends a training that is asked to end: between two steps, on all ranks after the same one.

Slurm announces the end of a job's time with SIGUSR1 and a preemption with SIGTERM, a terminal sends
SIGINT; to all ranks, to one node's, or to one process. A handler does no more than note it. The
first rank that has noted a signal writes into the store of the process group after which step all
stop; each rank looks there at the end of each step. Nobody can have passed that step by then, as
gradients need every rank.

Lightning's own handler meets the other ranks in a collective call, in the midst of whatever these
compute or send: with a signal to one rank that is a hang, and so it is replaced.

Where a signal does not wait for a step, its handler raises, in the midst of whatever the main
thread does. Nearly all code bears that, but not Python's queues: one may lose a wake-up, and who
then closes what stands behind it waits, for minutes with the writer of event files. So the process
has only some time to clean up.
"""

from __future__ import annotations

import os
import queue
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import lightning as L
import torch.distributed as dist
from lightning.pytorch.utilities.exceptions import SIGTERMException

from act_lightning.main import EXIT_PREEMPTED
from act_lightning.sim.ranks import exchange

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
STORE_KEY = "act_lightning/stop"
GRACE_S = 10.0
"""How long a process that a signal ends at once may take; Slurm gives it 30 s by default."""


class StopRequest:
    """Whether training was asked to end, and after which step it does.

    Attributes:
        signal: what asked for it; None if nothing did.
        waits: whether a signal waits for the end of the step. If not, as while the trainer is set
            up or the policy plays, it ends the process at once, whose last checkpoint then counts.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self.waits = False
        self._last_step: int | None = None
        self._ends: queue.SimpleQueue[bool] = queue.SimpleQueue()  # the only one for handlers

    @property
    def exit_code(self) -> int:
        """Of the process, if it ends for that."""
        return 1 if self.signal == signal.SIGINT else EXIT_PREEMPTED

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Takes the signals while in the block. Only a process's main thread can."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {
            number: signal.signal(number, self._note)
            for number in SIGNALS
            if signal.getsignal(number) is not signal.SIG_IGN  # as in the background of a shell
        }
        threading.Thread(target=self._see_it_end, daemon=True).start()
        try:
            yield
        finally:
            self._ends.put(False)
            for number, handler in before.items():
                signal.signal(number, handler)

    def after_step(self, step: int, *, runs_ahead: bool) -> None:
        """Agrees with the other ranks. To be called by each at the end of each step.

        Args:
            step: optimizer steps taken.
            runs_ahead: whether ranks queue steps for a device; they may then be here a step before
                the others, and not two, since Lightning waits for the device at each step's start.
        """
        if not (dist.is_available() and dist.is_initialized()):
            if self.signal is not None:
                self._last_step = step
            return
        store = dist.distributed_c10d._get_default_store()
        if self.signal is not None and self._last_step is None:
            last_step = step + (2 if runs_ahead else 1)
            store.compare_set(STORE_KEY, "", f"{last_step} {self.signal}")  # the first one counts
        if self._last_step is None and store.check([STORE_KEY]):
            self._last_step, self.signal = map(int, store.get(STORE_KEY).split())

    def is_due(self, step: int) -> bool:
        """Whether all ranks stop now.

        Args:
            step: optimizer steps taken.
        """
        return self._last_step is not None and step >= self._last_step

    def is_asked_of_any(self) -> bool:
        """Whether one of the ranks was asked, which all have to call."""
        asked = [number for number in exchange(self.signal) if number is not None]
        if asked:
            self.signal = max(asked)
        return bool(asked)

    def _note(self, number: int, frame: FrameType | None) -> None:
        before, self.signal = self.signal, number
        if number == signal.SIGINT and (before == number or not self.waits):
            self._ends.put(True)
            raise KeyboardInterrupt  # the second Ctrl-C does not wait
        if before is None and not self.waits:
            self._ends.put(True)
            raise SIGTERMException

    def _see_it_end(self) -> None:
        """Ends the process GRACE_S after a handler has raised, unless the block ends before."""
        if not self._ends.get():
            return
        try:
            while self._ends.get(timeout=GRACE_S):
                pass  # a second signal, a second time
        except queue.Empty:
            os.write(2, f"ended: it had not done so within {GRACE_S:g} s of a signal\n".encode())
            os._exit(self.exit_code)


class StopSignals:
    """What Lightning's trainer asks about signals, in place of `trainer._signal_connector`.

    Args:
        trainer: the trainer.
        stop: what it is to know.
    """

    def __init__(self, trainer: L.Trainer, stop: StopRequest) -> None:
        self._trainer = trainer
        self._stop = stop

    @property
    def received_sigterm(self) -> bool:
        """Whether the trainer has to end between two steps; it asks also within a validation."""
        return bool(self._trainer.training) and self._stop.is_due(self._trainer.global_step)

    def register_signal_handlers(self) -> None:
        """Does nothing: `StopRequest` has the signals already."""

    def teardown(self) -> None:
        """Does nothing."""
