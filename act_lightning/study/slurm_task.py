"""What a task of a Slurm job array does with its run: start `fit`, and bring it to a good end.

`fit` holds the run's lock, and what it failed of is kept, as on one machine. How a task may end
before `fit` does:

- Its time is up, or it is preempted: `signal_delay_s` before, submitit gets SIGUSR2. `fit` saves
  `last.ckpt`, and the task is requeued and goes on from there.
- `scancel`, `scontrol requeue`: Slurm sends SIGTERM, which is handed on, then kills. The run is
  interrupted, and goes on when its task is requeued, or with the next sweep.
- Its node dies. Slurm requeues the task, which goes on from the last validation.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from types import FrameType

import submitit

from act_lightning.study.run_state import RunFiles, State
from act_lightning.study.study import PlannedRun

LOOK_S = 0.2
"""How often the process is looked at, and the lock if another process has it."""
LOCK_S = 120.0
"""How long a task waits for its run: the lock of a node that died is released after a while."""
LINGER_S = 600.0
"""How long a task that saved after SIGTERM waits for what Slurm does next."""


class Training:
    """A task of the array: trains and evaluates one run, or goes on with it.

    Args:
        run: the run.
        save_s: seconds in which `fit` must save when submitit asks for it; past them it is killed.
            Training saves between two steps, a validation has saved before it begins.
    """

    def __init__(self, run: PlannedRun, save_s: float) -> None:
        self.run = run
        self.save_s = save_s
        self._process: subprocess.Popen[bytes] | None = None
        self._is_stopping = False

    def __call__(self) -> str:
        """Returns what has become of the run.

        Raises:
            RuntimeError: it failed; Slurm then calls the task failed.
        """
        file = RunFiles(self.run)
        self._is_stopping = False
        signal.signal(signal.SIGTERM, self._stop)  # submitit's ignores it
        self._process = process = _start(file)
        if process is None:
            return file.state()
        if self._is_stopping:
            process.terminate()
        _has_ended(process, float("inf"))
        if self._is_stopping:
            # A task that ends by itself is not requeued, one that Slurm kills may be.
            time.sleep(LINGER_S)
            return file.state()
        state = file.ended(process.wait())
        if state == State.FAILED:
            raise RuntimeError(f"{file.name} failed: {file.failure()} (see {file.log})")
        return state

    def checkpoint(self) -> submitit.helpers.DelayedSubmission | None:
        """Saves; returns what the requeued task does, None if nothing is left to do."""
        if self._process is not None:
            self._process.terminate()
            if not _has_ended(self._process, self.save_s):
                os.killpg(self._process.pid, signal.SIGKILL)
        if RunFiles(self.run).state() == State.FINISHED:
            return None
        self._process = None  # which cannot be pickled
        return submitit.helpers.DelayedSubmission(self)

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self._is_stopping = True
        if self._process is not None:
            self._process.terminate()


def _start(file: RunFiles) -> subprocess.Popen[bytes] | None:
    """Starts `fit`; None if the run is finished, or another process keeps it."""
    # Some clusters send signals to all that a task started. This one would end `fit` unsaved.
    requeue = {signal.Signals[f"SIG{submitit.JobEnvironment.USR_SIG}"]}
    give_up = time.monotonic() + LOCK_S
    while file.state() != State.FINISHED and time.monotonic() < give_up:
        signal.pthread_sigmask(signal.SIG_BLOCK, requeue)
        try:
            process = file.start(os.environ)
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, requeue)
        if process is not None:
            return process
        time.sleep(LOOK_S)
    return None


def _has_ended(process: subprocess.Popen[bytes], timeout_s: float) -> bool:
    """Whether a process ends in time.

    Unlike Popen.wait it may be called by a signal handler that interrupts another call of it.
    """
    options = os.WEXITED | os.WNOHANG | os.WNOWAIT
    give_up = time.monotonic() + timeout_s
    try:
        while os.waitid(os.P_PID, process.pid, options) is None:
            if time.monotonic() > give_up:
                return False
            time.sleep(LOOK_S)
    except ChildProcessError:  # it was waited for
        pass
    return True
