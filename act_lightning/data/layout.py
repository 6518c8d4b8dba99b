"""Bytes on disk of a demonstration store: Zarr v3 documents, chunks and shards, written atomically.

`data/README.md` describes the format. Files are written here rather than through zarr-python
because an append must be all or nothing: zarr-python before 3.1 overwrites chunk files in place,
and every version decodes and re-encodes a whole shard to add frames to it. Here a file is written
beside its final name and moved into place, and frames already stored are copied as they are, at the
offsets they had: a reader that holds an older index of a growing shard still reads the right bytes.

Frames carry a checksum of their compressed bytes rather than zstd's own, of the pictures: with that
one, reading a 480x640 frame takes half as long again.

Source: Zarr v3 core specification, and its sharding-indexed, bytes, zstd and crc32c codecs.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
from numpy.typing import NDArray
from zstandard import ZstdCompressor

from act_lightning.data.files import Files, LocalFiles

CHUNK_ROWS = 1024
"""Time steps a chunk of a low-dimensional array: one small file for a few episodes."""
SHARD_FRAMES = 128
"""Frames a shard file; at most these are copied when an episode is appended."""
MISSING = 2**64 - 1
"""Offset and size, in a shard's index, of a frame that is not there."""
NO_INTEGER = -128
"""Fill value of tables of integers."""
PARTIAL_SUFFIX = ".partial"
"""Ends the name of a file that is still being written."""
REMEDY = "restore it from a copy, or record or ingest the store again"
"""What to do about a damaged store."""

_BYTES = {"name": "bytes", "configuration": {"endian": "little"}}
_CRC32C = {"name": "crc32c"}
_ZSTD = {"name": "zstd", "configuration": {"level": 1, "checksum": False}}


class StoreError(ValueError):
    """A demonstration store is damaged, of another format, or used wrongly."""


def why(error: BaseException) -> str:
    """What went wrong in reading, and what to do; a broken network is no damage to mend."""
    if isinstance(error, OSError) and not isinstance(error, FileNotFoundError):
        return str(error)
    return f"{str(error) or repr(error)}; {REMEDY}"


class StoreMismatchError(StoreError):
    """A demonstration store was recorded with other settings than those asked for."""


