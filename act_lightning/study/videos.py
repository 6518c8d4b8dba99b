"""Films as files: videos, animations in TensorBoard, and every failed episode at a glance.

Frames are those of `EpisodeResult.frames`: (F, 3, h, w) uint8 RGB. Files are written beside their
final names and then moved there.
"""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from tensorboard.compat.proto.summary_pb2 import Summary
from torch.utils.tensorboard import SummaryWriter

from act_lightning.new_file import write_file
from act_lightning.sim.results import EpisodeResult

Frames = NDArray[np.uint8]

GIF_SIZE = (240, 320)
"""(h, w) of an animation in pixels, at most."""
NUM_COLORS = 128
"""Colours of an animation."""
NUM_SHOWN = 6
"""Frames of an episode in a contact sheet."""
CELL_SIZE = (120, 160)
"""(h, w) of a frame in a contact sheet, in pixels, at most."""
PAGE_EPISODES = 100
"""Episodes on a page of a contact sheet, at most."""

_GIF_MAX_FPS = 50  # browsers play faster ones at 10
_GIF_LAST_MS = 1000
_LETTERS = 13
_NUM_COLUMNS = 2
_CAPTION_HEIGHT = 20
_GAP = 10
_FRAME_GAP = 2


def write_video(frames: Frames, path: Path, fps: float) -> None:
    """Writes an mp4 (H.264) that browsers play.

    Args:
        frames: (F, 3, h, w); odd sizes get another row or column, for H.264 halves its colours'.
        path: of the file; its folder exists.
        fps: frames a second.

    Raises:
        ValueError: if there is no frame, or `fps` is not positive.
    """
    _check(frames, fps)
    import av  # here: 17 MB of FFmpeg, which few verbs need

    even = np.pad(
        frames, ((0, 0), (0, 0), (0, frames.shape[2] % 2), (0, frames.shape[3] % 2)), mode="edge"
    )
    part = path.with_name(f"{path.name}.part")
    with av.open(str(part), "w", format="mp4", options={"movflags": "faststart"}) as container:
        stream = container.add_stream("libx264", Fraction(fps).limit_denominator(1000))
        stream.height, stream.width = even.shape[2:]
        stream.pix_fmt = "yuv420p"
        stream.options = {"crf": "20"}
        for frame in even:
            pixels = np.ascontiguousarray(frame.transpose(1, 2, 0))
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode(None))
    os.replace(part, path)


