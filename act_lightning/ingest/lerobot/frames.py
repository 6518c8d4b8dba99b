"""Frames of a LeRobotDataset: decoded from mp4 or from images in parquet, in order, few at a time.

A frame belongs to a step by its time: step i of an episode is the frame at the episode's start plus
i / fps, within LeRobot's own tolerance. LeRobot takes the nearest frame; here frames are also
counted, so that one missing or too many is an error and not a picture of another moment.
"""

from __future__ import annotations

import io
import zlib
from collections.abc import Iterator
from itertools import islice

import av
import numpy as np
from av.video.reformatter import VideoReformatter
from numpy.typing import NDArray
from PIL import Image

from act_lightning.ingest.lerobot.index import Segment
from act_lightning.ingest.lerobot.rows import Rows, brief
from act_lightning.ingest.source import SourceError

TOLERANCE = 1e-4
"""Seconds between a step's time and its frame's: `tolerance_s` of LeRobotDataset."""
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


class ImageColumn:
    """One camera's frames of one episode, PNG or JPEG in a parquet column."""

    def __init__(
        self, rows: Rows, key: str, first_row: int, image_size: tuple[int, int], where: str
    ) -> None:
        self._rows = rows
        self._key = key
        self._first_row = first_row
        self._image_size = image_size
        self._where = where

    def __call__(self, start: int, stop: int) -> NDArray[np.uint8]:
        """Frames start .. stop of the episode: (stop - start, H, W, 3)."""
        frames = np.empty((stop - start, *self._image_size, 3), np.uint8)
        for step in range(start, stop):
            row = self._first_row + step
            try:
                cell = self._rows.read(row, row + 1).column(self._key)[0].as_py()
                frames[step - start] = decode_image(cell["bytes"], self._image_size)
            except SourceError as error:
                raise SourceError(f"{error} ({self._where}, step {step})") from error
            except Exception as error:  # Pillow raises what it likes
                raise SourceError(
                    f"{self._rows.path}: {self._where}, step {step}: the image is damaged "
                    f"({brief(error)})"
                ) from error
        return frames


def decode_image(content: bytes | None, image_size: tuple[int, int]) -> NDArray[np.uint8]:
    """A PNG or JPEG as (H, W, 3) RGB.

    Raises:
        ValueError: it is missing, damaged, or of another size or kind; and what Pillow raises.
    """
    if content is None:
        raise ValueError("no bytes; images kept as separate files are not read")
    if content.startswith(PNG_SIGNATURE):
        check_png(content)
    with Image.open(io.BytesIO(content), formats=("PNG", "JPEG")) as image:
        if (image.height, image.width) != image_size or image.mode != "RGB":
            height, width = image_size
            raise ValueError(f"{image.height}x{image.width} {image.mode}, not {height}x{width} RGB")
        return np.asarray(image)


def check_png(content: bytes) -> None:
    """Checks the checksum of every chunk, which Pillow does not do for the pixels.

    Raises:
        ValueError: one is wrong, or the file is cut short.

    Source: PNG specification, section 5.3.
    """
    position, kind = len(PNG_SIGNATURE), b""
    while kind != b"IEND":
        size = int.from_bytes(content[position : position + 4], "big")
        end = position + 8 + size
        kind = content[position + 4 : position + 8]
        if zlib.crc32(content[position + 4 : end]).to_bytes(4, "big") != content[end : end + 4]:
            raise ValueError(f"wrong checksum in the chunk at byte {position}")
        position = end + 4
    if position != len(content):
        raise ValueError(f"{len(content) - position} bytes too many")


