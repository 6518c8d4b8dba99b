"""What the scripted demonstrators want: pinch poses and grippers over time.

A plan is a smooth function of (time, object poses, achieved pinch poses), made of minimum-jerk
blends (Flash and Hogan 1985) between waypoints. Objects are followed where it matters:
- until its gripper closes, an arm aims at where its object is now; then that place is kept;
- while an object is carried, the pinch pose is corrected by how the object lies in the hand, so
  that neither the grasp nor a slip decides about success;
- the peg follows the socket's actual pose, and the receiving hand the cube's.

Times are in steps of a 300-step episode, positions in m. Shapes: T times, 2 arms (left, right).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from act_lightning.sim.kinematics import (
    Array,
    Pose,
    min_jerk,
    rotation_from_vector,
    rotation_vector,
    rotation_y,
    rotation_z,
    saturated,
    towards,
)

NOMINAL_STEPS = 300
LEFT, RIGHT = 0, 1

_OPEN, _CLOSED = 0.9, 0.0
_START_GRIPPER = 0.1
_TO_OTHER_ARM = np.array([[1.0, 0.0, 0.0], [-1.0, 0.0, 0.0]])
_FACING = np.array([0.0, np.pi])
_FOLLOW = 0.08  # share of a change of the grasp that is noticed in a step
_PITCH = 1.2  # rad; at 1.0 the wrist is nearly singular over the near corners of the table


@dataclass(frozen=True, kw_only=True)
class Style:
    """What distinguishes one demonstration from another of the same world."""

    delay: Array
    """(2,) steps by which each arm starts late."""
    height: Array
    """(2,) m above the object from which each arm descends."""
    offset: Array
    """(2,) m along the object by which each grasp is off its usual place."""
    pause: float
    """Steps between lifting and bringing together."""
    meeting_height: float
    """z of the meeting point, m."""
    tempo: float
    """Speed of the timetable, 1 as planned."""


PLAIN = Style(
    delay=np.zeros(2),
    height=np.full(2, 0.1),
    offset=np.zeros(2),
    pause=0.0,
    meeting_height=0.18,
    tempo=1.0,
)


def sample_style(rng: np.random.Generator) -> Style:
    """Draws a style: one arm, left or right, starts late; everything else varies evenly."""
    delay = np.zeros(2)
    delay[rng.integers(2)] = rng.uniform(0.0, 20.0)
    return Style(
        delay=delay,
        height=rng.uniform(0.07, 0.13, 2),
        offset=rng.uniform(-0.008, 0.008, 2),
        pause=rng.uniform(0.0, 10.0),
        meeting_height=rng.uniform(0.15, 0.21),
        tempo=rng.uniform(0.97, 1.1),
    )


@dataclass(frozen=True, kw_only=True)
class World:
    """What the plan looks at."""

    objects: Pose
    """(2,) the object of each arm, turned by its symmetry so that its yaw is the smallest."""
    pinch: Pose
    """(2,) achieved pinch poses."""


class Plan:
    """Both arms' timetable for one episode; subclasses say where to carry what."""

    object_joints: ClassVar[tuple[str, str]]
    """Free joint of the object each arm handles."""
    symmetry: ClassVar[int]
    """How many times an object repeats itself in a turn about the vertical."""
    wrist_sign: ClassVar[Array]
    """(2,) sign of each arm's wrist angle."""

    _grasp: Pose
    _close: tuple[Array, Array]

    def __init__(self, style: Style) -> None:
        self.style = style
        self._reference: Pose | None = None
        self._seen: Pose | None = None

    def grippers(self, time: float) -> Array:
        """(2,) commands in [0, 1]."""
        raise NotImplementedError

    def leaving_home(self, times: Array) -> Array:
        """(T, 2) from 0, at the start pose, to 1, on the way given by `pinch`."""
        raise NotImplementedError

    def pinch(self, times: Array, now: float, world: World) -> Pose:
        """(T, 2) pinch poses wanted at `times`, given the world at time `now`."""
        raise NotImplementedError

    def misalignment(self, now: float, world: World) -> float:
        """How far off the objects are for what is being done, in m; 0 if that does not matter."""
        raise NotImplementedError

    def precision(self, now: float) -> float:
        """From 0, moving freely, to 1, where a centimetre decides about success."""
        raise NotImplementedError

    def load(self, now: float) -> float:
        """From 0, with empty hands, to 1, once a hand holds something."""
        return float(min_jerk(now, *self._close).max())

    def _held(self, world: World, trust: Array, pushing: float = 0.0) -> Pose:
        """How the objects lie in the hands (2,): as intended, or by `trust` (2,) as seen.

        What is seen is low-passed over a quarter of a second, because a hand that chases a
        slipping object at once shakes it off. That and the place of the grasp are all a plan
        remembers; both stay constant in an undisturbed episode. While `pushing` (0 to 1), slipping
        along the object is let be: a hand that made up for it would creep on against resistance.
        """
        seen = world.objects.inverse() @ world.pinch
        start = self._grasp if self._seen is None else self._seen
        seen.position[:, 0] -= pushing * (seen.position[:, 0] - start.position[:, 0])
        share = np.where(trust > 0, _FOLLOW, 0.0)
        self._seen = towards(start, seen, share, (0.02, 0.3))
        return towards(self._grasp, self._seen, trust, (0.03, 0.4))

    def _following(self, now: float, close: Array, target: Pose) -> Pose:
        """`target` (2,), but what it was when the gripper began to close, once it did."""
        kept = self._reference
        if kept is not None:
            closing = now >= close
            target = Pose(
                rotation=np.where(closing[:, None, None], kept.rotation, target.rotation),
                position=np.where(closing[:, None], kept.position, target.position),
            )
        self._reference = target
        return target


