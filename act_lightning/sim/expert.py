"""Scripted demonstrators for insertion and transfer cube, made to be imitated.

At every step a plan (plans.py) says where both hands should be now, closed-form inverse kinematics
(kinematics.py) turns that into joint angles, and a tracking law turns those into commands:

    command = wanted + lag(wanted velocity) + gravity + feedback * (wanted - achieved)

Departures from the usual scripted demonstrators (tonyzhaozh/act's waypoints, differential inverse
kinematics added up step by step), and why:
- Nothing is integrated: the action is a function of the present, so a network can learn it from an
  observation.
- Lag and gravity are compensated in advance. MuJoCo's dry friction is a soft constraint: below its
  limit it behaves like viscous damping (documentation, "Computation: friction loss"), which makes
  a joint a first-order lag whose time constant, friction and stiffness say; the joints then track
  within a milliradian and the feedback stays small.
- The timetable waits while the hands are off their way where that matters; undisturbed, never.
- `perturb` disturbs what is executed, not what is recorded: data that shows how to recover (DART,
  Laskey et al. 2017).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import gymnasium
import mujoco
import numpy as np
from gym_aloha.constants import DT, START_ARM_POSE
from numpy.typing import NDArray

from act_lightning.sim import detour
from act_lightning.sim.demonstrator import Demonstrator, DemonstratorConfig
from act_lightning.sim.kinematics import Arms, Array, Pose, rotation_vector, rotation_z
from act_lightning.sim.plans import (
    NOMINAL_STEPS,
    PLAIN,
    InsertionPlan,
    Plan,
    TransferCubePlan,
    World,
    sample_style,
)

_PLANS: dict[str, type[Plan]] = {"insertion": InsertionPlan, "transfer_cube": TransferCubePlan}
_JOINTS = np.array([[*range(6)], [*range(8, 14)]])
_HOME = np.array(START_ARM_POSE)[_JOINTS]
_MAX_LEAD = 0.3  # rad between commanded and achieved joints
_TOLERANCE = 0.006  # m off the way at which the timetable runs at half its speed
_NOISE_STEPS = 8.0  # correlation time of the action noise
_LOADED_NOISE = 0.02  # rad, most while carrying: more shakes objects off
_PRECISE_NOISE = 0.006  # rad, most where precision is needed: 3 to 4 mm at the finger tips
_BURST_STEPS = 40  # noise comes and goes in bursts of this length


@dataclass(frozen=True, kw_only=True)
class ExpertConfig(DemonstratorConfig):
    """How the demonstrator of the ALOHA tasks, or of Detour, behaves."""

    style: Literal["plain", "style"] = "plain"
    """plain: one timetable; style: timing, heights, grasps, pauses drawn from the seed. Detour: the
    way is drawn from the seed in both; style adds smooth noise to it."""
    num_steps: int = 300
    """Length of the timetable in control steps; success comes at about 80% of it. ALOHA tasks
    only: a detour takes the steps it takes."""
    feedback: float = 2.0
    """Highest gain from tracking error to command; quick joints get less, for stability. ALOHA
    tasks only."""
    action_noise: float = 0.0
    """Standard deviation in rad of the disturbance that `perturb` adds, in bursts; 0 for none.
    ALOHA tasks only."""

    def __post_init__(self) -> None:
        if self.style not in ("plain", "style"):
            raise ValueError(f"expert.style={self.style!r}; choose one of: plain, style")
        if self.num_steps < 150:
            raise ValueError(f"expert.num_steps={self.num_steps}; the arms need 150 or more")
        if not 0 <= self.feedback <= 4:
            raise ValueError(f"expert.feedback={self.feedback}; give a gain from 0 to 4")
        if not 0 <= self.action_noise <= 0.2:
            raise ValueError(f"expert.action_noise={self.action_noise}; give 0 to 0.2 rad")

    def build(self, task: str) -> Demonstrator:
        """Makes the demonstrator of an ALOHA task, or of Detour.

        Raises:
            ValueError: none is written here for `task`, or it cannot do what the settings ask.
        """
        if task == detour.ENV_ID:
            if self.action_noise:
                raise ValueError(
                    f"expert.action_noise={self.action_noise}: there is nothing to recover from "
                    f"in {task}; set it to 0, and expert.style=style for demonstrations that vary"
                )
            return detour.DetourExpert(varied=self.style == "style")
        if task not in _PLANS:
            raise ValueError(
                f"task={task!r} is none of {', '.join([*_PLANS, detour.ENV_ID])}, which are what "
                "this expert plays; name another demonstrator by demonstrations.expert.class_path"
            )
        return Expert(_PLANS[task], self)


class Expert:
    """Plays one ALOHA task; `reset`, then `act` once a control step."""

    def __init__(self, plan: type[Plan], config: ExpertConfig) -> None:
        self.config = config
        self._make_plan = plan

    def reset(self, env: gymnasium.Env[Any, Any], seed: int) -> None:
        """Starts an episode in a freshly reset ALOHA environment.

        Args:
            env: its `unwrapped.model` and `.data` are read at every step.
            seed: draws the style and the noise; worlds draw from other streams.
        """
        model, self._data = env.unwrapped.model, env.unwrapped.data  # type: ignore[attr-defined]
        style_rng, self._rng = (np.random.default_rng([seed, stream]) for stream in (1, 2))
        style = sample_style(style_rng) if self.config.style == "style" else PLAIN
        self._plan = self._make_plan(style)
        self._arms = Arms(model)
        self._stiffness = model.actuator_gainprm[_JOINTS, 0]
        self._lag, self._stick = _friction(model, self._stiffness)
        response = 1 - np.exp(-DT / self._lag)
        self._gain = np.clip(0.5 / response - 1, 0.0, self.config.feedback)
        self._addresses = [model.joint(name).qposadr[0] for name in self._plan.object_joints]
        self._time = 0.0
        self._num_acts = 0
        self._burst = np.zeros((2, 1))
        self._noise = np.zeros((2, 2, 6))
        self.tracking_error = np.zeros((2, 6))

    def act(self) -> NDArray[np.float32]:
        """The action now: (14,), rad and grippers in [0, 1]."""
        joints = self._data.qpos[_JOINTS]
        pinch = self._arms.pinch(joints)
        world = World(objects=self._objects(), pinch=pinch)
        speed = NOMINAL_STEPS / self.config.num_steps * self._plan.style.tempo
        times = np.array([self._time, self._time + speed])
        target = self._plan.pinch(times, self._time, world)
        wanted = self._arms.solve(target, self._plan.wrist_sign)
        wanted = _HOME + self._plan.leaving_home(times)[..., None] * (wanted - _HOME)
        pace = self._pace(world, self._arms.pinch(wanted[0]))
        command = self._track(joints, wanted[0], pace * (wanted[1] - wanted[0]))
        grippers = self._plan.grippers(self._time)
        self._time += pace * speed
        self._num_acts += 1
        self.tracking_error = wanted[0] - joints
        return np.concatenate(
            [command[0], grippers[:1], command[1], grippers[1:]], dtype=np.float32
        )

    def perturb(self, action: NDArray[np.float32]) -> NDArray[np.float32]:
        """What to execute instead of `action`: disturbed in bursts, gently where it must be.

        Args:
            action: (14,) from `act`, which is what to record.

        Returns:
            (14,), the grippers as they were.
        """
        if self.config.action_noise == 0:
            return action
        if self._num_acts % _BURST_STEPS == 1:
            self._burst = self._rng.integers(2, size=(2, 1)).astype(np.float64)
        keep = np.exp(-2 / _NOISE_STEPS)
        fresh = self._burst * self._rng.standard_normal((2, 6))
        # Twice low-passed, so that it does not jerk; `unit` brings the variance back to 1.
        self._noise[0] = keep * self._noise[0] + (1 - keep) * fresh
        self._noise[1] = keep * self._noise[1] + (1 - keep) * self._noise[0]
        unit = np.sqrt((1 + keep) ** 3 / ((1 - keep) * (1 + keep**2)))
        scale = self.config.action_noise
        scale += min(0.0, _LOADED_NOISE - scale) * self._plan.load(self._time)
        scale += min(0.0, _PRECISE_NOISE - scale) * self._plan.precision(self._time)
        executed = action.copy()
        executed[[*range(6), *range(7, 13)]] += (scale * unit * self._noise[1]).ravel()
        return executed

    def _track(self, joints: Array, wanted: Array, change: Array) -> Array:
        """Commands (2, 6) that take the joints along `wanted`, changing by `change` a step."""
        slip = self._lag * change / DT / self._stick
        lead = self._stick * np.tanh(slip)
        # Beyond its friction a joint is a spring without damping, and feedback would make it ring.
        gain = self._gain / (1 + (slip / 0.4) ** 4)
        feedback = np.clip(gain * (wanted - joints), -self._stick / 2, self._stick / 2)
        gravity = np.clip(self._data.qfrc_bias[_JOINTS] / self._stiffness, -0.015, 0.015)
        command = wanted + change / 2 + lead + gravity + feedback
        return np.asarray(np.clip(command, joints - _MAX_LEAD, joints + _MAX_LEAD))

    def _pace(self, world: World, wanted: Pose) -> float:
        """Speed of the timetable, from 1 on the way to 0 far off it, where precision matters."""
        off = np.linalg.norm(wanted.position - world.pinch.position, axis=-1)
        turned = rotation_vector(np.swapaxes(wanted.rotation, -1, -2) @ world.pinch.rotation)
        farthest = float((off + 0.03 * np.linalg.norm(turned, axis=-1)).max())
        farthest *= self._plan.precision(self._time)
        farthest = max(farthest, self._plan.misalignment(self._time, world))
        return float(1 / (1 + (farthest / _TOLERANCE) ** 4))

    def _objects(self) -> Pose:
        """(2,) poses of the arms' objects, turned by their symmetry to the smallest yaw."""
        rotation = np.zeros((2, 9))
        for row, address in zip(rotation, self._addresses, strict=True):
            mujoco.mju_quat2Mat(row, self._data.qpos[address + 3 : address + 7])
        position = np.stack([self._data.qpos[start : start + 3] for start in self._addresses])
        turned = rotation.reshape(2, 3, 3)
        step = 2 * np.pi / self._plan.symmetry
        turns = np.round(np.arctan2(turned[:, 1, 0], turned[:, 0, 0]) / step)
        return Pose(rotation=turned @ rotation_z(-turns * step), position=position)


def _friction(model: mujoco.MjModel, stiffness: Array) -> tuple[Array, Array]:
    """The joints' lag (s), and the leads (rad) at which friction gives way; (2, 6) each.

    Below its limit, friction acts as damping with the coefficient that MuJoCo derives from solref,
    solimp and the joint's inverse inertia (documentation, "Computation: constraint model").
    """
    near, far = model.dof_solimp[_JOINTS, 0], model.dof_solimp[_JOINTS, 1]
    damping = 2 / (far * model.dof_solref[_JOINTS, 0])
    damping = damping * near / (1 - near) / model.dof_invweight0[_JOINTS]
    return damping / stiffness, model.dof_frictionloss[_JOINTS] / stiffness
