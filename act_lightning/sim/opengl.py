"""Finds a headless OpenGL; `python -m act_lightning.sim.opengl` says which, or what to install.

MuJoCo picks its OpenGL from the environment variable MUJOCO_GL when it is imported, and PyOpenGL
binds to one platform a process. Here the choice is made when the first picture is asked for, so
that nothing has to be set in time: MUJOCO_GL if set, else EGL where there is a GPU, else OSMesa,
else EGL in software (Mesa).
"""

from __future__ import annotations

import ctypes
import ctypes.util
import functools
import importlib
import os
import sys
from pathlib import Path
from typing import Any

ADVICE = (
    "install a software renderer with `apt-get install libosmesa6` (where that package is gone: "
    "`apt-get install libegl1 libgl1 libgl1-mesa-dri`), or with a GPU its driver's EGL library"
)

_MODULES = {"egl": "mujoco.egl", "osmesa": "mujoco.osmesa", "glfw": "mujoco.glfw"}
_DEFAULTS = ("", "1", "true", "on", "enable", "enabled")
_GPU_FILES = ("/dev/nvidiactl", "/dev/dri/renderD128", "/dev/dxg")


class OpenGLNotFoundError(RuntimeError):
    """No OpenGL that works without a display; the message says what to install."""


@functools.cache
def find_backend() -> str:
    """Which OpenGL this process uses: `egl`, `osmesa` or `glfw`; decided once a process.

    Raises:
        OpenGLNotFoundError: if there is none, or MUJOCO_GL names one that cannot be used here.
    """
    wanted = os.environ.get("MUJOCO_GL", "").lower().strip()
    wanted = {"glx": "glfw"}.get(wanted, wanted)
    if wanted in _DEFAULTS:
        # Something else in this process may have bound PyOpenGL already (dm_control, mujoco.egl).
        wanted = os.environ.get("PYOPENGL_PLATFORM", "").lower()
        return wanted if wanted in _MODULES else _choose()
    if wanted not in _MODULES:
        raise OpenGLNotFoundError(
            f"MUJOCO_GL={os.environ['MUJOCO_GL']} draws nothing; unset it, or set egl or osmesa"
        )
    return wanted


def make_context() -> Any:
    """Makes an OpenGL context (MuJoCo's `GLContext`: `make_current`, `free`) to draw off screen.

    Raises:
        OpenGLNotFoundError: if no OpenGL is found, or the one found does not work.
    """
    backend = find_backend()
    try:
        # MuJoCo draws into its own framebuffer, so the context's is as small as can be.
        return importlib.import_module(_MODULES[backend]).GLContext(1, 1)
    except (
        Exception
    ) as error:  # the libraries' loaders raise anything: AttributeError, GLError, ...
        raise OpenGLNotFoundError(
            f"OpenGL through {backend} does not work ({type(error).__name__}: {error}); "
            f"set MUJOCO_GL to egl or osmesa to choose another, or {ADVICE}"
        ) from error


def _choose() -> str:
    has_gpu = any(Path(file).exists() for file in _GPU_FILES)
    # EGL is asked first only where there is a GPU: on others it would load a second copy of Mesa.
    if has_gpu and _egl_works():
        return "egl"
    if ctypes.util.find_library("OSMesa"):
        return "osmesa"
    if not has_gpu and _egl_works():
        return "egl"
    raise OpenGLNotFoundError(f"no OpenGL that works without a display was found; {ADVICE}")


def _egl_works() -> bool:
    """Whether EGL opens a device; asked through ctypes, as PyOpenGL would stay bound to EGL."""
    if not (ctypes.util.find_library("OpenGL") or ctypes.util.find_library("GL")):
        return False
    try:
        egl = ctypes.CDLL("libEGL.so.1")
        query_devices = _egl_extension(egl, b"eglQueryDevicesEXT", ctypes.c_uint)
        get_display = _egl_extension(egl, b"eglGetPlatformDisplayEXT", ctypes.c_void_p)
    except (OSError, AttributeError):
        return False
    devices, count = (ctypes.c_void_p * 64)(), ctypes.c_int()
    query_devices(64, devices, ctypes.byref(count))
    egl.eglInitialize.argtypes = [ctypes.c_void_p] * 3
    platform_device = 0x313F  # EGL_PLATFORM_DEVICE_EXT
    for device in devices[: count.value]:
        display = get_display(platform_device, ctypes.c_void_p(device), None)
        if display and egl.eglInitialize(display, None, None):
            return True
    return False


def _egl_extension(egl: ctypes.CDLL, name: bytes, result: Any) -> Any:
    egl.eglGetProcAddress.restype = ctypes.c_void_p
    address = egl.eglGetProcAddress(name)
    if not address:
        raise AttributeError(name)
    return ctypes.CFUNCTYPE(result, ctypes.c_uint, ctypes.c_void_p, ctypes.c_void_p)(address)


_ONE_CUBE = """<mujoco><worldbody><camera name="above" pos="0 0 3"/>
<light pos="0 0 3"/><geom type="box" size="1 1 1" rgba="1 1 1 1"/></worldbody></mujoco>"""


def draw_one_pixel() -> str:
    """Draws a white cube as one pixel, and returns the names of the backend and of the renderer.

    Raises:
        OpenGLNotFoundError: if there is no OpenGL, or it draws nothing.
    """
    import mujoco
    import numpy as np

    from act_lightning.sim.render import Renderer

    model = mujoco.MjModel.from_xml_string(_ONE_CUBE)
    data = mujoco.MjData(model)
    mujoco.mj_forward(model, data)
    renderer = Renderer(model, (1, 1), "fast")
    pixel = np.zeros((3, 1, 1), np.uint8)
    renderer.draw(data, 0, pixel)
    from OpenGL import GL

    name = f"{find_backend()} ({GL.glGetString(GL.GL_RENDERER).decode()})"
    renderer.close()
    if not pixel.all():
        raise OpenGLNotFoundError(f"{name} draws nothing; {ADVICE}")
    return name


def main() -> int:
    """Prints which OpenGL is used and returns 0, or what to install and returns 1."""
    try:
        print(f"OpenGL: {draw_one_pixel()}")
    except Exception as error:  # whatever the driver does, one line says so
        print(f"OpenGL: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
