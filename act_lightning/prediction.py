"""How far off the prediction is at each step of the chunk, on held-out demonstrations.

One number for a chunk hides what its length costs: the first action is nearly given by where the
robot is, the last one has to be guessed. So every validation measures the error of each step, the
checkpoint holds it, and `results.json` says it of the checkpoint that was graded.
"""

from __future__ import annotations

import math
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torchmetrics import Metric

from act_lightning.batch import Batch
from act_lightning.module import ACTModule, float64_device
from act_lightning.policy import CHECKPOINT_KEY


class ErrorByHorizon(Metric):
    """Mean absolute error of each step of the chunk, over all batches and ranks.

    Args:
        chunk_size: K.
    """

    full_state_update = False
    sum_error: Tensor
    num_actions: Tensor

    def __init__(self, chunk_size: int) -> None:
        super().__init__()
        for name in ("sum_error", "num_actions"):
            # Float64, so that the order of ranks and batches changes nothing that is shown.
            zeros = torch.zeros(chunk_size, dtype=torch.float64)
            self.add_state(name, zeros, dist_reduce_fx="sum")

    def update(self, chunk: Tensor, target: Tensor, is_pad: Tensor) -> None:
        """Adds a batch.

        Args:
            chunk: (B, K, A) predicted actions, in standard deviations.
            target: (B, K, A) demonstrated actions, same unit; padded ones may hold anything.
            is_pad: (B, K) bool, True past the episode's end.
        """
        error_bk = (chunk - target).abs().mean(dim=-1).masked_fill(is_pad, 0.0)
        self.sum_error += error_bk.to(self.sum_error).sum(dim=0)
        self.num_actions += (~is_pad).to(self.num_actions).sum(dim=0)

    def compute(self) -> Tensor:
        """(K,) errors in standard deviations; NaN for a step that no demonstration reaches."""
        return self.sum_error / self.num_actions


class PredictionCallback(Callback):
    """Measures the error of each step of the chunk at every validation.

    Logs `val/l1_first` and `val/l1_last`, the errors of the chunk's first and last action, and puts
    `summary` into every checkpoint.

    Attributes:
        summary: of the latest validation, as plain values; None before the first. Its entries:

            - step: optimizer steps taken then;
            - l1_by_horizon: K errors, with z = 0 where there is a latent, in standard deviations of
              each action value; None for a step that no held-out demonstration reaches.
    """

    def __init__(self) -> None:
        self.summary: dict[str, Any] | None = None
        self._errors: ErrorByHorizon | None = None

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begins anew."""
        self._errors = None

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Adds the chunks that `ACTModule.validation_step` returns."""
        if trainer.sanity_checking:
            return
        assert isinstance(pl_module, ACTModule)
        chunk = outputs["chunk"]
        if self._errors is None:
            self._errors = ErrorByHorizon(chunk.shape[1]).to(float64_device(pl_module.device))
        target = pl_module.net.normalizer.normalize_actions(batch.actions)
        self._errors.update(chunk, target, batch.is_pad)

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Gathers the ranks' errors, logs them and keeps them for the checkpoints."""
        if self._errors is None:
            return
        errors = self._errors.compute().reshape(-1)  # because torchmetrics makes a scalar of (1,)
        ends = {"val/l1_first": errors[0].float(), "val/l1_last": errors[-1].float()}
        pl_module.log_dict(
            {name: error for name, error in ends.items() if error.isfinite()},
            sync_dist=True,  # equal on all ranks; Lightning warns otherwise
        )
        self.summary = {
            "step": trainer.global_step,
            "l1_by_horizon": [x if math.isfinite(x) else None for x in errors.tolist()],
        }

    def on_save_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Adds the summary to the entry that `ACTModule` then completes."""
        if self.summary is not None:
            checkpoint.setdefault(CHECKPOINT_KEY, {})["prediction"] = self.summary

    def on_load_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Keeps what is known until the resumed run validates."""
        self.summary = checkpoint.get(CHECKPOINT_KEY, {}).get("prediction")
