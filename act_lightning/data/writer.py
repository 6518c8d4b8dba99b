"""Records demonstrations into a store, each of them wholly or not at all.

An episode is committed by one rename, of `meta/episode_ends/zarr.json`, after everything else was
written: a writer killed at any moment leaves a store with every episode completed before. What the
interrupted append left lies past the end that readers see, and is removed by the next
`StoreWriter.resume`.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any, Self

import numpy as np
from filelock import FileLock, Timeout
from numpy.typing import NDArray

from act_lightning.batch import DataSpec
from act_lightning.data import layout
from act_lightning.data.episode import Episode
from act_lightning.data.layout import StoreError, StoreMismatchError
from act_lightning.data.store import (
    FORMAT,
    VERSION,
    is_complete,
    read_array,
    read_attributes,
    read_spec,
    table_sizes,
)

_UNITS = {
    "qpos": "rad; grippers from 0 (closed) to 1 (open)",
    "action": "commanded qpos",
    "env_state": "object poses: m, unit quaternion wxyz",
}


class StoreWriter:
    """Records episodes into a store, one at a time, each of them wholly or not at all.

    Use it as a context manager: it holds a lock, so that a second writer is refused.
    """

    num_episodes: int
    """Episodes committed."""

    def __init__(self, path: Path, lock: FileLock, attributes: dict[str, Any]) -> None:
        """Use `create` or `resume`."""
        self.path = path
        self.spec = read_spec(path, attributes)
        self._lock = lock
        self._attributes = attributes
        ends = read_array(path, "meta/episode_ends", np.int64, ())
        seeds = read_array(path, "meta/episode_seed", np.int64, (), len(ends))
        self.num_episodes = len(ends)
        self._num_frames = int(ends[-1]) if len(ends) else 0
        self._last_seed: int = max([-1, *seeds.tolist(), *attributes["failed_seeds"]])

    @classmethod
    def create(
        cls,
        path: str | Path,
        spec: DataSpec,
        provenance: dict[str, Any],
        expected_episodes: int | None = None,
    ) -> StoreWriter:
        """Makes an empty store.

        Args:
            path: the new folder.
            spec: what every episode holds.
            provenance: what makes the demonstrations, as JSON types. To resume, all of it but
                `versions` must be equal.
            expected_episodes: the store counts as complete once it holds so many; None: once
                `finalize` was called.

        Raises:
            StoreError: something is at `path` already, or another process writes there.
        """
        path = Path(path)
        lock = _lock(path)
        try:
            if path.exists():
                raise StoreError(f"{path} exists already; resume it, or choose another path")
            attributes = {
                "format": FORMAT,
                "version": VERSION,
                "spec": _plain(asdict(spec)),
                "provenance": _plain(provenance),
                "resumed_with": [],
                "expected_episodes": expected_episodes,
                "complete": False,
                "failed_seeds": [],
            }
            _write_empty(path, attributes, spec)
            return cls(path, lock, attributes)
        except BaseException:
            lock.release()
            raise

    @classmethod
    def resume(
        cls,
        path: str | Path,
        spec: DataSpec,
        provenance: dict[str, Any],
        expected_episodes: int | None = None,
    ) -> StoreWriter:
        """Opens a store to add episodes; what an interrupted append left behind is removed.

        Args:
            path: the store's folder.
            spec: as given to `create`.
            provenance: as given to `create`. Other `versions` are noted in the store.
            expected_episodes: as in `create`; a larger number than before extends the store.

        Raises:
            FileNotFoundError: nothing is at `path`.
            StoreMismatchError: the store has other settings; the message names them.
            StoreError: no store is at `path`, or another process writes there.
        """
        path = Path(path)
        check_settings(path, spec, provenance)
        lock = _lock(path)
        try:
            writer = cls(path, lock, read_attributes(path))
            writer._note_resumption(_plain(provenance), expected_episodes)
            writer._remove_leftovers()
            return writer
        except BaseException:
            lock.release()
            raise

    def append(self, episode: Episode) -> None:
        """Adds an episode; when this returns it is on disk, and when it raises nothing has changed.

        Raises:
            ValueError: a shape differs from the store's, a value is not finite, or the seed is not
                above all seeds before.
            StoreError: the disk is full, or another fault of writing.
        """
        tables = episode.checked_tables(self.spec)
        self._check_seed(episode.seed)
        try:
            if self._attributes["complete"]:
                self._set_attributes(complete=False)
            self._write(episode, tables)
        except OSError as error:
            raise StoreError(
                f"{self.path}: writing episode {self.num_episodes} (seed {episode.seed}) failed: "
                f"{error.strerror or error}. The {self.num_episodes} episodes before it are safe; "
                "mend this and record again to continue"
            ) from error
        self.num_episodes += 1
        self._num_frames += len(episode.actions)
        self._last_seed = episode.seed

    def record_failure(self, seed: int) -> None:
        """Remembers that the demonstrator failed in a world, so that it is not tried again."""
        self._check_seed(seed)
        self._set_attributes(failed_seeds=[*self._attributes["failed_seeds"], seed])
        self._last_seed = seed

    def finalize(self) -> None:
        """Marks the store as complete."""
        if self.num_episodes == 0:
            raise StoreError(f"{self.path} holds no episode; there is nothing to complete")
        self._set_attributes(complete=True)

    def close(self) -> None:
        """Lets another writer in."""
        self._lock.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @property
    def num_failures(self) -> int:
        """Number of worlds in which the demonstrator failed."""
        failed: list[int] = self._attributes["failed_seeds"]
        return len(failed)

    @property
    def next_seed(self) -> int:
        """World after the last one tried; 0 at first."""
        return self._last_seed + 1

    @property
    def complete(self) -> bool:
        """Whether the store holds all the episodes it was made for."""
        return is_complete(self._attributes, self.num_episodes)

    def _write(self, episode: Episode, tables: dict[str, NDArray[np.float32]]) -> None:
        """Writes data, then lengths, and the episode's end, which commits it, last."""
        start, end = self._num_frames, self._num_frames + len(episode.actions)
        data, meta = self.path / "data", self.path / "meta"
        for column, camera in enumerate(self.spec.cameras):
            assert episode.images is not None
            frames = episode.images[:, column].transpose(0, 2, 3, 1)
            layout.write_frames(data / f"images_{camera}", start, frames)
            layout.set_length(data / f"images_{camera}", end)
        for name, table in tables.items():
            layout.write_rows(data / name, start, table)
            layout.set_length(data / name, end)
        for name, value in (("episode_seed", episode.seed), ("episode_ends", end)):
            layout.write_rows(meta / name, self.num_episodes, np.array([value], np.int64))
            layout.set_length(meta / name, self.num_episodes + 1)

    def _check_seed(self, seed: int) -> None:
        if seed <= self._last_seed:
            raise ValueError(
                f"{self.path}: seed {seed} comes after {self._last_seed}; each seed is tried once, "
                "in increasing order"
            )

    def _set_attributes(self, **changes: Any) -> None:
        attributes = self._attributes | changes
        layout.write_json(self.path / "zarr.json", layout.group_document(attributes))
        self._attributes = attributes

    def _note_resumption(self, provenance: dict[str, Any], expected_episodes: int | None) -> None:
        """Notes a higher goal, and versions other than those of the episodes so far."""
        old = self._attributes["expected_episodes"]
        if expected_episodes is not None and self.num_episodes < expected_episodes != old:
            self._set_attributes(expected_episodes=expected_episodes, complete=False)
        history = self._attributes["resumed_with"]
        versions = provenance.get("versions")
        before = history[-1] if history else self._attributes["provenance"]
        if versions != before.get("versions") and not self.complete:
            entry = {"first_episode": self.num_episodes, "versions": versions}
            self._set_attributes(resumed_with=[*history, entry])

    def _remove_leftovers(self) -> None:
        """Cuts every array to the committed episodes."""
        for partial in self.path.glob(f"*{layout.PARTIAL_SUFFIX}"):
            partial.unlink()
        arrays = {self.path / "meta" / name: self.num_episodes for name in _META}
        arrays |= {self.path / "data" / name: self._num_frames for name in _data_arrays(self.spec)}
        for array, length in arrays.items():
            layout.set_length(array, length)
            layout.remove_leftovers(array, length)


