"""Films an episode: small pictures at regular times, with what the policy plans written over them.

Runs in the simulator's process and is free of torch. What is filmed is the environment's `picture`
at the size asked for, or else what it renders, shrunk.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import gymnasium
import numpy as np
from numpy.typing import NDArray

from act_lightning.sim.overlay import draw_overlay


class Film(NamedTuple):
    """How to film an episode."""

    interval: int = 30
    """Control steps between two frames."""
    size: tuple[int, int] = (120, 160)
    """(h, w) of a frame in pixels; at most, for environments that choose their size."""
    overlay: bool = False
    """Write step and stage into the frames, and draw the predicted chunk as the gripper's path."""


class Filmer:
    """Films one episode of a freshly reset environment, whose first frame it takes at once.

    Args:
        env: the environment. Of `env.unwrapped` it uses, if they are there, `picture(size)`,
            `stages`, `is_success` and `path_in_picture(chunk, size)`.
        film: how to film it.
    """

    def __init__(self, env: gymnasium.Env[Any, Any], film: Film) -> None:
        self._env = env
        self._world: Any = env.unwrapped
        self._film = film
        self._num_steps = 0
        self._reward = 0.0
        self._max_reward = 0.0
        self._chunk: NDArray[np.float32] | None = None
        self._chunk_start = 0
        self._frames: list[NDArray[np.uint8]] = []
        # A picture and its text wait until the plan for the coming step is there, to be drawn too.
        self._waiting: tuple[NDArray[np.uint8], str] | None = self._shoot()

    def plan(self, chunk: NDArray[np.float32]) -> None:
        """Takes note of the newest predicted chunk (K, A), which begins with the coming step."""
        self._chunk, self._chunk_start = chunk, self._num_steps

    def step(self, num_steps: int, reward: float) -> None:
        """Takes a frame if one is due after `num_steps` control steps, the last with `reward`."""
        self._finish_frame()
        self._count(num_steps, reward)
        if num_steps % self._film.interval == 0:
            self._waiting = self._shoot()

    def end(self, num_steps: int, reward: float) -> None:
        """Takes the last frame, unless `step` took it; num_steps and reward as there."""
        if num_steps != self._num_steps:
            self._finish_frame()
        self._count(num_steps, reward)
        if self._waiting is None:
            self._waiting = self._shoot()
        self._finish_frame()

    @property
    def frames(self) -> NDArray[np.uint8]:
        """(F, 3, h, w) pictures so far."""
        self._finish_frame()
        return np.stack(self._frames).transpose(0, 3, 1, 2)

    def _count(self, num_steps: int, reward: float) -> None:
        self._num_steps, self._reward = num_steps, reward
        self._max_reward = max(self._max_reward, reward)

    def _shoot(self) -> tuple[NDArray[np.uint8], str]:
        text = describe_progress(self._world, self._num_steps, self._reward, self._max_reward)
        return self._picture(), text

    def _finish_frame(self) -> None:
        if self._waiting is None:
            return
        (image, text), self._waiting = self._waiting, None
        if self._film.overlay:
            image = draw_overlay(image, text, self._paths(image.shape[:2]))
        self._frames.append(image)

    def _paths(self, size: tuple[int, int]) -> list[NDArray[np.float64]]:
        if self._chunk is None or not hasattr(self._world, "path_in_picture"):
            return []
        ahead = self._chunk[self._num_steps - self._chunk_start :]
        paths: list[NDArray[np.float64]] = self._world.path_in_picture(ahead, size)
        return paths

    def _picture(self) -> NDArray[np.uint8]:
        """What a spectator sees, (h, w, 3)."""
        if hasattr(self._world, "picture"):  # Ours can draw small.
            image = self._world.picture(size=self._film.size)
        else:
            image = np.asarray(self._env.render())
        factor = math.ceil(max(np.divide(image.shape[:2], self._film.size)))
        height, width = image.shape[0] // factor, image.shape[1] // factor
        tiles = image[: height * factor, : width * factor].reshape(height, factor, width, factor, 3)
        shrunk: NDArray[np.uint8] = tiles.mean(axis=(1, 3)).round().astype(np.uint8)
        return shrunk


def describe_progress(world: Any, num_steps: int, reward: float, max_reward: float) -> str:
    """One line: the step, and the furthest stage so far; without stages, the last reward.

    Args:
        world: the environment, unwrapped; may have `stages` and `is_success`.
        num_steps: control steps played.
        reward: of the last step.
        max_reward: highest of the episode.
    """
    stages: tuple[str, ...] = getattr(world, "stages", ())
    if getattr(world, "is_success", False):
        state = "success"
    elif not stages:
        state = f"reward {reward:.3g}"
    else:
        reached = min(int(max_reward), len(stages))
        state = stages[reached - 1] if reached else ""
    return f"step {num_steps}  {state}".rstrip()
