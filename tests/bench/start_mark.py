"""Ends a training after its first step, and leaves the time; for bench/start.py."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback


class FirstStep(Callback):
    """Writes the system's monotonic clock to the file that START_MARK names.

    Nothing is cleaned up: it is the start that is measured, not the end.
    """

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, index: int
    ) -> None:
        Path(os.environ["START_MARK"]).write_text(str(time.monotonic()))
        os._exit(0)
