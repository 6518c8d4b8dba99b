"""Pixels of many pictures at once, each moved, enlarged and coloured in its own way.

Sources, and departures from them:
- Shift: DrQ (Kostrikov et al. 2020): pad with the edge, cut out at random. The `CropRandomizer` of
  robomimic and diffusion_policy (cut out a smaller window at random, in evaluation the middle one)
  is the same movement, but its policy never sees the border, and network and evaluation have to
  know the window. Here they need not: the middle of all shifts is the picture itself.
- Window: torchvision's `RandomResizedCrop` at constant aspect. It adds what a shift lacks, a change
  of scale. The size of the window is drawn too, up to the whole picture: one fixed size would show
  the network one magnification in training and another in evaluation.
- Colours: torchvision's `ColorJitter`, its formulas and ranges, but always in the order brightness,
  contrast, saturation, hue, where it draws one: they commute, but for clipping and for what a turn
  of hue does to grey. Rounded to uint8 once, at the end; torchvision truncates after each.

Shapes: M pictures, H x W pixels; float pictures go from 0 to 255.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import grid_sample

GREY = (0.2989, 0.587, 0.114)
"""Weights of red, green and blue, as in torchvision."""
WHITE = 255.0


def shift(pictures: Tensor, down: Tensor, right: Tensor) -> Tensor:
    """Moves pictures by whole pixels; the edge fills up what is left free.

    Args:
        pictures: (M, 3, H, W), of any type.
        down: (M,) rows from a pixel of the result to the pixel that it shows.
        right: (M,) columns, likewise.

    Returns:
        (M, 3, H, W), channels-last in memory, whatever they were.
    """
    count, channels, height, width = pictures.shape
    rows = (_places(height, down) + down[:, None]).clamp(0, height - 1).long()
    columns = (_places(width, right) + right[:, None]).clamp(0, width - 1).long()
    first = torch.arange(count, device=pictures.device)[:, None] * height
    pixels = (first + rows)[:, :, None] * width + columns[:, None, :]
    # A pixel's colours lie together, and are copied together.
    flat = pictures.permute(0, 2, 3, 1).reshape(-1, channels)
    moved = flat.index_select(0, pixels.flatten())
    return moved.view(count, height, width, channels).permute(0, 3, 1, 2)


def resample(
    pictures: Tensor, rows: tuple[Tensor, Tensor, Tensor], columns: tuple[Tensor, Tensor, Tensor]
) -> Tensor:
    """Shows a window of each shifted picture at full size, in one pass.

    Bilinear: `interpolate(window, align_corners=False)` of the picture that `shift` returns.

    Args:
        pictures: (M, 3, H, W) float.
        rows: (M,) each: how far down the picture is shifted, where the window begins, and how many
            rows it has; whole pixels.
        columns: likewise.
    """
    height, width = pictures.shape[-2:]
    grid = pictures.new_empty(len(pictures), height, width, 2)
    grid[..., 0] = _grid(width, *columns)[:, None, :]
    grid[..., 1] = _grid(height, *rows)[:, :, None]
    return grid_sample(pictures, grid, padding_mode="border", align_corners=True)


def adjust_brightness(pictures: Tensor, factors: Tensor) -> Tensor:
    """Scales the colours of (M, 3, H, W) float pictures by (M,) factors."""
    return (pictures * factors[:, None, None, None]).clamp_(0, WHITE)


def adjust_contrast(pictures: Tensor, factors: Tensor) -> Tensor:
    """Scales the distance to each picture's mean grey."""
    mean = _grey(pictures).mean(dim=(1, 2, 3), keepdim=True)
    return mean.lerp(pictures, factors[:, None, None, None]).clamp_(0, WHITE)


def adjust_saturation(pictures: Tensor, factors: Tensor) -> Tensor:
    """Scales the distance of each pixel to its own grey."""
    return _grey(pictures).lerp(pictures, factors[:, None, None, None]).clamp_(0, WHITE)


def adjust_hue(pictures: Tensor, turns: Tensor) -> Tensor:
    """Turns the circle of hues, at equal saturation and value (HSV).

    A channel of the result is `high - chroma * f(how far the hue is from the channel's own)`:
    torchvision's six cases in one formula.

    Args:
        pictures: (M, 3, H, W) float.
        turns: (M,) from -0.5 to 0.5.
    """
    red, green, blue = pictures.unbind(1)
    high = pictures.amax(1)
    chroma = high - pictures.amin(1)
    per_chroma = 1 / chroma.clamp(min=1e-6)  # grey has no hue: any will do
    sixths = torch.where(
        high == red,
        (green - blue) * per_chroma,
        torch.where(high == green, (blue - red) * per_chroma + 2, (red - green) * per_chroma + 4),
    )
    sixths = sixths + 6 * turns[:, None, None]
    turned = []
    for own in (5, 3, 1):
        distance = (sixths + own).remainder(6)
        turned.append(high - chroma * distance.minimum(4 - distance).clamp_(0, 1))
    return torch.stack(turned, dim=1)


def _grey(pictures: Tensor) -> Tensor:
    """(M, 3, H, W) to (M, 1, H, W)."""
    red, green, blue = pictures.unbind(1)
    return (GREY[0] * red + GREY[1] * green + GREY[2] * blue)[:, None]


def _grid(length: int, move: Tensor, start: Tensor, window: Tensor) -> Tensor:
    """(M, length) places that the pixels of an axis show, as grid_sample counts: from -1 to 1."""
    inside = (_places(length, move) + 0.5) * (window / length)[:, None] - 0.5
    inside = inside.clamp(min=0).minimum(window[:, None] - 1)
    places = (start + move)[:, None] + inside
    return 2 * places.clamp(0, length - 1) / max(length - 1, 1) - 1


def _places(length: int, like: Tensor) -> Tensor:
    """(length,) numbers of the pixels along an axis, on the device of `like`."""
    return torch.arange(length, device=like.device, dtype=like.dtype)
