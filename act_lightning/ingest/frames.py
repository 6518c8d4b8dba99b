"""Frames of a foreign data set on their way into a store: cameras chosen, one size, uint8."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from act_lightning.batch import DataSpec
from act_lightning.data.episode import Episode
from act_lightning.ingest.source import MAX_SIDE, IngestOptions, SourceError

FrameBlock = Callable[[int, int], NDArray[np.uint8]]
"""Reads frames start .. stop of one camera: (stop - start, h, w, 3) uint8 RGB, source's size."""


class CameraFrames:
    """`Frames` of one episode, from one function a camera; brought to one size on the way.

    Sizes are changed by averaging over areas (Pillow's BOX filter), each axis by itself, so another
    aspect ratio stretches the picture; enlarging repeats pixels.
    """

    shape: tuple[int, int, int, int, int]
    """(T, N, 3, H, W)."""

    def __init__(
        self,
        num_steps: int,
        image_size: tuple[int, int],
        cameras: Sequence[FrameBlock],
        *,
        swap_red_blue: bool = False,
    ) -> None:
        self.shape = (num_steps, len(cameras), 3, *image_size)
        self._cameras = tuple(cameras)
        self._swap_red_blue = swap_red_blue

    def read(self, camera: int, start: int, stop: int) -> NDArray[np.uint8]:
        """Frames start .. stop of a camera: (stop - start, H, W, 3) uint8, RGB.

        Raises:
            SourceError: from the camera's function.
        """
        frames = self._cameras[camera](start, stop)
        if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[3] != 3:
            raise AssertionError(f"a reader gave frames {frames.shape} {frames.dtype}")
        if self._swap_red_blue:
            frames = frames[..., ::-1]
        return resize(frames, self.shape[3:])


def resize(frames: NDArray[np.uint8], image_size: tuple[int, int]) -> NDArray[np.uint8]:
    """Brings (n, h, w, 3) frames to (n, H, W, 3) by averaging over areas; others stay as they are.

    Source: Pillow's BOX filter, which weighs each pixel by the area it covers.
    """
    height, width = image_size
    if frames.shape[1:3] == image_size:
        return frames
    resized = np.empty((len(frames), height, width, 3), np.uint8)
    for frame, out in zip(frames, resized, strict=True):
        image = Image.fromarray(np.ascontiguousarray(frame))
        out[...] = np.asarray(image.resize((width, height), Image.Resampling.BOX))
    return resized


def common_size(
    sizes: Mapping[str, tuple[int, int]], options: IngestOptions, where: str
) -> tuple[int, int]:
    """(H, W) of all cameras of the store: --image-size, or the size they share; (0, 0) for none.

    Args:
        sizes: (H, W) of each camera in the source, by name.
        options: of the command.
        where: the source, for the message.

    Raises:
        SourceError: a size is impossible, or they differ and no size was asked for.
    """
    for camera, size in sizes.items():
        if not all(0 < side <= MAX_SIDE for side in size):
            raise SourceError(f"{where}: camera {camera} has frames of {size[0]}x{size[1]} pixels")
    if options.image_size is not None and sizes:
        return options.image_size
    if len(set(sizes.values())) > 1:
        listed = ", ".join(f"{name} {height}x{width}" for name, (height, width) in sizes.items())
        raise SourceError(
            f"{where}: the cameras differ in size ({listed}), and a store has one; "
            "give --image-size H W, or choose with --cameras"
        )
    return next(iter(sizes.values()), (0, 0))


def choose_cameras(
    found: Sequence[str], options: IngestOptions, where: str
) -> tuple[tuple[str, str], ...]:
    """(name in the store, name in the source) of the cameras to take: those asked for, else all.

    Raises:
        SourceError: one asked for is not there; or the source's name cannot be one in a store.
    """
    if options.cameras is None:
        pairs = tuple((re.sub(r"[^A-Za-z0-9_.-]", "_", key), key) for key in found)
        if len({name for name, _ in pairs}) < len(pairs):
            raise SourceError(f"{where}: name the cameras with --cameras NAME={found[0]},...")
        return pairs
    for _, key in options.cameras:
        if key not in found:
            listed = ", ".join(found) or "no camera"
            raise SourceError(f"{where}: there is no camera {key}; it holds {listed}")
    return options.cameras


def check_same_cameras(
    found: set[str], first: set[str], options: IngestOptions, where: str
) -> None:
    """Sees that no camera is left out without a word, where all were asked for.

    Raises:
        SourceError: an episode has other cameras than the first that was read.
    """
    if options.cameras is None and found != first:
        raise SourceError(
            f"{where} has other cameras ({', '.join(sorted(found)) or 'none'}) than the first "
            f"episode ({', '.join(sorted(first)) or 'none'}); choose with --cameras"
        )


def make_episode(
    id: int,
    tables: Mapping[str, NDArray[Any]],
    cameras: Sequence[FrameBlock],
    spec: DataSpec,
    options: IngestOptions,
    success: bool | None = None,
) -> Episode:
    """An episode of (T, size) `tables`, by name in the store, and one function a camera."""
    frames = CameraFrames(
        len(tables["action"]), spec.image_size, cameras, swap_red_blue=options.swap_red_blue
    )
    return Episode(
        qpos=tables["qpos"],
        actions=tables["action"],
        env_state=tables.get("env_state"),
        images=frames if cameras else None,
        id=id,
        success=success,
    )


def exact_uint8(frames: NDArray[Any], where: str, start: int) -> NDArray[np.uint8]:
    """Frames as uint8, if that loses nothing: floats that are whole numbers from 0 to 255.

    Args:
        frames: (n, h, w, 3) of any type.
        where: file, episode and camera, for the message.
        start: step of the first frame, for the message.

    Raises:
        SourceError: a value is no whole number from 0 to 255.
    """
    if frames.dtype == np.uint8:
        return frames
    if frames.dtype.kind not in "fiu":
        raise SourceError(f"{where}: frames are {frames.dtype}, not numbers")
    with np.errstate(invalid="ignore"):
        converted = frames.astype(np.uint8)
    bad = np.argwhere(converted != frames)
    if len(bad):
        raise SourceError(
            f"{where}: frames are {frames.dtype}, and a value at step {start + int(bad[0][0])} is "
            f"{frames[tuple(bad[0])]}; only whole numbers from 0 to 255 are taken"
        )
    return converted
