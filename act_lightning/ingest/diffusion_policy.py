"""diffusion_policy's replay buffers: a Zarr v2 group, as a folder or packed as .zarr.zip.

    data/<key>         (T, ...) numbers, or (T, H, W, 3) frames, uint8 or float from 0 to 255
    meta/episode_ends  (episodes,) int64, position after each episode's last step

Keys differ from one data set to another and nothing says what they mean or at which rate they were
recorded, so --qpos and --fps are needed. PushT: `--qpos 'state[:2]' --env-state 'state[2:]'
--fps 10`.

The writer stores every chunk, black frames too, so a chunk that is missing is damage here, where
Zarr would fill it with zeros. Frames of the JPEG 2000 and JPEG XL codecs of diffusion_policy and
UMI can be read where imagecodecs is installed and its codecs are registered with numcodecs.

Source: real-stanford/diffusion_policy diffusion_policy/common/replay_buffer.py (reader and writer),
real_world/real_data_conversion.py.
"""

from __future__ import annotations

import hashlib
import itertools
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray

from act_lightning.batch import DataSpec
from act_lightning.data.episode import Episode
from act_lightning.ingest.columns import MAX_TABLE_BYTES, Columns, join_columns
from act_lightning.ingest.frames import choose_cameras, common_size, exact_uint8, make_episode
from act_lightning.ingest.source import IngestOptions, SourceError, describe, need_fps

FORMAT = "diffusion_policy"
ENDS = "meta/episode_ends"
MAX_CHUNK_BYTES = 2**28
"""Of an array's chunk, which is decoded whole."""


def matches(path: Path) -> bool:
    """Whether a folder, or a .zip, is a Zarr v2 group with meta/episode_ends."""
    name = "meta/episode_ends/.zarray"
    if path.is_dir():
        return (path / name).is_file()
    try:
        with zipfile.ZipFile(path) as archive:
            return name in archive.namelist()
    except (OSError, ValueError, zipfile.BadZipFile, NotImplementedError):
        return path.name.endswith(".zarr.zip")


def open_source(path: Path, options: IngestOptions) -> DiffusionPolicySource:
    """Opens a replay buffer.

    Raises:
        SourceError: it is damaged, of another format, or an option does not fit.
    """
    return DiffusionPolicySource(path, options)


class DiffusionPolicySource:
    """Episodes of a replay buffer; see `Source`."""

    format = FORMAT

    def __init__(self, path: Path, options: IngestOptions) -> None:
        self._path = path
        self._options = options
        self._arrays = _open_arrays(path)
        self._ends = _read_ends(self._arrays, path)
        self.ids = list(range(len(self._ends)))
        keys = {key: array for key, array in self._arrays.items() if key != ENDS}
        found = {
            key: (array.shape[1], array.shape[2])
            for key, array in keys.items()
            if array.ndim == 4 and array.shape[3] == 3
        }
        if options.qpos is None:
            listed = ", ".join(f"{key} {array.shape[1:]}" for key, array in keys.items())
            raise SourceError(
                f"{path} does not say which key is qpos; give --qpos KEY ..., of {listed}. Columns "
                "are taken as 'state[:2]'"
            )
        self._qpos = [Columns.parse(key) for key in options.qpos]
        self._action = [Columns.parse(key) for key in options.action or ("action",)]
        self._env_state = [Columns.parse(key) for key in options.env_state]
        self._cameras = choose_cameras(list(found), options, str(path))
        sizes = {name: found[key] for name, key in self._cameras}
        self.spec = DataSpec(
            task=options.task or path.name.removesuffix(".zip").removesuffix(".zarr"),
            fps=need_fps(options.fps, str(path), "PushT was recorded at 10"),
            dim_qpos=self._width(self._qpos),
            dim_action=self._width(self._action),
            dim_env_state=self._width(self._env_state),
            cameras=tuple(sizes),
            image_size=common_size(sizes, options, str(path)),
        )
        taken = {part.key for part in (*self._qpos, *self._action, *self._env_state)}
        taken |= {key for _, key in self._cameras}
        self.unused = tuple(key for key in keys if key not in taken)
        self.units = dict.fromkeys(("qpos", "action", "env_state"), "as in the source")
        self.provenance = describe(
            FORMAT,
            path,
            options,
            cameras=self._cameras,
            qpos=self._qpos,
            action=self._action,
            # The ids are positions: with another list they would be other episodes.
            episode_ends_sha256=hashlib.sha256(self._ends.tobytes()).hexdigest(),
        )

    def name(self, id: int) -> str:
        """The episode's position."""
        return f"episode {id}"

    def read(self, id: int) -> Episode:
        """Reads an episode.

        Raises:
            SourceError: it is damaged.
        """
        start = int(self._ends[id - 1]) if id else 0
        stop = int(self._ends[id])
        where = f"{self._path}: {self.name(id)}"
        if start == stop:
            raise SourceError(f"{where} has no steps")
        parts = {"qpos": self._qpos, "action": self._action, "env_state": self._env_state}
        tables = {
            name: join_columns(columns, lambda key: self._table(key, where, start, stop), where)
            for name, columns in parts.items()
            if columns
        }
        readers = [partial(self._frames, key, where, start) for _, key in self._cameras]
        return make_episode(id, tables, readers, self.spec, self._options)

    def _array(self, key: str, where: str) -> _Array:
        if key not in self._arrays:
            listed = ", ".join(name for name in self._arrays if name != ENDS)
            raise SourceError(f"{where}: there is no data/{key}; it holds {listed}")
        return self._arrays[key]

    def _width(self, parts: list[Columns]) -> int:
        """Number of columns that some keys give together."""
        width = 0
        for part in parts:
            shape = self._array(part.key, str(self._path)).shape[1:]
            size = int(np.prod(shape, dtype=object))
            columns = len(range(*part.columns.indices(size)))
            if columns == 0:
                raise SourceError(f"{self._path}: {part} is empty; {part.key} has {size} columns")
            width += columns
        return width

    def _table(self, key: str, where: str, start: int, stop: int) -> NDArray[Any]:
        array = self._array(key, where)
        row_bytes = int(np.prod(array.shape[1:], dtype=object)) * array.itemsize
        if (stop - start) * row_bytes > MAX_TABLE_BYTES:
            raise SourceError(f"{where}: data/{key} claims shape {array.shape}; it is damaged")
        return array.read(start, stop, where)

    def _frames(self, key: str, where: str, first: int, start: int, stop: int) -> NDArray[np.uint8]:
        """Frames start .. stop of the episode whose first frame is `first`."""
        frames = self._array(key, where).read(first + start, first + stop, where)
        return exact_uint8(frames, f"{where}: data/{key}", start)


