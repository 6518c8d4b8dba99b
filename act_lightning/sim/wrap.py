"""Any gymnasium environment, with observations in the shape of ours: `qpos`, `env_state`, `images`.

`EnvConfig.observation_keys` says where each is in the foreign observation. Pictures come out
channels first, at the configured size (averaged over areas); actions are vectors, whatever the
foreign space's shape.
"""

from __future__ import annotations

import contextlib
import os
import re
from typing import TYPE_CHECKING, Any

import gymnasium
import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray
from PIL import Image

from act_lightning.sim import register_envs
from act_lightning.sim.opengl import OpenGLNotFoundError, find_backend
from act_lightning.sim.perturb import Delay, ObservationNoise

if TYPE_CHECKING:
    from act_lightning.sim.env import EnvConfig


class WrappedEnv(gymnasium.Env[dict[str, Any], NDArray[Any]]):
    """A foreign environment behind the same methods as `AlohaEnv`'s."""

    stages: tuple[str, ...] = ()
    """Names of stages on the way to success: foreign rewards stand for none."""
    observation_space: spaces.Dict
    action_space: spaces.Box
    foreign: gymnasium.Env[Any, Any]
    """What `gymnasium.make` made."""
    foreign_observation: Any
    """Its newest observation, as it came."""

    def __init__(self, config: EnvConfig) -> None:
        """Makes the foreign environment and checks that what is mapped exists in its observations.

        Raises:
            ValueError: for an unknown id, a key that is not there, a space that cannot be mapped.
        """
        self.config = config
        arguments: dict[str, Any] = {"render_mode": "rgb_array", "disable_env_checker": True}
        arguments |= config.make_kwargs
        register_envs()
        if arguments["render_mode"] == "rgb_array" and "MUJOCO_GL" not in os.environ:
            # gymnasium's MuJoCo worlds would look for a display; others do without OpenGL.
            with contextlib.suppress(OpenGLNotFoundError):
                os.environ["MUJOCO_GL"] = find_backend()
        try:
            self.foreign = gymnasium.make(config.task, **arguments)
        except ImportError as error:
            raise ValueError(
                f"task={config.task!r} cannot be made: {error}. `make setup` installs gym-pusht "
                "(below Python 3.14) and gymnasium-robotics; another world's package goes into "
                ".venv by `.venv/bin/python -m pip install`"
            ) from error
        except (gymnasium.error.Error, TypeError) as error:
            raise ValueError(f"task={config.task!r} cannot be made: {error}") from error
        self.metadata = self.foreign.metadata
        self.render_mode = self.foreign.render_mode
        self._image_keys = [self._image_key(camera) for camera in config.cameras]
        self._has_env_state = config.env_state and "env_state" in config.observation_keys
        self.observation_space = self._make_observation_space()
        self.action_space = _vector_space(self.foreign.action_space)
        self.foreign_observation = None
        self._delay = Delay(config.perturbation.action_delay)
        self._noise = ObservationNoise(config.perturbation)
        self._world = 0
        self._num_steps = 0
        self.is_success = False

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
        """Starts an episode; `seed` and `options` are the foreign environment's."""
        super().reset(seed=seed)
        self._world = int(self.np_random.integers(2**32)) if seed is None else seed
        self._delay.reset()
        self.foreign_observation, info = self.foreign.reset(seed=seed, options=options)
        self._num_steps = 0
        self.is_success = False
        return self.observe(), {**info, "is_success": False}

    def advance(self, action: NDArray[Any]) -> tuple[float, bool, bool]:
        """Takes one step; the observation waits for `observe`.

        Args:
            action: (A,), clipped to the bounds; a choice among n is a number, rounded.

        Returns:
            The reward, whether the episode terminated, whether it was truncated.

        Raises:
            ValueError: if `action` has a wrong shape or holds NaN; if an episode ends without
                saying whether it succeeded.
        """
        action = np.asarray(action)
        if action.shape != self.action_space.shape or not np.isfinite(action).all():
            raise ValueError(
                f"action={action.tolist()}; give finite numbers of shape {self.action_space.shape}"
            )
        clipped = np.clip(action, self.action_space.low, self.action_space.high)
        self.foreign_observation, reward, terminated, truncated, info = self.foreign.step(
            _foreign_action(self._delay.push(clipped), self.foreign.action_space)
        )
        self._num_steps += 1
        truncated = truncated or (
            not terminated and self._num_steps >= self.config.max_episode_steps
        )
        self.is_success = self._find_success(info, terminated, truncated)
        self._info = info
        return float(reward), bool(terminated), bool(truncated)

    def observe(self) -> dict[str, NDArray[Any]]:
        """The current observation, mapped."""
        keys = self.config.observation_keys
        observation = {"qpos": _flat(_look_up(self.foreign_observation, keys["qpos"]))}
        if self._has_env_state:
            observation["env_state"] = _flat(_look_up(self.foreign_observation, keys["env_state"]))
        if self._image_keys:
            observation["images"] = np.stack(
                [
                    _resize(_look_up(self.foreign_observation, key), self.config.image_size)
                    for key in self._image_keys
                ]
            )
        self._noise.add(observation, self._world, self._num_steps)
        return observation

    def step(
        self, action: NDArray[Any]
    ) -> tuple[dict[str, NDArray[Any]], float, bool, bool, dict[str, Any]]:
        """`advance`, then `observe`."""
        reward, terminated, truncated = self.advance(action)
        info = {**self._info, "is_success": self.is_success}
        return self.observe(), reward, terminated, truncated, info

    def render(self) -> Any:
        """What the foreign environment renders."""
        return self.foreign.render()

    def path_in_picture(
        self, chunk: NDArray[Any], size: tuple[int, int]
    ) -> list[NDArray[np.float64]]:
        """What the foreign environment's method of this name says; nothing if it has none."""
        path: Any = getattr(self.foreign.unwrapped, "path_in_picture", None)
        return [] if path is None else path(chunk, size)

    def close(self) -> None:
        """Closes the foreign environment."""
        self.foreign.close()

    def _image_key(self, camera: str) -> str:
        prefix = "images."
        keys = self.config.observation_keys
        if prefix + camera not in keys:
            known = [key.removeprefix(prefix) for key in keys if key.startswith(prefix)]
            raise ValueError(
                f"{self.config.task} has no camera {camera!r}; observation_keys maps {known}"
            )
        return keys[prefix + camera]

    def _find_success(self, info: dict[str, Any], terminated: bool, truncated: bool) -> bool:
        key = self.config.success_key
        ends = {"terminated": terminated, "truncated": truncated}
        if key in ends:
            return bool(ends[key])
        if key not in info and (terminated or truncated):
            raise ValueError(
                f"{self.config.task}: info has no {key!r} to say whether the episode succeeded; "
                f"set success_key to one of {sorted(info)}, or to terminated or truncated"
            )
        return bool(info.get(key, False))

    def _make_observation_space(self) -> spaces.Dict:
        source, keys = self.foreign.observation_space, self.config.observation_keys
        names = ["qpos", "env_state"] if self._has_env_state else ["qpos"]
        contents: dict[str, spaces.Space[Any]] = {}
        for name in names:
            box = self._box(source, name, keys[name])
            contents[name] = spaces.Box(-np.inf, np.inf, (int(np.prod(box.shape)),), np.float32)
        for camera, key in zip(self.config.cameras, self._image_keys, strict=True):
            box = self._box(source, f"images.{camera}", key)
            if len(box.shape) != 3 or box.shape[2] != 3 or box.dtype != np.uint8:
                raise ValueError(
                    f"observation_keys: images.{camera} is {box.dtype} of shape {box.shape} in "
                    f"{self.config.task}; it must be uint8 of shape (H, W, 3)"
                )
        if self._image_keys:
            shape = (len(self._image_keys), 3, *self.config.image_size)
            contents["images"] = spaces.Box(0, 255, shape, np.uint8)
        return spaces.Dict(contents)

    def _box(self, source: spaces.Space[Any], name: str, key: str) -> spaces.Box:
        try:
            found = _look_up(source, key)
        except (KeyError, TypeError):
            found = None
        if not isinstance(found, spaces.Box):
            raise ValueError(
                f"observation_keys: {name}={key!r} leads to no array in {self.config.task}; its "
                f"observations are {source}"
            )
        return found


