"""The checkpoints that every run keeps: how they reach the disk, and which a run goes on from."""

from __future__ import annotations

import os
import shutil
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import SIGTERMException
from rich import get_console

from act_lightning.policy import read_checkpoint
from act_lightning.preemption import StopRequest, StopSignals
from act_lightning.sim.ranks import exchange

LAST, PREVIOUS = "last.ckpt", "previous.ckpt"
"""What a run goes on from, and what was that before."""


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint beside its final name and moves it into place.

    Lightning's own way collects it in the system's temporary folder, often another disk, from where
    it is copied: a full disk or a kill then leaves half of a file in place of the one before. What
    a run goes on from is kept twice, as the newest and the one before: a machine that loses power,
    or a file server that does, may damage what it had said to be on disk.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        """Saves `checkpoint` at `path`; when it raises, what was there is there still."""
        part = Path(f"{path}.part")
        try:
            super().save_checkpoint(checkpoint, part, storage_options)
            _to_disk(part)
            if Path(path).name == LAST:
                _keep(Path(path), Path(path).with_name(PREVIOUS))
            os.replace(part, path)
            with suppress(OSError):  # some file systems cannot
                _to_disk(part.parent)
        finally:
            part.unlink(missing_ok=True)


class Reached(NamedTuple):
    """How far a checkpoint's training had come."""

    step: int
    """Optimizer steps taken."""
    owes_validation: bool
    """Whether the validation of that step was still to come."""


def find_resumable(folder: Path) -> tuple[Path, Reached] | None:
    """Finds the newest checkpoint that a run can go on from, with a warning if one is damaged.

    Args:
        folder: of a run's checkpoints.

    Returns:
        The checkpoint and how far it is; None if there is none yet.

    Raises:
        ValueError: there are some, and all are damaged.
    """
    damage: ValueError | None = None
    for path in (folder / LAST, folder / PREVIOUS):
        if not path.is_file():
            continue
        try:
            reached = read_reached(path)
        except ValueError as error:
            damage = damage or error
            continue
        if damage is not None:
            warnings.warn(f"{damage}. Going on from {path}, the one before", stacklevel=2)
        return path, reached
    if damage is not None:
        raise damage
    return None


def resume_point(path: str, run: Path | None) -> tuple[str | None, Reached]:
    """What `--ckpt_path` means, and how far that is.

    Args:
        path: a checkpoint, or `last`: the run's own, if it has one already.
        run: the run's folder; None if it has no name yet.

    Returns:
        The checkpoint, or None if the run starts anew.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is not a checkpoint that training can go on from, or `last` of no run.
    """
    own = path == "last"
    if own and run is None:
        raise ValueError("--ckpt_path=last needs --run, the name of the run to go on with")
    if own or Path(path).name == LAST:
        found = find_resumable(run / "checkpoints" if own and run else Path(path).parent)
        if found is not None:
            return str(found[0]), found[1]
        if own:
            return None, Reached(step=0, owes_validation=False)
    return path, read_reached(path)


def put_in_place(folder: Path, path: str | None) -> None:
    """Puts the checkpoint that a run goes on from in place of its last one, if that is damaged.

    Else the next one to be saved would make the damaged one the one before.

    Args:
        folder: of the run's checkpoints.
        path: what the run goes on from, maybe a checkpoint of another; None if it starts anew.
    """
    if path is not None and (folder / PREVIOUS).exists() and (folder / PREVIOUS).samefile(path):
        _keep(folder / PREVIOUS, folder / LAST)


def read_reached(path: str | Path) -> Reached:
    """Reads how far a checkpoint's training had come.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is not a checkpoint that training can go on from.
    """
    checkpoint = read_checkpoint(path)
    states = checkpoint.get("callbacks", {})
    owes = any(state.get("before_validation", False) for state in states.values())
    return Reached(checkpoint["global_step"], owes)


def _keep(path: Path, copy: Path) -> None:
    """Gives a file a second name, which another file may have, and leaves it its first one."""
    if not path.is_file():
        return
    part = Path(f"{copy}.part")
    part.unlink(missing_ok=True)
    try:
        os.link(path, part)
    except OSError:  # a file system without hard links
        shutil.copyfile(path, part)
    os.replace(part, copy)


