"""What a loader may leave behind: its threads, and its processes."""

import threading

import psutil


def loader_threads():
    return [t.name for t in threading.enumerate() if t.name.startswith("act-")]


def loader_processes():
    """Living ones of this process; not multiprocessing's own servers, which stay."""
    return [
        process
        for process in psutil.Process().children(recursive=True)
        if process.status() != psutil.STATUS_ZOMBIE
        and ("pt_data_worker" in process.name() or "spawn_main" in " ".join(process.cmdline()))
    ]


def left_over():
    return loader_threads() + loader_processes()
