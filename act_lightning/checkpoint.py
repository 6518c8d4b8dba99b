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
    because the best score so far belongs into it. An interruption inside validation adds nothing:
    weights may be swapped for their average at that moment. Nor does an error of training itself,
    whose state may be unsound.
    """

    def __init__(self) -> None:
        super().__init__(
            filename="last",
            enable_version_counter=False,
            save_on_train_epoch_end=False,
            save_on_exception=True,
        )

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Saves what training has reached; `on_validation_end` saves again."""
        if not self._should_skip_saving_checkpoint(trainer):
            self._save_none_monitor_checkpoint(trainer, self._monitor_candidates(trainer))
            self._last_global_step_saved = 0

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
