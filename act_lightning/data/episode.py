"""One demonstration on its way into a store, and what makes it acceptable."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from act_lightning.batch import DataSpec
from act_lightning.data.store import first_not_finite, table_sizes


@dataclass(frozen=True, kw_only=True)
class Episode:
    """One demonstration of T steps; step t holds an observation and the action taken from it."""

    qpos: NDArray[Any]
    """(T, D) joint positions."""
    actions: NDArray[Any]
    """(T, A) commanded actions."""
    env_state: NDArray[Any] | None = None
    """(T, E) object poses; None when `DataSpec.dim_env_state` is 0."""
    images: NDArray[np.uint8] | None = None
    """(T, N, 3, H, W) uint8, cameras in the order of `DataSpec.cameras`; None without cameras."""
    seed: int
    """World it was recorded in."""

    def checked_tables(self, spec: DataSpec) -> dict[str, NDArray[np.float32]]:
        """The low-dimensional arrays by name in the store, as float32.

        Raises:
            ValueError: a shape differs from `spec`, or a value is not finite.
        """
        num_steps = len(self.actions)
        if num_steps == 0:
            raise ValueError(f"episode of seed {self.seed} has no steps")
        arrays = {"qpos": self.qpos, "action": self.actions, "env_state": self.env_state}
        tables = {}
        for name, size in table_sizes(spec).items():
            array = arrays.pop(name)
            expected = (num_steps, size)
            if array is None or array.shape != expected:
                shape = None if array is None else array.shape
                raise ValueError(
                    f"episode of seed {self.seed}: {name} has shape {shape}, not {expected}"
                )
            tables[name] = array.astype(np.float32)
            if (bad := first_not_finite(tables[name])) is not None:
                raise ValueError(
                    f"episode of seed {self.seed}: {name} is {tables[name][bad]} "
                    f"at step {bad[0]}, dimension {bad[1]}"
                )
        if arrays.get("env_state") is not None:
            raise ValueError(
                f"episode of seed {self.seed} has env_state, but the store has dim_env_state=0"
            )
        images = (num_steps, len(spec.cameras), 3, *spec.image_size) if spec.cameras else None
        given = None if self.images is None else self.images.shape
        if given != images or (self.images is not None and self.images.dtype != np.uint8):
            dtype = "" if self.images is None else f" {self.images.dtype}"
            raise ValueError(
                f"episode of seed {self.seed}: images are {given}{dtype}, not {images} uint8"
            )
        return tables
