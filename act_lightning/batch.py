"""The contract between demonstrations, networks, simulators and robots: observation and batch.

Every reader produces these types and every network consumes them, so a key, shape, dtype or range
is decided here and nowhere else. Values are in physical units; the network normalises them itself.

Shapes: B batch, K chunk size, D qpos, A action, E env_state, N cameras, H x W pixels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # data sets are read and written without torch: it takes half a gigabyte
    import torch
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class DataSpec:
    """What one demonstration step holds; saved in the store, and in every checkpoint."""

    task: str
    """Name of the task the demonstrations show."""
    fps: float
    """Control steps a second."""
    dim_qpos: int
    """D, number of proprioceptive values."""
    dim_action: int
    """A, number of action values."""
    dim_env_state: int = 0
    """E, number of object-pose values; 0 when there are none."""
    cameras: tuple[str, ...] = ()
    """Camera names, in the order of the N axis of `images`."""
    image_size: tuple[int, int] = (0, 0)
    """(H, W) in pixels, the same for all cameras; (0, 0) without cameras."""

    def __post_init__(self) -> None:
        if self.dim_qpos < 1 or self.dim_action < 1 or self.dim_env_state < 0:
            raise ValueError(
                f"DataSpec: dim_qpos={self.dim_qpos} and dim_action={self.dim_action} must be "
                f"positive, dim_env_state={self.dim_env_state} must not be negative"
            )
        if bool(self.cameras) != (min(self.image_size) > 0):
            raise ValueError(
                f"DataSpec: cameras={self.cameras} with image_size={self.image_size}; "
                "give a size exactly when there are cameras"
            )
        if self.fps <= 0:
            raise ValueError(f"DataSpec: fps={self.fps} must be positive")


@dataclass(frozen=True, kw_only=True)
class Observation:
    """What the robot perceives at one control step, batched."""

    qpos: Tensor
    """(B, D) float32, joint positions; ALOHA: rad, and grippers in [0, 1]."""
    images: Tensor | None = None
    """(B, N, 3, H, W) uint8, cameras in the order of `DataSpec.cameras`; None without cameras."""
    env_state: Tensor | None = None
    """(B, E) float32, object poses (m, quaternion wxyz); None unless the experiment uses them."""

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Observation:
        """Copies every tensor to `device`; dtypes stay as they are."""
        return Observation(
            qpos=self.qpos.to(device, non_blocking=non_blocking),
            images=None
            if self.images is None
            else self.images.to(device, non_blocking=non_blocking),
            env_state=None
            if self.env_state is None
            else self.env_state.to(device, non_blocking=non_blocking),
        )

    def pin_memory(self) -> Observation:
        """Copies every tensor to page-locked memory, which a GPU reads asynchronously."""
        return Observation(
            qpos=self.qpos.pin_memory(),
            images=None if self.images is None else self.images.pin_memory(),
            env_state=None if self.env_state is None else self.env_state.pin_memory(),
        )

    def __len__(self) -> int:
        return len(self.qpos)


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Observations, and the chunk of actions the demonstrator took from each of them on."""

    observation: Observation
    actions: Tensor
    """(B, K, A) float32, un-normalised; steps past the episode's end repeat its last action."""
    is_pad: Tensor
    """(B, K) bool, True past the episode's end."""
    position: int | None = None
    """Place of the first sample in the order of training, or among the frames of validation,
    counted over all ranks; the others follow it. None where there is no order."""

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """Copies every tensor to `device`; dtypes stay as they are."""
        return Batch(
            observation=self.observation.to(device, non_blocking),
            actions=self.actions.to(device, non_blocking=non_blocking),
            is_pad=self.is_pad.to(device, non_blocking=non_blocking),
            position=self.position,
        )

    def pin_memory(self) -> Batch:
        """Copies every tensor to page-locked memory, which a GPU reads asynchronously."""
        return Batch(
            observation=self.observation.pin_memory(),
            actions=self.actions.pin_memory(),
            is_pad=self.is_pad.pin_memory(),
            position=self.position,
        )

    def __len__(self) -> int:
        return len(self.actions)
