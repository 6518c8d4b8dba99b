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
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray

from act_lightning.batch import DataSpec
from act_lightning.data.images import FrameReader, open_frames
from act_lightning.data.layout import StoreError

FORMAT = "act_lightning.demonstrations"
VERSION = 1
"""Raised whenever a reader of the version before would misread the store."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Store:
    """An opened store; low-dimensional arrays are in memory, images are read when asked for."""

    path: Path
    spec: DataSpec
    provenance: dict[str, Any]
    """What made the demonstrations, as the recorder wrote it."""
    complete: bool
    """False while it is still being recorded."""
    expected_episodes: int | None
    episode_ends: NDArray[np.int64]
    """(num_episodes,) position after each episode's last frame."""
    episode_seeds: NDArray[np.int64]
    """(num_episodes,) world of each episode."""
    failed_seeds: tuple[int, ...]
    """Worlds in which the demonstrator failed; not stored."""
    qpos: NDArray[np.float32]
    """(T, D)."""
    actions: NDArray[np.float32]
    """(T, A)."""
    env_state: NDArray[np.float32] | None
    """(T, E), or None."""
    cameras: dict[str, FrameReader]
    """Reader of each camera's frames."""

    @classmethod
    def open(cls, path: str | Path, *, allow_incomplete: bool = False) -> Store:
        """Opens and checks a store.

        Raises:
            FileNotFoundError: nothing is at `path`.
            StoreError: it is no store, incomplete, damaged, of a newer version, or holds NaN.
        """
        path = Path(path)
        attributes = read_attributes(path)
        spec = read_spec(path, attributes)
        ends = read_array(path, "meta/episode_ends", np.int64, ())
        seeds = read_array(path, "meta/episode_seed", np.int64, (), len(ends))
        expected = attributes["expected_episodes"]
        complete = is_complete(attributes, len(ends))
        if not complete and not allow_incomplete:
            of = "" if expected is None else f" of {expected}"
            raise StoreError(
                f"{path} is still being recorded: it holds {len(ends)}{of} episodes. "
                "Run `make data` with the same EXP to continue"
            )
        if np.any(np.diff(ends, prepend=0) < 1) or (complete and len(ends) == 0):
            raise StoreError(f"{path}: meta/episode_ends does not increase; record it again")
        num_frames = int(ends[-1]) if len(ends) else 0
        tables = {
            name: read_array(path, f"data/{name}", np.float32, (size,), num_frames)
            for name, size in table_sizes(spec).items()
        }
        store = cls(
            path=path,
            spec=spec,
            provenance=attributes["provenance"],
            complete=complete,
            expected_episodes=expected,
            episode_ends=ends,
            episode_seeds=seeds,
            failed_seeds=tuple(attributes["failed_seeds"]),
            qpos=tables["qpos"],
            actions=tables["action"],
            env_state=tables.get("env_state"),
            cameras={name: _open_camera(path, name, spec, num_frames) for name in spec.cameras},
        )
        for name, table in tables.items():
            if (bad := first_not_finite(table)) is not None:
                raise StoreError(
                    f"{path}: data/{name} is {table[bad]} in {store.locate(bad[0])}, "
                    f"dimension {bad[1]}; record the store again"
                )
        return store

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
        """Names a frame for a message: its episode, seed and step."""
        episode = int(np.searchsorted(self.episode_ends, frame, side="right"))
        step = frame - int(self.episode_starts[episode])
        return f"episode {episode} (seed {self.episode_seeds[episode]}), step {step}"

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
        for row, frame in enumerate(frames.tolist()):
            for column, name in enumerate(names):
                try:
                    self.cameras[name].read_into(frame, out[row, column])
                except StoreError as error:
                    raise StoreError(f"{error} ({self.locate(frame)})") from error
        return out.transpose(0, 1, 4, 2, 3)


def table_sizes(spec: DataSpec) -> dict[str, int]:
    """Name in the store, and width, of every low-dimensional array that `spec` asks for."""
    sizes = {"qpos": spec.dim_qpos, "action": spec.dim_action, "env_state": spec.dim_env_state}
    return {name: size for name, size in sizes.items() if size > 0}


