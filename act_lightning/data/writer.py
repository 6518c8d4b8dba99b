"""Records demonstrations into a store, each of them wholly or not at all.

An episode is committed by one rename, of `meta/episode_ends/zarr.json`, after everything else was
written: a writer killed at any moment leaves a store with every episode completed before. What the
interrupted append left lies past the end that readers see, and is removed by the next
`StoreWriter.resume`.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Self

import numpy as np
from filelock import FileLock, Timeout
from numpy.typing import NDArray

from act_lightning.batch import DataSpec
from act_lightning.data import layout
from act_lightning.data.episode import Episode, Frames
from act_lightning.data.files import LocalFiles, is_remote, open_files
from act_lightning.data.layout import StoreError, StoreMismatchError
from act_lightning.data.store import (
    FORMAT,
    VERSION,
    is_complete,
    read_attributes,
    read_episodes,
    read_spec,
    table_sizes,
)
from act_lightning.settings import flatten

BLOCK_BYTES = 2**26
"""Decoded frames of an episode that are in memory at a time."""


class StoreWriter:
    """Records episodes into a store, one at a time, each of them wholly or not at all.

    Use it as a context manager: it holds a lock, so that a second writer is refused.
    """

    num_episodes: int
    """Episodes committed."""

    def __init__(self, path: Path, lock: FileLock, attributes: dict[str, Any]) -> None:
        """Use `create` or `resume`."""
        files = LocalFiles(path)
        self.path = path
        self.spec = read_spec(files, attributes)
        self._lock = lock
        self._attributes = attributes
        ends, ids, _ = read_episodes(files, attributes)
        self.num_episodes = len(ends)
        self._num_frames = int(ends[-1]) if len(ends) else 0
        self._last_id: int = max([-1, *ids.tolist(), *attributes["skipped"]])

    @classmethod
    def create(
        cls,
        path: str | Path,
        spec: DataSpec,
        provenance: dict[str, Any],
        expected_episodes: int | None = None,
        units: Mapping[str, str] | None = None,
    ) -> StoreWriter:
        """Makes an empty store.

        Args:
            path: the new folder.
            spec: what every episode holds.
            provenance: what makes the demonstrations, as JSON types. To resume, all of it but
                `versions` must be equal.
            expected_episodes: the store counts as complete once it holds so many; None: once
                `finalize` was called.
            units: of `qpos`, `action` and `env_state`; those left out are not stated.

        Raises:
            StoreError: something is at `path` already, another process writes there, or it is an
                object store.
        """
        path = _local(path)
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
                "skipped": [],
            }
            _write_empty(path, attributes, spec, units or {})
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

        A store of an older version is brought to this one.

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
        path = _local(path)
        check_settings(path, spec, provenance)
        lock = _lock(path)
        try:
            writer = cls(path, lock, _migrate(path))
            writer._note_resumption(_plain(provenance), expected_episodes)
            writer._remove_leftovers()
            return writer
        except BaseException:
            lock.release()
            raise

    def append(self, episode: Episode) -> None:
        """Adds an episode; when this returns it is on disk, and when it raises nothing has changed.

        Raises:
            ValueError: a shape differs from the store's, a value is not finite, or the id is not
                above all ids before.
            StoreError: the disk is full, or another fault of writing.
        """
        tables = episode.checked_tables(self.spec)
        self._check_id(episode.id)
        try:
            if self._attributes["complete"]:
                self._set_attributes(complete=False)
            self._write(episode, tables)
        except OSError as error:
            raise StoreError(
                f"{self.path}: writing episode {self.num_episodes} (id {episode.id}) failed: "
                f"{error.strerror or error}. The {self.num_episodes} episodes before it are safe; "
                "mend this and run the command again to continue"
            ) from error
        self.num_episodes += 1
        self._num_frames += len(episode.actions)
        self._last_id = episode.id

    def skip(self, id: int) -> None:
        """Remembers an episode that failed or is bad, so that it is not tried again."""
        self._check_id(id)
        self._set_attributes(skipped=[*self._attributes["skipped"], id])
        self._last_id = id

    def finalize(self) -> None:
        """Marks the store as complete."""
        if self.num_episodes == 0:
            raise StoreError(f"{self.path} holds no episode; there is nothing to complete")
        self._remove_leftovers()
        self._set_attributes(complete=True)

    def close(self) -> None:
        """Lets another writer in."""
        self._lock.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @property
    def num_skipped(self) -> int:
        """Number of episodes that were tried and not stored."""
        skipped: list[int] = self._attributes["skipped"]
        return len(skipped)

    @property
    def next_id(self) -> int:
        """The id after the last one tried; 0 at first."""
        return self._last_id + 1

    @property
    def complete(self) -> bool:
        """Whether the store holds all the episodes it was made for."""
        return is_complete(self._attributes, self.num_episodes)

    def _write(self, episode: Episode, tables: dict[str, NDArray[np.float32]]) -> None:
        """Writes data, then lengths, and the episode's end, which commits it, last."""
        start, end = self._num_frames, self._num_frames + len(episode.actions)
        data, meta = self.path / "data", self.path / "meta"
        for number, camera in enumerate(self.spec.cameras):
            assert episode.frames is not None
            array = data / f"images_{camera}"
            frames = _each_frame(episode.frames, number)
            layout.write_frames(array, start, end - start, frames)
            layout.set_length(array, end)
        for name, table in tables.items():
            layout.write_rows(data / name, start, table)
            layout.set_length(data / name, end)
        success = -1 if episode.success is None else int(episode.success)
        values = {"episode_id": episode.id, "episode_success": success, "episode_ends": end}
        for name, value in values.items():
            row = np.array([value], _META[name][0])
            layout.write_rows(meta / name, self.num_episodes, row)
            layout.set_length(meta / name, self.num_episodes + 1)

    def _check_id(self, id: int) -> None:
        if id <= self._last_id:
            raise ValueError(
                f"{self.path}: id {id} comes after {self._last_id}; each id is tried once, "
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
        names = [*table_sizes(self.spec), *(f"images_{camera}" for camera in self.spec.cameras)]
        arrays |= {self.path / "data" / name: self._num_frames for name in names}
        for array, length in arrays.items():
            layout.set_length(array, length)
            layout.remove_leftovers(array, length)


def check_settings(path: str | Path, spec: DataSpec, provenance: dict[str, Any]) -> None:
    """Checks that a store was recorded with these settings; program versions may differ.

    Raises:
        FileNotFoundError: nothing is at `path`.
        StoreMismatchError: they differ; the message names each setting with both values.
    """
    attributes = read_attributes(open_files(path))
    old = flatten({"spec": attributes["spec"], "provenance": attributes["provenance"]})
    new = flatten({"spec": _plain(asdict(spec)), "provenance": _plain(provenance)})
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


_META = {
    "episode_id": ("int64", "seed of the simulated world, or number in the data set it came from"),
    "episode_success": ("int8", "1 success, 0 failure, -1 not known"),
    "episode_ends": ("int64", "frames"),
}
"""Type and units of the arrays below meta/; the last one is written last, and commits."""


def _meta_document(name: str) -> dict[str, Any]:
    """zarr.json of an empty array below meta/."""
    dtype, meaning = _META[name]
    return layout.table_document(dtype, (), meaning)


def _each_frame(frames: Frames, camera: int) -> Iterator[NDArray[np.uint8]]:
    """Frames of one camera one by one, of which at most `BLOCK_BYTES` are in memory.

    Raises:
        ValueError: the source gives other pictures than it said it would.
    """
    num_frames, _, channels, height, width = frames.shape
    block = max(1, BLOCK_BYTES // (channels * height * width))
    for start in range(0, num_frames, block):
        stop = min(start + block, num_frames)
        pictures = frames.read(camera, start, stop)
        expected = (stop - start, height, width, channels)
        if pictures.shape != expected or pictures.dtype != np.uint8:
            raise ValueError(
                f"frames {start} to {stop} of camera {camera} are {pictures.dtype} of shape "
                f"{pictures.shape}, not uint8 of shape {expected}"
            )
        yield from pictures


def _write_empty(
    path: Path, attributes: dict[str, Any], spec: DataSpec, units: Mapping[str, str]
) -> None:
    """Makes an empty store beside `path` and moves it there."""
    partial = path.with_name(f".{path.name}.new{layout.PARTIAL_SUFFIX}")
    shutil.rmtree(partial, ignore_errors=True)  # of a killed writer
    documents = {"": layout.group_document(attributes)}
    documents |= {name: layout.group_document() for name in ("data", "meta")}
    for name, size in table_sizes(spec).items():
        document = layout.table_document("float32", (size,), units.get(name, "not stated"))
        documents[f"data/{name}"] = document
    for camera in spec.cameras:
        documents[f"data/images_{camera}"] = layout.frames_document(*spec.image_size)
    documents |= {f"meta/{name}": _meta_document(name) for name in _META}
    for name, document in documents.items():
        layout.write_json(partial / name / "zarr.json", document)
    partial.rename(path)


def _migrate(path: Path) -> dict[str, Any]:
    """Brings a store to this version, and returns its attributes.

    The arrays of this version are written beside the old ones; writing the attributes makes them
    count. Killed in between, the store is still one of the old version.
    """
    files = LocalFiles(path)
    attributes = read_attributes(files)
    if attributes["version"] < VERSION:
        ends, ids, success = read_episodes(files, attributes)
        for name, values in (("episode_id", ids), ("episode_success", success)):
            array = path / "meta" / name
            layout.write_json(array / "zarr.json", _meta_document(name))
            layout.write_rows(array, 0, values)
            layout.set_length(array, len(ends))
        attributes["version"] = VERSION
        layout.write_json(path / "zarr.json", layout.group_document(attributes))
    shutil.rmtree(path / "meta" / "episode_seed", ignore_errors=True)  # version 1's ids
    return attributes


def _local(path: str | Path) -> Path:
    if is_remote(path):
        raise StoreError(
            f"{path}: an object store is read only; write the store to local disk, and copy it "
            "there when it is complete"
        )
    return Path(path)


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
