"""One of several processes that train together: how it ends when it fails, or another one does.

Launchers (torchrun, `srun`, Lightning's own) end the other ranks when one ends with an error. What
is added here:

- A rank that fails says which one it is. The others, which only see it gone, say so in one line,
  after it.
- A rank ends with its launcher. Those that wait for each other on a GPU would not notice.
- Ranks that stop because they were asked to all end of themselves.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from torch.distributed.elastic.multiprocessing.errors import get_error_handler

from act_lightning.main import EXPECTED_ERRORS, explain
from act_lightning.sim.ranks import ElsewhereError

LAUNCHER = "ACT_LIGHTNING_LAUNCHER"
"""Environment variable: process id of the rank that started the others on its node."""
EXIT_FAILED = 76
"""Exit code of a failed task of `srun`. That returns the highest code of its tasks, and those that
it then ends may end with EXIT_PREEMPTED: their job would be requeued, and fail again."""
LOOK_S = 1.0
"""How often a rank looks whether its launcher is there."""
GRACE_S = 5.0
"""How long a rank may take to say what it failed of, once its launcher is gone; the others, which
saw it end, wait half as long before they say so."""
LINGER_S = 30.0
"""How long a rank that has stopped waits for the one that started it."""
FROM_GLOO = re.compile(r"\[\S+:\d+\] |Application timeout")
"""How its errors begin, which have no type of their own."""
GONE = re.compile(
    "Connection (closed|reset) by peer|Broken pipe|Application timeout caused pair closure"
    "|Connection was likely closed|remote process exited"
)
"""What gloo, NCCL and the store say when another rank has ended."""
LATE = re.compile(r"Timed out waiting \d+ms|wait timeout after \d+ms")
"""What they say when another rank does not come."""


@contextmanager
def as_rank() -> Iterator[None]:
    """Ends this process as one of several: with its launcher, and saying which rank has failed.

    A process by itself is left alone. An error ends the process here: while the interpreter ends,
    threads of gloo and NCCL may abort it, or wait for the other ranks.
    """
    launcher = _launcher()
    has_stopped = threading.Event()
    if launcher is not None:
        threading.Thread(target=_end_with, args=(launcher, has_stopped), daemon=True).start()
    try:
        yield
    except (SystemExit, KeyboardInterrupt):
        if dist.is_available() and dist.is_initialized():  # all stop, as they were asked to
            has_stopped.set()
            _leave_with_others(launcher)
        raise
    except Exception as error:
        rank = this_rank()
        if rank is None:
            raise
        _report(error, rank)
        os._exit(1 if _end_of_another(error) or not is_of_srun() else EXIT_FAILED)
    finally:
        has_stopped.set()


def this_rank() -> str | None:
    """What a message calls this process, as `rank 1 of 4 (node7)`; None if it is by itself."""
    variables = os.environ
    if dist.is_available() and dist.is_initialized():
        rank, size = dist.get_rank(), dist.get_world_size()
    elif TorchElasticEnvironment.detect():
        rank, size = int(variables["RANK"]), int(variables["WORLD_SIZE"])
    elif is_of_srun():
        rank, size = int(variables["SLURM_PROCID"]), int(variables["SLURM_STEP_NUM_TASKS"])
    elif LAUNCHER in variables and "WORLD_SIZE" in variables:
        before = int(variables.get("NODE_RANK", 0)) * int(variables["LOCAL_WORLD_SIZE"])
        rank, size = before + int(variables["LOCAL_RANK"]), int(variables["WORLD_SIZE"])
    else:
        return None
    return f"rank {rank} of {size} ({socket.gethostname()})" if size > 1 else None


def lost_another(error: Exception) -> bool:
    """Whether all that went wrong is that another rank has ended."""
    return _is_of_ranks(error) and bool(GONE.search(str(error)))


def is_of_srun() -> bool:
    """Whether `srun` has started this process as one of several."""
    return int(os.environ.get("SLURM_STEP_NUM_TASKS", 1)) > 1


def _launcher() -> int | None:
    """Process id of what started this rank, if it has to end with it."""
    started_by = os.environ.get(LAUNCHER)
    if started_by is not None and int(started_by) != os.getpid():
        return int(started_by)
    return os.getppid() if TorchElasticEnvironment.detect() else None


def _end_with(launcher: int, has_stopped: threading.Event) -> None:
    while os.getppid() == launcher:
        time.sleep(LOOK_S)
    time.sleep(GRACE_S)
    if not has_stopped.is_set():
        os._exit(1)


def _leave_with_others(launcher: int | None) -> None:
    """Lets all ranks end of themselves, where the first to do so would have the others killed."""
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, signal.SIG_IGN)
    give_up = time.monotonic() + LINGER_S
    if LAUNCHER in os.environ:
        while os.getppid() == launcher and time.monotonic() < give_up:
            time.sleep(0.1)


def _report(error: Exception, rank: str) -> None:
    """Says what this rank failed of; if that is the end of another one, after that one."""
    end_of_another = _end_of_another(error)
    if end_of_another is not None:
        time.sleep(GRACE_S / 2)
        text = f"{rank} stopped, because another rank {end_of_another}"
    else:
        text = f"\nerror on {rank}: {_explain(error)}"
        if os.environ.get("ACT_LIGHTNING_TRACEBACK") or not isinstance(error, EXPECTED_ERRORS):
            text += f"\n{''.join(traceback.format_exception(error))}"
        if "TORCHELASTIC_ERROR_FILE" in os.environ:
            get_error_handler().record_exception(error)  # for torchrun's own summary
    sys.stdout.flush()
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


def _end_of_another(error: Exception) -> str | None:
    if isinstance(error, ElsewhereError):
        return f"failed: {error}"
    if lost_another(error):
        return "ended; see its error (without one it was killed, as where memory runs out)"
    return None


def _explain(error: Exception) -> str:
    if _is_of_ranks(error) and LATE.search(str(error)):
        return (
            "another rank did not come within launch.timeout_min to where all exchange something "
            f"({str(error).splitlines()[0]}); raise it if that rank was busy"
        )
    return explain(error)


def _is_of_ranks(error: Exception) -> bool:
    """Whether it is an error of what ranks exchange, not of files or other processes."""
    return isinstance(error, dist.DistError) or bool(FROM_GLOO.match(str(error)))
