"""Which environment to make: the settings, checked before anything is loaded."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

Quality = Literal["fast", "full"]
Range = tuple[float, float]

OBJECT_RANGES: dict[str, dict[str, tuple[Range, Range]]] = {
    "insertion": {"peg": ((0.1, 0.2), (0.4, 0.6)), "socket": ((-0.2, -0.1), (0.4, 0.6))},
    "transfer_cube": {"cube": ((0.0, 0.2), (0.4, 0.6))},
}
"""gym-aloha's ((x0, x1), (y0, y1)) in m of each task's objects, in the order of `env_state`."""


@dataclass(frozen=True, kw_only=True)
class EnvConfig:
    """Which world to simulate, and what to observe of it."""

    task: str = "insertion"
    """`insertion`, `transfer_cube`, or any gymnasium id (`module:id` imports `module` first)."""
    cameras: tuple[str, ...] = ()
    """Cameras to render, in the order of the N axis of `images`; none: nothing is rendered."""
    image_size: tuple[int, int] = (120, 160)
    """(H, W) of every camera image, in pixels."""
    render_quality: Quality = "fast"
    """fast: no shadows, antialiased by supersampling; full: the same pixels as gym-aloha's."""
    max_episode_steps: int = 300
    """Control steps after which an episode is truncated."""
    env_state: bool = True
    """Whether observations hold the object poses."""
    object_ranges: dict[str, tuple[Range, Range]] | None = None
    """((x0, x1), (y0, y1)) in m by object (peg, socket; cube); those left out keep gym-aloha's."""
    object_yaw: float = 0.0
    """Objects are turned about the vertical by up to this either way, in rad; gym-aloha's is 0."""
    observation_keys: dict[str, str] = field(default_factory=dict)
    """For other gymnasium ids: where in their observation `qpos`, `env_state` and each
    `images.<camera>` are, as keys joined by `.` or `/`; empty: the observation itself."""
    success_key: str = "is_success"
    """For other ids: the key of `info` that says success; or `terminated`, or `truncated`."""
    make_kwargs: dict[str, Any] = field(default_factory=dict)
    """For other ids: further arguments of `gymnasium.make`."""

    @property
    def is_aloha(self) -> bool:
        """Whether `task` is one of the two ALOHA tasks simulated here."""
        return self.task in OBJECT_RANGES

    def __post_init__(self) -> None:
        if not self.is_aloha and "qpos" not in self.observation_keys:
            raise ValueError(
                f"EnvConfig: task={self.task!r} is none of {', '.join(OBJECT_RANGES)}; for "
                "another gymnasium id say in observation_keys where its observation holds `qpos`"
            )
        if self.is_aloha and (self.observation_keys or self.make_kwargs):
            raise ValueError(
                "EnvConfig: observation_keys and make_kwargs are for other gymnasium ids, "
                f"not for {self.task}"
            )
        if self.max_episode_steps < 1:
            raise ValueError(
                f"EnvConfig: max_episode_steps={self.max_episode_steps}; give 1 or more"
            )
        if min(self.image_size) < 1:
            raise ValueError(f"EnvConfig: image_size={self.image_size}; give (H, W) in pixels")
        if self.render_quality not in ("fast", "full"):
            raise ValueError(
                f"EnvConfig: render_quality={self.render_quality!r}; give fast or full"
            )
        if len(set(self.cameras)) < len(self.cameras):
            raise ValueError(f"EnvConfig: cameras={self.cameras} names one twice")
        self._check_objects()

    def _check_objects(self) -> None:
        if not 0 <= self.object_yaw <= math.pi:
            raise ValueError(f"EnvConfig: object_yaw={self.object_yaw}; give 0 to pi, in rad")
        if not self.is_aloha and (self.object_ranges or self.object_yaw):
            raise ValueError("EnvConfig: object_ranges and object_yaw are for the ALOHA tasks only")
        known = OBJECT_RANGES.get(self.task, {})
        for name, ranges in (self.object_ranges or {}).items():
            if name not in known:
                raise ValueError(
                    f"EnvConfig: object_ranges names {name!r}; {self.task} has {', '.join(known)}"
                )
            if any(low > high for low, high in ranges):
                raise ValueError(
                    f"EnvConfig: object_ranges[{name!r}]={ranges}; give (low, high), low first"
                )