class InsertionPlan(Plan):
    """The left arm takes the socket, the right arm the peg; they meet in the air and push.

    The pin's end is 0.04 m from the socket's centre and the peg's 0.06 m from its own.
    """

    object_joints = ("blue_socket_joint", "red_peg_joint")
    symmetry = 2
    wrist_sign = np.ones(2)

    _rest_height = np.array([0.022, 0.010])
    _grasp_position = np.array([[-0.005, 0.0, -0.006], [0.005, 0.0, 0.001]])
    _half_gap = 0.1  # from either object's centre to the meeting point before the push
    _depth = 0.053  # pushed by either arm: 3 mm beyond contact with the pin

    def __init__(self, style: Style) -> None:
        super().__init__(style)
        late = style.delay
        self._home = (late, late + 75)
        self._descend = (late + 60, late + 110)
        self._close = (late + 110, late + 125)
        self._lift = (late + 125, late + 165)
        self._move = (late + 130 + style.pause, late + 195 + style.pause)
        last = float(self._move[1].max())
        self._push = (last - 10, last + 50)
        grasp = self._grasp_position.copy()
        grasp[:, 0] += style.offset
        self._grasp = Pose(rotation=rotation_z(_FACING) @ rotation_y(_PITCH), position=grasp)
        middle = np.array([0.0, 0.5, style.meeting_height])
        self._meeting = middle - self._half_gap * _TO_OTHER_ARM

    def grippers(self, time: float) -> Array:
        """See `Plan`."""
        opened = _START_GRIPPER + (_OPEN - _START_GRIPPER) * min_jerk(time, *self._home)
        return opened + (_CLOSED - opened) * min_jerk(time, *self._close)

    def leaving_home(self, times: Array) -> Array:
        """See `Plan`."""
        return min_jerk(times[:, None], *self._home)

    def pinch(self, times: Array, now: float, world: World) -> Pose:
        """See `Plan`."""
        reference = self._following(
            now, self._close[0], _on_table(world.objects, self._rest_height)
        )
        here, carried = self._carried(np.array([now]), reference), self._carried(times, reference)
        meeting = float(min_jerk(now, self._move[0].max(), self._push[0] + 5))
        _follow(carried, here, world.objects, meeting)
        trust = min_jerk(now, self._lift[0], self._move[1])
        pushing = float(min_jerk(now, self._push[0] + 10, self._push[0] + 30))
        target = carried @ self._held(world, trust, pushing)
        above = self.style.height * (1 - min_jerk(times[:, None], *self._descend))
        target.position[..., 2] += above
        return target

    def misalignment(self, now: float, world: World) -> float:
        """See `Plan`."""
        socket, peg = world.objects.position
        turned = world.objects.rotation[LEFT].T @ world.objects.rotation[RIGHT]
        off = np.hypot(*(peg - socket)[1:]) + 0.06 * np.linalg.norm(rotation_vector(turned))
        return float(off * min_jerk(now, self._push[0], self._push[0] + 20))

    def precision(self, now: float) -> float:
        """See `Plan`."""
        grasping = min_jerk(now, self._descend[0] + 15, self._descend[0] + 35)
        grasping = grasping * (1 - min_jerk(now, *self._lift))
        pushing = min_jerk(now, self._push[0], self._push[0] + 20)
        return float(np.maximum(grasping.max(), pushing))

    def _carried(self, times: Array, start: Pose) -> Pose:
        """(T, 2) where the objects are to be, from the table to the pin."""
        times = times[:, None]
        move, lift = min_jerk(times, *self._move), min_jerk(times, *self._lift)
        way = (self._meeting - start.position) * np.stack([move, move, lift], -1)
        push = _TO_OTHER_ARM * self._depth * min_jerk(times, *self._push)[..., None]
        return Pose(
            rotation=rotation_z(_yaw(start.rotation) * (1 - move)),
            position=start.position + way + push,
        )


