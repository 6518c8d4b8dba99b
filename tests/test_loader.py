"""Loader processes: the same batches as threads, errors that arrive, and processes that end."""

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from left_over import loader_processes
from small_store import write_store

from act_lightning.batch import Batch
from act_lightning.data.layout import StoreError
from act_lightning.data.order import FrameSampling, SampleOrder
from act_lightning.data.store import Store
from act_lightning.data.stream import BatchReader, TrainingStream

LENGTHS = (70, 1, 120, 5)

pytestmark = pytest.mark.timeout(120)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return write_store(tmp_path_factory.mktemp("store") / "a.zarr", LENGTHS)


def stream_of(store, reader=BatchReader, **changes):
    read = reader(store=store, chunk_size=4, cameras=("top",), use_env_state=True)
    order = SampleOrder(FrameSampling(seed=0, frames=np.arange(store.num_frames)))
    settings = {"reader": read, "order": order, "batch_size": 4, "num_workers": 2}
    return TrainingStream(**(settings | changes))


def tensors(batch):
    seen = batch.observation
    return [seen.qpos, seen.images, seen.env_state, batch.actions, batch.is_pad]


def wait_until(condition, seconds=20):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.parametrize("start_method", ["fork", "forkserver", "spawn"])
def test_processes_change_nothing(path, start_method):
    """The parent has read the same store in threads before, which a forked child must survive."""
    store = Store.open(path)
    wanted = [batch for _, batch in zip(range(30), stream_of(store, num_workers=0), strict=False)]
    threads = iter(stream_of(store, num_workers=0, prefetch=4))
    next(threads)  # their threads are reading while processes are forked
    state = torch.get_rng_state()
    batches = iter(stream_of(store, start_method=start_method))
    for step, batch in zip(range(30), batches, strict=False):
        assert batch.position == wanted[step].position
        for ours, theirs in zip(tensors(batch), tensors(wanted[step]), strict=True):
            assert ours.dtype == theirs.dtype
            assert ours.stride() == theirs.stride()
            assert torch.equal(ours, theirs)
    assert torch.equal(torch.get_rng_state(), state)
    assert len(loader_processes()) == 2
    batches.close()
    threads.close()
    assert not loader_processes()


def test_one_process_or_three_with_other_depths(path):
    store = Store.open(path)
    plain = iter(stream_of(store, num_workers=0))
    one = iter(stream_of(store, num_workers=1, prefetch=1, start_method="fork"))
    three = iter(stream_of(store, num_workers=3, prefetch=3, start_method="fork"))
    for _, *batches in zip(range(20), plain, one, three, strict=False):
        assert torch.equal(batches[0].observation.images, batches[1].observation.images)
        assert torch.equal(batches[0].observation.images, batches[2].observation.images)
    one.close()
    three.close()
    assert not loader_processes()


def test_processes_end_when_the_iterator_is_collected(path):
    batches = iter(stream_of(Store.open(path), start_method="fork"))
    next(batches)
    assert len(loader_processes()) == 2
    del batches
    assert not loader_processes()


class Broken(BatchReader):
    """Stands for a bug of ours."""

    def __call__(self, frames: np.ndarray) -> Batch:
        raise AssertionError("a bug")


def test_a_bug_keeps_its_traceback(path):
    batches = iter(stream_of(Store.open(path), Broken, start_method="fork"))
    with pytest.raises(AssertionError, match=r"a bug"):
        next(batches)
    assert not loader_processes()


class Absent(BatchReader):
    def __call__(self, frames: np.ndarray) -> Batch:
        raise StoreError("x.zarr/data/images_top/c/0: frame 7 is missing (episode 1, step 3)")


@pytest.mark.parametrize("start_method", ["fork", "forkserver", "spawn"])
def test_an_error_arrives_as_it_was_raised(path, start_method):
    batches = iter(stream_of(Store.open(path), Absent, start_method=start_method))
    with pytest.raises(StoreError) as caught:
        next(batches)
    assert str(caught.value) == (
        "x.zarr/data/images_top/c/0: frame 7 is missing (episode 1, step 3)"
    )
    assert not loader_processes()


@pytest.mark.parametrize("start_method", ["fork", "forkserver", "spawn"])
def test_a_killed_process_is_reported_and_the_others_end(path, start_method):
    batches = iter(stream_of(Store.open(path), start_method=start_method))
    next(batches)
    loader_processes()[0].kill()
    began = time.monotonic()
    # A direct child's death is reported by torch's signal handler, a server's child's by us.
    with pytest.raises(RuntimeError, match=r"(?i)loader.* (ended unexpectedly|is killed)"):
        sum(len(batch) for batch in batches)
    assert time.monotonic() - began < 20
    batches.close()
    assert not loader_processes()


