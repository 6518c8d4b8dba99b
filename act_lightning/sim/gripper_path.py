"""Where a chunk of actions leads the grippers of the ALOHA scenes, and where a camera sees that."""

from __future__ import annotations

import mujoco
import numpy as np
from numpy.typing import NDArray

from act_lightning.sim.kinematics import Arms, Array

_NEAREST = 0.01  # in front of a camera, in m; what is nearer or behind it is not seen


def pinch_paths(model: mujoco.MjModel, chunk: NDArray[np.floating]) -> list[Array]:
    """Where the pinch points would be if the commanded joint angles were reached at once.

    Args:
        model: one of gym-aloha's scenes.
        chunk: (n, 14) actions, as `AlohaEnv` takes them.

    Returns:
        (n, 3) positions in the world in m, of the left arm and of the right.
    """
    joints = np.asarray(chunk, np.float64).reshape(len(chunk), 2, 7)[..., :6]
    positions = Arms(model).pinch(joints).position
    return [positions[:, 0], positions[:, 1]]


def project(
    model: mujoco.MjModel, data: mujoco.MjData, camera: int, points: Array, size: tuple[int, int]
) -> Array:
    """Where a camera sees points of the world.

    Args:
        model: the scene.
        data: its state, kinematics computed.
        camera: id of the camera.
        points: (n, 3), m.
        size: (h, w) of the picture, in pixels.

    Returns:
        (n, 2) places as (column, row) in pixels from the picture's upper left corner, which may lie
        outside of it; NaN for points behind the camera.
    """
    rotation = data.cam_xmat[camera].reshape(3, 3)  # columns: right, up, backwards
    right, up, back = ((points - data.cam_xpos[camera]) @ rotation).T
    depth = np.where(-back > _NEAREST, -back, np.nan)
    height, width = size
    focal = height / 2 / np.tan(np.radians(model.cam_fovy[camera]) / 2)
    return np.stack([width / 2 + focal * right / depth, height / 2 - focal * up / depth], axis=-1)
