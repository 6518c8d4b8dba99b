"""A blindfolded point's way round obstacles: one observation, several right sequences of actions.

             ╭── left ───╮
    start ───┤  ( obstacle )  ├─── goal        one obstacle: 2 modes; two in a row: 4
             ╰── right ──╯

The point observes the time and nothing else, so at every step before the last obstacle what it sees
goes with 2 ** n ways on. A policy that answers with their mean runs into the obstacle; one that
draws a way, as a CVAE's latent is there for, gets past. Plans must be executed whole: whoever plans
again on the way draws again.

Source: our own; the idea is Florence et al. 2021 (arXiv 2109.00137), whose policies also fail or
succeed by whether they can represent several modes. Lengths are in m.
"""

from __future__ import annotations

import itertools
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray
from PIL import Image, ImageDraw

ENV_ID = "act_lightning/Detour-v0"
NUM_STEPS = 20
"""Control steps of an episode."""
OBSTACLE_RADIUS = 0.15
"""Radius of every obstacle."""
GOAL_DISTANCE = 0.05
"""Farthest from the goal that counts as there."""

_GOAL = np.array([1.0, 0.0])
_DETOUR = 0.5  # how far a demonstrated way leads off the straight one
_NOISE = 0.015  # standard deviation of the amplitude of each of a demonstration's three waves
_PICTURE_SIZE = (120, 160)  # (h, w) pixels, 1 m = 100 pixels


def mode_paths(num_obstacles: int = 1) -> NDArray[np.float64]:
    """The ways past the obstacles, without a demonstrator's noise.

    Returns:
        (2 ** num_obstacles, NUM_STEPS, 2) positions after each step: first the way left of all
        obstacles, last the one right of all; in between as binary numbers count, right being 1 and
        the last obstacle the lowest digit.

    Raises:
        ValueError: if there are neither 1 nor 2 obstacles.
    """
    if num_obstacles not in (1, 2):
        raise ValueError(f"num_obstacles={num_obstacles}; give 1 or 2")
    x = np.arange(1, NUM_STEPS + 1) / NUM_STEPS
    off = _DETOUR * np.sin(np.pi * num_obstacles * x) ** 2
    passing = np.minimum((num_obstacles * x).astype(int), num_obstacles - 1)
    sides = np.array(list(itertools.product((1.0, -1.0), repeat=num_obstacles)))
    return np.stack([np.broadcast_to(x, (len(sides), NUM_STEPS)), off * sides[:, passing]], axis=-1)


