"""Ways to read batches ahead of the training step: threads, or processes. Both keep their order.

Threads of the training process are the default: reading and decompressing release the interpreter
lock, and processes pay for handing images over. Processes help where the reader holds the lock, as
zarr-python does on stores of foreign layout.

The processes are torch's DataLoader's, which yields no error of its own to the user: what goes
wrong while reading is raised in the training process as it was in the loader process, and a process
that is killed ends training with one message. Two things are added to torch's: a process opens the
store for itself (whatever the start method, so no lock and no connection of the parent is
inherited), and it ends at once when the training process is killed. Torch's own watchdog looks at
the parent process, which under `forkserver` is the server, and the server lives as long as its
children do.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import pickle
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from types import TracebackType
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset

from act_lightning.batch import Batch
from act_lightning.data.layout import StoreError

Read = Callable[[NDArray[np.int64]], Batch]
"""Reads a batch: the samples at (B,) positions in the store."""
StartMethod = Literal["forkserver", "spawn", "fork"]


def read_in_threads(
    read: Read, requests: Iterable[NDArray[np.int64]], num_threads: int
) -> Generator[Batch, None, None]:
    """Reads batches in as many threads as batches ahead; they end with the generator.

    Args:
        read: is called from the threads.
        requests: positions of each batch; taken from in the caller's thread.
        num_threads: 0 reads in the caller's thread.
    """
    if num_threads == 0:
        yield from map(read, requests)
        return
    pool = ThreadPoolExecutor(num_threads, thread_name_prefix="act-data")
    pending: deque[Future[Batch]] = deque()
    try:
        for frames in requests:
            pending.append(pool.submit(read, frames))
            if len(pending) > num_threads:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def read_in_processes(
    read: Read,
    requests: Iterable[NDArray[np.int64]],
    *,
    num_workers: int,
    start_method: StartMethod,
    prefetch: int,
    pin_memory: bool,
) -> Generator[Batch, None, None]:
    """Reads batches in other processes; they end with the generator, or with this process.

    Args:
        read: is pickled, and called in the processes.
        requests: positions of each batch; taken from in the caller's thread.
        num_workers: processes.
        start_method: how they are started.
        prefetch: batches that each reads ahead, at least 1.
        pin_memory: whether the batches are copied to page-locked memory, by a thread.

    Raises:
        StoreError: the store cannot be read.
        RuntimeError: a process was killed.
    """
    loader = DataLoader(
        _Remote(read),
        batch_size=None,
        sampler=requests,
        num_workers=num_workers,
        collate_fn=_as_it_is,
        pin_memory=pin_memory,
        worker_init_fn=_start_worker,
        multiprocessing_context=start_method,
        prefetch_factor=prefetch,
        # The loader draws a seed, which shall not come from the generator that training uses.
        generator=torch.Generator(),
    )
    batches = _start(loader)
    end = partial(_end_workers, batches)
    atexit.register(end)  # else multiprocessing waits for the processes, which ignore its SIGTERM
    try:
        while (result := _next(batches)) is not None:
            if isinstance(result, Exception):
                raise result
            yield result
    finally:
        atexit.unregister(end)
        end()


def _start(loader: DataLoader[Any]) -> Iterator[Any]:
    """Starts the processes, and those that multiprocessing has beside them.

    Signals of a terminal or a batch system go to all of them, and would end those. What is blocked
    while they start they never get.
    """
    theirs = {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, theirs)
    try:
        return iter(loader)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _next(batches: Iterator[Any]) -> Any:
    """The next batch or error, None at the end; says it clearly when a process is gone."""
    try:
        return next(batches, None)
    except (RuntimeError, OSError, EOFError) as error:
        if str(error).startswith("Caught "):  # raised by our own code, with its traceback
            raise
        raise RuntimeError(
            f"a loader process ended unexpectedly ({error}): it was killed, or memory or /dev/shm "
            "ran out. Go on from the last checkpoint, with fewer data.num_workers, or 0 to read "
            "in threads"
        ) from None


def _end_workers(batches: Any) -> None:
    """Ends the processes now: a traceback may keep the iterator alive."""
    batches._shutdown_workers()
    for worker in batches._workers:
        if worker.is_alive():
            worker.kill()
            worker.join()


class _Remote(Dataset[Any]):
    """Reads in a loader process, and hands errors over as values."""

    def __init__(self, read: Read) -> None:
        # Pickled here, as `fork` would not do it.
        self._pickled = pickle.dumps(read)
        self._read: Read | None = None

    def __getitem__(self, frames: NDArray[np.int64]) -> Batch | Exception:
        try:
            if self._read is None:
                self._read = pickle.loads(self._pickled)
            return self._read(frames)
        except StoreError as error:
            return error
        except OSError as error:  # the store is gone before it was opened here
            return StoreError(f"a loader process cannot open the store: {error}")


def _as_it_is(batch: Any) -> Any:
    return batch


def _start_worker(worker_id: int) -> None:
    """Prepares a loader process: the training process decides when it ends.

    Ctrl-C and the batch system's signals go to all processes; the training process saves a
    checkpoint first, and needs batches until its step is done.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    sys.excepthook = _report
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _report(
    kind: type[BaseException], error: BaseException, traceback: TracebackType | None
) -> None:
    """Says nothing when the training process was interrupted while it fetched a batch."""
    if not issubclass(kind, (EOFError, OSError)):
        sys.__excepthook__(kind, error, traceback)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
