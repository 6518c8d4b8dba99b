"""Gymnasium environments over gym-aloha's two bimanual tasks; `make_env` also wraps any other id.

Source: gym-aloha 0.1.5 (Apache-2.0). Its scenes, start pose, gripper units, pose sampling, reward
rules and order of physics steps are kept, so that joint positions and rewards are bit-equal for
equal actions. Departures, and why:
- Plain MuJoCo instead of dm_control: nothing rendered unasked, and a quick import.
- Only the cameras asked for are rendered, at the size asked for (gym-aloha: three of 480x640).
- Object poses belong to the instance (gym-aloha: a module-level global), and can be varied.
- `action_space` holds the true bounds (gym-aloha: -1 to 1, although actions are angles in rad).
  Beyond them the actuators clip, as they do there.
- Cameras, lights, actions and observations can be perturbed (perturb.py).
- `reset(seed=None)` continues the generator of the last seeded reset (gym-aloha: system entropy).
"""

from __future__ import annotations

import copy
import functools
from typing import TYPE_CHECKING, Any

import gymnasium
import mujoco
import numpy as np
from gym_aloha.constants import (
    ASSETS_DIR,
    DT,
    START_ARM_POSE,
    normalize_puppet_gripper_position,
    unnormalize_puppet_gripper_position,
)
from gymnasium import spaces
from numpy.typing import NDArray

from act_lightning.sim.config import GRIPPERS, OBJECT_RANGES, EnvConfig
from act_lightning.sim.gripper_path import pinch_paths, project
from act_lightning.sim.perturb import Delay, ObservationNoise, Scene
from act_lightning.sim.poses import check_poses, sample_poses
from act_lightning.sim.render import Renderer
from act_lightning.sim.rewards import REWARD_RULES, STAGES
from act_lightning.sim.wrap import WrappedEnv

if TYPE_CHECKING:
    from act_lightning.batch import DataSpec

__all__ = ["STAGES", "AlohaEnv", "EnvConfig", "WrappedEnv", "data_spec", "make_env"]

_NUM_ROBOT_JOINTS = len(START_ARM_POSE)
# Of each arm's 8 joints the last two are mirrored fingers, observed and commanded as one gripper.
_OBSERVED_JOINTS = [*range(7), *range(8, 15)]
_DIVERGED = [
    mujoco.mjtWarning.mjWARN_BADQPOS.value,
    mujoco.mjtWarning.mjWARN_BADQVEL.value,
    mujoco.mjtWarning.mjWARN_BADQACC.value,
]


def make_env(config: EnvConfig) -> AlohaEnv | WrappedEnv:
    """Makes the environment that `config` describes.

    Observations are a dict of `qpos` (D,) float32, `env_state` (E,) float32 if asked for, and
    `images` (N, 3, H, W) uint8 if there are cameras. Beside gymnasium's methods there are
    `advance(action)` (simulates, observes nothing) and `observe()`; `step` is one, then the other.

    Raises:
        ValueError: for an unknown id, camera or observation key.
    """
    return AlohaEnv(config) if config.is_aloha else WrappedEnv(config)


def data_spec(config: EnvConfig) -> DataSpec:
    """What a step recorded from `make_env(config)` holds."""
    # Imported late, because it needs torch, which simulator processes do without.
    from act_lightning.batch import DataSpec

    env = make_env(config)
    sizes = {name: spaces.flatdim(space) for name, space in env.observation_space.spaces.items()}
    spec = DataSpec(
        task=config.task,
        fps=float(env.metadata.get("render_fps") or round(1 / DT)),
        dim_qpos=sizes["qpos"],
        dim_action=env.action_space.shape[0],
        dim_env_state=sizes.get("env_state", 0),
        cameras=config.cameras,
        image_size=config.image_size if config.cameras else (0, 0),
    )
    env.close()
    return spec


