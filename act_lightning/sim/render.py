"""Draws cameras of a MuJoCo scene off screen, without a display.

Two qualities. `full` draws exactly what dm_control (so gym-aloha) draws of the same state, with
the scene's own shadow map and multisampling. `fast` is for software rendering, where those two cost
ten times the rest:
- no shadows (the map is 4096 x 4096 for every picture, however small);
- no multisampling; instead twice the height and width are drawn and 2 x 2 pixels averaged, which
  costs little because the time goes into vertices;
- vertices of a mesh closer than `MERGE_DISTANCE` are merged. gym-aloha's arms have 60 thousand
  triangles, most in details below a pixel; merged at 2 mm 22 thousand remain.
"""

from __future__ import annotations

import atexit
import copy
import weakref

import mujoco
import numpy as np
from numpy.typing import NDArray

from act_lightning.sim.config import Quality
from act_lightning.sim.opengl import make_context

MERGE_DISTANCE = 0.002
"""Edge of the cube within which `fast` merges the vertices of a mesh, in m."""

_SUPERSAMPLING = 2
_MAX_SHAPES = 1000
_OFFSCREEN = mujoco.mjtFramebuffer.mjFB_OFFSCREEN.value
_EVEN_BYTES = np.uint32(0x00FF00FF)


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
        """Reads the picture and averages 2 x 2 pixels, two of a pixel's four bytes at a time."""
        # Loaded late: PyOpenGL binds to a platform when imported; `make_context` has chosen it.
        from OpenGL import GL

        height, width = self._viewport.height, self._viewport.width
        # Bytes: of an array of another type PyOpenGL makes a copy, too small for the picture.
        rgba = np.empty((height, width, 4), np.uint8)
        # RGBA is how the framebuffer is stored: a tenth of mjr_readPixels' time, which drops A.
        GL.glReadPixels(0, 0, width, height, GL.GL_RGBA, GL.GL_UNSIGNED_BYTE, rgba)
        pixels = rgba.view(np.uint32)[..., 0]
        upper, lower = pixels[::-2], pixels[-2::-2]
        red_blue = (upper & _EVEN_BYTES) + (lower & _EVEN_BYTES)
        green = (upper >> 8 & _EVEN_BYTES) + (lower >> 8 & _EVEN_BYTES)
        red_blue = red_blue[:, ::2] + red_blue[:, 1::2] + np.uint32(0x00020002) >> 2
        green = green[:, ::2] + green[:, 1::2] + np.uint32(2) >> 2
        out[0] = red_blue
        out[1] = green
        out[2] = red_blue >> 16


class _GLResources:
    """What must be freed with its own OpenGL context current, and before the interpreter's end."""

    def __init__(self, model: mujoco.MjModel) -> None:
        self.context = make_context()
        self.context.make_current()
        self.drawing = mujoco.MjrContext(model, mujoco.mjtFontScale.mjFONTSCALE_150.value)
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