class DetourEnv(gymnasium.Env[dict[str, Any], NDArray[Any]]):
    """The world: an action (2,) is the position to be at after the step.

    Observes `time` (1,), from 0 to 1. Reward 1 for an episode that succeeded, at its end: at the
    goal, and never inside an obstacle, between two steps neither. As in the ALOHA tasks, an episode
    that succeeded is terminated and one that failed is truncated.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 20}
    observation_space = spaces.Dict({"time": spaces.Box(0.0, 1.0, (1,), np.float32)})
    action_space = spaces.Box(
        np.array([-0.5, -1.0], np.float32), np.array([1.5, 1.0], np.float32), dtype=np.float32
    )

    def __init__(self, num_obstacles: int = 1, render_mode: str | None = None) -> None:
        mode_paths(num_obstacles)
        self.render_mode = render_mode
        centers = (np.arange(num_obstacles) + 0.5) / num_obstacles
        self._obstacles = np.stack([centers, np.zeros(num_obstacles)], axis=-1)
        self._track = [np.zeros(2)]
        self._collided = False

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
        """Puts the point at (0, 0); every seed starts the same episode."""
        super().reset(seed=seed)
        self._track = [np.zeros(2)]
        self._collided = False
        return self._observe(), {"is_success": False}

    def step(
        self, action: NDArray[Any]
    ) -> tuple[dict[str, NDArray[Any]], float, bool, bool, dict[str, Any]]:
        """Moves the point straight to `action`."""
        position = np.asarray(action, np.float64)
        distances = _distances_to_line(self._obstacles, self._track[-1], position)
        self._collided |= bool(distances.min() < OBSTACLE_RADIUS)
        self._track.append(position)
        over = len(self._track) > NUM_STEPS
        there = bool(np.linalg.norm(position - _GOAL) <= GOAL_DISTANCE)
        success = over and there and not self._collided
        info = {"is_success": success}
        return self._observe(), float(success), success, over and not success, info

    def render(self) -> NDArray[np.uint8]:
        """The obstacles and the way so far: (120, 160, 3) uint8."""
        image = Image.new("RGB", _PICTURE_SIZE[::-1], "white")
        draw = ImageDraw.Draw(image)
        for center in self._obstacles:
            corners = _pixels(center - OBSTACLE_RADIUS)[0], _pixels(center + OBSTACLE_RADIUS)[0]
            (left, bottom), (right, top) = corners
            draw.ellipse((left, top, right, bottom), fill="gray")
        for place, color in ((np.zeros(2), "green"), (_GOAL, "red")):
            ((x, y),) = _pixels(place)
            draw.ellipse((x - 3, y - 3, x + 3, y + 3), fill=color)
        draw.line(_pixels(np.stack(self._track)), fill="blue", width=2)
        return np.asarray(image)

    def path_in_picture(
        self, chunk: NDArray[np.floating], size: tuple[int, int]
    ) -> list[NDArray[np.float64]]:
        """Where a chunk of actions leads in the picture that `render` gives, scaled to `size`.

        Args:
            chunk: (n, 2) positions to be at.
            size: (h, w) pixels.

        Returns:
            One path: (n, 2) places as (column, row).
        """
        places = np.reshape(_pixels(np.asarray(chunk, np.float64)), (-1, 2))
        return [places * np.divide(size[::-1], _PICTURE_SIZE[::-1])]

    def _observe(self) -> dict[str, NDArray[Any]]:
        time = min(1.0, (len(self._track) - 1) / NUM_STEPS)
        return {"time": np.array([time], np.float32)}


class DetourExpert:
    """The demonstrator: a way drawn from the seed, each as likely.

    Args:
        varied: add smooth noise of about 0.026 m (root mean square) to the way.
    """

    def __init__(self, varied: bool) -> None:
        self._varied = varied

    def reset(self, env: gymnasium.Env[Any, Any], seed: int) -> None:
        """Chooses the way past the obstacles of a freshly reset environment.

        Args:
            env: its `unwrapped.config.make_kwargs` say how many obstacles there are.
            seed: draws the way and the noise.
        """
        paths = mode_paths(**env.unwrapped.config.make_kwargs)  # type: ignore[attr-defined]
        rng = np.random.default_rng(seed)
        path = paths[rng.integers(len(paths))]
        if self._varied:
            path = path + smooth_noise(rng)
        self._actions = iter(path.astype(np.float32))

    def act(self) -> NDArray[np.float32]:
        """The action now: (2,), the position to go to; the goal once the way has ended."""
        return next(self._actions, _GOAL.astype(np.float32))

    def perturb(self, action: NDArray[np.float32]) -> NDArray[np.float32]:
        """What to execute instead of `action`: the same, for there is nothing to recover from."""
        return action


def smooth_noise(rng: np.random.Generator) -> NDArray[np.float64]:
    """(NUM_STEPS, 2) noise of three sine waves in each direction, zero at start and goal."""
    x = np.arange(1, NUM_STEPS + 1) / NUM_STEPS
    waves = np.sin(np.pi * np.outer(x, [1, 2, 3]))
    return waves @ rng.normal(scale=_NOISE, size=(3, 2))


def _distances_to_line(
    points: NDArray[np.float64], start: NDArray[np.float64], end: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Distances of points (N, 2) from the straight line between two places."""
    along = end - start
    length = max(float(along @ along), 1e-12)
    nearest = start + np.clip((points - start) @ along / length, 0.0, 1.0)[:, None] * along
    return np.asarray(np.linalg.norm(points - nearest, axis=-1))


def _pixels(places: NDArray[np.float64]) -> list[tuple[float, float]]:
    """Places (2,) or (N, 2) as (column, row) in the picture, whose middle is (0.5, 0)."""
    return [(30 + 100 * float(x), 60 - 100 * float(y)) for x, y in np.atleast_2d(places)]
