"""How much of training is waiting for data: `train/data_wait`."""

from __future__ import annotations

import time
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback

from act_lightning.data.stream import TrainingStream


class DataWait(Callback):
    """Logs the share of step time since the last log in which training waited for a batch, 0 to 1.

    A step's time runs from the moment it asks for a batch to the end of its update; Lightning asks
    for the batch after the one it trains on, once a step. So validation, rollouts and checkpoints,
    which lie between steps, count for nothing, nor does the first batch, which is read before
    training begins. Of several ranks, that which waited most counts: the others wait for it.

    Measured on the processor, without waiting for a GPU. Where steps are queued for a GPU faster
    than it takes them, it may be idle less than this says, never more.
    """

    def __init__(self) -> None:
        self._waited = self._total = 0.0
        self._logged_step = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Forgets a fit before this one."""
        self._waited = self._total = 0.0
        self._logged_step = trainer.global_step

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, index: int
    ) -> None:
        """Adds this step, and logs where Lightning's loggers take it."""
        stream = trainer.train_dataloader
        if not isinstance(stream, TrainingStream):
            return
        self._waited += stream.delivered_at - stream.asked_at
        self._total += time.perf_counter() - stream.asked_at
        step, interval = trainer.global_step, trainer.log_every_n_steps  # type: ignore[attr-defined]
        if step == self._logged_step or step % max(1, interval):
            return
        pl_module.log(
            "train/data_wait",
            self._waited / self._total,
            batch_size=len(batch),
            sync_dist=trainer.world_size > 1,
            reduce_fx="max",
        )
        self._logged_step = step
        self._waited = self._total = 0.0