def check_settings(path: str | Path, spec: DataSpec, provenance: dict[str, Any]) -> None:
    """Checks that a store was recorded with these settings; program versions may differ.

    Raises:
        FileNotFoundError: nothing is at `path`.
        StoreMismatchError: they differ; the message names each setting with both values.
    """
    attributes = read_attributes(Path(path))
    old = _flat({"spec": attributes["spec"], "provenance": attributes["provenance"]})
    new = _flat({"spec": _plain(asdict(spec)), "provenance": _plain(provenance)})
    differing = [
        f"{name} is {old.get(name, 'not set')} there and {new.get(name, 'not set')} now"
        for name in sorted(old.keys() | new.keys())
        if old.get(name) != new.get(name) and not name.startswith("provenance.versions.")
    ]
    if differing:
        raise StoreMismatchError(
            f"{path} was recorded with other settings: {'; '.join(differing)}. "
            "Record into another path, move the store away, or set these back"
        )


_META = {"episode_ends": "frames", "episode_seed": "seed of the simulated world"}


def _data_arrays(spec: DataSpec) -> dict[str, dict[str, Any]]:
    """zarr.json of every array below data/, empty, by name."""
    arrays = {
        name: layout.table_document("float32", (size,), _UNITS[name])
        for name, size in table_sizes(spec).items()
    }
    for camera in spec.cameras:
        arrays[f"images_{camera}"] = layout.frames_document(*spec.image_size)
    return arrays


def _write_empty(path: Path, attributes: dict[str, Any], spec: DataSpec) -> None:
    """Makes an empty store beside `path` and moves it there."""
    for old in path.parent.glob(f".{path.name}.*{layout.PARTIAL_SUFFIX}"):
        shutil.rmtree(old)
    partial = path.with_name(f".{path.name}.new{layout.PARTIAL_SUFFIX}")
    documents = {"": layout.group_document(attributes)}
    documents |= {name: layout.group_document() for name in ("data", "meta")}
    documents |= {f"data/{name}": array for name, array in _data_arrays(spec).items()}
    documents |= {
        f"meta/{name}": layout.table_document("int64", (), units) for name, units in _META.items()
    }
    for name, document in documents.items():
        layout.write_json(partial / name / "zarr.json", document)
    partial.rename(path)


def _lock(path: Path) -> FileLock:
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(f"{path}.lock")
    try:
        lock.acquire(blocking=False)
    except Timeout:
        raise StoreError(
            f"{path}: another process is recording into it; wait, or stop it"
        ) from None
    return lock


def _plain(value: dict[str, Any]) -> dict[str, Any]:
    """The value as JSON gives it back: tuples become lists."""
    plain: dict[str, Any] = json.loads(json.dumps(value, allow_nan=False))
    return plain


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Leaves of a nested dict by dotted name."""
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            leaves |= _flat(value, f"{prefix}{key}.")
        else:
            leaves[f"{prefix}{key}"] = value
    return leaves
