"""Files of a LeRobotDataset v3.0 as they are written: many episodes a file, up to a size.

A new file begins with the episode that, at the file's mean size a step, would take it past its
limit; LeRobot's own writer decides so too. Nothing but the rows or frames at hand is in memory.
"""

from __future__ import annotations

from collections.abc import Iterable
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from av.video.frame import PictureType
from numpy.typing import NDArray

CHUNKS_SIZE = 1000
"""Files a folder."""
CODEC = "h264"
PIXEL_FORMAT = "yuv420p"
GOP = 2
"""Every second frame is a key frame, as LeRobot has it: a random frame costs at most two."""
MEGABYTE = 2**20


class Place(NamedTuple):
    """Where an episode goes."""

    chunk: int
    file: int
    first_step: int
    """Steps in the file before it."""


class Numbers:
    """Chooses the file of each episode."""

    def __init__(self, limit_mb: float) -> None:
        self._limit = limit_mb * MEGABYTE
        self._number = 0
        self._steps = 0

    def place(self, num_steps: int, size: int) -> Place:
        """Where the next episode goes.

        Args:
            num_steps: that it has.
            size: bytes of the file written so far.
        """
        if self._steps and size + size / self._steps * num_steps >= self._limit:
            self._number += 1
            self._steps = 0
        place = Place(*divmod(self._number, CHUNKS_SIZE), self._steps)
        self._steps += num_steps
        return place


class TableFiles:
    """Parquet files, with a checksum a page.

    Args:
        root: folder of the data set.
        pattern: of the files' paths, with `chunk_index` and `file_index`.
        limit_mb: size from which on a new file begins.
    """

    def __init__(self, root: Path, pattern: str, limit_mb: float) -> None:
        self._root = root
        self._pattern = pattern
        self._numbers = Numbers(limit_mb)
        self._writer: pq.ParquetWriter | None = None
        self._path: Path | None = None

    def place(self, num_rows: int) -> Place:
        """Where the next rows go; they are to be written before the next call."""
        size = self._path.stat().st_size if self._path is not None else 0
        place = self._numbers.place(num_rows, size)
        if place.first_step == 0:
            self.close()
            path = self._pattern.format(chunk_index=place.chunk, file_index=place.file)
            self._path = self._root / path
        return place

    def write(self, table: pa.Table) -> None:
        """Adds rows, as a row group of their own."""
        assert self._path is not None
        if self._writer is None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._writer = pq.ParquetWriter(self._path, table.schema, write_page_checksum=True)
        self._writer.write_table(table)

    def close(self) -> None:
        """Completes the file that is being written."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None


class VideoFiles:
    """The mp4 files of one camera, each one stream in which every episode begins at a key frame.

    Args:
        root: folder of the data set.
        pattern: of the files' paths, with `chunk_index` and `file_index`.
        limit_mb: size from which on a new file begins.
        fps: frames a second.
        image_size: (H, W), even numbers.
        crf: quality of libx264, 0 (lossless but for colours) to 51.
    """

    def __init__(
        self,
        root: Path,
        pattern: str,
        limit_mb: float,
        *,
        fps: int,
        image_size: tuple[int, int],
        crf: int,
    ) -> None:
        self._root = root
        self._pattern = pattern
        self._numbers = Numbers(limit_mb)
        self._fps = fps
        self._image_size = image_size
        # Without B-frames a key frame's group needs none after it. forced-idr: see `write`.
        self._options = {"crf": str(crf), "g": str(GOP), "bf": "0", "forced-idr": "1"}
        self._container: av.container.OutputContainer | None = None
        self._stream: Any = None
        self._size = 0

    def write(self, num_frames: int, blocks: Iterable[NDArray[np.uint8]]) -> Place:
        """Adds an episode.

        Args:
            num_frames: that the blocks have together.
            blocks: (n, H, W, 3) RGB each.
        """
        place = self._numbers.place(num_frames, self._size)
        if place.first_step == 0:
            self.close()
            self._open(place)
        assert self._container is not None
        count = place.first_step
        for block in blocks:
            for pixels in block:
                frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
                frame.pts, frame.time_base = count, Fraction(1, self._fps)
                if count == place.first_step:
                    frame.pict_type = PictureType.I
                self._mux(self._stream.encode(frame))
                count += 1
        return place

    def close(self) -> None:
        """Completes the file that is being written."""
        if self._container is not None:
            self._mux(self._stream.encode())
            self._container.close()
            self._container = None

    def _open(self, place: Place) -> None:
        path = self._root / self._pattern.format(chunk_index=place.chunk, file_index=place.file)
        path.parent.mkdir(parents=True, exist_ok=True)
        # The index before the frames: a reader need not go to the file's end first.
        self._container = av.open(str(path), "w", options={"movflags": "faststart"})
        self._stream = self._container.add_stream("libx264", self._fps, options=self._options)
        self._stream.height, self._stream.width = self._image_size
        self._stream.pix_fmt = PIXEL_FORMAT
        self._size = 0

    def _mux(self, packets: list[Any]) -> None:
        assert self._container is not None
        for packet in packets:
            self._size += packet.size
            self._container.mux(packet)