def _to_disk(path: Path) -> None:
    """Waits until a file, or a folder's list of names, is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def best_checkpoint(with_rollouts: bool) -> ModelCheckpoint:
    """Keeps `best.ckpt`: by success in rollouts, or by validation L1 where there are none."""
    return ModelCheckpoint(
        filename="best",
        monitor="rollout/score" if with_rollouts else "val/l1_prior",
        mode="max" if with_rollouts else "min",
        enable_version_counter=False,
        save_on_train_epoch_end=False,
    )


class LastCheckpoint(ModelCheckpoint):
    """Keeps `last.ckpt`: written around every validation, and when training is asked to end.

    Before a validation, because the rollouts in it take a while and may be interrupted; after it,
    because the best score so far belongs into it. A run that ended in between owes that validation:
    Lightning goes on with the next step, or with none after the last, so it is made up for when the
    run is resumed. An interruption inside validation adds nothing: weights may be swapped for their
    average at that moment. Nor does an error of training itself, whose state may be unsound.

    Args:
        stop: when training ends before its last step. It is told when a signal has to wait.
    """

    def __init__(self, stop: StopRequest) -> None:
        self._stop = stop
        self._is_before_validation = self._owes_validation = self._adds_step = False
        super().__init__(
            filename="last",
            enable_version_counter=False,
            save_on_train_epoch_end=False,
            save_on_exception=True,
        )

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Takes over from Lightning what is done about signals."""
        super().setup(trainer, pl_module, stage)
        trainer._signal_connector = StopSignals(trainer, self._stop)  # type: ignore[assignment]

    def state_dict(self) -> dict[str, Any]:
        """Says whether the validation of this step is still to come."""
        return super().state_dict() | {"before_validation": self._is_before_validation}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Notes what a run owes that was cut off in a validation."""
        super().load_state_dict(state_dict)
        self._owes_validation = state_dict.get("before_validation", False)

    def on_load_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Finds out whether Lightning would end the run at once, as all its steps are taken."""
        self._adds_step = 0 < trainer.max_steps <= checkpoint["global_step"]

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Keeps it from doing so, until training starts."""
        self._adds_step = self._adds_step and self._owes_validation
        trainer.fit_loop.epoch_loop.max_steps += self._adds_step

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Makes up for the validation that the resumed run owes; from now on signals wait.

        Raises:
            ValueError: ranks have gone on from different checkpoints.
        """
        _check_same_step(trainer.global_step)
        if self._owes_validation:
            self._owes_validation = False
            trainer.fit_loop.epoch_loop.max_steps -= self._adds_step
            trainer.validating = True
            # As in the validations of a run that was not resumed: it stands in checkpoints.
            trainer.fit_loop.epoch_loop._batches_that_stepped = trainer.global_step - 1
            trainer.fit_loop.epoch_loop.val_loop.run()
            trainer.training = True
        self._stop.waits = True

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Corrects what Lightning counts of its own: after some resumes it would log a step off."""
        trainer.fit_loop.epoch_loop._batches_that_stepped = trainer.global_step

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, index: int
    ) -> None:
        """Agrees with the other ranks on whether to end."""
        if not trainer.fit_loop._should_accumulate():
            on_gpu = pl_module.device.type == "cuda"
            self._stop.after_step(trainer.global_step, runs_ahead=on_gpu)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Saves what training has reached; `on_validation_end` saves again.

        Raises:
            SIGTERMException: training was asked to end.
        """
        if self._should_skip_saving_checkpoint(trainer):
            return
        self._is_before_validation = True
        try:
            self._save_none_monitor_checkpoint(trainer, self._monitor_candidates(trainer))
        finally:
            self._is_before_validation = False
        self._last_global_step_saved = 0
        if self._stop.is_asked_of_any():
            raise SIGTERMException
        self._stop.waits = False

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Saves the best score too, without being interrupted."""
        self._stop.waits = trainer.state.fn == TrainerFn.FITTING
        super().on_validation_end(trainer, pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Signals need not wait any more."""
        super().on_train_end(trainer, pl_module)
        self._stop.waits = False

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        """Saves where all ranks have agreed to end, between two steps, and says how to go on."""
        if not isinstance(exception, (KeyboardInterrupt, SIGTERMException)):
            return
        if trainer.training and self._stop.is_due(trainer.global_step):
            super().on_exception(trainer, pl_module, exception)
        self._stop.waits = False
        run = getattr(trainer.logger, "log_dir", None)
        if trainer.is_global_zero and run and Path(run, "checkpoints", LAST).is_file():
            get_console().print(f"interrupted; go on with make resume RUN={run}", soft_wrap=True)


def _check_same_step(step: int) -> None:
    steps = exchange(step)
    if len(set(steps)) > 1:
        found = ", ".join(f"rank {rank} at {step}" for rank, step in enumerate(steps))
        raise ValueError(
            f"the ranks go on from different steps ({found}); put the run's folder where all nodes "
            "see it"
        )
