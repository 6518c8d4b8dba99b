"""Augmentation of training batches, on the device they are on: shift, crop, colours, qpos noise.

Every sample, and each of its cameras, is augmented in its own way, and that way is a pure function
of (seed, place of the sample in the order of training). So it does not depend on ranks, batch size,
loader or device, and a resumed run repeats it; torchvision and robomimic draw from wherever a
generator happens to be. Random numbers are drawn on the CPU, ten for a picture, and go to the
device as two small tensors. `nets.pixels` says what is done to pictures, and after whom.

Shapes: B batch, N cameras, M = B * N pictures, H x W pixels, D qpos.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from act_lightning.batch import Batch, DataSpec
from act_lightning.nets.pixels import (
    adjust_brightness,
    adjust_contrast,
    adjust_hue,
    adjust_saturation,
    resample,
    shift,
)

PICTURES, QPOS, LATENT = 2**63, 2**63 + 1, 2**63 + 2
"""Second halves of Philox's key; `data.order` uses small ones, the numbers of passes."""
COLOURS = {
    "brightness": adjust_brightness,
    "contrast": adjust_contrast,
    "saturation": adjust_saturation,
    "hue": adjust_hue,
}
"""What each setting does to colours, in this order."""


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """Random changes to training observations. The defaults change nothing, and cost nothing."""

    shift: int = 0
    """Move each picture by up to so many pixels, up or down and left or right; its edge fills up
    what is left free."""
    crop: float = 1.0
    """Show a window of each picture, enlarged to the picture's size. Height and width of the window
    are a random share of the picture's, between this and 1; 1 is off."""
    brightness: float = 0.0
    """Multiply colours by a random factor between 1 - this (at least 0) and 1 + this."""
    contrast: float = 0.0
    """Multiply the distance of colours to the picture's mean grey by a random factor between 1 -
    this (at least 0) and 1 + this."""
    saturation: float = 0.0
    """Multiply the distance of colours to their own grey by a random factor between 1 - this (at
    least 0) and 1 + this."""
    hue: float = 0.0
    """Turn the circle of hues by a random share of a full turn, up to this either way; at most 0.5:
    then any hue may become any other."""
    qpos_noise: float = 0.0
    """Standard deviation of normal noise on qpos, in standard deviations of each joint over the
    training demonstrations: one number for radians and grippers, and little for a joint that hardly
    moves."""

    def __post_init__(self) -> None:
        if not 0 < self.crop <= 1:
            raise ValueError(f"augment.crop={self.crop}; give a share above 0, and at most 1")
        if not 0 <= self.hue <= 0.5:
            raise ValueError(f"augment.hue={self.hue}; give a share of a turn from 0 to 0.5")
        for name in ("shift", "brightness", "contrast", "saturation", "qpos_noise"):
            value = getattr(self, name)
            if not 0 <= value < math.inf:
                raise ValueError(f"augment.{name}={value}; give 0 (off) or more")

    @property
    def active(self) -> tuple[str, ...]:
        """Names of the settings that are not off."""
        return tuple(f.name for f in fields(self) if getattr(self, f.name) != f.default)


class PictureDraws(NamedTuple):
    """What happens to M pictures: (M,) float32 each, in pixels where no unit is given."""

    down: Tensor
    """Rows from a pixel of the result to the pixel that it shows; whole."""
    right: Tensor
    """Columns, likewise."""
    top: Tensor
    """First row of the window; whole, like the next three."""
    left: Tensor
    height: Tensor
    width: Tensor
    brightness: Tensor
    """Factor, like the next two."""
    contrast: Tensor
    saturation: Tensor
    hue: Tensor
    """Turns, from -0.5 to 0.5."""


