"""Random access to camera frames: one compressed frame a read, decoded into the caller's buffer.

zarr-python spends about a millisecond on every frame it is asked for, whatever its size, and
fetches the shard's index each time. Arrays laid out as we write them (one frame a chunk, zstd, in
shards with a checksummed index at their end), or the same without shards, are read directly: cached
index, one range of the file, zstd into the batch. Every other layout goes through zarr-python.

All may be called from several threads, and after a fork; `Files` decides what stays open. The zstd
context is kept, one a thread: making one takes as long as decoding a small frame, and numcodecs
makes one a call.
"""

from __future__ import annotations

import json
import threading
from array import array
from typing import Any, Protocol

import google_crc32c
import numpy as np
import zarr
import zstandard
from numpy.typing import NDArray

from act_lightning.data.files import Files
from act_lightning.data.layout import MISSING, StoreError, chunk_name, read_shard_index, why

_CRC32C_RESIDUE = 0x48674BC7
"""CRC32C of any bytes followed by their own, little-endian."""


class FrameReader(Protocol):
    """Reads frames of one camera."""

    def read_into(self, frame: int, out: NDArray[np.uint8]) -> None:
        """Decodes frame number `frame` into `out`, (H, W, 3) contiguous.

        Raises:
            StoreError: the frame is missing, damaged, or of another size.
        """


def open_frames(files: Files, name: str) -> FrameReader:
    """Chooses the reader of the frames array `name`, (T, H, W, 3) uint8.

    Raises:
        OSError: there is no such array.
        ValueError, KeyError, TypeError: its zarr.json is damaged.
    """
    document = json.loads(files.read(f"{name}/zarr.json"))
    try:
        return _open_direct(files, name, document) or ZarrFrames(files, name, document)
    except (KeyError, TypeError, IndexError):  # another codec, or another way to write it down
        return ZarrFrames(files, name, document)


def _open_direct(files: Files, name: str, document: dict[str, Any]) -> FrameReader | None:
    """The reader of an array of whole frames, one a chunk, zstd alone; None if it is another."""
    frame_shape = document["shape"][1:]
    grid, keys, codecs = (document[key] for key in ("chunk_grid", "chunk_key_encoding", "codecs"))
    num_frames, *rest = grid["configuration"]["chunk_shape"]
    whole_frames = grid["name"] == "regular" and rest == frame_shape
    slashes = keys == {"name": "default", "configuration": {"separator": "/"}}
    if not whole_frames or not slashes or document["data_type"] != "uint8":
        return None
    if num_frames == 1 and _is_zstd(codecs):
        return ChunkFrames(files, name, document["fill_value"], _is_checked(codecs))
    sharding, *others = codecs
    if sharding["name"] != "sharding_indexed" or others:
        return None
    inside = sharding["configuration"]
    little = {"name": "bytes", "configuration": {"endian": "little"}}
    ours = (
        inside["chunk_shape"] == [1, *frame_shape]
        and _is_zstd(inside["codecs"])
        and inside["index_codecs"][0] == little
        and [codec["name"] for codec in inside["index_codecs"][1:]] == ["crc32c"]
        and inside.get("index_location", "end") == "end"
    )
    return DirectFrames(files, name, num_frames, _is_checked(inside["codecs"])) if ours else None


def _is_zstd(codecs: list[dict[str, Any]]) -> bool:
    names = [codec["name"] for codec in codecs]
    return names in (["bytes", "zstd"], ["bytes", "zstd", "crc32c"])


def _is_checked(codecs: list[dict[str, Any]]) -> bool:
    return bool(codecs[-1]["name"] == "crc32c")


