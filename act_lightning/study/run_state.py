"""What has become of each run of a study: read from its folder, and kept there for the next sweep.

Nothing but files says it, so a sweep that was killed, or one on another machine that shares the
disk, finds the same. Beside the runs lies `sweep/`: the log of each, a lock that its process holds
as long as it lives, and what it failed of.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from enum import StrEnum
from typing import IO

from act_lightning.main import EXIT_PREEMPTED
from act_lightning.new_file import write_file
from act_lightning.provenance import read_provenance
from act_lightning.run_lock import LOCK_FILE, is_held, try_lock
from act_lightning.study.study import PlannedRun


class State(StrEnum):
    """Of a run."""

    WAITING = "waiting"
    """Nothing is there."""
    QUEUED = "queued"
    """Slurm has it, and has not started it yet."""
    RUNNING = "running"
    """A process has it, of this sweep or of another."""
    INTERRUPTED = "interrupted"
    """It was stopped and has a checkpoint to go on from."""
    FAILED = "failed"
    """It ended with an error, and is not tried again unless asked for."""
    FINISHED = "finished"
    """It was trained and evaluated."""


class RunFiles:
    """A run's folder, and what the sweep keeps about it.

    Args:
        run: the run.
    """

    def __init__(self, run: PlannedRun) -> None:
        self.run = run
        self.name = f"{run.variant}/{run.folder.name}"
        kept = run.folder.parent.parent / "sweep" / run.folder.parent.name
        self.log = kept / f"{run.folder.name}.log"
        self.last_checkpoint = run.folder / "checkpoints" / "last.ckpt"
        self.results = run.folder / "results.json"
        self._lock = kept / f"{run.folder.name}.lock"
        self._failure = kept / f"{run.folder.name}.failed.json"

    def state(self) -> State:
        """What has become of it."""
        if self._is_finished():
            return State.FINISHED
        if self._is_claimed():
            return State.RUNNING
        if self._failure.is_file():
            return State.FAILED
        return State.INTERRUPTED if self.last_checkpoint.is_file() else State.WAITING

    def failure(self) -> str:
        """What it failed of; empty if it did not."""
        try:
            return str(json.loads(self._failure.read_text())["message"])
        except (OSError, ValueError, KeyError):
            return ""

    def start(self, environment: Mapping[str, str]) -> subprocess.Popen[bytes] | None:
        """Starts `fit`, or goes on from the last checkpoint; None if another process has the run.

        The process holds the lock by itself, also when this one is gone, and does not get the
        signals of this one's terminal.

        Args:
            environment: variables of the process.
        """
        lock = self._claim()
        if lock is None:
            return None
        with lock:
            if self._is_finished():  # by another process, meanwhile
                return None
            self._failure.unlink(missing_ok=True)
            arguments = list(self.run.arguments)
            if self.last_checkpoint.is_file():
                arguments.append("--ckpt_path=last")
            elif self.run.folder.exists():
                shutil.rmtree(self.run.folder)  # it ended before its first checkpoint
            with self.log.open("ab") as log:
                return subprocess.Popen(
                    [sys.executable, "-m", "act_lightning", "fit", *arguments],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env=dict(environment),
                    start_new_session=True,
                    pass_fds=(lock.fileno(),),
                )

    def ended(self, exit_code: int) -> State:
        """What became of it; keeps what the process ended with, if it failed."""
        if exit_code == 0 and self._is_finished():
            return State.FINISHED
        if exit_code == EXIT_PREEMPTED:
            return self.state()
        record = {"exit_code": exit_code, "message": self._explain(exit_code)}
        write_file(self._failure, json.dumps(record, indent=1).encode())
        return State.FAILED

    def _is_finished(self) -> bool:
        """Whether `fit` came to its end; results alone may be of an evaluation by hand."""
        try:
            record = read_provenance(self.run.folder) or {}
        except ValueError:
            return False
        return bool(record.get("finished")) and self.results.is_file()

    def _explain(self, exit_code: int) -> str:
        if exit_code < 0:
            return f"killed by signal {-exit_code}"
        if exit_code == 0:
            return "it was not evaluated: rollout.final_episodes is 0"
        lines = [line for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith("error:")]
        return (errors or lines or ["no output"])[-1].removeprefix("error:").strip()

    def _claim(self) -> IO[bytes] | None:
        """The lock, or None if another process holds it."""
        self._lock.parent.mkdir(parents=True, exist_ok=True)
        lock = self._lock.open("ab")
        if is_held(self.run.folder / LOCK_FILE) or not try_lock(lock, fcntl.LOCK_EX):
            lock.close()
            return None
        return lock

    def _is_claimed(self) -> bool:
        """Also by `make resume`, which knows of no study."""
        return is_held(self._lock) or is_held(self.run.folder / LOCK_FILE)


def environment_of_slot(
    slot: int, num_slots: int, gpus: list[str], cores: list[int]
) -> dict[str, str]:
    """Variables of a process that shares the machine with others.

    Args:
        slot: number of the process among those that run at once.
        num_slots: how many run at once.
        gpus: names of the GPUs, as CUDA_VISIBLE_DEVICES has them.
        cores: CPUs of the process.
    """
    environment = dict(os.environ)
    if num_slots > 1 and gpus:
        environment["CUDA_VISIBLE_DEVICES"] = gpus[slot % len(gpus)]
    if num_slots > 1:
        environment.setdefault("OMP_NUM_THREADS", str(len(cores)))
    return environment
