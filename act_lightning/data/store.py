"""A store of demonstrations on disk, opened and checked.

The format is documented in data/README.md. It is a Zarr v3 group that zarr-python reads, laid out
as in real-stanford/diffusion_policy (`data/*` over time, `meta/episode_ends`). Departures: images
are one array a camera and one compressed frame a chunk, so that a random frame costs one small
read, and the group carries what it was recorded with, so that demonstrations of different settings
are never mixed without a word.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray

from act_lightning.batch import DataSpec
from act_lightning.data.files import Files, open_files
from act_lightning.data.images import FrameReader, open_frames
from act_lightning.data.layout import REMEDY, StoreError, chunk_name, why
from act_lightning.data.mirror import MirrorConfig

FORMAT = "act_lightning.demonstrations"
VERSION = 2
"""Raised whenever a reader of the version before would misread the store."""

_ATTRIBUTES = {
    "spec": dict,
    "provenance": dict,
    "expected_episodes": int | None,
    "complete": bool,
    "skipped": list,
}
"""Those of the group that a reader needs, and their types."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Store:
    """An opened store; low-dimensional arrays are in memory, images are read when asked for."""

    files: Files
    """Where its bytes are; `str(files)` is the place, for messages."""
    spec: DataSpec
    provenance: dict[str, Any]
    """What made the demonstrations, as the recorder wrote it."""
    complete: bool
    """False while it is still being recorded."""
    expected_episodes: int | None
    episode_ends: NDArray[np.int64]
    """(num_episodes,) position after each episode's last frame."""
    episode_ids: NDArray[np.int64]
    """(num_episodes,) simulated world of each, or its number in the data set it came from."""
    episode_success: NDArray[np.int8]
    """(num_episodes,) 1 success, 0 failure, -1 not known."""
    skipped: tuple[int, ...]
    """Ids of episodes that were tried and not stored: the demonstrator failed, or bad data."""
    qpos: NDArray[np.float32]
    """(T, D)."""
    actions: NDArray[np.float32]
    """(T, A)."""
    env_state: NDArray[np.float32] | None
    """(T, E), or None."""
    units: dict[str, str]
    """Of each low-dimensional array, by its name in the store."""
    cameras: dict[str, FrameReader]
    """Reader of each camera's frames."""

    @classmethod
    def open(
        cls,
        location: str | Path,
        *,
        allow_incomplete: bool = False,
        mirror: MirrorConfig | None = None,
    ) -> Store:
        """Opens and checks a store.

        Args:
            location: its folder, or `s3://bucket/prefix`.
            allow_incomplete: whether it may still be being recorded.
            mirror: how shards of an object store are kept on local disk.

        Raises:
            FileNotFoundError: nothing is there.
            StoreError: it is no store, incomplete, damaged, of a newer version, or holds NaN.
        """
        return cls.of(open_files(location, mirror), allow_incomplete)

    @classmethod
    def of(cls, files: Files, allow_incomplete: bool) -> Store:
        """Opens and checks the store that lies in `files`; otherwise as `open`."""
        attributes = read_attributes(files)
        spec = read_spec(files, attributes)
        ends, ids, success = read_episodes(files, attributes)
        expected = attributes["expected_episodes"]
        complete = is_complete(attributes, len(ends))
        if not complete and not allow_incomplete:
            of = "" if expected is None else f" of {expected}"
            raise StoreError(
                f"{files} is still being recorded: it holds {len(ends)}{of} episodes. To continue, "
                "run the same command again: `make data` with the same EXP, or `ingest`"
            )
        if complete and len(ends) == 0:
            raise StoreError(f"{files}: meta/episode_ends is empty; {REMEDY}")
        tables = {
            name: _read_table(files, f"data/{name}", size, ends, ids)
            for name, size in table_sizes(spec).items()
        }
        store = cls(
            files=files,
            spec=spec,
            provenance=attributes["provenance"],
            complete=complete,
            expected_episodes=expected,
            episode_ends=ends,
            episode_ids=ids,
            episode_success=success,
            skipped=tuple(attributes["skipped"]),
            qpos=tables["qpos"],
            actions=tables["action"],
            env_state=tables.get("env_state"),
            units={name: read_units(files, f"data/{name}") for name in tables},
            cameras={name: _open_camera(files, name, spec, ends) for name in spec.cameras},
        )
        for name, table in tables.items():
            if (bad := first_not_finite(table)) is not None:
                raise StoreError(
                    f"{files}: data/{name} is {table[bad]} in {store.locate(bad[0])}, "
                    f"dimension {bad[1]}; {REMEDY}"
                )
        return store

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickles where it is, alone: a loader process opens the store for itself."""
        return Store.of, (self.files, not self.complete)

    @property
    def num_episodes(self) -> int:
        """Number of demonstrations."""
        return len(self.episode_ends)

    @property
    def num_frames(self) -> int:
        """T, number of steps of all demonstrations together."""
        return len(self.actions)

    @property
    def episode_starts(self) -> NDArray[np.int64]:
        """(num_episodes,) position of each episode's first frame."""
        return np.concatenate([np.zeros(1, np.int64), self.episode_ends])[:-1]

    def locate(self, frame: int) -> str:
        """Names a frame for a message: its episode, the episode's id, and the step."""
        return locate(frame, self.episode_ends, self.episode_ids)

    def read_images(
        self, frames: NDArray[np.int64], cameras: Sequence[str] | None = None
    ) -> NDArray[np.uint8]:
        """Reads frames of several cameras; may be called from several threads.

        Args:
            frames: (n,) positions along time.
            cameras: which cameras, in which order; default all, in the store's order.

        Returns:
            (n, N, 3, H, W) uint8: a transposed view of (n, N, H, W, 3) memory, which torch calls
            channels_last and convolves fastest.

        Raises:
            StoreError: a frame is missing or damaged.
        """
        names = self.spec.cameras if cameras is None else cameras
        out = np.empty((len(frames), len(names), *self.spec.image_size, 3), np.uint8)

        numbers, readers = frames.tolist(), [self.cameras[name] for name in names]

        def read(place: tuple[int, int]) -> None:
            row, column = place
            try:
                readers[column].read_into(numbers[row], out[row, column])
            except StoreError as error:
                raise StoreError(f"{error} ({self.locate(numbers[row])})") from error

        self.files.for_each(read, list(product(range(len(numbers)), range(len(readers)))))
        return out.transpose(0, 1, 4, 2, 3)