def first_not_finite(table: NDArray[np.float32]) -> tuple[int, int] | None:
    """(row, column) of the first NaN or infinity of a 2-D array, or None."""
    bad = np.argwhere(~np.isfinite(table))
    return (int(bad[0, 0]), int(bad[0, 1])) if len(bad) else None


def read_attributes(path: Path) -> dict[str, Any]:
    """Reads and checks the group's attributes.

    Raises:
        FileNotFoundError: nothing is at `path`.
        StoreError: no store, a damaged one, or one of a newer version.
    """
    if not path.exists():
        raise FileNotFoundError(f"no demonstrations at {path}; record them with `make data`")
    try:
        attributes: dict[str, Any] = json.loads((path / "zarr.json").read_bytes())["attributes"]
        if attributes["format"] != FORMAT:
            raise StoreError(f"{path}: format {attributes['format']!r} is not {FORMAT!r}")
        if attributes["version"] > VERSION:
            raise StoreError(
                f"{path} has format version {attributes['version']}, this program reads up to "
                f"{VERSION}; update act_lightning"
            )
        needed = {"spec", "provenance", "expected_episodes", "complete", "failed_seeds"}
        if missing := sorted(needed - attributes.keys()):
            raise StoreError(f"{path}: attributes {missing} are missing; record it again")
    except StoreError:
        raise
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StoreError(
            f"{path} is not a store of demonstrations ({error!r}); move it away and record with "
            "`make data`, or give another demonstrations.path"
        ) from error
    return attributes


def read_spec(path: Path, attributes: dict[str, Any]) -> DataSpec:
    """What the store's steps hold.

    Raises:
        StoreError: the attribute does not describe a `DataSpec`.
    """
    try:
        lists = {name: tuple(attributes["spec"][name]) for name in ("cameras", "image_size")}
        return DataSpec(**(attributes["spec"] | lists))
    except (TypeError, ValueError, KeyError) as error:
        raise StoreError(f"{path}: attribute spec is damaged ({error}); record it again") from error


def read_array(
    root: Path, name: str, dtype: type, row_shape: tuple[int, ...], num_rows: int | None = None
) -> NDArray[Any]:
    """Reads the first `num_rows` rows (default all) of a small array, and checks its shape.

    Raises:
        StoreError: the array is missing, damaged, too short, or of another shape or dtype.
    """
    try:
        array = zarr.open_array(root / name, mode="r")
        if array.shape[1:] != row_shape or array.dtype != dtype:
            raise StoreError(
                f"{root}: {name} is {array.dtype} of shape {array.shape}, "
                f"not {np.dtype(dtype)} of shape {('T', *row_shape)}; record the store again"
            )
        if num_rows is not None and array.shape[0] < num_rows:
            raise StoreError(
                f"{root}: {name} has {array.shape[0]} rows instead of {num_rows}; "
                "record the store again"
            )
        return np.asarray(array[:num_rows])
    except StoreError:
        raise
    except Exception as error:  # zarr and its codecs raise what they like
        raise StoreError(
            f"{root}: {name} cannot be read ({error!r}); record the store again"
        ) from error


def _open_camera(root: Path, camera: str, spec: DataSpec, num_frames: int) -> FrameReader:
    name = f"data/images_{camera}"
    try:
        shape = tuple(json.loads((root / name / "zarr.json").read_bytes())["shape"])
        reader = open_frames(root / name)
    except (OSError, ValueError, KeyError) as error:
        raise StoreError(f"{root}: {name} cannot be read ({error!r}); record it again") from error
    if shape[1:] != (*spec.image_size, 3) or shape[0] < num_frames:
        raise StoreError(
            f"{root}: {name} has shape {shape}, not {(num_frames, *spec.image_size, 3)}; "
            "record the store again"
        )
    return reader


def is_complete(attributes: dict[str, Any], num_episodes: int) -> bool:
    """Whether a store holds all the episodes it was made for."""
    expected = attributes["expected_episodes"]
    return bool(attributes["complete"]) or (expected is not None and num_episodes >= expected)
