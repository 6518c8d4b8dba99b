"""Which environment to make: the settings, checked before anything is loaded."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

Quality = Literal["fast", "full"]
Range = tuple[float, float]

OBJECT_RANGES: dict[str, dict[str, tuple[Range, Range]]] = {
    "insertion": {"peg": ((0.1, 0.2), (0.4, 0.6)), "socket": ((-0.2, -0.1), (0.4, 0.6))},
    "transfer_cube": {"cube": ((0.0, 0.2), (0.4, 0.6))},
}
"""gym-aloha's ((x0, x1), (y0, y1)) in m of each task's objects, in the order of `env_state`."""
GRIPPERS = [6, 13]
"""The values of an ALOHA action and of its `qpos` that are gripper openings; the others are rad."""

FIRST_EVALUATION_SEED = 1_000_000
"""Seeds from here on are worlds that no demonstration ever shows."""
FIRST_VALIDATION_SEED = 2_000_000
"""Worlds played while training, which choose the checkpoint, and so must not also grade it."""

_TABLE = ((-0.6, 0.6), (0.22, 0.98))  # x and y in m
_MAX_DELAY = 50


@dataclass(frozen=True, kw_only=True)
class Perturbation:
    """How a world differs from the nominal one; drawn from its seed, so it is one world for all."""

    camera_shift: float = 0.0
    """Each camera is moved by up to this along each axis, in m; ALOHA tasks only."""
    camera_turn: float = 0.0
    """Each camera is turned by up to this about each of its axes, in rad; ALOHA tasks only."""
    light: float = 0.0
    """Each light's brightness is scaled by a factor from 1 - light to 1 + light, and its direction
    turned by up to this about each axis, in rad; ALOHA tasks only."""
    action_delay: int = 0
    """Control steps before an action takes effect. Until the first one does, the arms hold their
    start pose; other gymnasium ids, which have no such pose, get the first action at once."""
    qpos_noise: float = 0.0
    """Standard deviation of what is added to every observed `qpos`, in its own unit (rad)."""
    env_state_noise: float = 0.0
    """Standard deviation of what is added to observed object positions, in m; orientations stay.
    For other gymnasium ids: to all of `env_state`."""
    image_noise: float = 0.0
    """Standard deviation of what is added to every value of a camera image, in grey levels of
    255."""

    def __post_init__(self) -> None:
        for entry in fields(self):
            value = getattr(self, entry.name)
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"perturbation.{entry.name}={value}; give 0 or more")
        if self.camera_turn > math.pi:
            raise ValueError(
                f"perturbation.camera_turn={self.camera_turn}; give at most pi: it is in rad"
            )
        if self.light > 1:
            raise ValueError(
                f"perturbation.light={self.light}; give at most 1: lights cannot be darker than off"
            )
        if not isinstance(self.action_delay, int) or self.action_delay > _MAX_DELAY:
            raise ValueError(
                f"perturbation.action_delay={self.action_delay}; give whole control steps, "
                f"at most {_MAX_DELAY}"
            )

    @property
    def changes_scene(self) -> bool:
        """Whether cameras or lights are changed, which only scenes of ours can be."""
        return max(self.camera_shift, self.camera_turn, self.light) > 0


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
    object_beyond: float = 0.0
    """Objects stand outside their ranges, by up to this along an axis, in m; 0: inside them."""
    object_grid: int = 0
    """n: objects stand at the centres of n x n cells of their ranges, each cell once in n * n
    consecutive worlds; 0: anywhere in their ranges."""
    perturbation: Perturbation = field(default_factory=Perturbation)
    """How cameras, lights, the action's delay and observations differ from the nominal world."""
    action_margin: float | None = 0.25
    """Share of the range of an action's bounds by which a policy may exceed them. Within it its
    actions are clipped; beyond it a rollout stops the episode as failed. null: never."""
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
        if self.action_margin is not None and not self.action_margin >= 0:
            raise ValueError(
                f"EnvConfig: action_margin={self.action_margin}; give a share of the range, 0 or "
                "more, or null for no limit"
            )
        if not self.is_aloha and self.perturbation.changes_scene:
            raise ValueError(
                f"EnvConfig: {self.task} cannot move its cameras and lights; set "
                "perturbation.camera_shift, camera_turn and light to 0"
            )
        self._check_objects()

    def recorded(self) -> dict[str, Any]:
        """The fields that decide what a demonstration holds, as a store keeps and compares them.

        Fields younger than the first stores are left out at their defaults, so that those stores
        still count as recorded with the same settings.
        """
        kept = asdict(self)
        del kept["action_margin"]  # A matter of rollouts.
        for name, default in _LATER_FIELDS.items():
            if getattr(self, name) == default:
                del kept[name]
        return kept

    def _check_objects(self) -> None:
        if not 0 <= self.object_yaw <= math.pi:
            raise ValueError(f"EnvConfig: object_yaw={self.object_yaw}; give 0 to pi, in rad")
        if not 0 <= self.object_beyond <= 1:
            raise ValueError(f"EnvConfig: object_beyond={self.object_beyond}; give 0 to 1, in m")
        if self.object_grid < 0:
            raise ValueError(f"EnvConfig: object_grid={self.object_grid}; give 0 (none) or more")
        if self.object_beyond and self.object_grid:
            raise ValueError(
                "EnvConfig: object_beyond and object_grid exclude each other; set one to 0"
            )
        moved = ("object_ranges", "object_yaw", "object_beyond", "object_grid")
        if not self.is_aloha and (given := [name for name in moved if getattr(self, name)]):
            raise ValueError(f"EnvConfig: {', '.join(given)}: for the ALOHA tasks only")
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
        for name, ranges in (known | (self.object_ranges or {})).items():
            self._check_range(name, ranges)

    def _check_range(self, name: str, ranges: tuple[Range, Range]) -> None:
        if self.object_grid and any(low == high for low, high in ranges):
            raise ValueError(
                f"EnvConfig: object_grid={self.object_grid} has no cells in "
                f"object_ranges[{name!r}]={ranges}; give ranges that are not points"
            )
        reach = [(low - self.object_beyond, high + self.object_beyond) for low, high in ranges]
        if self.object_beyond and any(
            low < edges[0] or high > edges[1]
            for (low, high), edges in zip(reach, _TABLE, strict=True)
        ):
            raise ValueError(
                f"EnvConfig: object_beyond={self.object_beyond} takes {name} from {ranges} off the "
                f"table, whose edges are at {_TABLE}; give less"
            )


_LATER_FIELDS: dict[str, Any] = {
    "object_beyond": 0.0,
    "object_grid": 0,
    "perturbation": Perturbation(),
}
"""Fields of `EnvConfig` that the first stores do not know, and their defaults."""
