"""The two checkpoints that every run keeps, and how they reach the disk whole."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import lightning as L
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException
from rich import get_console


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint beside its final name and moves it into place.

    Lightning's own way collects it in the system's temporary folder, often another disk, from where
    it is copied: a full disk or a kill then leaves half of a file in place of the one before.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        """Saves `checkpoint` at `path`; when it raises, what was there is there still."""
        part = Path(f"{path}.part")
        try:
            super().save_checkpoint(checkpoint, part, storage_options)
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)


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
    """Keeps `last.ckpt`: written around every validation, and when training is interrupted.

    Before a validation, because the rollouts in it take a while and may be interrupted; after it,
    because the best score so far belongs into it. A run that ended in between owes that validation:
    Lightning goes on with the next step, or with none after the last, so it is made up for when the
    run is resumed. An interruption inside validation adds nothing: weights may be swapped for their
    average at that moment. Nor does an error of training itself, whose state may be unsound.
    """

    def __init__(self) -> None:
        self._is_before_validation = self._owes_validation = self._adds_step = False
        super().__init__(
            filename="last",
            enable_version_counter=False,
            save_on_train_epoch_end=False,
            save_on_exception=True,
        )

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Saves what training has reached; `on_validation_end` saves again."""
        if not self._should_skip_saving_checkpoint(trainer):
            self._is_before_validation = True
            try:
                self._save_none_monitor_checkpoint(trainer, self._monitor_candidates(trainer))
            finally:
                self._is_before_validation = False
            self._last_global_step_saved = 0

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
        """Makes up for the validation that the resumed run owes."""
        if not self._owes_validation:
            return
        self._owes_validation = False
        trainer.fit_loop.epoch_loop.max_steps -= self._adds_step
        trainer.validating = True
        trainer.fit_loop.epoch_loop.val_loop.run()
        trainer.training = True

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        """Saves after Ctrl-C and SIGTERM, between two steps, and says how to go on."""
        if not isinstance(exception, (KeyboardInterrupt, SIGTERMException)):
            return
        if trainer.training:
            super().on_exception(trainer, pl_module, exception)
        run = getattr(trainer.logger, "log_dir", None)
        if trainer.is_global_zero and run and Path(run, "checkpoints", "last.ckpt").is_file():
            get_console().print(f"interrupted; go on with make resume RUN={run}", soft_wrap=True)