def locate(frame: int, ends: NDArray[np.int64], ids: NDArray[np.int64]) -> str:
    """Names a frame for a message, given the episodes' ends and ids."""
    episode = int(np.searchsorted(ends, frame, side="right"))
    start = int(ends[episode - 1]) if episode else 0
    return f"episode {episode} (id {ids[episode]}), step {frame - start}"


def table_sizes(spec: DataSpec) -> dict[str, int]:
    """Name in the store, and width, of every low-dimensional array that `spec` asks for."""
    sizes = {"qpos": spec.dim_qpos, "action": spec.dim_action, "env_state": spec.dim_env_state}
    return {name: size for name, size in sizes.items() if size > 0}


def first_not_finite(table: NDArray[np.float32]) -> tuple[int, int] | None:
    """(row, column) of the first NaN or infinity of a 2-D array, or None."""
    bad = np.argwhere(~np.isfinite(table))
    return (int(bad[0, 0]), int(bad[0, 1])) if len(bad) else None


def read_attributes(files: Files) -> dict[str, Any]:
    """Reads and checks the group's attributes, in the terms of this version.

    `version` stays what is on disk, because the arrays are still of that version.

    Raises:
        FileNotFoundError: nothing is there.
        StoreError: no store, a damaged one, or one of a newer version.
    """
    if not files.exists():
        raise FileNotFoundError(
            f"no demonstrations at {files}; record them with `make data`, or `ingest` yours"
        )
    try:
        attributes: dict[str, Any] = json.loads(files.read("zarr.json"))["attributes"]
        if attributes["format"] != FORMAT:
            raise StoreError(f"{files}: format {attributes['format']!r} is not {FORMAT!r}")
        if attributes["version"] > VERSION:
            raise StoreError(
                f"{files} has format version {attributes['version']}, this program reads up to "
                f"{VERSION}; update act_lightning"
            )
        if attributes["version"] == 1 and "failed_seeds" in attributes:
            attributes["skipped"] = attributes.pop("failed_seeds")
        if missing := sorted(_ATTRIBUTES.keys() - attributes.keys()):
            raise StoreError(f"{files}: attributes {missing} are missing; {REMEDY}")
        for name, kind in _ATTRIBUTES.items():
            if not isinstance(attributes[name], kind):
                raise StoreError(f"{files}: attribute {name} is {attributes[name]!r}; {REMEDY}")
    except StoreError:
        raise
    except OSError as error:
        if not isinstance(error, FileNotFoundError | NotADirectoryError):
            raise StoreError(f"{files}: zarr.json cannot be read: {error}") from error
        raise _not_a_store(files, error) from error
    except (ValueError, KeyError, TypeError) as error:
        raise _not_a_store(files, error) from error
    return attributes


