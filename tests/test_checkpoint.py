"""What a run goes on from: which checkpoint, alone in its folder, with its curves cut there."""

import errno
import fcntl
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.utilities.exceptions import SIGTERMException
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

from act_lightning.checkpoint import (
    AtomicCheckpointIO,
    LastCheckpoint,
    Reached,
    find_resumable,
    put_in_place,
    read_reached,
)
from act_lightning.event_files import cut_events
from act_lightning.policy import CHECKPOINT_KEY
from act_lightning.preemption import StopRequest
from act_lightning.run_lock import LOCK_FILE, hold_run, is_held


def checkpoint(step, owes=False):
    return {
        "global_step": step,
        "callbacks": {"LastCheckpoint": {"before_validation": owes}, "Other": {}},
        CHECKPOINT_KEY: {"net": {"class_path": "a.B"}},
    }


def save(folder, name, step, **options):
    AtomicCheckpointIO().save_checkpoint(checkpoint(step, **options), folder / name)


# ---- the file -----------------------------------------------------------------------------------


@pytest.mark.parametrize("has_links", [True, False])
def test_the_checkpoint_before_is_kept(tmp_path, monkeypatch, has_links):
    if not has_links:

        def link(*_):
            raise PermissionError

        monkeypatch.setattr(os, "link", link)
    for step in (1, 2, 3):
        save(tmp_path, "last.ckpt", step)
        save(tmp_path, "best.ckpt", step)
    steps = {path.name: read_reached(path).step for path in tmp_path.iterdir()}
    assert steps == {"last.ckpt": 3, "previous.ckpt": 2, "best.ckpt": 3}


def test_a_checkpoint_that_could_not_be_written_changes_nothing(tmp_path, monkeypatch):
    save(tmp_path, "last.ckpt", 1)
    save(tmp_path, "last.ckpt", 2)

    def full(path, *_):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        save(tmp_path, "last.ckpt", 3)
    steps = {path.name: read_reached(path).step for path in tmp_path.iterdir()}
    assert steps == {"last.ckpt": 2, "previous.ckpt": 1}


def test_the_newest_whole_checkpoint_is_found(tmp_path, recwarn):
    assert find_resumable(tmp_path / "none") is None
    save(tmp_path, "last.ckpt", 1)
    assert find_resumable(tmp_path) == (tmp_path / "last.ckpt", Reached(1, False))
    save(tmp_path, "last.ckpt", 2, owes=True)
    assert find_resumable(tmp_path) == (tmp_path / "last.ckpt", Reached(2, True))
    assert not recwarn


@pytest.mark.parametrize("size", [0, 100, -1])
def test_a_truncated_one_is_passed_over_with_a_warning(tmp_path, size):
    for step in (1, 2):
        save(tmp_path, "last.ckpt", step)
    content = (tmp_path / "last.ckpt").read_bytes()
    (tmp_path / "last.ckpt").write_bytes(content[:size])
    with pytest.warns(UserWarning, match=r"last\.ckpt is damaged.*previous\.ckpt, the one before"):
        assert find_resumable(tmp_path) == (tmp_path / "previous.ckpt", Reached(1, False))
    put_in_place(tmp_path / "other", str(tmp_path / "previous.ckpt"))
    put_in_place(tmp_path, None)
    assert (tmp_path / "last.ckpt").read_bytes() == content[:size]  # not this run's to change
    put_in_place(tmp_path, str(tmp_path / "previous.ckpt"))
    save(tmp_path, "last.ckpt", 3)
    assert [read_reached(tmp_path / f"{name}.ckpt").step for name in ("last", "previous")] == [3, 1]
    for name in ("last", "previous"):
        (tmp_path / f"{name}.ckpt").write_bytes(content[:50])
    with pytest.raises(ValueError, match=r"last\.ckpt is damaged"):
        find_resumable(tmp_path)


def test_a_file_that_cannot_be_read_now_is_not_called_damaged(tmp_path, monkeypatch):
    save(tmp_path, "last.ckpt", 1)
    save(tmp_path, "last.ckpt", 2)

    def load(path, **_):
        raise OSError(errno.ESTALE, "Stale file handle", str(path))

    monkeypatch.setattr(torch, "load", load)
    with pytest.raises(OSError, match="Stale file handle"):
        find_resumable(tmp_path)


# ---- the curves ---------------------------------------------------------------------------------


def write_events(folder, steps):
    with SummaryWriter(str(folder)) as writer:
        writer.add_text("config/all", "text", 0)
        for step in steps:
            writer.add_scalar("train/loss", step, step)
            if step % 5 == 0:
                writer.add_scalar("val/l1_prior", step, step)
                writer.add_histogram("val/kl_per_dim", torch.arange(3), step)


def steps_of(folder):
    events = EventAccumulator(str(folder), size_guidance={"histograms": 0}).Reload()
    tags = events.Tags()
    steps = {tag: [event.step for event in events.Scalars(tag)] for tag in tags["scalars"]}
    return steps | {tag: [e.step for e in events.Histograms(tag)] for tag in tags["histograms"]}


