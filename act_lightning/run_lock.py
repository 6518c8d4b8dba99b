"""One training at a time in a run's folder."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

LOCK_FILE = "run.lock"
LOOK_S = 1.0
"""For how long those that only look whether the lock is held may have it."""
REQUEUED_S = 120.0
"""How long a requeued job waits for the lock: a file server keeps that of a node that died (NFS
about 90 s)."""


@contextmanager
def hold_run(folder: Path) -> Iterator[None]:
    """Keeps other trainings out of a run's folder while in the block, or until the process ends.

    Raises:
        ValueError: another process trains it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    give_up = time.monotonic() + (REQUEUED_S if "SLURM_RESTART_COUNT" in os.environ else LOOK_S)
    with (folder / LOCK_FILE).open("ab") as lock:
        while not try_lock(lock, fcntl.LOCK_EX):
            if time.monotonic() < give_up:
                time.sleep(LOOK_S / 10)
                continue
            raise ValueError(
                f"another process trains {folder}; wait for it, end it, or give another --run"
            )
        yield


def is_held(lock: Path) -> bool:
    """Whether a process has locked the file."""
    if not lock.is_file():
        return False
    with lock.open("rb") as file:
        return not try_lock(file, fcntl.LOCK_SH)  # which others who just look do not refuse


def try_lock(file: IO[bytes], kind: int) -> bool:
    """Locks an open file until it is closed; False if another process holds it."""
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
