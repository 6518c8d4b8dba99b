"""The T of gym_pusht's PushT: its shape, and how it slides when it is pushed.

Source of the numbers: gym-pusht 0.1 (Apache-2.0), PushTEnv.add_tee. There nothing rubs and the T
stops at once, so a push at a point of an edge goes along the edge's inner normal n, and moves the T
about its centre of mass by v = n / k and w = (r x n) / (k I), k = 1 + (r x n)^2 / I, for each px
pushed (I is the moment of inertia over the mass). That is one constant twist in the T's own frame,
so where a push of any length ends is known in closed form.

Lengths are in px of the world's 512, positions (x, y), angles in rad.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

OUTLINE: Array = np.array(
    [[-60, 0], [60, 0], [60, 30], [15, 30], [15, 120], [-15, 120], [-15, 30], [-60, 30]], np.float64
)
"""(8, 2) corners in the T's frame; an edge's inner normal is on the left of the way along it."""
MASS_CENTER: Array = np.array([0.0, 45.0])
"""(2,) in the T's frame; not the centre of the area, as the world has it."""
INERTIA = 3000.0
"""Moment of inertia about the centre of mass, over the mass, px^2."""

_BOXES = np.array([[[-60, 0], [60, 30]], [[-15, 30], [15, 120]]], np.float64)
_AREA_CENTER = np.array([0.0, 285 / 7])
_AREA_INERTIA = 1931.0  # about the centre of the area, over the area, px^2


class Pose(NamedTuple):
    """Where Ts are."""

    origin: Array
    """(..., 2), the middle of the bar's outer edge."""
    angle: Array
    """(...)"""

    def place(self, points: Array) -> Array:
        """Points (..., 2) of the T's frame in the world."""
        return self.origin + _turned(points, self.angle)

    def local(self, places: Array) -> Array:
        """Places (..., 2) of the world in the T's frame."""
        return _turned(places - self.origin, -self.angle)


class Pushes(NamedTuple):
    """Where the T can be pushed, in its own frame."""

    point: Array
    """(C, 2) on the outline."""
    normal: Array
    """(C, 2) inwards."""
    slide: Array
    """(C, 2) motion of the centre of mass for each px pushed."""
    turn: Array
    """(C,) rad for each px pushed."""

    def end(self, pose: Pose, which: Any, length: Array) -> Pose:
        """Where the T is after being pushed.

        Args:
            pose: where it is, ().
            which: index of the pushes; broadcasts against `length`.
            length: how far each is pushed.
        """
        slide, angle = self.slide[which], self.turn[which] * length
        # The integral of the rotation over the push: sinc turns along, the other across.
        along = np.sinc(angle / np.pi)
        across = np.sinc(angle / (2 * np.pi)) * np.sin(angle / 2)
        moved = np.stack(
            [
                along * slide[..., 0] - across * slide[..., 1],
                across * slide[..., 0] + along * slide[..., 1],
            ],
            axis=-1,
        )
        center = pose.place(MASS_CENTER + moved * length[..., None])
        end = pose.angle + angle
        return Pose(center - _turned(MASS_CENTER, end), end)


def find_pushes(spacing: float, room: float) -> Pushes:
    """Points all along the outline.

    Args:
        spacing: about their distance.
        room: from corners where the outline turns inwards, for what pushes.
    """
    edges = np.roll(OUTLINE, -1, axis=0) - OUTLINE
    lengths = np.linalg.norm(edges, axis=1)
    inwards_turning = _cross(np.roll(edges, 1, axis=0), edges) < 0
    margins = np.where(inwards_turning, room, 3.0)
    points, normals = [], []
    for corner, edge, length, margin, next_margin in zip(
        OUTLINE, edges, lengths, margins, np.roll(margins, -1), strict=True
    ):
        number = max(2, round((length - margin - next_margin) / spacing) + 1)
        at = np.linspace(margin, length - next_margin, number)
        points.append(corner + at[:, None] * edge / length)
        normals.append(np.tile([-edge[1], edge[0]] / length, (number, 1)))
    point, normal = np.concatenate(points), np.concatenate(normals)
    lever = _cross(point - MASS_CENTER, normal)
    mobility = 1 / (1 + lever**2 / INERTIA)
    return Pushes(point, normal, mobility[:, None] * normal, mobility * lever / INERTIA)


def distance(points: Array) -> Array:
    """Distances (...) of points (..., 2) of the T's frame from the T; negative inside."""
    center, half = _BOXES.mean(axis=1), (_BOXES[:, 1] - _BOXES[:, 0]) / 2
    off = np.abs(points[..., None, :] - center) - half
    outside = np.linalg.norm(np.maximum(off, 0.0), axis=-1)
    nearest: Array = (outside + np.minimum(off.max(axis=-1), 0.0)).min(axis=-1)
    return nearest


def mismatch(pose: Pose, goal: Pose) -> Array:
    """(...) root mean square distance of the T's points from their places at the goal."""
    off = pose.place(_AREA_CENTER) - goal.place(_AREA_CENTER)
    turned = 2 * _AREA_INERTIA * (1 - np.cos(pose.angle - goal.angle))
    return np.asarray(np.sqrt((off**2).sum(axis=-1) + turned))


def _turned(points: Array, angle: Array) -> Array:
    cos, sin = np.cos(angle), np.sin(angle)
    x, y = points[..., 0], points[..., 1]
    return np.stack([cos * x - sin * y, sin * x + cos * y], axis=-1)


def _cross(first: Array, second: Array) -> Array:
    return first[..., 0] * second[..., 1] - first[..., 1] * second[..., 0]
