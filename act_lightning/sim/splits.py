"""Held-out splits of the evaluation worlds: what no demonstration shows, one difference at a time.

The magnitudes are what a real cell meets between two days: a camera that was bumped and mounted
again, daylight, a slower control loop, worse encoders and trackers. Each split changes the world
that a run was trained on, so its results compare with those of the standard worlds seed by seed.

The scripted demonstrator solves `far` and the delays (experiments/LOG.md), so they can be solved.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from act_lightning.sim.config import EnvConfig
from act_lightning.sim.poses import object_ranges, sample_poses

STANDARD = "standard"
"""The worlds a run was trained on, unseen seeds."""

SPLITS: dict[str, str] = {
    "far": "objects up to 5 cm outside the range of the demonstrations",
    "grid": "objects on an 8 x 8 grid over that range, each cell equally often",
    "camera": "each camera moved by up to 1 cm and turned by up to 2 degrees about each axis",
    "light": "each light up to 30% brighter or darker, from up to 0.3 rad elsewhere",
    "delay_1": "actions take effect 1 control step late",
    "delay_2": "actions take effect 2 control steps late",
    "delay_3": "actions take effect 3 control steps late",
    "noise": "noise on what is observed: joints 0.003 rad, objects 2 mm, images 5 grey levels "
    "(other gymnasium ids: 0.003 and 0.002 in their own units)",
}
"""What each split changes."""

FAR = 0.05
"""How far outside their ranges objects stand at most in `far`, in m."""
GRID = 8
"""Cells along each side in `grid`: 64 in all, of which 512 worlds visit each 8 times and 200 worlds
at least 3 times. A finer grid would leave cells with one world or none."""

_PERTURBATIONS: dict[str, dict[str, Any]] = {
    "camera": {"camera_shift": 0.01, "camera_turn": float(np.radians(2))},
    "light": {"light": 0.3},
    "delay_1": {"action_delay": 1},
    "delay_2": {"action_delay": 2},
    "delay_3": {"action_delay": 3},
    "noise": {"qpos_noise": 0.003, "env_state_noise": 0.002, "image_noise": 5.0},
}


def split_env(env: EnvConfig, split: str) -> EnvConfig:
    """The worlds of a split.

    Args:
        env: the worlds of the run. A perturbation there stays, but for what the split sets.
        split: one of `SPLITS`, or `standard`.

    Raises:
        ValueError: there is no such split, or it cannot be made of this task.
    """
    if split == STANDARD:
        return env
    if split not in SPLITS:
        raise ValueError(f"split={split!r}; choose one of: {', '.join([STANDARD, *SPLITS])}")
    if not env.is_aloha and split in ("far", "grid"):
        raise ValueError(
            f"split={split!r}: {env.task} has no objects whose places are ours to choose; choose "
            f"one of: {', '.join(name for name in SPLITS if name.startswith(('delay', 'noise')))}"
        )
    if split in ("camera", "light") and not env.cameras:
        raise ValueError(f"split={split!r}: no camera is observed, so nothing would differ")
    if split == "far":
        return replace(env, object_beyond=FAR, object_grid=0)
    if split == "grid":
        return replace(env, object_beyond=0.0, object_grid=GRID)
    perturbation = replace(env.perturbation, **_PERTURBATIONS[split])
    return replace(env, perturbation=perturbation)


def object_poses(env: EnvConfig, seeds: Sequence[int]) -> dict[str, NDArray[np.float64]]:
    """Where the objects of worlds stand: (n, 2), x and y in m, by object.

    Raises:
        ValueError: the task has no objects whose places are known.
    """
    if not env.is_aloha:
        raise ValueError(f"{env.task} does not say where its objects stand")
    poses = np.stack([sample_poses(env, seed) for seed in seeds])
    return {name: poses[:, index, :2] for index, name in enumerate(object_ranges(env))}
