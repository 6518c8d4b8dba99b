"""What a terminal, or a log file, shows of training."""

from __future__ import annotations

import time
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ProgressBar
from rich import get_console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

REFRESH_HZ = 2


class TrainingProgress(ProgressBar):
    """Shows step, loss, KL, success and time left; without a terminal, a line now and then.

    Lightning's own bars count epochs, and know no end where the budget is given in steps.
    """

    LINE_INTERVAL_S = 30.0

    def __init__(self) -> None:
        super().__init__()
        self._progress: Progress | None = None
        self._enabled = True
        self._bar = TaskID(0)
        self._start_time = self._line_time = 0.0
        self._start_step = 0

    def disable(self) -> None:
        """Shows nothing from now on; the trainer calls it on all ranks but the first."""
        self._enabled = False

    def enable(self) -> None:
        """Shows progress again."""
        self._enabled = True

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Says what is trained, and starts the bar at the step it starts or resumes from."""
        if not self._enabled:
            return
        size = sum(parameter.numel() for parameter in pl_module.parameters())
        # Not trainer.log_dir, which all ranks would have to ask for.
        folder = getattr(trainer.logger, "log_dir", "no folder")
        console = get_console()
        console.print(
            f"{folder}: {size / 1e6:.1f} M parameters, {trainer.precision}, "
            f"{trainer.world_size} x {pl_module.device.type}",
            highlight=False,
            soft_wrap=True,
        )
        self._start_time = self._line_time = time.monotonic()
        self._start_step = trainer.global_step
        if not console.is_terminal:
            return
        columns = (
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(),
            TextColumn("{task.fields[metrics]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        # Training waits a millisecond while it is drawn: not ten times a second, as by default.
        self._progress = Progress(*columns, console=console, refresh_per_second=REFRESH_HZ)
        self._progress.start()
        total = trainer.max_steps if trainer.max_steps > 0 else None
        self._bar = self._progress.add_task(
            "train", total=total, completed=trainer.global_step, metrics=""
        )

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, index: int
    ) -> None:
        """Moves the bar, or prints a line if the last one is long ago."""
        if not self._enabled:
            return
        is_last = trainer.global_step == trainer.max_steps
        if self._progress is not None:
            if index % max(1, trainer.log_every_n_steps) == 0 or is_last:  # type: ignore[attr-defined]
                self._progress.update(
                    self._bar, completed=trainer.global_step, metrics=_metrics_text(trainer)
                )
        elif time.monotonic() - self._line_time > self.LINE_INTERVAL_S or is_last:
            self._line_time = time.monotonic()
            done = max(1, trainer.global_step - self._start_step)
            left = (
                (self._line_time - self._start_time)
                / done
                * (trainer.max_steps - trainer.global_step)
            )
            print(
                f"step {trainer.global_step}/{trainer.max_steps}  {_metrics_text(trainer)}  "
                f"{left / 60:.1f} min left",
                flush=True,
            )

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Leaves the bar as it is."""
        self._stop()

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        """Leaves the bar as it is, and the terminal in order."""
        self._stop()

    def _stop(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None


def _metrics_text(trainer: L.Trainer) -> str:
    shown = {
        "loss": "train/loss",
        "l1": "train/l1",
        "mse": "train/mse",
        "kl": "train/kl",
        "val l1": "val/l1_prior",
    }
    metrics = trainer.callback_metrics
    parts = [f"{k} {float(metrics[v]):.4f}" for k, v in shown.items() if v in metrics]
    for name in metrics:
        if name.startswith("rollout/") and name.endswith("/successes"):
            way = name.split("/")[1]
            episodes = metrics[f"rollout/{way}/episodes"]
            parts.append(f"{way} {metrics[name]:.0f}/{episodes:.0f}")
    return "  ".join(parts)