class DirectFrames:
    """Reads sharded zstd frames without zarr-python.

    A frame that is missing is damage: our writer writes every frame, black ones too.
    """

    def __init__(self, files: Files, name: str, shard_frames: int, crc32c: bool) -> None:
        self._files = files
        self._name = name
        self._shard_frames = shard_frames
        self._crc32c = crc32c
        # Offset and size of each frame of the shards used so far, one after the other: quick to
        # look up, and small for a million frames.
        self._shards: dict[int, tuple[str, array[int]]] = {}

    def read_into(self, frame: int, out: NDArray[np.uint8]) -> None:
        """Decodes frame number `frame` into `out`, (H, W, 3) contiguous.

        Raises:
            StoreError: the frame, or its shard, is missing or damaged.
        """
        shard, slot = divmod(frame, self._shard_frames)
        try:
            name, index = self._shards.get(shard) or self._open_shard(shard)
        except StoreError as error:
            raise StoreError(f"frame {frame} cannot be read: {error}") from error
        offset, size = index[2 * slot], index[2 * slot + 1]
        try:
            if offset == MISSING:
                raise ValueError("it is missing")
            blob = self._files.read_range(name, offset, size)
            if len(blob) != size:
                raise ValueError("the file is cut off")
            _decode(blob, self._crc32c, out)
        except (OSError, ValueError, zstandard.ZstdError) as error:
            raise _cannot_read(f"{self._files}/{name}", frame, error) from error

    def _open_shard(self, shard: int) -> tuple[str, array[int]]:
        name = f"{self._name}/{chunk_name(shard, 4)}"
        index = array("Q", read_shard_index(self._files, name, self._shard_frames).tobytes())
        self._shards[shard] = (name, index)
        return self._shards[shard]


class ChunkFrames:
    """Reads zstd frames, one a file, without zarr-python; one without a file is the fill value."""

    def __init__(self, files: Files, name: str, fill_value: int, crc32c: bool) -> None:
        self._files = files
        self._name = name
        self._fill_value = fill_value
        self._crc32c = crc32c

    def read_into(self, frame: int, out: NDArray[np.uint8]) -> None:
        """Decodes frame number `frame` into `out`, (H, W, 3) contiguous.

        Raises:
            StoreError: the frame is damaged, or the whole array is gone.
        """
        name = f"{self._name}/{chunk_name(frame, 4)}"
        try:
            blob = self._files.read(name)
        except FileNotFoundError:
            _check_still_there(self._files, self._name, frame)
            out.fill(self._fill_value)
            return
        except OSError as error:
            raise _cannot_read(f"{self._files}/{name}", frame, error) from error
        try:
            _decode(blob, self._crc32c, out)
        except (ValueError, zstandard.ZstdError) as error:
            raise _cannot_read(f"{self._files}/{name}", frame, error) from error


class ZarrFrames:
    """Reads frames of any codec through zarr-python, slowly; missing ones are the fill value."""

    def __init__(self, files: Files, name: str, document: dict[str, Any]) -> None:
        self._files = files
        self._name = name
        self._fill_value = document["fill_value"]
        self._array = zarr.open_array(files.zarr_store(), path=name, mode="r")

    def read_into(self, frame: int, out: NDArray[np.uint8]) -> None:
        """Decodes frame number `frame` into `out`, (H, W, 3).

        Raises:
            StoreError: the frame is damaged, or the whole array is gone.
        """
        try:
            out[...] = self._array[frame]
        except Exception as error:  # zarr and its codecs raise what they like
            raise _cannot_read(f"{self._files}/{self._name}", frame, error) from error
        if (out == self._fill_value).all():
            _check_still_there(self._files, self._name, frame)


class _Decoder(threading.local):
    """The zstd context of each thread; two threads must not share one."""

    def __init__(self) -> None:
        self.zstd = zstandard.ZstdDecompressor()


_decoder = _Decoder()


def _decode(blob: bytes, crc32c: bool, out: NDArray[np.uint8]) -> None:
    """Decodes a zstd frame, followed by its CRC32C if so said, that fills `out` exactly.

    Raises:
        ValueError: a checksum does not match, or the size is another.
        ZstdError: it is damaged; its own checksum, if it has one, is verified too.
    """
    if crc32c and google_crc32c.value(blob) != _CRC32C_RESIDUE:
        raise ValueError("its checksum does not match")
    reader = _decoder.zstd.stream_reader(memoryview(blob)[:-4] if crc32c else blob)
    size = reader.readinto(out)
    if size != out.nbytes or reader.read(1):
        raise ValueError(f"it does not hold {out.nbytes} bytes")


def _check_still_there(files: Files, name: str, frame: int) -> None:
    """A missing chunk is the fill value, but not where the whole array was deleted or moved."""
    if not files.exists(f"{name}/zarr.json"):
        raise _cannot_read(f"{files}/{name}", frame, FileNotFoundError("the array is gone"))


def _cannot_read(place: str, frame: int, error: Exception) -> StoreError:
    return StoreError(f"{place}: frame {frame} cannot be read: {why(error)}")