@pytest.mark.parametrize(("owes", "last_validation"), [(False, [5, 10]), (True, [5])])
def test_what_is_logged_once_more_is_cut(tmp_path, owes, last_validation):
    write_events(tmp_path, range(1, 8))
    with SummaryWriter(str(tmp_path), filename_suffix=".b") as writer:
        writer.add_scalar("evaluation/chunked/success_rate", 0.5, 5)
    write_events(tmp_path / "rest", range(8, 13))
    next((tmp_path / "rest").iterdir()).rename(tmp_path / "events.out.tfevents.9999999999.c")
    (tmp_path / "rest").rmdir()
    cut_events(tmp_path, 10, owes_validation=owes)
    assert steps_of(tmp_path) == {
        "train/loss": list(range(1, 11)),
        "val/l1_prior": last_validation,
        "val/kl_per_dim": last_validation,
    }
    cut_events(tmp_path, 0, owes_validation=False)
    assert steps_of(tmp_path) == {}


def test_half_a_record_is_cut(tmp_path):
    write_events(tmp_path, range(1, 4))
    path = next(tmp_path.iterdir())
    path.write_bytes(path.read_bytes()[:-7])
    cut_events(tmp_path, 10, owes_validation=False)
    with SummaryWriter(str(tmp_path), filename_suffix=".b") as writer:
        writer.add_scalar("train/loss", 4, 4)
    assert steps_of(tmp_path) == {"train/loss": [1, 2, 4]}


# ---- the folder ---------------------------------------------------------------------------------

HOLDS = """\
import sys
from pathlib import Path
from act_lightning.run_lock import hold_run
with hold_run(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_second_training_of_a_run_is_refused(tmp_path):
    run = tmp_path / "run"
    assert not is_held(run / LOCK_FILE)
    other = subprocess.Popen(
        [sys.executable, "-c", HOLDS, run], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert other.stdout.readline() == b"held\n"
    try:
        assert is_held(run / LOCK_FILE)
        with (
            pytest.raises(ValueError, match="another process trains .*give another --run"),
            hold_run(run),
        ):
            pass
    finally:
        other.kill()
        other.wait()
    with hold_run(run):  # the lock of a killed process is gone with it
        assert is_held(run / LOCK_FILE)
    assert not is_held(run / LOCK_FILE)


def test_a_requeued_job_waits_for_the_lock_of_the_one_before(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    with (tmp_path / LOCK_FILE).open("wb") as before:
        fcntl.flock(before, fcntl.LOCK_EX)
        monkeypatch.setattr("act_lightning.run_lock.time.sleep", lambda _: before.close())
        with hold_run(tmp_path):
            assert is_held(tmp_path / LOCK_FILE)


# ---- the request to stop ------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_waits_for_the_end_of_the_step(number):
    stop = StopRequest()
    before = signal.getsignal(number)
    with stop.listening():
        stop.waits = True
        os.kill(os.getpid(), number)
        assert stop.signal == number
        assert not stop.is_due(5)
        stop.after_step(5, runs_ahead=False)
        assert stop.is_due(5)
    assert signal.getsignal(number) is before


def test_outside_of_training_a_signal_ends_the_process_at_once():
    for number, expected in (
        (signal.SIGTERM, SIGTERMException),
        (signal.SIGUSR1, SIGTERMException),
        (signal.SIGINT, KeyboardInterrupt),
    ):
        stop = StopRequest()
        with stop.listening(), pytest.raises(expected):
            os.kill(os.getpid(), number)
        assert stop.is_asked_of_any()


def test_a_second_ctrl_c_does_not_wait():
    stop = StopRequest()
    stop.waits = True
    with stop.listening():
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


CLEANS_UP = """
import os, signal, threading
from act_lightning import preemption

preemption.GRACE_S = 0.5
with preemption.StopRequest().listening():
    try:
        os.kill(os.getpid(), signal.{name})
    finally:
        {cleanup}
"""


@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 75), ("SIGUSR1", 75), ("SIGINT", 1)])
def test_a_process_that_cannot_clean_up_is_ended(name, code):
    """As one whose queue has lost a wake-up, since a handler has raised within it."""
    hangs = CLEANS_UP.format(name=name, cleanup="threading.Event().wait()")
    done = subprocess.run([sys.executable, "-c", hangs], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (
        code,
        "ended: it had not done so within 0.5 s of a signal\n",
    )


def test_a_process_that_has_cleaned_up_is_not_ended(monkeypatch):
    ended = []
    monkeypatch.setattr("act_lightning.preemption.GRACE_S", 0.1)
    monkeypatch.setattr("act_lightning.preemption.os._exit", ended.append)
    with pytest.raises(SIGTERMException), StopRequest().listening():
        os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0.5)
    assert ended == []


def test_what_a_shell_ignores_in_the_background_stays_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with StopRequest().listening():
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


class Interrupted(BoringModel):
    """Gets SIGTERM in its fifth batch."""

    def training_step(self, batch, batch_idx):
        if batch_idx == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize(("parts", "batches"), [(1, 5), (3, 6)])
def test_training_ends_between_two_steps_and_not_within_one(tmp_path, parts, batches):
    stop = StopRequest()
    trainer = Trainer(
        accelerator="cpu",
        max_steps=10,
        accumulate_grad_batches=parts,
        limit_val_batches=0,
        callbacks=[LastCheckpoint(stop)],
        plugins=[AtomicCheckpointIO()],
        default_root_dir=tmp_path,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    with stop.listening(), pytest.raises(SIGTERMException):
        trainer.fit(Interrupted())
    saved = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    assert saved["global_step"] == batches // parts
    progress = saved["loops"]["fit_loop"]["epoch_loop.batch_progress"]["total"]
    assert progress["completed"] == progress["ready"] == batches
