"""Trainings at a pace that a test sets, so that it can end one in the midst."""

import time
from contextlib import suppress
from pathlib import Path

from lightning.pytorch import Callback


class Pace(Callback):
    """Waits after each step as long as runs/<experiment>/pause says; leaves the step in `step`."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        run = Path(trainer.logger.log_dir)
        if trainer.is_global_zero:
            (run / "step").write_text(str(trainer.global_step))
        with suppress(FileNotFoundError):
            time.sleep(float((run.parent / "pause").read_text()))
