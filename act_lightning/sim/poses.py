"""Where the objects of the ALOHA tasks stand: a pure function of the settings and the world's seed.

Three ways: anywhere in their ranges, drawn as gym-aloha draws; outside them (`object_beyond`); at
the centres of a grid's cells (`object_grid`).
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from act_lightning.sim.config import FIRST_EVALUATION_SEED, OBJECT_RANGES, EnvConfig, Range

CLEARANCE = 0.13
"""Least distance in m between the centres of two objects outside their ranges: the objects are
0.12 m long, and must not start inside each other."""

_HEIGHT = 0.05
_MAX_TRIES = 1000
# Of the generators that extend gym-aloha's; the demonstrator's and the perturbations' are others.
_BEYOND_STREAM, _GRID_STREAM = 11, 12


def object_ranges(config: EnvConfig) -> dict[str, tuple[Range, Range]]:
    """((x0, x1), (y0, y1)) in m of each object of an ALOHA task, in the order of `env_state`."""
    return OBJECT_RANGES[config.task] | (config.object_ranges or {})


def sample_poses(config: EnvConfig, seed: int) -> NDArray[np.float64]:
    """Object poses of the world `seed`: (objects, 7), x y z in m and a unit quaternion wxyz.

    Raises:
        ValueError: there is no such world.
    """
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed={seed}; give 0 to {2**32 - 1}")
    ranges = object_ranges(config)
    poses = np.zeros((len(ranges), 7))
    poses[:, 3] = 1
    # gym-aloha's generator and order of draws: x, y, z by object. What is ours is drawn after.
    rng = np.random.RandomState(seed)
    for pose, (x, y) in zip(poses, ranges.values(), strict=True):
        low, high = np.array([x, y, (_HEIGHT, _HEIGHT)]).T
        pose[:3] = rng.uniform(low, high)
    if config.object_yaw > 0:
        yaw = rng.uniform(-config.object_yaw, config.object_yaw, len(poses))
        poses[:, 3], poses[:, 6] = np.cos(yaw / 2), np.sin(yaw / 2)
    bounds = np.array(list(ranges.values()))
    if config.object_beyond:
        poses[:, :2] = _beyond(bounds, config.object_beyond, seed)
    elif config.object_grid:
        poses[:, :2] = _on_grid(bounds, config.object_grid, seed)
    return poses


def check_poses(config: EnvConfig, given: Any) -> NDArray[np.float64]:
    """Poses given by hand as (objects, 7), x y z in m and a unit quaternion wxyz.

    Raises:
        ValueError: their number or a quaternion is wrong.
    """
    poses = np.asarray(given, np.float64)
    expected = (len(OBJECT_RANGES[config.task]), 7)
    if poses.size != math.prod(expected):
        raise ValueError(f"object_poses has shape {poses.shape}; {config.task} needs {expected}")
    poses = poses.reshape(expected)
    if not np.allclose(np.linalg.norm(poses[:, 3:], axis=1), 1, atol=1e-3):
        raise ValueError(f"object_poses: quaternions {poses[:, 3:].tolist()} are not of length 1")
    return poses


def _beyond(bounds: NDArray[np.float64], beyond: float, seed: int) -> NDArray[np.float64]:
    """(objects, 2) places outside `bounds` (objects, 2, 2), none of them in another's way."""
    rng = np.random.default_rng([seed, _BEYOND_STREAM])
    pairs = np.triu_indices(len(bounds), 1)
    for _ in range(_MAX_TRIES):
        places = np.stack([_outside(low, high, beyond, rng) for low, high in bounds.swapaxes(1, 2)])
        apart = np.linalg.norm(places[:, None] - places, axis=-1)
        if (apart[pairs] >= CLEARANCE).all():
            return places
    raise ValueError(
        f"object_beyond={beyond}: no places found outside {bounds.tolist()} where the objects are "
        f"{CLEARANCE} m apart; give a larger object_beyond, or object_ranges farther apart"
    )


def _outside(
    low: NDArray[np.float64], high: NDArray[np.float64], beyond: float, rng: np.random.Generator
) -> NDArray[np.float64]:
    """(2,) a place drawn evenly from a frame of width `beyond` around a rectangle."""
    width, height = high - low
    # The frame is two strips beside the rectangle, of the frame's height, and two above and below.
    beside = rng.uniform(0, width + height + 2 * beyond) < height + 2 * beyond
    margin = np.array([0.0, beyond if beside else 0.0])
    place: NDArray[np.float64] = rng.uniform(low - margin, high + margin)
    axis = 0 if beside else 1
    depth = rng.uniform(-beyond, beyond)
    place[axis] = (low if depth < 0 else high)[axis] + depth
    return place


def _on_grid(bounds: NDArray[np.float64], num_cells: int, seed: int) -> NDArray[np.float64]:
    """(objects, 2) centres of cells of a grid of `num_cells` x `num_cells` over each of `bounds`.

    Worlds are counted from the first evaluation world on, in rounds of as many as there are cells.
    Each round visits every cell of every object once, in an order of its own.
    """
    turn, place = divmod(seed - FIRST_EVALUATION_SEED, num_cells**2)
    places = np.empty((len(bounds), 2))
    for index, (low, high) in enumerate(np.moveaxis(bounds, 2, 1)):
        # Rounds before the first evaluation world have negative numbers, which seed nothing.
        rng = np.random.default_rng([turn % 2**32, _GRID_STREAM, index])
        cell = np.array(divmod(int(rng.permutation(num_cells**2)[place]), num_cells))
        places[index] = low + (cell + 0.5) / num_cells * (high - low)
    return places