class _Array:
    """An array whose missing chunks are errors, as are all faults of zarr and its codecs."""

    def __init__(self, array: zarr.Array[Any], exists: Callable[[str], bool]) -> None:
        self._array = array
        self._exists = exists
        self.shape: tuple[int, ...] = array.shape
        self.ndim = array.ndim
        self.itemsize = array.dtype.itemsize

    def read(self, start: int, stop: int, where: str) -> NDArray[Any]:
        """Rows start .. stop.

        Raises:
            SourceError: they are not all there.
        """
        array, name = self._array, self._array.path
        if array.ndim < 1 or min(array.chunks) < 1:
            raise SourceError(f"{where}: {name} has shape {self.shape}, chunks {array.chunks}")
        if stop > array.shape[0]:
            raise SourceError(f"{where}: {name} ends at row {array.shape[0]}, before {stop}")
        chunk_bytes = int(np.prod(array.chunks, dtype=object)) * self.itemsize
        if chunk_bytes > MAX_CHUNK_BYTES:
            raise SourceError(
                f"{where}: {name} has chunks of {chunk_bytes / 1e6:.0f} MB, which would not fit in "
                f"memory; write it again with chunks of at most {MAX_CHUNK_BYTES / 1e6:.0f} MB"
            )
        rows = range(start // array.chunks[0], -(-stop // array.chunks[0]))
        others = [
            range(-(-size // chunk))
            for size, chunk in zip(array.shape[1:], array.chunks[1:], strict=True)
        ]
        for place in itertools.product(rows, *others):
            key = f"{name}/{array.metadata.encode_chunk_key(place)}"
            if not self._exists(key):
                raise SourceError(f"{where}: the chunk {key} is missing")
        try:
            return np.asarray(array[start:stop])
        except Exception as error:  # zarr and its codecs raise what they like
            raise SourceError(f"{where}: {name} cannot be read ({error})") from error


def _open_arrays(path: Path) -> dict[str, _Array]:
    """Arrays below data/ by name, and meta/episode_ends."""
    try:
        if path.is_dir():
            root = zarr.open_group(path, mode="r", zarr_format=2, use_consolidated=False)
            exists: Callable[[str], bool] = lambda key: (path / key).is_file()  # noqa: E731
        else:
            store = zarr.storage.ZipStore(path, mode="r")
            root = zarr.open_group(store, mode="r", zarr_format=2, use_consolidated=False)
            with zipfile.ZipFile(path) as archive:
                exists = frozenset(archive.namelist()).__contains__
        found = dict(root.members(max_depth=None))
    except Exception as error:  # zarr and its codecs raise what they like
        hint = ""
        if "imagecodecs" in str(error):
            hint = "; install imagecodecs and register its codecs, or decode the frames first"
        raise SourceError(
            f"{path} cannot be read as diffusion_policy's Zarr v2 ({error}){hint}"
        ) from error
    arrays = {
        key.removeprefix("data/"): _Array(array, exists)
        for key, array in found.items()
        if isinstance(array, zarr.Array) and (key.startswith("data/") or key == ENDS)
    }
    if ENDS not in arrays:
        raise SourceError(f"{path} has no {ENDS}; is it of another format?")
    return arrays


def _read_ends(arrays: dict[str, _Array], path: Path) -> NDArray[np.int64]:
    """(episodes,) int64, not decreasing; an episode without steps is its own fault."""
    array = arrays[ENDS]
    if array.ndim != 1 or array.shape[0] * array.itemsize > MAX_TABLE_BYTES:
        raise SourceError(f"{path}: meta/episode_ends has shape {array.shape}")
    ends = array.read(0, array.shape[0], str(path))
    if ends.dtype.kind not in "iu" or not len(ends):
        raise SourceError(f"{path}: meta/episode_ends holds {len(ends)} {ends.dtype}")
    ends = ends.astype(np.int64)
    wrong = np.flatnonzero(np.diff(ends, prepend=0) < 0)
    if len(wrong):
        raise SourceError(
            f"{path}: meta/episode_ends is {ends[wrong[0]]} at episode {wrong[0]}, less than before"
        )
    return ends
