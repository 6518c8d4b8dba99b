"""Writes over a picture: a line of text, and paths that fade with time."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

COLORS = ((60, 255, 90), (255, 225, 0), (255, 90, 230), (80, 220, 255))
"""RGB of the first path, the second, ...; the first two are no object's in the ALOHA scenes."""

_SUPERSAMPLING = 3  # PIL draws lines without antialiasing
_FAINTEST = 0.25


def draw_overlay(
    image: NDArray[np.uint8], text: str, paths: Sequence[NDArray[np.floating]]
) -> NDArray[np.uint8]:
    """Writes `text` along the lower edge and draws `paths`, each in a colour of its own.

    Args:
        image: (h, w, 3) RGB; left as it is.
        text: one line.
        paths: (n, 2) places as (column, row) in pixels, soonest first; drawn from strong to faint.
            Places that are not finite or far outside are left out.

    Returns:
        (h, w, 3), a new picture.
    """
    height, width = image.shape[:2]
    picture = Image.fromarray(image).convert("RGBA")
    if any(len(path) for path in paths):
        picture.alpha_composite(_draw_paths((width, height), paths))
    picture.alpha_composite(_write((width, height), text))
    return np.asarray(picture.convert("RGB"))


def _draw_paths(size: tuple[int, int], paths: Sequence[NDArray[np.floating]]) -> Image.Image:
    """A transparent picture of `size` (w, h) with the paths."""
    layer = Image.new("RGBA", (size[0] * _SUPERSAMPLING, size[1] * _SUPERSAMPLING))
    draw = ImageDraw.Draw(layer)
    line = max(4, layer.height // 180)
    shown = [np.where(np.abs(path - np.divide(size, 2)) <= size, path, np.nan) for path in paths]
    # First wider and dark, so that a path is seen on light things too.
    for path in shown:
        _draw_path(draw, path * _SUPERSAMPLING, 2 * line, (0, 0, 0), 0.6)
    for number, path in enumerate(shown):
        _draw_path(draw, path * _SUPERSAMPLING, line, COLORS[number % len(COLORS)], 1.0)
    return layer.reduce(_SUPERSAMPLING)


def _draw_path(
    draw: ImageDraw.ImageDraw,
    path: NDArray[np.floating],
    width: int,
    color: tuple[int, int, int],
    strength: float,
) -> None:
    """Draws a path (n, 2) and a dot at its beginning; nothing where it is NaN."""
    fills = [
        (*color, round(255 * a)) for a in np.linspace(strength, strength * _FAINTEST, len(path))
    ]
    seen = np.isfinite(path).all(axis=-1)
    places = [(x, y) for x, y in path.tolist()]
    # The soonest last, above what comes after it.
    for i in reversed(range(len(path) - 1)):
        if seen[i] and seen[i + 1]:
            draw.line(places[i : i + 2], fill=fills[i], width=width)
    if seen[:1].any():
        (x, y), radius = places[0], width
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=fills[0])


def _write(size: tuple[int, int], text: str) -> Image.Image:
    """A transparent picture of `size` (w, h) with the text on a dark strip at the lower edge."""
    width, height = size
    layer = Image.new("RGBA", size)
    draw = ImageDraw.Draw(layer)
    letters = max(9, height // 22)
    strip = round(1.4 * letters)
    draw.rectangle((0, height - strip, width, height), fill=(0, 0, 0, 150))
    font = ImageFont.load_default(letters)
    draw.text((letters // 2, height - strip / 2), text, (255, 255, 255, 255), font, anchor="lm")
    return layer