def _not_a_store(files: Files, error: Exception) -> StoreError:
    return StoreError(
        f"{files} is not a store of demonstrations ({error!r}); move it away and record with "
        "`make data`, or give another demonstrations.path. Data of other formats can be taken "
        "in with `ingest`"
    )


def read_spec(files: Files, attributes: dict[str, Any]) -> DataSpec:
    """What the store's steps hold.

    Raises:
        StoreError: the attribute does not describe a `DataSpec`.
    """
    try:
        lists = {name: tuple(attributes["spec"][name]) for name in ("cameras", "image_size")}
        return DataSpec(**(attributes["spec"] | lists))
    except (TypeError, ValueError, KeyError) as error:
        raise StoreError(f"{files}: attribute spec is damaged ({error}); {REMEDY}") from error


def read_episodes(
    files: Files, attributes: dict[str, Any]
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int8]]:
    """Ends, ids and successes of the episodes; each (num_episodes,).

    Version 1 called the ids seeds, and said nothing of success: its recorder kept nothing else.

    Raises:
        StoreError: an array is missing or damaged, an episode has no steps, or ids do not increase.
    """
    ends = read_array(files, "meta/episode_ends", np.int64, ())
    lengths = np.diff(ends, prepend=0)
    if len(empty := np.flatnonzero(lengths < 1)):
        raise StoreError(
            f"{files}: meta/episode_ends does not increase at episode {empty[0]}, which would have "
            f"{lengths[empty[0]]} steps; {REMEDY}"
        )
    name = "meta/episode_seed" if attributes["version"] == 1 else "meta/episode_id"
    ids = read_array(files, name, np.int64, (), len(ends))
    if len(bad := np.flatnonzero(np.diff(ids, prepend=-1) < 1)):
        raise StoreError(
            f"{files}: {name} is {ids[bad[0]]} at episode {bad[0]}, and must increase "
            f"from 0 on; {REMEDY}"
        )
    if attributes["version"] == 1:
        return ends, ids, np.ones(len(ends), np.int8)
    success = read_array(files, "meta/episode_success", np.int8, (), len(ends))
    if len(bad := np.flatnonzero(np.abs(success.astype(int)) > 1)):
        raise StoreError(
            f"{files}: meta/episode_success is {success[bad[0]]} at episode {bad[0]}, not 1, 0 or "
            f"-1; {REMEDY}"
        )
    return ends, ids, success


