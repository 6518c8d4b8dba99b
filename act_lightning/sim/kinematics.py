"""Closed-form kinematics of gym-aloha's ViperX arms, and the frames the demonstrators think in.

The arm is a waist, a planar two-link arm and a spherical wrist, so six joint angles follow from a
pinch pose in closed form (e.g. Siciliano et al., Robotics, section 2.12). Link lengths are read
from the MuJoCo model. This was preferred to differential inverse kinematics (mink, damped least
squares): it is exact, has no state and no step size, so that a demonstrator's action can be a
function of the present alone, and it takes 0.1 ms for both arms.

The pinch frame: origin where the finger tips meet, x forward out of the gripper, y the way the
fingers close. Rotations are (..., 3, 3) matrices, positions (..., 3) in m, angles in rad; leading
dimensions broadcast.
"""

from __future__ import annotations

from dataclasses import dataclass

import mujoco
import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

PINCH_DISTANCE = 0.15
"""From the gripper link's origin to the pinch point, in m; the finger tips end at 0.154."""


@dataclass(frozen=True, kw_only=True)
class Pose:
    """Rigid transforms: `x_world = rotation @ x_local + position`."""

    rotation: Array
    """(..., 3, 3)"""
    position: Array
    """(..., 3), m."""

    def __matmul__(self, other: Pose) -> Pose:
        return Pose(
            rotation=self.rotation @ other.rotation,
            position=self.position + (self.rotation @ other.position[..., None])[..., 0],
        )

    def inverse(self) -> Pose:
        """The transform back."""
        back = np.swapaxes(self.rotation, -1, -2)
        return Pose(rotation=back, position=-(back @ self.position[..., None])[..., 0])


def rotation_y(angle: Array | float) -> Array:
    """Rotations about y; positive tips x downwards."""
    return _rotation(1, angle)


def rotation_z(angle: Array | float) -> Array:
    """Rotations about z; positive turns x towards y."""
    return _rotation(2, angle)


def rotation_x(angle: Array | float) -> Array:
    """Rotations about x; positive turns y towards z."""
    return _rotation(0, angle)


def rotation_vector(rotation: Array) -> Array:
    """Axis times angle of rotations well below pi; (..., 3)."""
    skew = (rotation - np.swapaxes(rotation, -1, -2)) / 2
    axis = np.stack([skew[..., 2, 1], skew[..., 0, 2], skew[..., 1, 0]], -1)
    sine = np.linalg.norm(axis, axis=-1, keepdims=True)
    cosine = (np.trace(rotation, axis1=-2, axis2=-1)[..., None] - 1) / 2
    return np.asarray(axis * (np.arctan2(sine, cosine) / np.maximum(sine, 1e-9)))


def rotation_from_vector(vector: Array) -> Array:
    """The rotation of axis times angle (Rodrigues' formula); inverse of `rotation_vector`."""
    angle = np.linalg.norm(vector, axis=-1)[..., None, None]
    x, y, z = np.moveaxis(vector, -1, 0)
    zero = np.zeros_like(x)
    skew = np.stack([zero, -z, y, z, zero, -x, -y, x, zero], -1).reshape(*x.shape, 3, 3)
    first = np.sinc(angle / np.pi)
    second = np.sinc(angle / (2 * np.pi)) ** 2 / 2
    return np.asarray(np.eye(3) + first * skew + second * (skew @ skew))


def min_jerk(time: Array | float, start: Array | float, end: Array | float) -> Array:
    """Smooth step from 0 at `start` to 1 at `end`, with zero velocity and acceleration at both."""
    x = np.clip((np.asarray(time, np.float64) - start) / (np.asarray(end) - start), 0.0, 1.0)
    return np.asarray(x**3 * (10 - 15 * x + 6 * x**2))


def towards(start: Pose, end: Pose, share: Array, limits: tuple[float, float]) -> Pose:
    """Poses (2,) a share (2,) of the way from `start` to `end`, a way below `limits` (m, rad)."""
    turned = rotation_vector(np.swapaxes(start.rotation, -1, -2) @ end.rotation)
    moved = end.position - start.position
    turn = rotation_from_vector(share[..., None] * saturated(turned, limits[1]))
    return Pose(
        rotation=start.rotation @ turn,
        position=start.position + share[..., None] * saturated(moved, limits[0]),
    )


def saturated(vector: Array, limit: float) -> Array:
    """Shortens vectors smoothly, to less than `limit`."""
    length = np.linalg.norm(vector, axis=-1, keepdims=True)
    return np.asarray(vector / np.sqrt(1 + (length / limit) ** 2))