class TransferCubePlan(Plan):
    """The right arm lifts the cube, the left arm takes it in the air, the right arm withdraws.

    The hands meet at a right angle, from above and from the side, so that the fingers keep apart.
    """

    object_joints = ("red_box_joint", "red_box_joint")
    symmetry = 4
    wrist_sign = np.array([-1.0, 1.0])

    _grasp_position = np.array([[-0.009, 0.0, -0.006], [0.008, 0.0, 0.004]])
    _grasp_pitch = np.array([0.05, _PITCH])
    _back_off = 0.12  # where the left hand waits, before the cube

    def __init__(self, style: Style) -> None:
        super().__init__(style)
        late, delay = style.delay[RIGHT], style.delay[LEFT]
        self._home = (np.array([delay, late]), np.array([delay + 130, late + 75]))
        self._descend = (late + 60, late + 110)
        carry = late + 130 + style.pause
        self._lift, self._move = (late + 125, late + 170), (carry, carry + 60)
        self._reach = (carry + 45, carry + 95)
        taken = carry + 90
        self._close = (np.array([taken, late + 110]), np.array([taken + 15, late + 125]))
        self._release, self._withdraw = (taken + 25, taken + 35), (taken + 35, taken + 65)
        grasp = self._grasp_position.copy()
        grasp[RIGHT, 0] += style.offset[RIGHT] / 4
        self._grasp = Pose(
            rotation=rotation_z(_FACING) @ rotation_y(self._grasp_pitch), position=grasp
        )
        self._meeting = np.array([0.0, 0.5, style.meeting_height + 0.04])

    def grippers(self, time: float) -> Array:
        """See `Plan`."""
        start, end = self._home
        opened = _START_GRIPPER + (_OPEN - _START_GRIPPER) * min_jerk(time, start, end)
        command = opened + (_CLOSED - opened) * min_jerk(time, *self._close)
        command[RIGHT] += (_OPEN - _CLOSED) * min_jerk(time, *self._release)
        return command

    def leaving_home(self, times: Array) -> Array:
        """See `Plan`."""
        return min_jerk(times[:, None], *self._home)

    def pinch(self, times: Array, now: float, world: World) -> Pose:
        """See `Plan`."""
        objects = world.objects
        aim = _on_table(objects, np.full(2, 0.02))
        aim.position[LEFT], aim.rotation[LEFT] = objects.position[LEFT], objects.rotation[LEFT]
        reference = self._following(now, self._close[0], aim)
        carried = self._carried(times, reference)
        trust = min_jerk(now, self._lift[0], self._move[1]) * (1 - min_jerk(now, *self._release))
        target = carried @ self._held(world, np.array([0.0, float(trust)]))
        target.position[:, RIGHT, 2] += self.style.height[RIGHT] * (
            1 - min_jerk(times, *self._descend)
        )
        target.position[:, LEFT, 0] -= self._back_off * (1 - min_jerk(times, *self._reach))
        away = min_jerk(times, *self._withdraw)[:, None]
        target.position[:, RIGHT] += away * np.array([0.06, 0.0, 0.1])
        return target

    def misalignment(self, now: float, world: World) -> float:
        """See `Plan`."""
        return 0.0

    def precision(self, now: float) -> float:
        """See `Plan`."""
        grasping = min_jerk(now, self._descend[0] + 15, self._descend[0] + 35)
        grasping = grasping * (1 - min_jerk(now, *self._lift))
        taking = min_jerk(now, self._reach[0] + 15, self._reach[0] + 35)
        return float(max(grasping, taking * (1 - min_jerk(now, *self._release))))

    def _carried(self, times: Array, start: Pose) -> Pose:
        """(T, 2) where either hand expects the cube; the left one waits at the meeting point."""
        times = times[:, None]
        move, lift = min_jerk(times, *self._move), min_jerk(times, *self._lift)
        seen = min_jerk(times, self._reach[0], self._reach[0] + 30)
        share = np.concatenate(
            [np.stack([1 - seen] * 3, -1), np.stack([move, move, lift], -1)], axis=1
        )
        turn = np.concatenate([seen, 1 - move], axis=1)
        upright = rotation_z(_yaw(start.rotation) * turn)
        return Pose(
            rotation=upright, position=start.position + (self._meeting - start.position) * share
        )


def _yaw(rotation: Array) -> Array:
    return np.arctan2(rotation[..., 1, 0], rotation[..., 0, 0])


def _on_table(objects: Pose, height: Array) -> Pose:
    """Objects where they are, upright and at rest (they fall at the start of an episode)."""
    position = objects.position.copy()
    position[:, 2] = height
    return Pose(rotation=rotation_z(_yaw(objects.rotation)), position=position)


def _follow(carried: Pose, here: Pose, objects: Pose, share: float) -> None:
    """Moves the peg's way (in place) by a share of how far the socket is off its own."""
    off = objects.position[LEFT] - here.position[0, LEFT]
    turned = rotation_vector(here.rotation[0, LEFT].T @ objects.rotation[LEFT])
    carried.position[:, RIGHT] += share * saturated(off, 0.03)
    carried.rotation[:, RIGHT] = carried.rotation[:, RIGHT] @ rotation_from_vector(
        share * saturated(turned, 0.3)
    )
