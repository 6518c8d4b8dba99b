"""Normalisation that travels inside the checkpoint.

`Stats` are measured once, on the training episodes only. `Normalizer` holds them as buffers, so a
state_dict is self-contained: `Normalizer(spec)` starts from identity statistics and
`load_state_dict` restores the real ones.

Source: tonyzhaozh/act (mean and standard deviation, the latter clipped at 1e-2; ImageNet's mean and
standard deviation for images). Departure: the original keeps statistics in a pickle beside the
checkpoint and counts validation episodes in; both make a policy wrong without a word.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor, nn

from act_lightning.batch import DataSpec

MIN_STD = 1e-2
"""Smallest divisor: a joint that never moved must not amplify its noise."""
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True, kw_only=True)
class Stats:
    """Mean and standard deviation of each dimension, float32, in the data's own units."""

    qpos_mean: Tensor
    """(D,)."""
    qpos_std: Tensor
    """(D,), at least `MIN_STD`."""
    action_mean: Tensor
    """(A,)."""
    action_std: Tensor
    """(A,), at least `MIN_STD`."""
    env_state_mean: Tensor | None = None
    """(E,); None without env_state."""
    env_state_std: Tensor | None = None
    """(E,), at least `MIN_STD`; None without env_state."""

    @classmethod
    def from_arrays(
        cls, *, qpos: ArrayLike, actions: ArrayLike, env_state: ArrayLike | None = None
    ) -> Stats:
        """Measures the statistics of demonstrations; pass training episodes only.

        Args:
            qpos: (T, D) joint positions.
            actions: (T, A) commanded actions.
            env_state: (T, E) object poses; None when the experiment does not use them.

        Raises:
            ValueError: if an array is not (T, size) with T >= 1, or holds NaN or infinity.
        """
        qpos_mean, qpos_std = _mean_std("qpos", qpos)
        action_mean, action_std = _mean_std("actions", actions)
        env_mean, env_std = (None, None) if env_state is None else _mean_std("env_state", env_state)
        return cls(
            qpos_mean=qpos_mean,
            qpos_std=qpos_std,
            action_mean=action_mean,
            action_std=action_std,
            env_state_mean=env_mean,
            env_state_std=env_std,
        )

    @classmethod
    def identity(cls, spec: DataSpec) -> Stats:
        """Statistics that change nothing, in the shapes of `spec`."""
        return cls(
            qpos_mean=torch.zeros(spec.dim_qpos),
            qpos_std=torch.ones(spec.dim_qpos),
            action_mean=torch.zeros(spec.dim_action),
            action_std=torch.ones(spec.dim_action),
            env_state_mean=torch.zeros(spec.dim_env_state) if spec.dim_env_state else None,
            env_state_std=torch.ones(spec.dim_env_state) if spec.dim_env_state else None,
        )


class Normalizer(nn.Module):
    """Physical units to standard deviations, and back for actions."""

    qpos_mean: Tensor
    qpos_std: Tensor
    action_mean: Tensor
    action_std: Tensor
    env_state_mean: Tensor
    env_state_std: Tensor
    image_mean: Tensor
    image_std: Tensor

    def __init__(self, spec: DataSpec, stats: Stats | None = None) -> None:
        """Builds the buffers.

        Args:
            spec: what the batches hold.
            stats: statistics of the training episodes; None for identity, to be filled by
                `load_state_dict`.

        Raises:
            ValueError: if `stats` do not have the sizes of `spec`.
        """
        super().__init__()
        stats = stats or Stats.identity(spec)
        self._register("qpos", stats.qpos_mean, stats.qpos_std, spec.dim_qpos)
        self._register("action", stats.action_mean, stats.action_std, spec.dim_action)
        if spec.dim_env_state:
            self._register(
                "env_state", stats.env_state_mean, stats.env_state_std, spec.dim_env_state
            )
        if spec.cameras:
            self._register("image", torch.tensor(IMAGENET_MEAN), torch.tensor(IMAGENET_STD), 3)

    def _register(self, name: str, mean: Tensor | None, std: Tensor | None, size: int) -> None:
        for kind, values in (("mean", mean), ("std", std)):
            shape = None if values is None else tuple(values.shape)
            if values is None or shape != (size,):
                raise ValueError(
                    f"Normalizer: stats.{name}_{kind} has shape {shape}, the data has ({size},); "
                    "measure the statistics on the data set that is trained on"
                )
            self.register_buffer(f"{name}_{kind}", values.detach().clone().float())

    def normalize_qpos(self, qpos: Tensor) -> Tensor:
        """(B, D) physical units to standard deviations."""
        return (qpos - self.qpos_mean) / self.qpos_std

    def normalize_env_state(self, env_state: Tensor) -> Tensor:
        """(B, E) object poses to standard deviations."""
        return (env_state - self.env_state_mean) / self.env_state_std

    def normalize_actions(self, actions: Tensor) -> Tensor:
        """(..., A) actions in physical units to standard deviations."""
        return (actions - self.action_mean) / self.action_std

    def unnormalize_actions(self, actions: Tensor) -> Tensor:
        """(..., A) actions in standard deviations to physical units."""
        return actions * self.action_std + self.action_mean

    def normalize_images(self, images: Tensor) -> Tensor:
        """(B, N, 3, H, W) uint8 to float32 of about unit variance, channels last in memory.

        Convolutions are fastest on channels-last pictures, and the conversion from uint8 is a copy
        anyway.
        """
        pictures = images.flatten(0, 1).to(torch.float32, memory_format=torch.channels_last)
        mean, std = (255.0 * x.view(3, 1, 1) for x in (self.image_mean, self.image_std))
        return ((pictures - mean) / std).reshape(images.shape)


def _mean_std(name: str, values: ArrayLike) -> tuple[Tensor, Tensor]:
    array = np.asarray(values)
    if array.ndim != 2 or len(array) == 0:
        raise ValueError(
            f"Stats: {name} has shape {array.shape}; expected (steps, size) with steps >= 1"
        )
    bad = np.argwhere(~np.isfinite(array))
    if len(bad):
        step, dim = bad[0]
        raise ValueError(
            f"Stats: {name} dimension {dim} is {array[step, dim]} at step {step} "
            f"({len(bad)} such values in all); repair or drop that episode"
        )
    mean, std = array.mean(axis=0, dtype=np.float64), array.std(axis=0, dtype=np.float64)
    return (
        torch.from_numpy(mean.astype(np.float32)),
        torch.from_numpy(std.clip(min=MIN_STD).astype(np.float32)),
    )
