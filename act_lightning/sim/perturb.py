"""Perturbations of a world: moved cameras, other lights, delayed actions, noisy observations.

All is drawn from the world's seed, each kind by a generator of its own: a perturbed world is the
same world for every policy, and one kind does not change another. The noise of a step is drawn from
(seed, step), so it does not depend on how often a policy looks.
"""

from __future__ import annotations

from collections import deque
from typing import Any

import mujoco
import numpy as np
from numpy.typing import NDArray

from act_lightning.sim.config import Perturbation

# Of the generators; those of the demonstrator and of the object poses are others.
_CAMERA_STREAM, _LIGHT_STREAM = 21, 22
_NOISE_STREAMS = {"qpos": 23, "env_state": 24, "images": 25}


class Delay:
    """Holds actions back for some steps: the queue of a control loop that lags behind."""

    def __init__(self, num_steps: int) -> None:
        self._num_steps = num_steps
        self._waiting: deque[NDArray[Any]] = deque()

    def reset(self, held: NDArray[Any] | None = None) -> None:
        """Starts an episode; `held` takes effect until the first action does, default: itself."""
        self._waiting.clear()
        if held is not None:
            self._waiting.extend([held] * self._num_steps)

    def push(self, action: NDArray[Any]) -> NDArray[Any]:
        """Takes the action of this step; returns the one that takes effect now."""
        if not self._waiting:
            self._waiting.extend([action] * self._num_steps)
        self._waiting.append(action)
        return self._waiting.popleft()


class ObservationNoise:
    """Adds noise to observations."""

    def __init__(
        self, config: Perturbation, env_state_places: NDArray[np.bool_] | None = None
    ) -> None:
        """Decides what gets noise.

        Args:
            config: how much.
            env_state_places: (E,), which values of `env_state` are positions; None: all of them.
        """
        self._scales: dict[str, Any] = {
            "qpos": config.qpos_noise,
            "env_state": config.env_state_noise,
            "images": config.image_noise,
        }
        if env_state_places is not None and config.env_state_noise:
            self._scales["env_state"] = config.env_state_noise * env_state_places
        self._scales = {name: scale for name, scale in self._scales.items() if np.any(scale)}

    def add(self, observation: dict[str, NDArray[Any]], seed: int, step: int) -> None:
        """Adds the noise of a step of the world `seed`, in place."""
        for name, scale in self._scales.items():
            if name not in observation:
                continue
            clean = observation[name]
            rng = np.random.default_rng([seed, _NOISE_STREAMS[name], step])
            noisy = clean + scale * rng.standard_normal(clean.shape, np.float32)
            if name == "images":
                noisy = np.clip(np.rint(noisy), 0, 255)
            observation[name] = noisy.astype(clean.dtype)


class Scene:
    """Moves the cameras and changes the lights of one model, world by world."""

    def __init__(self, config: Perturbation, model: mujoco.MjModel) -> None:
        """Notes the nominal scene.

        Args:
            config: how far to go from it.
            model: changed from now on, so no other instance's.
        """
        self._config = config
        self._model = model
        self._lights = {
            name: getattr(model, name).copy()
            for name in ("light_ambient", "light_diffuse", "light_specular", "light_dir")
        }
        headlight = model.vis.headlight
        self._headlight = {
            name: getattr(headlight, name).copy() for name in ("ambient", "diffuse", "specular")
        }
        self._turns = np.tile(np.eye(3), (model.ncam, 1, 1))
        self._shifts = np.zeros((model.ncam, 3))

    def reset(self, seed: int) -> None:
        """Draws the world `seed`; every camera and light, whichever are observed."""
        if not self._config.changes_scene:
            return
        if self._config.light:
            self._change_lights(np.random.default_rng([seed, _LIGHT_STREAM]))
        rng = np.random.default_rng([seed, _CAMERA_STREAM])
        shape = (self._model.ncam, 3)
        self._shifts = rng.uniform(-self._config.camera_shift, self._config.camera_shift, shape)
        self._turns = _rotations(
            rng.uniform(-self._config.camera_turn, self._config.camera_turn, shape)
        )

    def place_cameras(self, data: mujoco.MjData) -> None:
        """Moves and turns the cameras in a state away from where MuJoCo has just put them.

        The model's own camera poses would not do: its cameras aim at a body, whatever their
        orientation, and would turn back to it.
        """
        if not (self._config.camera_shift or self._config.camera_turn):
            return
        nominal = data.cam_xmat.reshape(-1, 3, 3).copy()
        data.cam_xpos += (nominal @ self._shifts[..., None])[..., 0]
        data.cam_xmat[:] = (nominal @ self._turns).reshape(-1, 9)

    def _change_lights(self, rng: np.random.Generator) -> None:
        size, model = self._config.light, self._model
        factors = rng.uniform(1 - size, 1 + size, model.nlight + 1)
        for name, nominal in self._lights.items():
            getattr(model, name)[:] = nominal * factors[:-1, None]
        for name, nominal in self._headlight.items():
            getattr(model.vis.headlight, name)[:] = nominal * factors[-1]
        turns = _rotations(rng.uniform(-size, size, (model.nlight, 3)))
        model.light_dir[:] = (turns @ self._lights["light_dir"][..., None])[..., 0]


def _rotations(turns: NDArray[np.float64]) -> NDArray[np.float64]:
    """(n, 3, 3) rotations about the axis and by the length of each of `turns` (n, 3), in rad."""
    matrices = np.zeros((len(turns), 9))
    for matrix, turn in zip(matrices, turns, strict=True):
        quaternion = np.zeros(4)
        angle = np.linalg.norm(turn)
        mujoco.mju_axisAngle2Quat(quaternion, turn / max(angle, 1e-12), angle)
        mujoco.mju_quat2Mat(matrix, quaternion)
    return matrices.reshape(-1, 3, 3)
