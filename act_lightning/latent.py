"""Whether the latent does anything: KL of each dimension, active units, and what z buys in L1.

A CVAE whose KL term is too dear learns to ignore its latent: the posterior equals the prior for
every chunk, the decoder never looks at z, and what is left is behaviour cloning of chunks. Nothing
in the loss curve shows it, so every validation measures it, the checkpoint holds the result, and a
run that ends so says so.

Source: active units from Burda et al. 2016 (arXiv 1509.00519), section 5. Departure: theirs is a
VAE of images; here the posterior sees observation and chunk, and a unit that merely repeats the
observation counts as active too, while one with a tiny variance of its own can say much with a mean
that varies little (early in training, or with hardly any KL weight). So KL and the L1 with and
without z stand beside the count.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from rich import get_console
from torch import Tensor
from torchmetrics import Metric

from act_lightning.module import float64_device
from act_lightning.policy import CHECKPOINT_KEY

ACTIVE_VARIANCE = 0.01
"""Variance over the data that the posterior mean of an active unit exceeds; the source's."""
L1_OF_Z = {"l1_posterior": "the posterior's z", "l1_prior": "z = 0", "l1_sampled": "z ~ N(0, I)"}
"""Validation's reconstruction errors, by where their z is from."""


class LatentReport(NamedTuple):
    """What the posteriors of a data set have in common."""

    kl_per_dim: Tensor
    """(L,) KL to the prior, mean over the data, in nats."""
    variance: Tensor
    """(L,) variance over the data of the posterior mean."""
    active_units: Tensor
    """Number of dimensions whose `variance` exceeds `ACTIVE_VARIANCE`."""

    @property
    def kl(self) -> Tensor:
        """KL of the whole latent, in nats."""
        return self.kl_per_dim.sum()