def _look_up(container: Any, key: str) -> Any:
    """Follows a key joined by `.` or `/`; an empty one is the container itself."""
    for part in re.split(r"[./]", key):
        if part:
            container = container[part]
    return container


def _flat(values: Any) -> NDArray[np.float32]:
    return np.array(values, np.float32).ravel()


def _resize(image: NDArray[np.uint8], size: tuple[int, int]) -> NDArray[np.uint8]:
    """(H, W, 3) to (3, *size), each new pixel the average of the area it covers."""
    if image.shape[:2] != size:
        height, width = size
        resized = Image.fromarray(image).resize((width, height), Image.Resampling.BOX)
        image = np.asarray(resized)
    return np.ascontiguousarray(image.transpose(2, 0, 1))


def _vector_space(space: spaces.Space[Any]) -> spaces.Box:
    if isinstance(space, spaces.Box):
        low, high = (bound.ravel().astype(np.float32) for bound in (space.low, space.high))
        return spaces.Box(low, high, dtype=np.float32)
    if isinstance(space, spaces.Discrete):
        first, last = int(space.start), int(space.start + space.n - 1)
        return spaces.Box(first, last, (1,), np.float32)
    raise ValueError(f"action space {space} is neither a Box nor Discrete")


def _foreign_action(action: NDArray[Any], space: spaces.Space[Any]) -> Any:
    if isinstance(space, spaces.Discrete):
        return int(np.rint(action[0]))
    assert isinstance(space, spaces.Box)
    return action.reshape(space.shape).astype(space.dtype)
