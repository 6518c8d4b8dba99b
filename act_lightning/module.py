"""ACTModule: what one training step is, which optimizer takes it, and what is logged. Nothing else.

It trains any `ChunkNet`; the loss is the network's own. What is drawn for a sample (augmentation,
the latent's noise) is a function of (seed, place of the sample in the order of training), and what
is drawn for a step (dropout) of (seed, step, rank). So a resumed run repeats the steps of the
uninterrupted one, and without dropout the number of ranks changes nothing but rounding;
tonyzhaozh/act and LeRobot draw from wherever the generator happens to be.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any, Literal

import lightning as L
import numpy as np
import torch
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from rich import get_console
from torch import Tensor, nn
from torch.optim import Optimizer
from torchmetrics import MeanMetric

from act_lightning.batch import Batch, DataSpec
from act_lightning.data.datamodule import ACTDataModule
from act_lightning.nets.augment import LATENT, Augmentation, AugmentConfig, draw_normal
from act_lightning.nets.chunk_net import ChunkNetConfig, Posterior
from act_lightning.nets.normalize import Stats
from act_lightning.policy import CHECKPOINT_KEY, describe_net


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW and the learning-rate schedule. The defaults are the paper's."""

    lr: float = 1e-5
    """Learning rate of the transformer, after warm-up."""
    backbone_lr: float = 1e-5
    """Learning rate of the image backbone, after warm-up."""
    weight_decay: float = 1e-4
    """Decoupled weight decay, of every parameter."""
    schedule: Literal["constant", "cosine"] = "constant"
    """After warm-up: stay, or fall along half a cosine to `final_lr_fraction` at the last step."""
    warmup_steps: int = 0
    """Steps over which the learning rate rises linearly from zero."""
    final_lr_fraction: float = 0.01
    """Where the cosine ends, as a fraction of the peak."""
    scaling: Literal["none", "linear", "sqrt"] = "none"
    """How both learning rates follow the number of samples a step, where that is not
    `data.batch_size` (`data.batch_size_per_rank`, `trainer.accumulate_grad_batches`): not at all,
    with the ratio of the two (Goyal et al. 2017), or with its root (Malladi et al. 2022)."""

    def __post_init__(self) -> None:
        for name in ("lr", "backbone_lr", "weight_decay", "warmup_steps"):
            if getattr(self, name) < 0:
                raise ValueError(f"optimizer.{name}={getattr(self, name)} must not be negative")
        if not 0 <= self.final_lr_fraction <= 1:
            raise ValueError(
                f"optimizer.final_lr_fraction={self.final_lr_fraction} must lie between 0 and 1"
            )

    def scale(self, ratio: float) -> float:
        """Multiplier of both learning rates for `ratio` times the samples a step."""
        return {"none": 1.0, "linear": ratio, "sqrt": math.sqrt(ratio)}[self.scaling]

    def lr_factor(self, step: int, max_steps: int) -> float:
        """Multiplier of the peak learning rates at `step` of `max_steps`."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        if self.schedule == "constant":
            return 1.0
        progress = (step - self.warmup_steps) / max(1, max_steps - self.warmup_steps)
        cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
        return self.final_lr_fraction + (1 - self.final_lr_fraction) * cosine


class ACTModule(L.LightningModule):
    """Trains a `ChunkNet`, such as `ACT`, on batches of demonstrations.

    Args:
        net: which network, and its settings.
        spec: what an observation holds; taken from the demonstrations.
        stats: normalisation; taken from the training demonstrations. None when the weights, which
            carry it, are loaded from a checkpoint.
        optimizer: learning rates and their schedule.
        augment: random changes to the observations of training; validation and rollouts see them as
            they are.
        seed: of every random number drawn while training.
    """

    def __init__(
        self,
        net: ChunkNetConfig,
        spec: DataSpec | None = None,
        stats: Stats | None = None,
        optimizer: OptimizerConfig = OptimizerConfig(),
        augment: AugmentConfig = AugmentConfig(),
        seed: int = 0,
    ) -> None:
        super().__init__()
        # Optional only for the command line, which links it from the demonstrations.
        if spec is None:
            raise ValueError("ACTModule: give spec, what an observation holds")
        self.net = net.build(spec, stats)
        self.optimizer_config = optimizer
        self.augmentation = Augmentation(augment, spec, seed)
        self.seed = seed
        self._val_means: dict[str, MeanMetric] = {}
        self._start, self._cpu_start = time.monotonic(), time.process_time()
        self._seconds_before = self._cpu_seconds_before = 0.0

    # ---- training -------------------------------------------------------------------------------

    @property
    def train_seconds(self) -> float:
        """Seconds since training began, with those before a resumed run was cut off."""
        return self._seconds_before + time.monotonic() - self._start

    @property
    def cpu_seconds(self) -> float:
        """Processor time that this process has spent in training; its simulators not counted."""
        return self._cpu_seconds_before + time.process_time() - self._cpu_start

    def on_fit_start(self) -> None:
        """Starts the clocks."""
        self._start = time.monotonic()
        self._cpu_start = time.process_time()

    def on_train_start(self) -> None:
        """Says how many samples make a step, and what that does to the learning rate."""
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        if not isinstance(data, ACTDataModule) or not self.trainer.is_global_zero:
            return
        ranks, parts = self.trainer.world_size, self.trainer.accumulate_grad_batches
        shares = [f"{ranks} ranks"] * (ranks > 1) + [f"{parts} batches"] * (parts > 1)
        total = f"{data.global_batch_size * parts} samples"
        if shares:
            total += f" = {' x '.join([*shares, str(data.rank_batch_size)])}"
        config = self.optimizer_config
        lr = self.trainer.optimizers[0].param_groups[0]["initial_lr"]  # a checkpoint's, if resumed
        get_console().print(
            f"a step: {total}; learning rate {lr:g} (model.optimizer.scaling: {config.scaling})",
            highlight=False,
            soft_wrap=True,
        )

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Makes the step's randomness a pure function of (seed, step, rank)."""
        part = batch_idx % self.trainer.accumulate_grad_batches
        key = np.random.SeedSequence([self.seed, self.global_step, part, self.global_rank])
        seed = int(key.generate_state(1, np.uint64)[0])
        # Not torch.manual_seed: for each kind of GPU that is not there it formats a traceback.
        torch.default_generator.manual_seed(seed)
        if self.device.type != "cpu":
            torch.get_device_module(self.device).manual_seed(seed)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Loss of one batch, augmented, as the network defines it."""
        batch = self.augmentation(batch, self.net.normalizer.qpos_std)
        losses = self.net.losses(batch, self.global_step, self._draw_noise(batch))
        if (self.global_step + 1) % max(1, self.trainer.log_every_n_steps) == 0:  # type: ignore[attr-defined]
            if not torch.isfinite(losses["loss"]):
                raise ValueError(
                    f"train/loss is {losses['loss'].item()} at step {self.global_step}; lower "
                    "model.optimizer.lr or set trainer.gradient_clip_val, and go on from the last "
                    "checkpoint"
                )
            logged = {f"train/{name}": value.detach() for name, value in losses.items()}
            self.log_dict(logged, batch_size=len(batch), sync_dist=True)
            # "step" is where Lightning's loggers put the values: at the steps taken.
            self.log("step", self.global_step + 1.0, batch_size=len(batch))
        return losses["loss"]

    def _draw_noise(self, batch: Batch) -> Tensor | None:
        if batch.position is None or self.net.dim_noise == 0:
            return None
        shape = len(batch), self.net.dim_noise
        noise = draw_normal(self.seed, LATENT, batch.position, *shape)
        return noise.to(self.device, non_blocking=True)

    # ---- validation -----------------------------------------------------------------------------

    def on_validation_epoch_start(self) -> None:
        """Begins anew."""
        self._val_means = {}

    def validation_step(self, batch: Batch, batch_idx: int) -> dict[str, Posterior | Tensor | None]:
        """The network's errors on held-out demonstrations, with the same noise at each validation.

        Returns:
            `chunk` and `posterior`, for callbacks that look at predictions and latent.
        """
        seeds = torch.arange(len(batch)) + (batch.position or 0)
        evaluation = self.net.evaluate(batch, seeds)
        # Each mean weighs as much as what it is the mean of, so batches and ranks do not matter.
        num_actions = int((~batch.is_pad).sum())
        for values, weight in ((evaluation.errors, num_actions), (evaluation.metrics, len(batch))):
            for name, value in values.items():
                mean = self._val_means.setdefault(name, _exact_mean(self.device))
                mean.update(value.to(mean.device), weight)
        return {"chunk": evaluation.chunk, "posterior": evaluation.posterior}

    def on_validation_epoch_end(self) -> None:
        """Logs the means, and puts all that is logged of this validation at the steps taken."""
        if self.trainer.sanity_checking:
            return
        logged: dict[str, Tensor | float] = {"step": float(self.global_step)}
        logged |= {f"val/{name}": mean.compute() for name, mean in self._val_means.items()}
        # All ranks have the same; a mean could differ from it in the last digit.
        self.log_dict(logged, reduce_fx="max", sync_dist=True)

    # ---- optimizer ------------------------------------------------------------------------------

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """AdamW over two groups, backbone and the rest, under one schedule."""
        config = self.optimizer_config
        backbone: list[nn.Parameter] = []
        rest: list[nn.Parameter] = []
        for name, parameter in self.net.named_parameters():
            if parameter.requires_grad:
                (backbone if name.startswith("backbone.") else rest).append(parameter)
        scale = config.scale(self._batch_ratio)
        groups: list[dict[str, Any]] = [{"params": rest, "lr": scale * config.lr}]
        if backbone:
            groups.append({"params": backbone, "lr": scale * config.backbone_lr})
        optimizer = torch.optim.AdamW(groups, weight_decay=config.weight_decay, fused=self._fused)
        max_steps = self.trainer.max_steps
        if config.schedule == "cosine" and max_steps < 1:
            raise ValueError(
                "optimizer.schedule=cosine needs an end: set trainer.max_steps, "
                f"which is {max_steps}"
            )
        scheduler = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: config.lr_factor(step, max_steps)
        )
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clips the global norm; Lightning refuses to for fused optimizers, which bf16 allows."""
        if self._fused and gradient_clip_val and gradient_clip_algorithm in (None, "norm"):
            torch.nn.utils.clip_grad_norm_(self.net.parameters(), gradient_clip_val)
        else:
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    @property
    def _batch_ratio(self) -> float:
        """Samples a step, by those that `data.batch_size` names."""
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        if not isinstance(data, ACTDataModule):
            return 1.0
        samples = data.global_batch_size * self.trainer.accumulate_grad_batches
        return samples / data.batch_size

    @property
    def _fused(self) -> bool:
        """Whether the optimizer is fused: not where float16 gradients are scaled, and clipped."""
        return self.trainer.precision != "16-mixed"

    # ---- checkpoint -----------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds what rebuilds the network without a config file or a data set."""
        entry = checkpoint.setdefault(CHECKPOINT_KEY, {})  # callbacks come first, and may add to it
        entry |= describe_net(self.net) | {"train_seconds": self.train_seconds}
        entry["cost"] = {
            "cpu_seconds": self.cpu_seconds,
            "device": _device_name(self.device),
            "num_devices": self.trainer.world_size,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Goes on counting the time spent in training.

        Raises:
            ValueError: the checkpoint is of a network of other sizes.
        """
        theirs, ours = checkpoint[CHECKPOINT_KEY], describe_net(self.net)
        shapes = {name: value.shape for name, value in self.state_dict().items()}
        if {name: value.shape for name, value in checkpoint["state_dict"].items()} != shapes:
            differing = [
                f"{part}.{name} is {there.get(name)} there and {value} now"
                for part, there, now in (
                    ("net", theirs["net"]["init_args"], ours["net"]["init_args"]),
                    ("spec", theirs["spec"], ours["spec"]),
                )
                for name, value in now.items()
                if there.get(name) != value
            ]
            if theirs["net"]["class_path"] != ours["net"]["class_path"]:
                differing = [f"it is of {theirs['net']['class_path']}"]
            raise ValueError(
                f"the checkpoint is of another network: {'; '.join(differing)}. Set these back "
                "(net is model.net, spec what env and the demonstrations hold), or start anew"
            )
        self._seconds_before = theirs["train_seconds"]
        self._cpu_seconds_before = theirs.get("cost", {}).get("cpu_seconds", 0.0)


def float64_device(device: torch.device) -> torch.device:
    """Where sums are kept that want float64: Apple's GPUs know none."""
    return torch.device("cpu") if device.type == "mps" else device


def _exact_mean(device: torch.device) -> MeanMetric:
    """In float64, so that the order of ranks and batches changes nothing that is shown."""
    mean = MeanMetric()
    mean.set_dtype(torch.float64)
    return mean.to(float64_device(device))


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
