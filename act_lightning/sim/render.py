"""Draws cameras of a MuJoCo scene off screen, without a display.

Two qualities. `full` draws exactly what dm_control (so gym-aloha) draws of the same state, with
the scene's own shadow map and multisampling. `fast` is for software rendering, where those two cost
ten times the rest:
- no shadows (the map is 4096 x 4096 for every picture, however small);
- no multisampling; instead twice the height and width are drawn and 2 x 2 pixels averaged, which
  costs little because the time goes into vertices;
- vertices of a mesh closer than `MERGE_DISTANCE` are merged. gym-aloha's arms have 60 thousand
  triangles, most in details below a pixel; 18 thousand remain.
"""

from __future__ import annotations

import atexit
import copy
import weakref

import mujoco
import numpy as np
from numpy.typing import NDArray

from act_lightning.sim.config import Quality
from act_lightning.sim.opengl import ADVICE, OpenGLNotFoundError, find_backend, make_context

MERGE_DISTANCE = 0.0028
"""Edge of the cube within which `fast` merges vertices of a mesh, in m; 3 mm dents the fingers."""

_SUPERSAMPLING = 2
_MAX_SHAPES = 1000
_OFFSCREEN = mujoco.mjtFramebuffer.mjFB_OFFSCREEN.value
_EVEN_BYTES = np.uint64(0x00FF00FF00FF00FF)
_HALF = np.uint64(0x00020002)
_STRIP_ROWS = 32


class Renderer:
    """Draws any camera of one model at one size; holds an OpenGL context until `close`."""

    def __init__(self, model: mujoco.MjModel, size: tuple[int, int], quality: Quality) -> None:
        """Makes the context and uploads the model.

        Args:
            model: whose cameras are drawn. Later changes (colours, lights) show; meshes' do not.
            size: (H, W) of the pictures, in pixels.
            quality: see the module's docstring.

        Raises:
            OpenGLNotFoundError: if there is no OpenGL that works without a display.
        """
        self.size = size
        self._quality = quality
        scale = _SUPERSAMPLING if quality == "fast" else 1
        self._viewport = mujoco.MjrRect(0, 0, size[1] * scale, size[0] * scale)
        self._rgba = np.empty((self._viewport.height, self._viewport.width, 4), np.uint8)
        self._model = model
        self._scene = mujoco.MjvScene(model, _MAX_SHAPES)
        # Meshes and settings of quality are read once, when the context is made: from a copy.
        uploaded = copy.copy(model)
        uploaded.vis.global_.offheight = self._viewport.height
        uploaded.vis.global_.offwidth = self._viewport.width
        if quality == "fast":
            self._scene.flags[mujoco.mjtRndFlag.mjRND_SHADOW] = 0
            uploaded.vis.quality.offsamples = 0
            uploaded.vis.quality.shadowsize = 1
            _merge_vertices(uploaded, MERGE_DISTANCE)
        self._option = mujoco.MjvOption()
        self._option.flags[mujoco.mjtVisFlag.mjVIS_RANGEFINDER] = 0
        self._perturbation = mujoco.MjvPerturb()
        self._camera = mujoco.MjvCamera()
        self._camera.type = mujoco.mjtCamera.mjCAMERA_FIXED
        self._gl = _GLResources(uploaded)
        self._close = weakref.finalize(self, self._gl.free)
        # Exit handlers run last in, first out: this one before mujoco.egl's, which shuts EGL down.
        self._close.atexit = False
        atexit.register(self._close)

    def draw(self, data: mujoco.MjData, camera: int, out: NDArray[np.uint8]) -> None:
        """Draws what `camera` (an id) sees of `data` into `out`, (3, H, W) uint8 RGB."""
        self._gl.context.make_current()
        self._camera.fixedcamid = camera
        mujoco.mjv_updateScene(
            self._model,
            data,
            self._option,
            self._perturbation,
            self._camera,
            mujoco.mjtCatBit.mjCAT_ALL.value,
            self._scene,
        )
        mujoco.mjr_render(self._viewport, self._scene, self._gl.drawing)
        if self._quality == "fast":
            self._read_averaged(out)
        else:
            height, width = self.size
            pixels = np.empty((height, width, 3), np.uint8)
            mujoco.mjr_readPixels(pixels, None, self._viewport, self._gl.drawing)
            out[:] = pixels[::-1].transpose(2, 0, 1)

    def close(self) -> None:
        """Frees the OpenGL context; further calls do nothing."""
        self._close()
        atexit.unregister(self._close)

    def _read_averaged(self, out: NDArray[np.uint8]) -> None:
        # Loaded late: PyOpenGL binds to a platform when imported; `make_context` has chosen it.
        from OpenGL import GL

        height, width, _ = self._rgba.shape
        # RGBA is how the framebuffer is stored: a tenth of mjr_readPixels' time, which drops A.
        GL.glReadPixels(0, 0, width, height, GL.GL_RGBA, GL.GL_UNSIGNED_BYTE, self._rgba)
        _average_2x2(self._rgba[::-1], out)