class Augmentation:
    """Augments batches of training as an `AugmentConfig` says."""

    def __init__(self, config: AugmentConfig, spec: DataSpec, seed: int) -> None:
        """Decides what takes part.

        Raises:
            ValueError: pictures are to be changed, but there are none, or they are too small.
        """
        pictures = [name for name in config.active if name != "qpos_noise"]
        if pictures and not spec.cameras:
            raise ValueError(
                f"augment.{pictures[0]}={getattr(config, pictures[0])}, but observations have no "
                "cameras; leave it out, or set env.cameras"
            )
        if spec.cameras and config.shift >= min(spec.image_size):
            height, width = spec.image_size
            raise ValueError(
                f"augment.shift={config.shift} moves pictures of {height}x{width} out of sight; "
                "give less"
            )
        self.config = config
        self.spec = spec
        self.seed = seed
        self._active = bool(config.active)
        self._pictures = bool(pictures)
        self._crops = config.crop < 1  # and shifts by the way
        self._shifts = config.shift > 0 and not self._crops
        self._colours = {name: step for name, step in COLOURS.items() if name in pictures}

    def __call__(self, batch: Batch, qpos_std: Tensor) -> Batch:
        """Augments a batch; with everything off, returns the very batch.

        Args:
            batch: of training, with its position.
            qpos_std: (D,) standard deviations of qpos over the demonstrations.

        Returns:
            A batch with other images, uint8 and channels-last in memory, and another qpos.

        Raises:
            ValueError: the batch does not say its position.
        """
        if not self._active:
            return batch
        if batch.position is None:
            raise ValueError(
                "augmentation is on, but Batch.position is None, from which a sample's random "
                "numbers follow; let the loader set it, as act_lightning.data does"
            )
        observation = batch.observation
        if self.config.qpos_noise:
            noise = draw_normal(self.seed, QPOS, batch.position, *observation.qpos.shape)
            noise = noise.to(qpos_std.device, non_blocking=True)
            qpos = observation.qpos + self.config.qpos_noise * qpos_std * noise
            observation = replace(observation, qpos=qpos)
        if self._pictures and observation.images is not None:
            drawn = draw_pictures(self.config, self.spec, self.seed, batch.position, len(batch))
            drawn = drawn.to(observation.images.device, non_blocking=True)
            pictures = self._augment(observation.images.flatten(0, 1), PictureDraws(*drawn))
            observation = replace(observation, images=pictures.view(observation.images.shape))
        return replace(batch, observation=observation)

    def _augment(self, pictures: Tensor, draws: PictureDraws) -> Tensor:
        """(M, 3, H, W) uint8 to the same."""
        if self._shifts:
            pictures = shift(pictures, draws.down, draws.right)
        if not (self._crops or self._colours):
            return pictures
        # Planes apart from each other in memory, because colours are mixed plane by plane.
        planes = pictures.to(torch.float32, memory_format=torch.contiguous_format)
        if self._crops:
            rows = (draws.down, draws.top, draws.height)
            planes = resample(planes, rows, (draws.right, draws.left, draws.width))
        for name, adjust in self._colours.items():
            planes = adjust(planes, getattr(draws, name))
        return planes.round_().to(torch.uint8, memory_format=torch.channels_last)


# ---- random numbers -----------------------------------------------------------------------------


def draw_uniform(
    seed: int, purpose: int, start: int, rows: int, columns: int
) -> NDArray[np.float64]:
    """Random numbers of samples start .. start + rows, each a function of its place alone.

    Every sample owns a run of Philox's counter, so nothing has to be drawn for those before it.
    The bits are numpy's raw ones, which it guarantees never to change.

    Returns:
        (rows, columns), uniform between 0 and 1, both excluded.
    """
    blocks = -(-columns // 4)  # a count of Philox's counter is worth four numbers
    philox = np.random.Philox(key=np.array([seed, purpose], np.uint64), counter=start * blocks)
    raw = philox.random_raw(rows * blocks * 4).reshape(rows, -1)[:, :columns]
    return ((raw >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52


def draw_normal(seed: int, purpose: int, start: int, rows: int, columns: int) -> Tensor:
    """(rows, columns) float32 standard normal numbers of samples start .. start + rows."""
    uniform = torch.from_numpy(draw_uniform(seed, purpose, start, rows, columns))
    noise: Tensor = torch.special.ndtri(uniform)
    return noise.float()


def draw_pictures(
    config: AugmentConfig, spec: DataSpec, seed: int, start: int, rows: int
) -> Tensor:
    """Draws what happens to the pictures of samples start .. start + rows.

    Whether one setting is on does not change what is drawn for another.

    Returns:
        (10, M) float32, the fields of `PictureDraws`; camera by camera within sample by sample.
    """
    num_draws = 9
    uniform = draw_uniform(seed, PICTURES, start, rows, len(spec.cameras) * num_draws)
    down, right, side, top, left, *factors, hue = uniform.reshape(-1, num_draws).T
    moves = np.floor(np.stack([down, right]) * (2 * config.shift + 1)) - config.shift
    size = np.array(spec.image_size)[:, None]
    window = np.rint((config.crop + (1 - config.crop) * side) * size).clip(1)
    corner = np.floor(np.stack([top, left]) * (size - window + 1))
    reach = np.array([[config.brightness], [config.contrast], [config.saturation]])
    low, high = np.maximum(1 - reach, 0), 1 + reach
    colours = [*(low + (high - low) * np.stack(factors)), config.hue * (2 * hue - 1)]
    drawn = np.concatenate([moves, corner, window, colours])
    return torch.from_numpy(drawn.astype(np.float32))
