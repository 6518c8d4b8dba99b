"""A scripted demonstrator for Gymnasium-Robotics' FetchReach and FetchPickAndPlace.

The arm's hand is moved by displacements, so the action is proportional to how far the hand is from
where it should be. It is a function of the newest observation alone: which part of the task is due
shows in where the object is to the hand, and in how far the fingers are apart.

Source of the observations: Gymnasium-Robotics 1.4 (MIT), envs/fetch. Lengths are in m.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import gymnasium
import numpy as np
from numpy.typing import NDArray

from act_lightning.sim.demonstrator import Demonstrator, DemonstratorConfig

_TASKS = ("FetchReach", "FetchPickAndPlace")
_FULL = 0.05  # displacement that an action of 1 asks for
_ALIGNED = 0.01  # the hand is over the object
_BETWEEN = 0.015  # the object is between the fingers
_HELD = 0.06  # the fingers' distance when they hold the object, which is 0.05 wide
_HEIGHT = 0.08  # over the object while the hand is beside it
_SLOPE = 4.0  # of the way down
_NOISE_STEPS = 5  # correlation time of the action noise


@dataclass(frozen=True, kw_only=True)
class FetchExpertConfig(DemonstratorConfig):
    """How the demonstrator of the Fetch tasks behaves."""

    gain: float = 0.4
    """Share of the way to where the hand should be that an action asks for."""
    action_noise: float = 0.0
    """Standard deviation of the disturbance of the displacement, as a share of the largest."""

    def __post_init__(self) -> None:
        if not 0 < self.gain <= 1:
            raise ValueError(f"expert.gain={self.gain}; give a share above 0, at most 1")
        if not 0 <= self.action_noise <= 1:
            raise ValueError(f"expert.action_noise={self.action_noise}; give a share from 0 to 1")

    def build(self, task: str) -> Demonstrator:
        """Makes the demonstrator.

        Raises:
            ValueError: `task` is another than FetchReach and FetchPickAndPlace.
        """
        name = task.rpartition(":")[2].partition("-")[0].removesuffix("Dense")
        if name not in _TASKS:
            raise ValueError(f"task={task!r}: FetchExpertConfig plays {' and '.join(_TASKS)}")
        return FetchExpert(self)


class FetchExpert:
    """Plays one Fetch task; `reset`, then `act` once a control step."""

    def __init__(self, config: FetchExpertConfig) -> None:
        self.config = config

    def reset(self, env: gymnasium.Env[Any, Any], seed: int) -> None:
        """Starts an episode in a freshly reset Fetch environment.

        Args:
            env: its `unwrapped.foreign_observation` is read at every step.
            seed: draws the noise; worlds draw from another stream.
        """
        self._env: Any = env.unwrapped
        self._rng = np.random.default_rng([seed, 2])
        self._noise = np.zeros(3)

    def act(self) -> NDArray[np.float32]:
        """The action now: (4,), the hand's displacement and the fingers' speed, in [-1, 1]."""
        seen = self._env.foreign_observation
        to_goal = seen["desired_goal"] - seen["achieved_goal"]
        if seen["observation"].size == 10:  # FetchReach: the hand itself is to be at the goal.
            return self._action(to_goal, fingers=0.0)
        to_object = seen["observation"][6:9]
        beside = np.linalg.norm(to_object[:2])
        if max(beside, abs(to_object[2])) > _BETWEEN:
            height = np.clip(_SLOPE * (beside - _ALIGNED), 0.0, _HEIGHT)
            return self._action(to_object + [0.0, 0.0, height], fingers=1.0)
        held = seen["observation"][9:11].sum() < _HELD
        return self._action(to_goal if held else to_object, fingers=-1.0)

    def perturb(self, action: NDArray[np.float32]) -> NDArray[np.float32]:
        """What to execute instead of `action`: the displacement disturbed, the fingers not."""
        if self.config.action_noise == 0:
            return action
        keep = np.exp(-1 / _NOISE_STEPS)
        fresh = self._rng.normal(scale=self.config.action_noise, size=3)
        self._noise = keep * self._noise + np.sqrt(1 - keep**2) * fresh
        executed = action.copy()
        executed[:3] = np.clip(executed[:3] + self._noise, -1.0, 1.0)
        return executed

    def _action(self, way: NDArray[np.float64], fingers: float) -> NDArray[np.float32]:
        displacement = np.clip(self.config.gain * way / _FULL, -1.0, 1.0)
        return np.array([*displacement, fingers], np.float32)
