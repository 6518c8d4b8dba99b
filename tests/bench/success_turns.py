"""A training of ours that waits for its turn after every validation, for bench/success.py."""

from __future__ import annotations

from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback
from peers import Orders

from act_lightning.callbacks import RolloutCallback


class Turns(Callback):
    """Says what a validation found, and takes no further step before it is ordered to.

    It says so when the next step is due, or training has ended: then the checkpoint of that
    validation is written. Where no order comes the training ends, as by Ctrl-C.
    """

    def __init__(self) -> None:
        self._orders = Orders()
        self._found: dict[str, Any] | None = None

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Notes the step, the seconds that rollouts took, and the worlds that succeeded."""
        (played,) = (each for each in trainer.callbacks if isinstance(each, RolloutCallback))  # type: ignore[attr-defined]
        successes = {name: [0, 0] for name in played.executions}
        for result in played.results:
            successes[result.execution][0] += result.success
            successes[result.execution][1] += 1
        self._found = {
            "steps": trainer.global_step,
            "rollout_seconds": float(trainer.callback_metrics["rollout/seconds"]),
            "successes": successes,
        }

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Waits, where a validation came before."""
        if self._found is not None:
            self._say(last=False)
            if self._orders.next() is None:
                raise KeyboardInterrupt

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Says what the last validation found."""
        if self._found is not None:
            self._say(last=True)

    def _say(self, last: bool) -> None:
        self._orders.answer({**(self._found or {}), "last": last})
        self._found = None
