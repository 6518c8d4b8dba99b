"""Opens a store however damaged it is: what cannot be read is noted, and everything else is read.

`Store.open` stops at the first fault, rightly: nobody should train on such data. An inspection
names all of them. Low-dimensional arrays are held in memory, as training does; what could not be
read of them is NaN there.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray

from act_lightning.batch import DataSpec
from act_lightning.data.files import Files, open_files
from act_lightning.data.images import FrameReader, open_frames
from act_lightning.data.layout import REMEDY, StoreError
from act_lightning.data.store import (
    is_complete,
    read_array,
    read_attributes,
    read_spec,
    read_units,
    table_sizes,
)
from act_lightning.study.inspect.report import ArraySize, Finding, Place


@dataclass(frozen=True, kw_only=True, eq=False)
class Opened:
    """As much of a store as can be read."""

    files: Files
    version: int
    spec: DataSpec
    complete: bool
    expected_episodes: int | None
    skipped: int
    starts: NDArray[np.int64]
    """(num_episodes,) position of each episode's first frame."""
    ends: NDArray[np.int64]
    """(num_episodes,) position after its last; equal to the start of an episode without steps."""
    ids: NDArray[np.int64]
    success: NDArray[np.int8]
    tables: dict[str, NDArray[np.float32]]
    """(T, width) by name: qpos, action, and env_state if there is one."""
    lost: dict[str, NDArray[np.bool_]]
    """(T,) rows that could not be read, and so are NaN, by the same names."""
    units: dict[str, str]
    cameras: dict[str, FrameReader]
    """Those whose array can be opened."""
    findings: list[Finding] = field(default_factory=list)
    """What was wrong on the way."""

    @property
    def num_frames(self) -> int:
        """T."""
        return int(self.ends[-1]) if len(self.ends) else 0

    @property
    def is_start(self) -> NDArray[np.bool_]:
        """(T,) whether an episode starts there."""
        flags = np.zeros(self.num_frames, bool)
        flags[self.starts[self.ends > self.starts]] = True
        return flags

    def place(self, frame: int, detail: str = "", last: int | None = None) -> Place:
        """Names the steps from `frame` to `last`, default `frame`, of one episode."""
        episode = int(np.searchsorted(self.ends, frame, side="right"))
        start = int(self.starts[episode])
        last = frame if last is None else last
        return Place(
            episode=episode,
            id=int(self.ids[episode]),
            step=frame - start,
            last_step=last - start,
            detail=detail,
        )

    def episode_place(self, episode: int, detail: str = "") -> Place:
        """Names a whole episode."""
        return Place(episode=episode, id=int(self.ids[episode]), detail=detail)

    def places(self, found: Iterable[tuple[int, str]]) -> tuple[Place, ...]:
        """Names frames, in order of time; neighbours in an episode with equal details become one.

        Args:
            found: pairs of frame and detail.
        """
        runs: list[tuple[int, int, str]] = []
        is_start = self.is_start
        for frame, detail in sorted(found):
            if runs and runs[-1][1:] == (frame - 1, detail) and not is_start[frame]:
                runs[-1] = (runs[-1][0], frame, detail)
            else:
                runs.append((frame, frame, detail))
        return tuple(self.place(first, detail, last) for first, last, detail in runs)


def open_leniently(location: str | Path) -> Opened:
    """Opens a store, complete or not, damaged or not.

    Raises:
        FileNotFoundError: nothing is there.
        StoreError: it is no store, of a newer version, or its attributes or the ends of its
            episodes are damaged, without which nothing can be told.
    """
    files = open_files(location)
    attributes = read_attributes(files)
    spec = read_spec(files, attributes)
    findings: list[Finding] = []
    raw_ends = read_array(files, "meta/episode_ends", np.int64, ())
    version = int(attributes["version"])
    name = "meta/episode_seed" if version == 1 else "meta/episode_id"
    ids = _labels(files, name, np.int64, np.arange(len(raw_ends)), findings)
    success = np.ones(len(raw_ends), np.int8)
    if version > 1:
        unknown = np.full(len(raw_ends), -1, np.int8)
        success = _labels(files, "meta/episode_success", np.int8, unknown, findings)
    ends = np.maximum.accumulate(np.maximum(raw_ends, 0)) if len(raw_ends) else raw_ends
    starts = np.concatenate([np.zeros(1, np.int64), ends])[:-1]
    opened = Opened(
        files=files,
        version=version,
        spec=spec,
        complete=is_complete(attributes, len(ends)),
        expected_episodes=attributes["expected_episodes"],
        skipped=len(attributes["skipped"]),
        starts=starts,
        ends=ends,
        ids=ids,
        success=success,
        tables={},
        lost={},
        units={},
        cameras={},
        findings=findings,
    )
    _check_episodes(opened, raw_ends)
    for table, size in table_sizes(spec).items():
        _read_table(opened, table, size)
    for camera in spec.cameras:
        _open_camera(opened, camera)
    return opened


