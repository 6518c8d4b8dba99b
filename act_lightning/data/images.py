"""Random access to camera frames: one compressed frame a read, decoded into the caller's buffer.

zarr-python spends about 0.7 ms on every frame it is asked for, whatever its size, and fetches the
shard's index each time. Arrays laid out as we write them (one frame a chunk, zstd, in shards with a
checksummed index at their end) are read directly: cached index, `pread`, zstd into the batch. Every
other layout goes through zarr-python. Both are safe to call from several threads; the direct reader
holds no open file, so it is also safe to fork and to pickle.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import zarr
from numcodecs import zstd
from numpy.typing import NDArray

from act_lightning.data.layout import MISSING, StoreError, chunk_path, read_shard_index


class FrameReader(Protocol):
    """Reads frames of one camera."""

    def read_into(self, frame: int, out: NDArray[np.uint8]) -> None:
        """Decodes frame number `frame` into `out`, (H, W, 3) contiguous."""


def open_frames(path: Path) -> FrameReader:
    """Chooses the reader of the frames array at `path`, (T, H, W, 3) uint8."""
    document = json.loads((path / "zarr.json").read_bytes())
    if _is_ours(document):
        return DirectFrames(path, document["chunk_grid"]["configuration"]["chunk_shape"][0])
    return ZarrFrames(path)


class DirectFrames:
    """Reads sharded zstd frames without zarr-python."""

    def __init__(self, path: Path, shard_frames: int) -> None:
        self._path = path
        self._shard_frames = shard_frames
        # File name, and (offset, size) of each frame, of the shards used so far; plain Python
        # objects, which are quicker to look up than paths and numpy scalars.
        self._shards: dict[int, tuple[str, list[list[int]]]] = {}

    def read_into(self, frame: int, out: NDArray[np.uint8]) -> None:
        """Decodes frame number `frame` into `out`.

        Raises:
            StoreError: the frame, or its shard, is missing or damaged.
        """
        shard, slot = divmod(frame, self._shard_frames)
        path, index = self._shards.get(shard) or self._open_shard(shard)
        offset, size = index[slot]
        if offset == MISSING:
            raise StoreError(f"{path}: frame {frame} is missing; record the store again")
        try:
            file = os.open(path, os.O_RDONLY)
            try:
                blob = os.pread(file, size, offset)
            finally:
                os.close(file)
            if _content_size(blob) != out.nbytes:
                raise ValueError(f"{_content_size(blob)} bytes a frame instead of {out.nbytes}")
            zstd.decompress(blob, out)
        except (OSError, RuntimeError, ValueError) as error:
            raise StoreError(f"{path}: frame {frame} cannot be read: {error}") from error

    def _open_shard(self, shard: int) -> tuple[str, list[list[int]]]:
        path = chunk_path(self._path, shard, 4)
        index = read_shard_index(path, self._shard_frames).tolist()
        self._shards[shard] = (str(path), index)
        return self._shards[shard]


class ZarrFrames:
    """Reads frames of any codec through zarr-python, slowly."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._array = zarr.open_array(path, mode="r")

    def read_into(self, frame: int, out: NDArray[np.uint8]) -> None:
        """Decodes frame number `frame` into `out`."""
        try:
            out[...] = self._array[frame]
        except Exception as error:  # zarr and its codecs raise what they like
            raise StoreError(f"{self._path}: frame {frame} cannot be read: {error}") from error


def _is_ours(document: dict[str, Any]) -> bool:
    """Whether the array is one whole frame a chunk, zstd alone, in shards along time."""
    frame_shape = document["shape"][1:]
    little = {"name": "bytes", "configuration": {"endian": "little"}}
    separator = {"name": "default", "configuration": {"separator": "/"}}
    try:
        (sharding,) = document["codecs"]
        shards = sharding["configuration"]
        return bool(
            sharding["name"] == "sharding_indexed"
            and document["chunk_grid"]["name"] == "regular"
            and document["chunk_grid"]["configuration"]["chunk_shape"][1:] == frame_shape
            and document["chunk_key_encoding"] == separator
            and document["data_type"] == "uint8"
            and shards["chunk_shape"] == [1, *frame_shape]
            and [codec["name"] for codec in shards["codecs"]] == ["bytes", "zstd"]
            and shards["index_codecs"][0] == little
            and [codec["name"] for codec in shards["index_codecs"][1:]] == ["crc32c"]
            and shards.get("index_location", "end") == "end"
        )
    except (KeyError, TypeError, ValueError):  # another codec, or another way to write it down
        return False


def _content_size(blob: bytes) -> int:
    """Uncompressed size that a zstd frame declares; -1 if it declares none.

    numcodecs leaves the tail of a longer destination untouched, so the size is checked first. RFC
    8878, 3.1.1.1.
    """
    if len(blob) < 6 or blob[:4] != b"\x28\xb5\x2f\xfd":
        return -1
    descriptor = blob[4]
    size_flag, single_segment = descriptor >> 6, descriptor >> 5 & 1
    start = 5 + (not single_segment) + (0, 1, 2, 4)[descriptor & 3]
    length = (single_segment, 2, 4, 8)[size_flag]
    if length == 0:
        return -1
    return int.from_bytes(blob[start : start + length], "little") + (256 if length == 2 else 0)
