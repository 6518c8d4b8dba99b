"""A scripted demonstrator for gym_pusht's PushT: it knows how the T slides, and plans push by push.

The next push is the one that brings the T nearest to the goal for the way it takes; where each
would end is computed, not simulated (tee.py). The agent goes round the T by the shortest way, and
pushes as long as that brings the T nearer. Every action is computed from where agent and T are now;
only which push it is at is remembered.

Lengths are in px of the world's 512, positions (x, y).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import gymnasium
import numpy as np
from numpy.typing import NDArray

from act_lightning.sim.demonstrator import Demonstrator, DemonstratorConfig
from act_lightning.sim.tee import OUTLINE, Array, Pose, distance, find_pushes, mismatch

ENV_ID = "gym_pusht/PushT-v0"

_RADIUS = 15.0  # of the agent
_GAP = 8.0  # between agent and T before a push
_CLEAR = _RADIUS + 2.5  # least distance of the agent's centre from the T on the way round it
_LOW, _HIGH = 8.0, 504.0  # between the walls
_LEAD, _PUSH_LEAD = 40.0, 25.0  # of the commanded place before the agent, on the way and pushing
_ARRIVED = 5.0  # from where a push starts
_DONE = 0.3  # left of a push
_LENGTHS = np.concatenate([np.arange(0.5, 10, 0.5), np.arange(10, 40, 2), np.arange(40, 200, 8)])
_FINE_LENGTHS = np.concatenate([np.arange(0, 10, 0.25), np.arange(10, 200, 2)])
_PATIENCE = 1200.0  # way for which a push must divide the mismatch by e
_NOISE_STEPS = 5.0  # correlation time of the action noise


@dataclass(frozen=True, kw_only=True)
class PushTExpertConfig(DemonstratorConfig):
    """How the demonstrator of PushT behaves."""

    action_noise: float = 0.0
    """Standard deviation in px of the disturbance that is executed but not recorded; 0 for none."""

    def __post_init__(self) -> None:
        if not 0 <= self.action_noise <= 50:
            raise ValueError(f"expert.action_noise={self.action_noise}; give 0 to 50 px")

    def build(self, task: str) -> Demonstrator:
        """Makes the demonstrator.

        Raises:
            ValueError: `task` is not PushT.
        """
        if task.rpartition(":")[2] != ENV_ID:
            raise ValueError(f"task={task!r}: PushTExpertConfig plays {ENV_ID}")
        return PushTExpert(self)


class PushTExpert:
    """Plays PushT, whatever is observed of it; `reset`, then `act` once a control step."""

    def __init__(self, config: PushTExpertConfig) -> None:
        self.config = config
        self._pushes = find_pushes(spacing=5.0, room=_RADIUS + 3)
        self._all = np.arange(len(self._pushes.point))

    def reset(self, env: gymnasium.Env[Any, Any], seed: int) -> None:
        """Starts an episode in a freshly reset PushT.

        Args:
            env: agent and block of its `unwrapped.foreign` are read at every step.
            seed: draws the noise; worlds draw from another stream.
        """
        self._world: Any = env.unwrapped.foreign.unwrapped  # type: ignore[attr-defined]
        self._rng = np.random.default_rng([seed, 2])
        x, y, angle = self._world.goal_pose
        self._goal = Pose(np.array([x, y]), np.array(angle))
        self._noise = np.zeros(2)
        self._push: int | None = None
        self._is_pushing = False

    def act(self) -> NDArray[np.float32]:
        """The action now: (2,), the place to go to."""
        block, agent = self._world.block, np.array(self._world.agent.position)
        pose = Pose(np.array(block.position), np.array(block.angle))
        if self._push is None or (self._is_pushing and self._rest(pose, self._push) < _DONE):
            self._push, self._is_pushing = self._choose(pose, agent), False
        start = self._agent_at(pose, self._push, _GAP)
        self._is_pushing |= bool(np.linalg.norm(agent - start) < _ARRIVED)
        if self._is_pushing:
            length = min(self._rest(pose, self._push), _PUSH_LEAD)
            end = self._pushes.end(pose, self._push, np.array(length))
            return self._agent_at(end, self._push, 0.0).astype(np.float32)
        return self._way(pose, agent, start).astype(np.float32)

    def perturb(self, action: NDArray[np.float32]) -> NDArray[np.float32]:
        """What to execute instead of `action`: disturbed by smooth noise."""
        if self.config.action_noise == 0:
            return action
        keep = np.exp(-1 / _NOISE_STEPS)
        fresh = self._rng.normal(scale=self.config.action_noise, size=2)
        self._noise = keep * self._noise + np.sqrt(1 - keep**2) * fresh
        return np.clip(action + self._noise, 0.0, 512.0).astype(np.float32)

    def _agent_at(self, pose: Pose, push: Any, gap: float) -> Array:
        """Where the agent is at a push, `gap` away from touching the T."""
        return pose.place(self._pushes.point[push] - (_RADIUS + gap) * self._pushes.normal[push])

    def _rest(self, pose: Pose, push: int) -> float:
        """How much farther a push brings the T nearer to the goal."""
        ends = self._pushes.end(pose, push, _FINE_LENGTHS)
        return float(_FINE_LENGTHS[mismatch(ends, self._goal).argmin()])

    def _choose(self, pose: Pose, agent: Array) -> int:
        """Which push to make: the most is gained in proportion to the mismatch, for the way."""
        start = self._agent_at(pose, self._all, _GAP)
        ends = self._pushes.end(pose, self._all[:, None], _LENGTHS)
        corners = ends.place(OUTLINE[:, None, None])
        stop = self._agent_at(ends, self._all[:, None], 0.0)
        fits = _inside(corners, 0.0).all(axis=0) & _inside(stop, _RADIUS)
        fits &= _inside(start, _RADIUS)[:, None]
        way, _ = _routes(pose, _beside(pose, agent), pose.local(start))
        cost = np.log(1.0 + mismatch(ends, self._goal)) + way[:, None] / _PATIENCE
        return int(np.where(fits, cost, np.inf).min(axis=1).argmin())

    def _way(self, pose: Pose, agent: Array, end: Array) -> Array:
        """Where to go now, on the way round the T to `end`."""
        beside = _beside(pose, agent)
        if not np.array_equal(beside, pose.local(agent)):
            return pose.place(beside)
        _, (target,) = _routes(pose, beside, pose.local(end)[None])
        way = target - beside
        return pose.place(beside + way * min(1.0, _LEAD / max(float(np.linalg.norm(way)), 1e-9)))


def _inside(places: Array, margin: float) -> NDArray[np.bool_]:
    """Whether places (..., 2) are `margin` or more from the walls."""
    return np.asarray(((places > _LOW + margin) & (places < _HIGH - margin)).all(axis=-1))


def _beside(pose: Pose, agent: Array) -> Array:
    """(2,) The agent's place in the T's frame, or one near it that is clear of the T."""
    place = pose.local(agent)
    turns = np.linspace(0, 2 * np.pi, 24, endpoint=False)
    steps = 2.0 * np.stack([np.cos(turns), np.sin(turns)], axis=-1)
    while distance(place) < _CLEAR:
        place = place + steps[distance(place + steps).argmax()]
    return place


def _routes(pose: Pose, start: Array, ends: Array) -> tuple[Array, Array]:
    """The shortest ways round the T, all in its frame.

    Args:
        pose: where the T is, for the walls are in the world.
        start: (2,)
        ends: (E, 2)

    Returns:
        (E,) lengths, infinite where there is no way; (E, 2) the first place to go straight to.
    """
    corners = _corners()
    between = _straight(pose, corners, corners)
    np.fill_diagonal(between, 0.0)
    for i in range(len(corners)):  # Floyd and Warshall's
        between = np.minimum(between, between[:, i, None] + between[i])
    last = (between[:, :, None] + _straight(pose, corners, ends)).min(axis=1)
    first = _straight(pose, start[None], np.concatenate([corners, ends]))[0]
    by_corner = first[: len(corners), None] + last
    best = by_corner.argmin(axis=0)
    direct = first[len(corners) :]
    is_direct = direct <= by_corner.min(axis=0)
    length = np.where(is_direct, direct, by_corner.min(axis=0))
    return length, np.where(is_direct[:, None], ends, corners[best])


def _corners() -> Array:
    """(8, 2) places off the T's corners, between which the agent goes straight."""
    off = _RADIUS + _GAP
    x, y = OUTLINE.T
    away = np.stack([np.sign(x), np.where(y > 0, 1.0, -1.0)], axis=-1)
    return OUTLINE + off * away


def _straight(pose: Pose, starts: Array, ends: Array) -> Array:
    """(S, E) lengths of the straight ways, infinite where T or walls are in between."""
    share = np.linspace(0, 1, 25)[:, None]
    on_way = starts[:, None, None] * (1 - share) + ends[None, :, None] * share
    clear = (distance(on_way) >= _CLEAR).all(axis=-1)
    clear &= _inside(pose.place(on_way[:, :, [0, -1]]), _RADIUS).all(axis=-1)
    length = np.linalg.norm(starts[:, None] - ends[None], axis=-1)
    return np.where(clear, length, np.inf)