class VideoSegment:
    """One camera's frames of one episode, in an mp4 file.

    Args:
        segment: where they are.
        num_steps: how many they must be.
        fps: frames a second.
        image_size: (H, W) that they must have.
        where: episode and camera, for messages.
    """

    def __init__(
        self,
        segment: Segment,
        num_steps: int,
        fps: float,
        image_size: tuple[int, int],
        where: str,
    ) -> None:
        self._segment = segment
        self._num_steps = num_steps
        self._fps = fps
        self._image_size = image_size
        self._where = where
        self._frames: Iterator[av.VideoFrame] = iter(())
        self._next = -1

    def __call__(self, start: int, stop: int) -> NDArray[np.uint8]:
        """Frames start .. stop of the episode: (stop - start, H, W, 3); quick when asked in order.

        Raises:
            SourceError: a frame is missing, too many, damaged, or of another size.
        """
        if start != self._next:
            self._frames = islice(self._steps(), start, None)
        self._next = stop
        frames = np.empty((stop - start, *self._image_size, 3), np.uint8)
        # One for all: it starts threads, and each frame's own would start more.
        convert = VideoReformatter().reformat
        for out in frames:
            frame = next(self._frames)
            try:
                out[...] = convert(frame, format="rgb24").to_ndarray()
            except Exception as error:  # libav's errors are many
                raise SourceError(
                    f"{self._segment.path}: {self._where}, steps {start} to {stop - 1}: "
                    f"colours cannot be converted ({brief(error)})"
                ) from error
        return frames

    def _steps(self) -> Iterator[av.VideoFrame]:
        """The frame of each step, each once it is known that none follows where none should be."""
        segment, half = self._segment, 0.5 / self._fps
        step, last = 0, None
        for time, frame in self._decoded():
            expected = segment.start + step / self._fps
            if step == 0 and time < expected - half and segment.start > 0:
                continue  # of the episode before, on the way here from a key frame
            if time > segment.stop - half and step == self._num_steps:
                break
            if step == self._num_steps or time < expected - TOLERANCE:
                raise self._error(step, f"a frame too many, at {time:.4f} s")
            if time > expected + TOLERANCE:
                raise self._error(
                    step, f"no frame at {expected:.4f} s; the next one is at {time:.4f} s"
                )
            if last is not None:
                yield last
            step, last = step + 1, frame
        if step < self._num_steps:
            raise self._error(step, f"the video ends; {self._num_steps} frames were expected")
        assert last is not None
        yield last

    def _decoded(self) -> Iterator[tuple[float, av.VideoFrame]]:
        """Time in seconds and frame, from the key frame at or before the segment's start on."""
        path = self._segment.path
        decoded = 0
        try:
            # The format is named, as a damaged file may be taken for one of another kind.
            with av.open(str(path), format="mp4", metadata_errors="replace") as container:
                stream = container.streams.video[0]
                self._check_size(stream.codec_context.height, stream.codec_context.width)
                # Stop at damage, rather than paint over it from the pictures around.
                stream.codec_context.options = {"err_detect": "explode"}
                if self._segment.start > 0 and stream.time_base:
                    ticks = round(self._segment.start / stream.time_base) - 1
                    container.seek(ticks, backward=True, any_frame=False, stream=stream)
                for packet in container.demux(stream):
                    for frame in packet.decode():
                        if packet.is_corrupt or frame.is_corrupt or frame.time is None:
                            raise ValueError("a damaged packet")
                        self._check_size(frame.height, frame.width)
                        yield frame.time, frame
                        decoded += 1
        except (SourceError, GeneratorExit):
            raise
        except FileNotFoundError as error:
            raise SourceError(f"{path} does not exist ({self._where})") from error
        except Exception as error:  # libav's errors are many, and some are not its own
            raise SourceError(
                f"{path}: {self._where}: {decoded} frames on, the video is damaged "
                f"({brief(error)}); fetch it anew"
            ) from error

    def _check_size(self, height: int, width: int) -> None:
        if (height, width) != self._image_size:
            size = "x".join(map(str, self._image_size))
            raise SourceError(
                f"{self._segment.path}: {self._where}: frames of {height}x{width} pixels, "
                f"info.json says {size}"
            )

    def _error(self, step: int, what: str) -> SourceError:
        return SourceError(f"{self._segment.path}: {self._where}, step {step}: {what}")