class AlohaEnv(gymnasium.Env[dict[str, Any], NDArray[Any]]):
    """Two ViperX arms at a table, controlled at 50 Hz.

    An action is, for the left arm and then the right, 6 absolute joint angles in rad and the
    gripper (0 closed, 1 open); `qpos` has the same order. Rewards are 0, or 1 to 4 as `STAGES`
    names them; 4 ends the episode.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": round(1 / DT)}
    stages = STAGES[:-1]
    """Names of what rewards 1 to 3 stand for: the way to success."""
    observation_space: spaces.Dict
    action_space: spaces.Box

    def __init__(
        self,
        config: EnvConfig | None = None,
        *,
        render_mode: str | None = "rgb_array",
        **settings: Any,
    ) -> None:
        """Loads the scene.

        Args:
            config: what to simulate.
            render_mode: `rgb_array`: `render` returns a picture.
            settings: fields of an `EnvConfig`, for `gymnasium.make`; only without `config`.
        """
        self.config = EnvConfig(**settings) if config is None else config
        self.render_mode = render_mode
        # A copy: a reset switches options in the model, so instances must not share one.
        self.model = copy.copy(_load_model(self.config.task))
        self.data = mujoco.MjData(self.model)
        self._camera_ids = [self._camera_id(name) for name in self.config.cameras]
        self._renderers: dict[tuple[int, int], Renderer] = {}
        perturbation = self.config.perturbation
        self._scene = Scene(perturbation, self.model)
        self._delay = Delay(perturbation.action_delay)
        # Of each object's x y z and quaternion, the first three are places.
        self._noise = ObservationNoise(
            perturbation, np.arange(len(OBJECT_RANGES[self.config.task]) * 7) % 7 < 3
        )
        self._num_substeps = round(DT / self.model.opt.timestep)
        self._reward_rule = REWARD_RULES[self.config.task](self.model)
        self.action_space = self._make_action_space()
        self.observation_space = self._make_observation_space()
        self._start(0, self.sample_object_poses(0))

    @property
    def is_success(self) -> bool:
        """Whether the last step reached reward 4."""
        return self._reward == len(STAGES)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
        """Starts an episode.

        Args:
            seed: which world; with default ranges, gym-aloha's `sample_*_pose(seed)`. None: a
                world drawn from the generator of the last seeded reset.
            options: `object_poses` instead of the seed's: (objects, 7), x y z in m and a unit
                quaternion wxyz.

        Raises:
            ValueError: if the seed or the poses cannot be used.
        """
        super().reset(seed=seed)
        world = int(self.np_random.integers(2**32)) if seed is None else seed
        given = (options or {}).get("object_poses")
        poses = (
            self.sample_object_poses(world) if given is None else check_poses(self.config, given)
        )
        self._start(world, poses)
        return self.observe(), {"is_success": False}

    def sample_object_poses(self, seed: int) -> NDArray[np.float64]:
        """Object poses of the world `seed`: (objects, 7), x y z in m and a unit quaternion wxyz."""
        return sample_poses(self.config, seed)

    def advance(self, action: NDArray[Any]) -> tuple[float, bool, bool]:
        """Simulates one control step and observes nothing.

        Returns:
            The reward (0 to 4), whether the episode terminated (reward 4), and was truncated.

        Raises:
            ValueError: if `action` has another shape than (14,), or holds NaN or infinity.
            FloatingPointError: if the simulation diverged.
        """
        ctrl = _to_ctrl(_check_action(action, self.action_space.shape))
        self.data.ctrl[:] = self._delay.push(ctrl)
        # dm_control's order: contacts and poses belong to the new state afterwards.
        mujoco.mj_step2(self.model, self.data)
        mujoco.mj_step(self.model, self.data, self._num_substeps - 1)
        mujoco.mj_step1(self.model, self.data)
        self._scene.place_cameras(self.data)
        if self.data.warning.number[_DIVERGED].any():
            raise FloatingPointError(
                f"{self.config.task}: the simulation diverged at step {self._num_steps}"
            )
        self._num_steps += 1
        contact = self.data.contact
        touching = set(zip(contact.geom1.tolist(), contact.geom2.tolist(), strict=True))
        self._reward = self._reward_rule(touching)
        truncated = not self.is_success and self._num_steps >= self.config.max_episode_steps
        return float(self._reward), self.is_success, truncated

    def observe(self) -> dict[str, NDArray[Any]]:
        """What is perceived now; the images are rendered by this call."""
        qpos = self.data.qpos[_OBSERVED_JOINTS]
        qpos[GRIPPERS] = normalize_puppet_gripper_position(qpos[GRIPPERS])
        observation: dict[str, NDArray[Any]] = {"qpos": qpos.astype(np.float32)}
        if self.config.env_state:
            observation["env_state"] = self.data.qpos[_NUM_ROBOT_JOINTS:].astype(np.float32)
        if self._camera_ids:
            images = np.empty((len(self._camera_ids), 3, *self.config.image_size), np.uint8)
            renderer = self._renderer(self.config.image_size)
            for camera, image in zip(self._camera_ids, images, strict=True):
                renderer.draw(self.data, camera, image)
            observation["images"] = images
        self._noise.add(observation, self._world, self._num_steps)
        return observation

    def step(
        self, action: NDArray[Any]
    ) -> tuple[dict[str, NDArray[Any]], float, bool, bool, dict[str, Any]]:
        """`advance`, then `observe`."""
        reward, terminated, truncated = self.advance(action)
        return self.observe(), reward, terminated, truncated, {"is_success": self.is_success}

    def render(self) -> NDArray[np.uint8] | None:
        """A picture for people: (480, 640, 3) uint8 of camera `top`; None without render mode."""
        return self.picture() if self.render_mode == "rgb_array" else None

    def picture(self, camera: str = "top", size: tuple[int, int] = (480, 640)) -> NDArray[np.uint8]:
        """(H, W, 3) uint8 RGB of any camera at any size, whatever is observed."""
        image = np.empty((3, *size), np.uint8)
        self._renderer(size).draw(self.data, self._camera_id(camera), image)
        return np.ascontiguousarray(image.transpose(1, 2, 0))

    def path_in_picture(
        self, chunk: NDArray[Any], size: tuple[int, int]
    ) -> list[NDArray[np.float64]]:
        """Where a chunk's actions (n, 14) lead the left and the right pinch point in `picture`.

        Returns:
            (n, 2) places each, as (column, row) in a picture of `size` (h, w) pixels.
        """
        top = self._camera_id("top")
        paths = pinch_paths(self.model, chunk)
        return [project(self.model, self.data, top, path, size) for path in paths]

    def close(self) -> None:
        """Frees the OpenGL contexts; they come back if something is rendered afterwards."""
        for renderer in self._renderers.values():
            renderer.close()
        self._renderers.clear()

    def _renderer(self, size: tuple[int, int]) -> Renderer:
        if size not in self._renderers:
            self._renderers[size] = Renderer(self.model, size, self.config.render_quality)
        return self._renderers[size]

    def _camera_id(self, name: str) -> int:
        names = [self.model.camera(camera).name for camera in range(self.model.ncam)]
        if name not in names:
            raise ValueError(
                f"EnvConfig: cameras: {self.config.task} has no camera {name!r}; "
                f"it has {', '.join(names)}"
            )
        return names.index(name)

    def _make_action_space(self) -> spaces.Box:
        bounds = self.model.actuator_ctrlrange[_OBSERVED_JOINTS].astype(np.float32)
        bounds[GRIPPERS] = 0, 1
        return spaces.Box(bounds[:, 0], bounds[:, 1], dtype=np.float32)

    def _make_observation_space(self) -> spaces.Dict:
        def unbounded(size: int) -> spaces.Box:
            return spaces.Box(-np.inf, np.inf, (size,), np.float32)

        contents: dict[str, spaces.Space[Any]] = {"qpos": unbounded(len(_OBSERVED_JOINTS))}
        if self.config.env_state:
            contents["env_state"] = unbounded(self.model.nq - _NUM_ROBOT_JOINTS)
        if self.config.cameras:
            shape = (len(self.config.cameras), 3, *self.config.image_size)
            contents["images"] = spaces.Box(0, 255, shape, np.uint8)
        return spaces.Dict(contents)

    def _start(self, world: int, poses: NDArray[np.float64]) -> None:
        """Starts an episode of the world numbered `world`, with the objects at `poses`."""
        self._world = world
        self._num_steps = 0
        self._reward = 0
        self._scene.reset(world)
        self._delay.reset(np.array(START_ARM_POSE))
        self._set_state(poses)
        self._scene.place_cameras(self.data)

    def _set_state(self, poses: NDArray[np.float64]) -> None:
        mujoco.mj_resetData(self.model, self.data)
        self.data.qpos[:_NUM_ROBOT_JOINTS] = START_ARM_POSE
        self.data.ctrl[:] = START_ARM_POSE
        self.data.qpos[_NUM_ROBOT_JOINTS:] = poses.ravel()
        # dm_control's reset: forward dynamics without actuation, in two nested contexts.
        disabled = self.model.opt.disableflags
        self.model.opt.disableflags = disabled | mujoco.mjtDisableBit.mjDSBL_ACTUATION.value
        mujoco.mj_forward(self.model, self.data)
        mujoco.mj_forward(self.model, self.data)
        self.model.opt.disableflags = disabled


@functools.cache
def _load_model(task: str) -> mujoco.MjModel:
    """The compiled scene, loaded once a process (0.1 s); to be copied, never changed."""
    return mujoco.MjModel.from_xml_path(str(ASSETS_DIR / f"bimanual_viperx_{task}.xml"))


def _check_action(action: NDArray[Any], shape: tuple[int, ...] | None) -> NDArray[Any]:
    action = np.asarray(action)
    if action.shape != shape:
        raise ValueError(f"action has shape {action.shape}; give {shape}")
    if not np.isfinite(action).all():
        wrong = np.flatnonzero(~np.isfinite(action)).tolist()
        raise ValueError(f"action holds NaN or infinity at {wrong}: {action.tolist()}")
    return action


def _to_ctrl(action: NDArray[Any]) -> NDArray[Any]:
    left, right = (unnormalize_puppet_gripper_position(action[gripper]) for gripper in GRIPPERS)
    return np.concatenate([action[:6], [left, -left], action[7:13], [right, -right]])
