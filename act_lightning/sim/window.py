"""Windows to watch an environment in: MuJoCo's viewer for ours, `human` rendering for others."""

from __future__ import annotations

import os
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import gymnasium
import mujoco
import numpy as np
from numpy.typing import NDArray

from act_lightning.sim.config import EnvConfig
from act_lightning.sim.env import AlohaEnv, make_env
from act_lightning.sim.gripper_path import pinch_paths
from act_lightning.sim.overlay import COLORS
from act_lightning.sim.wrap import WrappedEnv

_LINE_WIDTH = 3.0  # pixels
_EVERY = 2  # actions to a piece of a path
_NO_ROTATION = np.eye(3).ravel()


def has_display() -> bool:
    """Whether there is an X11 or Wayland display to open a window on."""
    return bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))


@contextmanager
def open_window(config: EnvConfig) -> Iterator[AlohaWindow | HumanWindow]:
    """Makes the environment that `config` describes, in a window of its own.

    Raises:
        OSError: no window can be opened, or what draws in it is not installed.
        ValueError: as `make_env`.
    """
    if config.is_aloha:
        env = make_env(config)
        assert isinstance(env, AlohaEnv)
        window: AlohaWindow | HumanWindow = AlohaWindow(env)
    else:
        # Rendering for people is up to the environment itself, at every reset and step.
        kwargs = {**config.make_kwargs, "render_mode": "human"}
        foreign = make_env(replace(config, make_kwargs=kwargs))
        assert isinstance(foreign, WrappedEnv)
        window = HumanWindow(foreign)
    try:
        yield window
    except gymnasium.error.DependencyNotInstalled as error:  # raised when it first draws
        raise OSError(f"{error}; or write a video with --out FILE.mp4") from error
    finally:
        window.close()


class AlohaWindow:
    """MuJoCo's viewer on the environment's own model and data; a mouse turns the view and drags.

    The newest chunk is drawn as the way of both pinch points.
    """

    def __init__(self, env: AlohaEnv) -> None:
        import glfw
        import mujoco.viewer

        # The viewer waits for ever if its own thread finds no display.
        if not glfw.init():
            raise OSError(
                f"no window can be opened on DISPLAY={os.environ.get('DISPLAY')}; "
                "write a video with --out FILE.mp4"
            )
        self.env = env
        before = set(threading.enumerate())
        self._viewer = mujoco.viewer.launch_passive(
            env.model, env.data, show_left_ui=False, show_right_ui=False
        )
        self._threads = set(threading.enumerate()) - before
        view = self._viewer.cam
        view.lookat[:] = 0.0, 0.5, 0.15
        view.distance, view.azimuth, view.elevation = 1.4, 90, -40

    @property
    def is_open(self) -> bool:
        """Whether nobody has closed the window."""
        return bool(self._viewer.is_running())

    def lock(self) -> AbstractContextManager[Any]:
        """To be held while the environment changes its state."""
        return self._viewer.lock()  # type: ignore[no-any-return]

    def show(self, chunk: NDArray[np.float32], text: str) -> None:
        """Shows the present state, the actions (n, 14) to come as paths, and a line of text."""
        with self.lock():
            scene = self._viewer.user_scn
            scene.ngeom = 0
            for path, color in zip(pinch_paths(self.env.model, chunk), COLORS, strict=False):
                self._draw_path(scene, path[::_EVERY], color)
            label = _next_shape(scene, mujoco.mjtGeom.mjGEOM_LABEL, (1.0, 1.0, 1.0, 1.0))
            label.pos[:] = 0.0, 0.5, 0.5
            label.label = text
        self._viewer.sync()

    def close(self) -> None:
        """Closes the window and the environment."""
        self._viewer.close()
        # At the interpreter's end GLFW would close the window under a viewer that still draws.
        for thread in self._threads:
            thread.join(5.0)
        self.env.close()

    def _draw_path(
        self, scene: mujoco.MjvScene, path: NDArray[np.float64], color: tuple[int, int, int]
    ) -> None:
        red, green, blue = np.divide(color, 255)
        for start, end in zip(path, path[1:], strict=False):
            line = _next_shape(scene, mujoco.mjtGeom.mjGEOM_LINE, (red, green, blue, 1.0))
            mujoco.mjv_connector(line, mujoco.mjtGeom.mjGEOM_LINE, _LINE_WIDTH, start, end)


class HumanWindow:
    """The window that a foreign environment opens for `render_mode="human"`."""

    def __init__(self, env: WrappedEnv) -> None:
        self.env = env

    @property
    def is_open(self) -> bool:
        """Whether nobody has closed the window, be it pygame's or of gymnasium's MuJoCo viewer."""
        renderer = getattr(self.env.foreign.unwrapped, "mujoco_renderer", None)
        handle = getattr(getattr(renderer, "viewer", None), "window", None)
        if handle is not None:
            import glfw

            # Gymnasium may have seen it first, and then ends GLFW, which has no clock afterwards.
            with warnings.catch_warnings(action="ignore"):
                return glfw.get_timer_frequency() > 0 and not glfw.window_should_close(handle)
        # Loaded by the environment, if at all.
        pygame = sys.modules.get("pygame")
        if pygame is None or not pygame.display.get_init():
            return True
        return not pygame.event.peek(pygame.QUIT)

    def lock(self) -> AbstractContextManager[Any]:
        """Nothing: the environment draws in the thread that it is called in."""
        return nullcontext()

    def show(self, chunk: NDArray[np.float32], text: str) -> None:
        """Nothing: the environment has drawn itself."""

    def close(self) -> None:
        """Closes the environment, and so its window."""
        self.env.close()


def _next_shape(
    scene: mujoco.MjvScene, kind: mujoco.mjtGeom, rgba: tuple[float, float, float, float]
) -> mujoco.MjvGeom:
    """A new shape of a scene."""
    shape = scene.geoms[scene.ngeom]
    scene.ngeom += 1
    mujoco.mjv_initGeom(
        shape, kind, np.zeros(3), np.zeros(3), _NO_ROTATION, np.array(rgba, np.float32)
    )
    return shape