class LatentStatistics(Metric):
    """KL per dimension and active units over all batches and ranks.

    All states are sums, which ranks add up. They are float64, in which the difference of squares
    that the variance then is stays exact to 1e-12 for means up to 100 (the prior's scale is 1).

    Args:
        dim_latent: L, the number of latent dimensions.
    """

    full_state_update = False
    num_rows: Tensor
    sum_kl: Tensor
    sum_mu: Tensor
    sum_squares: Tensor

    def __init__(self, dim_latent: int) -> None:
        super().__init__()
        self.add_state("num_rows", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
        for name in ("sum_kl", "sum_mu", "sum_squares"):
            zeros = torch.zeros(dim_latent, dtype=torch.float64)
            self.add_state(name, zeros, dist_reduce_fx="sum")

    def update(self, mu: Tensor, logvar: Tensor) -> None:
        """Adds a batch.

        Args:
            mu: (B, L) posterior means.
            logvar: (B, L) logarithms of the posterior variances.
        """
        mu, logvar = (value.to(self.sum_mu.device, torch.float64) for value in (mu, logvar))
        squares = mu.square()
        self.num_rows += len(mu)
        self.sum_kl += (0.5 * (squares + logvar.expm1() - logvar)).sum(dim=0)
        self.sum_mu += mu.sum(dim=0)
        self.sum_squares += squares.sum(dim=0)

    def compute(self) -> LatentReport:
        """Report over all batches of all ranks."""
        mean = self.sum_mu / self.num_rows
        variance = (self.sum_squares / self.num_rows - mean.square()).clamp(min=0)
        active_units = (variance > ACTIVE_VARIANCE).sum()
        return LatentReport(self.sum_kl / self.num_rows, variance, active_units)


class LatentCallback(Callback):
    """Measures the latent at every validation; does nothing for a network without one.

    Logs `val/active_units`, `val/kl_max_dim` (nats of the dimension that says most) and, as a
    histogram, `val/kl_per_dim`. Puts `summary` into every checkpoint, and says at the end of
    training if the latent has collapsed.

    Attributes:
        summary: of the latest validation, as plain values; None before the first, or without a
            latent. Its entries:

            - step: optimizer steps taken then;
            - dim_latent: number of latent dimensions;
            - active_units: those whose posterior mean varies over the data (variance > 0.01);
            - collapsed: whether there is none;
            - kl: KL of the posterior to the prior, sum over the dimensions, in nats;
            - kl_max_dim: the largest KL of one dimension;
            - l1_posterior, l1_prior, l1_sampled: error of the chunk in standard deviations, with
              the posterior's mean as z, with z = 0, and with z from N(0, I); those that the network
              reports.
    """

    def __init__(self) -> None:
        self.summary: dict[str, Any] | None = None
        self._statistics: LatentStatistics | None = None
        self._report: LatentReport | None = None

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begins anew."""
        self._statistics = self._report = None

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Adds the posterior that `ACTModule.validation_step` returns."""
        posterior = outputs["posterior"]
        if posterior is None or trainer.sanity_checking:
            return
        if self._statistics is None:
            statistics = LatentStatistics(posterior.mu.shape[1])
            self._statistics = statistics.to(float64_device(pl_module.device))
        self._statistics.update(posterior.mu, posterior.logvar)

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Gathers the ranks' statistics and logs them."""
        if self._statistics is None:
            return
        kl_per_dim, variance, active_units = self._statistics.compute()
        # Reshaped because torchmetrics makes a scalar of (1,), a latent of one dimension.
        kl_per_dim, variance = kl_per_dim.reshape(-1), variance.reshape(-1)
        self._report = LatentReport(kl_per_dim, variance, active_units)
        pl_module.log_dict(
            {"val/active_units": active_units.float(), "val/kl_max_dim": kl_per_dim.max().float()},
            sync_dist=True,  # equal on all ranks; Lightning warns otherwise
        )

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Keeps the summary, before the checkpoints of this validation are saved."""
        if self._report is None:
            return
        active_units = int(self._report.active_units)
        errors = {name: trainer.callback_metrics.get(f"val/{name}") for name in L1_OF_Z}
        self.summary = {
            "step": trainer.global_step,
            "dim_latent": len(self._report.kl_per_dim),
            "active_units": active_units,
            "collapsed": active_units == 0,
            "kl": float(self._report.kl),
            "kl_max_dim": float(self._report.kl_per_dim.max()),
            **{name: float(error) for name, error in errors.items() if error is not None},
        }
        if isinstance(trainer.logger, TensorBoardLogger) and trainer.is_global_zero:
            trainer.logger.experiment.add_histogram(
                "val/kl_per_dim", self._report.kl_per_dim.cpu(), trainer.global_step
            )

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Says so if the latent has collapsed."""
        if self.summary is not None and self.summary["collapsed"] and trainer.is_global_zero:
            console = get_console()
            console.print(explain_collapse(self.summary), highlight=False, soft_wrap=True)

    def on_save_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Adds the summary to the entry that `ACTModule` then completes."""
        if self.summary is not None:
            checkpoint.setdefault(CHECKPOINT_KEY, {})["latent"] = self.summary

    def on_load_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Keeps what is known until the resumed run validates."""
        self.summary = checkpoint.get(CHECKPOINT_KEY, {}).get("latent")


def describe_latent(summary: Mapping[str, Any]) -> str:
    """One line for a report: active units, KL, and L1 by where z is from.

    Args:
        summary: as `LatentCallback.summary`.
    """
    errors = ", ".join(
        f"{summary[name]:.4f} with {z}" for name, z in L1_OF_Z.items() if name in summary
    )
    return (
        f"latent: {summary['active_units']} of {summary['dim_latent']} units active, KL "
        f"{summary['kl']:.4f} nats" + (f"; validation L1 {errors}" if errors else "")
    )


def explain_collapse(summary: Mapping[str, Any]) -> str:
    """What the console says of a run whose latent has collapsed, and what to try.

    Args:
        summary: as `LatentCallback.summary`.
    """
    errors = [f"{summary[name]:.4f} with {z}" for name, z in L1_OF_Z.items() if name in summary][:2]
    comparison = f" (validation L1 {' and '.join(errors)})" if errors else ""
    return (
        f"The latent has collapsed: of {summary['dim_latent']} units none is active. The posterior "
        f"is about the same for every chunk, so z tells the decoder next to nothing{comparison}. "
        "The CVAE does nothing; this policy is behaviour cloning of chunks. To use the latent, "
        "lower model.net.kl_schedule.weight, anneal it (model.net.kl_schedule.kind), or allow "
        "model.net.free_bits; to do without, set model.net.use_cvae=false."
    )