def read_array(
    files: Files, name: str, dtype: type, row_shape: tuple[int, ...], num_rows: int | None = None
) -> NDArray[Any]:
    """Reads the first `num_rows` rows (default all) of a small array, and checks its shape.

    Raises:
        StoreError: the array is missing, damaged, too short, or of another shape or dtype.
    """
    try:
        array = zarr.open_array(files.zarr_store(), path=name, mode="r")
        if array.shape[1:] != row_shape or array.dtype != dtype:
            raise StoreError(
                f"{files}: {name} is {array.dtype} of shape {array.shape}, "
                f"not {np.dtype(dtype)} of shape {('T', *row_shape)}; {REMEDY}"
            )
        if num_rows is not None and array.shape[0] < num_rows:
            raise StoreError(
                f"{files}: {name} has {array.shape[0]} rows instead of {num_rows}; {REMEDY}"
            )
        return np.asarray(array[:num_rows])
    except StoreError:
        raise
    except Exception as error:  # zarr and its codecs raise what they like
        raise StoreError(f"{files}: {name} cannot be read: {why(error)}") from error


def _read_table(
    files: Files, name: str, size: int, ends: NDArray[np.int64], ids: NDArray[np.int64]
) -> NDArray[np.float32]:
    """Reads a low-dimensional array over all episodes, (T, size).

    Raises:
        StoreError: as `read_array`; of a damaged chunk it names the file and the steps it holds.
    """
    num_frames = int(ends[-1]) if len(ends) else 0
    try:
        return read_array(files, name, np.float32, (size,), num_frames)
    except StoreError as unreadable:
        if unreadable.__cause__ is None:  # it can be read, but is not what it should be
            raise
        damage = _find_damage(files, name, num_frames)
        if damage is None:
            raise
        chunk, rows, error = damage
        raise StoreError(
            f"{files}/{name}/{chunk_name(chunk, 2)} cannot be read, which holds "
            f"{locate(rows.start, ends, ids)} to {locate(rows.stop - 1, ends, ids)}: {why(error)}"
        ) from error


def _find_damage(files: Files, name: str, num_rows: int) -> tuple[int, range, Exception] | None:
    """The first chunk of an array that cannot be read, and its rows; None if all can."""
    try:
        array = zarr.open_array(files.zarr_store(), path=name, mode="r")
    except Exception:  # it is not the chunks that are damaged
        return None
    size = (array.shards or array.chunks)[0]
    for start in range(0, num_rows, size):
        rows = range(start, min(start + size, num_rows))
        try:
            array[rows.start : rows.stop]
        except Exception as error:  # zarr and its codecs raise what they like
            return start // size, rows, error
    return None


def read_units(files: Files, name: str) -> str:
    """Units that an array states; empty if it states none.

    Raises:
        StoreError: its zarr.json is damaged.
    """
    try:
        return str(json.loads(files.read(f"{name}/zarr.json"))["attributes"].get("units", ""))
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise StoreError(f"{files}: {name} cannot be read: {why(error)}") from error


def _open_camera(files: Files, camera: str, spec: DataSpec, ends: NDArray[np.int64]) -> FrameReader:
    name = f"data/images_{camera}"
    num_frames = int(ends[-1]) if len(ends) else 0
    try:
        document = json.loads(files.read(f"{name}/zarr.json"))
        shape, dtype = tuple(document["shape"]), document["data_type"]
        if shape[1:] != (*spec.image_size, 3) or shape[0] < num_frames or dtype != "uint8":
            raise StoreError(
                f"{files}: {name} is {dtype} of shape {shape}, not uint8 of shape "
                f"{(num_frames, *spec.image_size, 3)}; {REMEDY}"
            )
        return open_frames(files, name)
    except StoreError:
        raise
    except Exception as error:  # zarr raises what it likes
        raise StoreError(f"{files}: {name} cannot be read: {why(error)}") from error


def is_complete(attributes: dict[str, Any], num_episodes: int) -> bool:
    """Whether a store holds all the episodes it was made for."""
    expected = attributes["expected_episodes"]
    return bool(attributes["complete"]) or (expected is not None and num_episodes >= expected)