def write_atomic(path: Path, content: bytes | Sequence[bytes]) -> None:
    """Replaces a file at once: a reader, or a crash, finds the old content or the new."""
    partial = path.with_name(f"{path.name}.{os.getpid()}{PARTIAL_SUFFIX}")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with partial.open("wb") as file:
            file.writelines([content] if isinstance(content, bytes) else content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def write_json(path: Path, document: dict[str, Any]) -> None:
    """Replaces a JSON file atomically; NaN is refused, as JSON has none."""
    write_atomic(path, json.dumps(document, indent=2, allow_nan=False).encode())


def group_document(attributes: dict[str, Any] | None = None) -> dict[str, Any]:
    """zarr.json of a group."""
    return {"zarr_format": 3, "node_type": "group", "attributes": attributes or {}}


def table_document(dtype: str, row_shape: tuple[int, ...], units: str) -> dict[str, Any]:
    """zarr.json of an empty array of small rows, uncompressed, with a checksum.

    The fill value is NaN, or an integer that no table holds, so that a lost chunk file cannot pass
    for data.
    """
    fill_value = "NaN" if dtype.startswith("float") else NO_INTEGER
    return _array_document(
        dtype, row_shape, CHUNK_ROWS, fill_value, [_BYTES, _CRC32C], {"units": units}
    )


def frames_document(height: int, width: int) -> dict[str, Any]:
    """zarr.json of an empty (T, H, W, 3) uint8 array: one compressed frame a chunk, in shards."""
    sharding = {
        "name": "sharding_indexed",
        "configuration": {
            "chunk_shape": [1, height, width, 3],
            "codecs": [{"name": "bytes"}, _ZSTD, _CRC32C],
            "index_codecs": [_BYTES, _CRC32C],
            "index_location": "end",
        },
    }
    units = {"units": "RGB, 0 to 255, rows from the top"}
    return _array_document("uint8", (height, width, 3), SHARD_FRAMES, 0, [sharding], units)


def _array_document(
    dtype: str,
    row_shape: tuple[int, ...],
    chunk_rows: int,
    fill_value: str | int,
    codecs: list[dict[str, Any]],
    attributes: dict[str, Any],
) -> dict[str, Any]:
    return {
        "zarr_format": 3,
        "node_type": "array",
        "shape": [0, *row_shape],
        "data_type": dtype,
        "chunk_grid": {
            "name": "regular",
            "configuration": {"chunk_shape": [chunk_rows, *row_shape]},
        },
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "fill_value": fill_value,
        "codecs": codecs,
        "attributes": attributes,
    }


def chunk_name(index: int, num_axes: int) -> str:
    """File, below its array, of chunk or shard number `index` along time; other axes are whole."""
    return "/".join(["c", str(index), *("0" * (num_axes - 1))])


def set_length(array: Path, length: int) -> None:
    """Sets the time axis of an array to `length`; the data must be written first."""
    document = json.loads((array / "zarr.json").read_bytes())
    if document["shape"][0] != length:
        document["shape"][0] = length
        write_json(array / "zarr.json", document)


def write_rows(array: Path, start: int, rows: NDArray[Any]) -> None:
    """Writes rows start .. start + len(rows) of a table; rows before `start` stay as they are.

    Rows past the array's length are not visible until `set_length`.
    """
    fill = np.nan if rows.dtype.kind == "f" else NO_INTEGER
    end = start + len(rows)
    for index in range(start // CHUNK_ROWS, -(-end // CHUNK_ROWS)):
        path = array / chunk_name(index, rows.ndim)
        first = index * CHUNK_ROWS
        chunk = np.full((CHUNK_ROWS, *rows.shape[1:]), fill, rows.dtype)
        if kept := max(start - first, 0):
            stored = np.frombuffer(_without_checksum(path.read_bytes(), path), rows.dtype)
            chunk[:kept] = stored.reshape(chunk.shape)[:kept]
        chunk[kept : end - first] = rows[first + kept - start : first + CHUNK_ROWS - start]
        content = chunk.astype(chunk.dtype.newbyteorder("<"), copy=False).tobytes()
        write_atomic(path, [content, _checksum(content)])


def write_frames(
    array: Path, start: int, num_frames: int, frames: Iterator[NDArray[np.uint8]]
) -> None:
    """Writes frames start .. start + num_frames of a sharded array; earlier ones stay as they are.

    Args:
        array: folder of an array made by `frames_document`.
        start: position of the first frame.
        num_frames: how many.
        frames: gives them, each (H, W, 3) in any memory order.

    Raises:
        StoreError: the shard that is to be added to is damaged.
    """
    end = start + num_frames
    compress = _compressor(array)
    for shard in range(start // SHARD_FRAMES, -(-end // SHARD_FRAMES)):
        name = chunk_name(shard, 4)
        path = array / name
        first = shard * SHARD_FRAMES
        index = np.full((SHARD_FRAMES, 2), MISSING, "<u8")
        blobs: list[bytes] = []
        size = 0
        if kept := max(start - first, 0):
            index[:kept] = read_shard_index(LocalFiles(array), name, SHARD_FRAMES)[:kept]
            if (index[:kept] == MISSING).any():
                raise StoreError(f"{path}: a frame before number {start} is missing; {REMEDY}")
            size = int(index[:kept].sum(axis=1).max())
            with path.open("rb") as file:
                blobs.append(file.read(size))
        for slot in range(kept, min(end - first, SHARD_FRAMES)):
            blob = compress(next(frames))
            index[slot] = size, len(blob)
            size += len(blob)
            blobs.append(blob)
        packed = index.tobytes()
        write_atomic(path, [*blobs, packed, _checksum(packed)])


def _compressor(array: Path) -> Callable[[NDArray[np.uint8]], bytes]:
    """What makes a frame's chunk, as the array's zarr.json has it.

    Arrays of version 1 have zstd's checksum of the picture, newer ones one of the chunk.
    """
    (sharding,) = json.loads((array / "zarr.json").read_bytes())["codecs"]
    codecs = sharding["configuration"]["codecs"]
    zstd = ZstdCompressor(
        codecs[1]["configuration"]["level"], write_checksum=codecs[1]["configuration"]["checksum"]
    )
    checked = codecs[-1] == _CRC32C

    def compress(frame: NDArray[np.uint8]) -> bytes:
        chunk = zstd.compress(np.ascontiguousarray(frame).data)
        return chunk + _checksum(chunk) if checked else chunk

    return compress


def read_shard_index(files: Files, name: str, num_frames: int) -> NDArray[np.uint64]:
    """Reads and checks the (num_frames, 2) table of byte offsets and sizes at the end of a shard.

    Raises:
        StoreError: the file is missing, cut off, or its index is damaged.
    """
    place = f"{files}/{name}"
    size = num_frames * 16 + 4
    try:
        packed, length = files.read_tail(name, size)
    except FileNotFoundError:
        raise StoreError(f"{place}: a shard of images is missing; {REMEDY}") from None
    except OSError as error:
        raise StoreError(f"{place}: the shard's index cannot be read: {why(error)}") from error
    if len(packed) != size:
        raise StoreError(f"{place}: the shard is cut off ({length} bytes); {REMEDY}")
    index = np.frombuffer(_without_checksum(packed, place), "<u8").reshape(num_frames, 2)
    present = index[index[:, 0] != MISSING]
    # One by one first: the sum of damaged numbers may wrap around.
    if (present > length).any() or (present.sum(axis=1) > length - size).any():
        raise StoreError(f"{place}: the shard's index points past its end; {REMEDY}")
    return index.astype(np.uint64)


def remove_leftovers(array: Path, num_rows: int) -> None:
    """Deletes what an interrupted append left: unfinished files, chunks past `num_rows`."""
    document = json.loads((array / "zarr.json").read_bytes())
    chunk_rows = document["chunk_grid"]["configuration"]["chunk_shape"][0]
    for partial in array.rglob(f"*{PARTIAL_SUFFIX}"):
        partial.unlink()
    for chunk in array.glob("c/*"):
        if chunk.name.isdigit() and int(chunk.name) * chunk_rows >= num_rows:
            shutil.rmtree(chunk) if chunk.is_dir() else chunk.unlink()


def _checksum(content: bytes) -> bytes:
    return int(google_crc32c.value(content)).to_bytes(4, "little")


def _without_checksum(content: bytes, place: Path | str) -> bytes:
    if _checksum(content[:-4]) != content[-4:]:
        raise StoreError(f"{place}: checksum does not match, the file is damaged; {REMEDY}")
    return content[:-4]