class Arms:
    """Forward and inverse kinematics of both arms; the axis before a pose's own is left, right."""

    def __init__(self, model: mujoco.MjModel) -> None:
        """Reads base poses and link lengths from a gym-aloha scene."""

        def offset(link: str) -> Array:
            return np.array(model.body(f"vx300s_left/{link}").pos)

        bases = [model.body(f"vx300s_{name}") for name in ("left", "right")]
        rotations = np.zeros((2, 9))
        for rotation, base in zip(rotations, bases, strict=True):
            mujoco.mju_quat2Mat(rotation, base.quat)
        shoulder = offset("shoulder_link") + offset("upper_arm_link")
        self.base = Pose(
            rotation=rotations.reshape(2, 3, 3),
            position=np.stack([base.pos for base in bases]) + shoulder,
        )
        upper = offset("upper_forearm_link")
        self._upper_length = float(np.hypot(upper[0], upper[2]))
        self._upper_angle = float(np.arctan2(upper[2], upper[0]))
        self._fore_length = float((offset("lower_forearm_link") + offset("wrist_link"))[0])
        self._hand_length = float(offset("gripper_link")[0]) + PINCH_DISTANCE

    def solve(self, pinch: Pose, wrist_sign: Array | float) -> Array:
        """Joint angles that bring the pinch frame to a pose, elbow up.

        Args:
            pinch: where the pinch frame is to be, in the world; out of reach: as far as it goes.
            wrist_sign: sign of the wrist angle, which of the wrist's two solutions to take.

        Returns:
            (..., 2, 6) waist, shoulder, elbow, forearm roll, wrist angle, wrist rotate.
        """
        local = self.base.inverse() @ pinch
        wrist = local.position - self._hand_length * local.rotation[..., :, 0]
        waist = np.arctan2(wrist[..., 1], wrist[..., 0])
        reach, height = np.hypot(wrist[..., 0], wrist[..., 1]), wrist[..., 2]
        shoulder, forearm = self._planar(reach, height)
        turn = rotation_z(waist) @ rotation_y(forearm)
        hand = np.swapaxes(turn, -1, -2) @ local.rotation
        sign = np.sign(wrist_sign)
        roll = np.arctan2(sign * hand[..., 1, 0], -sign * hand[..., 2, 0])
        angle = sign * np.arccos(np.clip(hand[..., 0, 0], -1.0, 1.0))
        rotate = np.arctan2(sign * hand[..., 0, 1], sign * hand[..., 0, 2])
        return np.stack([waist, shoulder, forearm - shoulder, roll, angle, rotate], -1)

    def pinch(self, joints: Array) -> Pose:
        """Forward kinematics: the pinch frame in the world at joint angles (..., 2, 6)."""
        waist, shoulder, elbow, roll, angle, rotate = np.moveaxis(joints, -1, 0)
        turn = rotation_z(waist) @ rotation_y(shoulder + elbow)
        elevation = self._upper_angle - shoulder
        reach = self._upper_length * np.cos(elevation) + self._fore_length * np.cos(
            shoulder + elbow
        )
        height = self._upper_length * np.sin(elevation) - self._fore_length * np.sin(
            shoulder + elbow
        )
        wrist = np.stack([reach * np.cos(waist), reach * np.sin(waist), height], -1)
        hand = turn @ rotation_x(roll) @ rotation_y(angle) @ rotation_x(rotate)
        return self.base @ Pose(rotation=hand, position=wrist + self._hand_length * hand[..., :, 0])

    def _planar(self, reach: Array, height: Array) -> tuple[Array, Array]:
        """Shoulder angle, and the forearm's pitch below the horizontal, of the two-link arm."""
        upper, fore = self._upper_length, self._fore_length
        distance = np.clip(np.hypot(reach, height), abs(upper - fore) + 1e-6, upper + fore - 1e-6)
        elevation = np.arctan2(height, reach)
        rise = np.arccos((upper**2 + distance**2 - fore**2) / (2 * upper * distance))
        fall = np.arccos((fore**2 + distance**2 - upper**2) / (2 * fore * distance))
        return self._upper_angle - elevation - rise, fall - elevation


def _rotation(axis: int, angle: Array | float) -> Array:
    angle = np.asarray(angle, np.float64)
    i, j = (axis + 1) % 3, (axis + 2) % 3
    rotation = np.zeros((*angle.shape, 3, 3))
    rotation[..., axis, axis] = 1.0
    rotation[..., i, i] = rotation[..., j, j] = np.cos(angle)
    rotation[..., j, i] = np.sin(angle)
    rotation[..., i, j] = -rotation[..., j, i]
    return rotation