def measure_arrays(opened: Opened) -> tuple[ArraySize, ...]:
    """Bytes of every array that can be opened, in memory and on disk."""
    episodes = "episode_seed" if opened.version == 1 else "episode_id"
    names = [f"data/{name}" for name in table_sizes(opened.spec)]
    names += [f"data/images_{camera}" for camera in opened.spec.cameras]
    names += ["meta/episode_ends", f"meta/{episodes}"]
    names += ["meta/episode_success"] if opened.version > 1 else []
    sizes = []
    for name in names:
        try:
            array = _open_array(opened.files, name)
        except Exception:  # told already, as damage
            continue
        try:
            stored = int(array.nbytes_stored())
        except Exception:  # not every place of files can list them
            stored = None
        sizes.append(ArraySize(name=name, raw=int(array.nbytes), stored=stored))
    return tuple(sizes)


def _open_array(files: Files, name: str) -> zarr.Array[Any]:
    return zarr.open_array(files.zarr_store(), path=name, mode="r")


def _labels(
    files: Files, name: str, dtype: type, default: NDArray[Any], findings: list[Finding]
) -> NDArray[Any]:
    """One value an episode; the default if they cannot be read."""
    try:
        return read_array(files, name, dtype, (), len(default))
    except StoreError as error:
        findings.append(_damage("unreadable", name, "cannot be read", [Place(detail=_cut(error))]))
        return default.astype(dtype)


def _check_episodes(opened: Opened, raw_ends: NDArray[np.int64]) -> None:
    lengths = np.diff(raw_ends, prepend=0)
    empty = [
        opened.episode_place(episode, f"it would have {lengths[episode]} steps")
        for episode in np.flatnonzero(lengths < 1).tolist()
    ]
    if empty:
        title = "some episodes have no steps"
        opened.findings.append(_damage("no_steps", "meta/episode_ends", title, empty))
    falling = np.flatnonzero(np.diff(opened.ids) <= 0) + 1
    if len(falling):
        title = "ids do not increase"
        places = [opened.episode_place(episode) for episode in falling.tolist()]
        opened.findings.append(_damage("ids", "meta/episode_id", title, places))
    wrong = np.flatnonzero(~np.isin(opened.success, (-1, 0, 1)))
    if len(wrong):
        places = [opened.episode_place(i, f"it is {opened.success[i]}") for i in wrong.tolist()]
        title = "success is none of 1 (yes), 0 (no) and -1 (unknown)"
        opened.findings.append(_damage("success", "meta/episode_success", title, places))


def _read_table(opened: Opened, name: str, size: int) -> None:
    """Reads a low-dimensional array a chunk at a time, and notes the rows that cannot be read."""
    num_frames = opened.num_frames
    table = np.full((num_frames, size), np.nan, np.float32)
    lost: dict[int, str] = {}
    subject = f"data/{name}"
    try:
        array = _open_array(opened.files, subject)
        opened.units[name] = read_units(opened.files, subject)
        if array.shape[1:] != (size,) or array.dtype != np.float32:
            detail = f"it is {array.dtype} of shape {array.shape}, not float32 of ('T', {size})"
            opened.findings.append(
                _damage("layout", subject, "another array than stated", [Place(detail=detail)])
            )
            table = np.full((num_frames, *array.shape[1:]), np.nan, np.float32)
            table = table.reshape(num_frames, -1)
        rows = (array.shards or array.chunks)[0]
        for start in range(0, min(num_frames, array.shape[0]), rows):
            stop = min(start + rows, num_frames, array.shape[0])
            try:
                block = np.asarray(array[start:stop], np.float32)
                table[start:stop] = block.reshape(stop - start, -1)
            except Exception as error:  # zarr and its codecs raise what they like
                lost.update(dict.fromkeys(range(start, stop), _cut(error)))
        absent = f"the array ends at row {array.shape[0]} of {num_frames}"
        lost.update(dict.fromkeys(range(array.shape[0], num_frames), absent))
    except Exception as error:  # the same
        lost = dict.fromkeys(range(num_frames), _cut(error))
    if lost:
        places = opened.places(lost.items())
        opened.findings.append(_damage("unreadable", subject, "rows cannot be read", places))
    opened.tables[name] = table
    opened.lost[name] = np.zeros(num_frames, bool)
    opened.lost[name][list(lost)] = True


def _open_camera(opened: Opened, camera: str) -> None:
    name = f"data/images_{camera}"
    try:
        array = _open_array(opened.files, name)
        expected = (*opened.spec.image_size, 3)
        if array.shape[1:] != expected or array.dtype != np.uint8:
            raise StoreError(
                f"it is {array.dtype} of {array.shape}, not uint8 of ('T', *{expected})"
            )
        opened.cameras[camera] = open_frames(opened.files, name)
    except Exception as error:  # zarr raises what it likes
        places = [Place(detail=_cut(error))]
        opened.findings.append(_damage("unreadable", name, "cannot be opened", places))


def _damage(kind: str, subject: str, title: str, places: Iterable[Place]) -> Finding:
    return Finding(kind=kind, subject=subject, damaged=True, title=title, places=tuple(places))


def _cut(error: Exception) -> str:
    """The error's message without the advice, which the report gives once."""
    text = str(error) or type(error).__name__
    return text.removesuffix(f"; {REMEDY}")
