"""One demonstration on its way into a store, and what makes it acceptable."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from act_lightning.batch import DataSpec
from act_lightning.data.store import first_not_finite, table_sizes


class Frames(Protocol):
    """Camera frames of one episode, decoded a few at a time.

    A long episode of several large cameras does not fit in memory. They are asked for camera by
    camera, in increasing ranges that adjoin, each once.
    """

    @property
    def shape(self) -> tuple[int, ...]:
        """(T, N, 3, H, W)."""

    def read(self, camera: int, start: int, stop: int) -> NDArray[np.uint8]:
        """Frames start .. stop of camera number `camera`: (stop - start, H, W, 3) RGB."""


@dataclass(frozen=True)
class ArrayFrames:
    """Frames that are all in memory."""

    images: NDArray[np.uint8]
    """(T, N, 3, H, W)."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(T, N, 3, H, W)."""
        return self.images.shape

    def read(self, camera: int, start: int, stop: int) -> NDArray[np.uint8]:
        """Frames start .. stop of one camera, (stop - start, H, W, 3)."""
        return self.images[start:stop, camera].transpose(0, 2, 3, 1)


@dataclass(frozen=True, kw_only=True)
class Episode:
    """One demonstration of T steps; step t holds an observation and the action taken from it."""

    qpos: NDArray[Any]
    """(T, D) joint positions."""
    actions: NDArray[Any]
    """(T, A) commanded actions."""
    env_state: NDArray[Any] | None = None
    """(T, E) object poses; None when `DataSpec.dim_env_state` is 0."""
    images: NDArray[np.uint8] | Frames | None = None
    """(T, N, 3, H, W) uint8, cameras in the order of `DataSpec.cameras`; None without cameras."""
    id: int
    """Simulated world it was recorded in, or its number in the data set it was taken from."""
    success: bool | None = None
    """Whether the task was done; None when that is not known."""

    def checked_tables(self, spec: DataSpec) -> dict[str, NDArray[np.float32]]:
        """The low-dimensional arrays by name in the store, as float32.

        Raises:
            ValueError: a shape differs from `spec`, or a value is not finite.
        """
        num_steps = len(self.actions)
        if num_steps == 0:
            raise ValueError(f"episode {self.id} has no steps")
        arrays = {"qpos": self.qpos, "action": self.actions, "env_state": self.env_state}
        tables = {}
        for name, size in table_sizes(spec).items():
            array = arrays.pop(name)
            expected = (num_steps, size)
            if array is None or array.shape != expected:
                shape = None if array is None else array.shape
                raise ValueError(f"episode {self.id}: {name} has shape {shape}, not {expected}")
            tables[name] = array.astype(np.float32)
            if (bad := first_not_finite(tables[name])) is not None:
                raise ValueError(
                    f"episode {self.id}: {name} is {tables[name][bad]} "
                    f"at step {bad[0]}, dimension {bad[1]}"
                )
        if arrays.get("env_state") is not None:
            raise ValueError(f"episode {self.id} has env_state, but the store has dim_env_state=0")
        self._check_images(spec)
        return tables

    @property
    def frames(self) -> Frames | None:
        """The images, to be read a few at a time; None without cameras."""
        return ArrayFrames(self.images) if isinstance(self.images, np.ndarray) else self.images

    def _check_images(self, spec: DataSpec) -> None:
        size = (len(spec.cameras), 3, *spec.image_size)
        expected = (len(self.actions), *size) if spec.cameras else None
        given = None if self.images is None else tuple(self.images.shape)
        dtype = self.images.dtype if isinstance(self.images, np.ndarray) else np.dtype(np.uint8)
        if given != expected or dtype != np.uint8:
            raise ValueError(f"episode {self.id}: images are {given} {dtype}, not {expected} uint8")