@pytest.mark.parametrize("start_method", ["fork", "forkserver"])
def test_signals_to_the_group_leave_the_processes_to_the_parent(path, start_method):
    before = psutil.Process().children(recursive=True)  # of other tests
    batches = iter(stream_of(Store.open(path), start_method=start_method))
    next(batches)
    started = set(psutil.Process().children(recursive=True)) - set(before)
    for process in started:  # multiprocessing's own, too
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            process.send_signal(number)
    for _ in range(10):
        next(batches)
    batches.close()
    assert not loader_processes()


SCRIPT = """
    import sys, time
    import numpy as np
    from act_lightning.data.order import FrameSampling, SampleOrder
    from act_lightning.data.store import Store
    from act_lightning.data.stream import BatchReader, TrainingStream

    if __name__ == "__main__":
        store = Store.open(sys.argv[1])
        stream = TrainingStream(
            reader=BatchReader(store=store, chunk_size=4, cameras=("top",), use_env_state=True),
            order=SampleOrder(FrameSampling(seed=0, frames=np.arange(store.num_frames))),
            batch_size=4,
            num_workers=2,
            start_method=sys.argv[2],
        )
        batches = iter(stream)
        next(batches)
        print("reading", flush=True)
        {then}
"""


def start_script(path, tmp_path, start_method, then):
    script = tmp_path / "reads.py"
    script.write_text(textwrap.dedent(SCRIPT).replace("{then}", then))
    process = subprocess.Popen(
        [sys.executable, script, path, start_method],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env=os.environ
        | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])},
    )
    assert process.stdout.readline() == "reading\n", process.stderr.read()
    family = psutil.Process(process.pid).children(recursive=True)
    assert len(family) >= 2
    return process, family


def gone(family):
    return not any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in family)


@pytest.mark.parametrize("start_method", ["fork", "forkserver", "spawn"])
def test_no_orphans_when_the_parent_is_killed(path, tmp_path, start_method):
    process, family = start_script(path, tmp_path, start_method, "time.sleep(100)")
    process.kill()
    process.wait()
    wait_until(lambda: gone(family), 10)


@pytest.mark.parametrize("start_method", ["fork", "forkserver"])
def test_ctrl_c_ends_all_without_a_word_of_the_processes(path, tmp_path, start_method):
    then = "for batch in batches: time.sleep(0.01)"
    process, family = start_script(path, tmp_path, start_method, then)
    time.sleep(0.3)
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert errors.count("Traceback") == 1, errors
    assert errors.strip().endswith("KeyboardInterrupt")
    wait_until(lambda: gone(family), 10)


@pytest.mark.parametrize("start_method", ["fork", "forkserver"])
def test_a_program_that_forgets_its_iterator_ends(path, tmp_path, start_method):
    process, family = start_script(path, tmp_path, start_method, "globals()['kept'] = batches")
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0
    assert errors == ""
    wait_until(lambda: gone(family), 10)


def test_a_relative_path_survives_a_change_of_folder(path, monkeypatch):
    """Processes begin in the folder in which this one began."""
    monkeypatch.chdir(path.parent)
    batches = iter(stream_of(Store.open(path.name), num_workers=1))
    wanted = next(iter(stream_of(Store.open(path), num_workers=0, prefetch=0)))
    assert torch.equal(next(batches).actions, wanted.actions)
    batches.close()


def test_nothing_of_the_readers_state_reaches_a_process(path):
    """A forked process would otherwise inherit locks that a thread of the parent holds."""
    store = Store.open(path)
    lock = threading.Lock()
    held = replace(stream_of(store).reader, store=HoldsLock(path, lock))
    lock.acquire()
    batches = iter(stream_of(store, reader=lambda **_: held, start_method="fork"))
    next(batches)
    batches.close()


class HoldsLock:
    """A store whose reading takes a lock that is not pickled, as a connection pool's."""

    def __init__(self, path, lock=None):
        self._path = path
        self._lock = lock or threading.Lock()
        self._store = Store.open(path)

    def __reduce__(self):
        return HoldsLock, (self._path,)

    def __getattr__(self, name):
        with self._lock:
            return getattr(self._store, name)


@pytest.mark.gpu
@pytest.mark.parametrize("ahead", [{"num_workers": 0}, {"num_workers": 2, "prefetch": 2}])
def test_batches_reach_a_gpu_through_page_locked_memory(path, ahead):
    """Copies are not waited for, so memory reused too early would show as other values."""
    store = Store.open(path)
    wanted = iter(stream_of(store, num_workers=0, prefetch=0))
    pinned = replace(stream_of(store).reader, pin_memory=True)
    batches = iter(stream_of(store, reader=lambda **_: pinned, **ahead))
    arrived = []
    for _ in range(200):
        batch = next(batches)
        assert all(tensor.is_pinned() for tensor in tensors(batch))
        assert batch.observation.images.dtype == torch.uint8
        arrived.append(batch.to("cuda", non_blocking=True))
        del batch
    for batch in arrived:
        for ours, theirs in zip(tensors(batch), tensors(next(wanted)), strict=True):
            assert torch.equal(ours.cpu(), theirs)
    batches.close()
    assert not loader_processes()