def encode_gif(frames: Frames, fps: float) -> bytes:
    """An animation that repeats, and holds its last frame for a second.

    It is shrunk to GIF_SIZE at most, and frames are left out where browsers could not keep up.

    Args:
        frames: (F, 3, h, w).
        fps: frames a second.

    Raises:
        ValueError: if there is no frame, or `fps` is not positive.
    """
    _check(frames, fps)
    stride = int(np.ceil(fps / _GIF_MAX_FPS))
    images = [_fit(frame, GIF_SIZE) for frame in frames[::stride]]
    # One palette for all: colours do not flicker, and what stands still costs nothing.
    sample = [np.asarray(image) for image in images[:: max(1, len(images) // 8)]]
    palette = Image.fromarray(np.concatenate(sample)).quantize(
        NUM_COLORS, method=Image.Quantize.MAXCOVERAGE
    )
    first, *others = (image.quantize(palette=palette, dither=Image.Dither.NONE) for image in images)
    # Times are multiples of 10 ms; rounding must not add up.
    times = (100 * stride / fps * np.arange(len(images) + 1)).round().astype(int) * 10
    durations = np.diff(times)
    durations[-1] = max(durations[-1], _GIF_LAST_MS)
    file = io.BytesIO()
    first.save(
        file, "gif", save_all=True, append_images=others, duration=durations.tolist(), loop=0
    )
    return file.getvalue()


def add_gif(writer: SummaryWriter, tag: str, frames: Frames, fps: float, step: int) -> None:
    """Adds an animation to TensorBoard's images; its own `add_video` needs moviepy.

    Args:
        writer: of the run.
        tag: name of the image.
        frames: (F, 3, h, w).
        fps: frames a second.
        step: optimizer steps taken.
    """
    encoded = encode_gif(frames, fps)
    width, height = Image.open(io.BytesIO(encoded)).size
    image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=encoded)
    summary = Summary(value=[Summary.Value(tag=tag, image=image)])
    writer._get_file_writer().add_summary(summary, step)  # type: ignore[no-untyped-call]


def write_contact_sheets(results: Sequence[EpisodeResult], folder: Path, stem: str) -> list[Path]:
    """Writes the pages of `contact_sheets` as <stem>.png, <stem>_2.png, ...

    Pages of the same name that an earlier call left and this one does not need are deleted.

    Returns:
        Paths of the pages, none without results.
    """
    pages = contact_sheets(results)
    paths = [folder / f"{stem}{f'_{i + 1}' if i else ''}.png" for i in range(len(pages))]
    for page, path in zip(pages, paths, strict=True):
        write_file(path, page)
    for old in (folder / f"{stem}.png", *folder.glob(f"{stem}_[0-9]*.png")):
        if old not in paths:
            old.unlink(missing_ok=True)
    return paths


def contact_sheets(results: Sequence[EpisodeResult]) -> list[bytes]:
    """Shows episodes at a glance: a few frames of each, below what there is to say about it.

    Args:
        results: the episodes, such as those that failed; those without frames are named only.

    Returns:
        Pages as PNG files, of at most PAGE_EPISODES each.
    """
    pages = [results[i : i + PAGE_EPISODES] for i in range(0, len(results), PAGE_EPISODES)]
    return [_draw_page(page, min(_NUM_COLUMNS, len(page))) for page in pages]


def caption(result: EpisodeResult) -> str:
    """An episode in one line: its world, its length, how far it came, and why it was stopped."""
    reached = [name for name, yes in result.stages.items() if yes]
    if reached:
        state = reached[-1]
    elif result.stage_names:
        state = f"not {result.stage_names[0]}"
    else:
        state = f"highest reward {result.max_reward:.3g}"
    parts = [f"world {result.seed}", f"{result.steps} steps", state]
    if result.error is not None:
        parts.append(" ".join(result.error.split()))
    return ", ".join(parts)


def _draw_page(results: Sequence[EpisodeResult], num_columns: int) -> bytes:
    pitch = CELL_SIZE[1] + _FRAME_GAP
    row, column = _CAPTION_HEIGHT + CELL_SIZE[0] + _GAP, NUM_SHOWN * pitch + _GAP
    num_rows = -(-len(results) // num_columns)
    page = Image.new("RGB", (num_columns * column + _GAP, num_rows * row + _GAP), "white")
    draw = ImageDraw.Draw(page)
    font = ImageFont.load_default(_LETTERS)
    for i, result in enumerate(results):
        x, y = i % num_columns * column + _GAP, i // num_columns * row + _GAP
        line = _shorten(caption(result), font, NUM_SHOWN * pitch)
        draw.text((x, y), line, "black" if result.error is None else "#b00000", font)
        frames = () if result.frames is None else result.frames
        chosen = np.linspace(0, len(frames) - 1, min(NUM_SHOWN, len(frames))).round().astype(int)
        for place, number in enumerate(chosen):
            cell = _fit(frames[number], CELL_SIZE)
            page.paste(cell, (x + place * pitch, y + _CAPTION_HEIGHT))
    file = io.BytesIO()
    page.save(file, "png")
    return file.getvalue()


def _shorten(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    """Cuts the end off a text that is wider than `width` pixels."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(f"{text}...") > width:
        text = text[:-1]
    return f"{text}..."


def _fit(frame: Frames, size: tuple[int, int]) -> Image.Image:
    """A frame (3, h, w) as a picture no larger than `size` (h, w), its shape kept."""
    image = Image.fromarray(np.ascontiguousarray(frame.transpose(1, 2, 0)))
    image.thumbnail((size[1], size[0]), Image.Resampling.BOX)
    return image


def _check(frames: Frames, fps: float) -> None:
    if frames.ndim != 4 or frames.shape[1] != 3 or len(frames) == 0:
        raise ValueError(f"frames are {frames.shape}; give (F, 3, h, w) with a frame at least")
    if not fps > 0:
        raise ValueError(f"fps={fps}; give more than 0")