def _average_2x2(rgba: NDArray[np.uint8], out: NDArray[np.uint8]) -> None:
    """Averages (2H, 2W, 4) over 2 x 2 pixels, rounded, into `out` (3, H, W), without A.

    Every second byte of eight is summed at a time, in 16 bits, which hold the sum of four; and few
    rows at a time, to stay within the processor's cache (a third of the time at 480 x 640).
    """
    # Two neighbours in each 64-bit number: rows are summed in pairs, then a number's halves.
    pixels = rgba.reshape(len(rgba), -1, 8).view(np.uint64)[..., 0]
    for top in range(0, out.shape[1], _STRIP_ROWS):
        strip = out[:, top : top + _STRIP_ROWS]
        rows = pixels[2 * top : 2 * (top + _STRIP_ROWS)]
        upper, lower = rows[::2], rows[1::2]
        red_blue = upper & _EVEN_BYTES
        red_blue += lower & _EVEN_BYTES
        green = upper >> 8 & _EVEN_BYTES
        green += lower >> 8 & _EVEN_BYTES
        for sums in (red_blue, green):
            sums += sums >> 32
            sums += _HALF
            sums >>= 2
        strip[0] = red_blue
        strip[1] = green
        strip[2] = red_blue >> 16


class _GLResources:
    """What must be freed with its own OpenGL context current, and before the interpreter's end."""

    def __init__(self, model: mujoco.MjModel) -> None:
        self.context = make_context()
        self.context.make_current()
        try:
            self.drawing = mujoco.MjrContext(model, mujoco.mjtFontScale.mjFONTSCALE_150.value)
        except mujoco.FatalError as error:  # glfw without a display fails no earlier
            raise OpenGLNotFoundError(
                f"OpenGL through {find_backend()} cannot draw ({error}); "
                f"set MUJOCO_GL to egl or osmesa to choose another, or {ADVICE}"
            ) from error
        mujoco.mjr_setBuffer(_OFFSCREEN, self.drawing)

    def free(self) -> None:
        self.context.make_current()
        self.drawing.free()
        self.context.free()
        # The libraries' own destructors must not run at the interpreter's end.
        del self.drawing, self.context


def _merge_vertices(model: mujoco.MjModel, distance: float) -> None:
    """Merges vertices of a mesh within a cube of edge `distance`; drops the faces left empty."""
    for mesh in range(model.nmesh):
        first_vertex, first_face = model.mesh_vertadr[mesh], model.mesh_faceadr[mesh]
        vertices = model.mesh_vert[first_vertex : first_vertex + model.mesh_vertnum[mesh]]
        rows = slice(first_face, first_face + model.mesh_facenum[mesh])
        cubes = np.floor(vertices / distance).astype(np.int64)
        _, members, cube_of = np.unique(cubes, axis=0, return_index=True, return_inverse=True)
        faces = members[cube_of.ravel()][model.mesh_face[rows]]
        kept = (faces != np.roll(faces, 1, axis=1)).all(axis=1)
        normals = model.mesh_facenormal[rows][kept]
        model.mesh_facenum[mesh] = len(normals)
        rows = slice(first_face, first_face + len(normals))
        model.mesh_face[rows], model.mesh_facenormal[rows] = faces[kept], normals
