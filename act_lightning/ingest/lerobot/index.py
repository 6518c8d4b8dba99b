"""What a LeRobotDataset says of itself: rate, features, tasks, and where each episode is.

Versions 3.0 and 2.1 (and 2.0, which differs from 2.1 in statistics only) hold the same in different
files: v3.0 many episodes a parquet and an mp4, listed in `meta/episodes/`; v2.1 one file each,
named by a pattern. What is said twice must agree, as there is little else to tell damage by.

Source: LeRobot 0.6.1, `datasets/utils.py`, and `convert_dataset_v21_to_v30.py` for v2.1.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from act_lightning.ingest.lerobot.info import (
    Info,
    at_least,
    get_field,
    read_info,
    read_json_lines,
)
from act_lightning.ingest.lerobot.rows import Rows
from act_lightning.ingest.source import SourceError


@dataclass(frozen=True, kw_only=True)
class Segment:
    """Where an episode's frames are in a video file."""

    path: Path
    start: float = 0.0
    """Seconds, of the first frame."""
    stop: float = float("inf")
    """Seconds, where the next episode may begin; infinite when the file must end."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """Where one episode is."""

    length: int
    first_index: int
    """Position of its first step in the whole data set."""
    table: Path
    first_row: int
    """Of the episode in `table`."""
    videos: dict[str, Segment]
    """By feature."""
    tasks: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Index:
    """The whole of `meta/`, statistics apart."""

    info: Info
    tasks: dict[int, str]
    """By number, as `task_index` has it."""
    episodes: list[Entry]
    """By `episode_index`."""
    num_rows: dict[Path, int]
    """That each table's file must have."""


def read_index(root: Path) -> Index:
    """Reads `meta/` of a data set.

    Raises:
        SourceError: a file is missing or damaged, the files disagree, or the version is another.
    """
    info = read_info(root)
    tasks, episodes = (_read_v3 if info.version == "v3.0" else _read_v2)(root, info)
    if len(episodes) != info.num_episodes:
        raise SourceError(
            f"{info.path}: total_episodes is {info.num_episodes}, but {len(episodes)} are listed"
        )
    if (num_frames := sum(entry.length for entry in episodes)) != info.num_frames:
        raise SourceError(
            f"{info.path}: total_frames is {info.num_frames}, but the episodes have {num_frames}"
        )
    for number, entry in enumerate(episodes):
        if unknown := set(entry.tasks) - set(tasks.values()):
            raise SourceError(f"{root / 'meta'}: episode {number}: no task is called {unknown}")
    return Index(
        info=info,
        tasks=tasks,
        episodes=episodes,
        # Episodes are in order, so the last one of a file says where it ends.
        num_rows={entry.table: entry.first_row + entry.length for entry in episodes},
    )


class _FileOrder:
    """Sees that episodes go through numbered files forwards, and forwards through each of them."""

    def __init__(self) -> None:
        self._file = (0, 0)
        self._end = 0.0

    def place(self, file: tuple[int, int], start: float | None, length: int) -> float:
        """Where the next episode begins in `file`, in steps: at `start`, or right after the last.

        Raises:
            ValueError: that is before the end of the last one.
        """
        if file < self._file:
            raise ValueError(f"is file {file}, after {self._file}")
        end = self._end if file == self._file else 0.0
        start = end if start is None else start
        if start < end - 0.5:
            raise ValueError("begins before the end of the episode before")
        self._file, self._end = file, start + length
        return start


def _read_v3(root: Path, info: Info) -> tuple[dict[int, str], list[Entry]]:
    listed = [
        (f"{path}: episode {row.get('episode_index')}", row)
        for path in sorted((root / "meta/episodes").glob("*/*.parquet"))
        for row in _read_rows(path, lambda name: not name.startswith("stats/"))
    ]
    if not listed:
        raise SourceError(f"{root}/meta/episodes holds no episode; the data set is incomplete")
    cameras = {key.split("/")[1] for key in listed[0][1] if key.startswith("videos/")}
    if cameras != set(info.video_keys):
        raise SourceError(
            f"{info.path} has the videos {info.video_keys}, meta/episodes has {sorted(cameras)}"
        )
    orders = {key: _FileOrder() for key in ("data", *info.video_keys)}
    entries: list[Entry] = []
    first = 0
    for where, row in listed:
        if (number := row.get("episode_index")) != len(entries):
            raise SourceError(f"{where}: episode_index is {number}, not {len(entries)}")
        entries.append(_read_entry_v3(root, info, row, first, orders, where))
        first += entries[-1].length
    path = root / "meta/tasks.parquet"
    # LeRobot writes the names as pandas' index, which is called "task" or nothing.
    pairs = [
        (row.get("task_index"), row.get("task", row.get("__index_level_0__")))
        for row in _read_rows(path, lambda name: True)
    ]
    return _number_tasks(pairs, path), _let_files_end(entries)


def _let_files_end(entries: list[Entry]) -> list[Entry]:
    """Gives the last segment of every video file no end but the file's: then frames are counted."""
    last = {
        (key, segment.path): number
        for number, entry in enumerate(entries)
        for key, segment in entry.videos.items()
    }
    return [
        replace(
            entry,
            videos={
                key: replace(segment, stop=float("inf"))
                if last[key, segment.path] == number
                else segment
                for key, segment in entry.videos.items()
            },
        )
        for number, entry in enumerate(entries)
    ]


def _read_entry_v3(
    root: Path,
    info: Info,
    row: dict[str, Any],
    first: int,
    orders: dict[str, _FileOrder],
    where: str,
) -> Entry:
    get = partial(get_field, row, where)
    length = at_least(1, get("length", int), f"{where}: length")
    ends = (get("dataset_from_index", int), get("dataset_to_index", int))
    if ends != (first, first + length):
        raise SourceError(f"{where}: its steps are {ends}, not {(first, first + length)}")

    def place(name: str, key: str, start: float | None) -> tuple[tuple[int, int], float]:
        file = (get(f"{name}/chunk_index", int), get(f"{name}/file_index", int))
        try:
            return file, orders[key].place(file, start, length)
        except ValueError as error:
            raise SourceError(f"{where}: {name} {error}") from error

    (chunk, file), first_row = place("data", "data", None)
    fields: dict[str, int | str] = {"chunk_index": chunk, "file_index": file}
    table = _expand(root, info, "data_path", fields)
    videos = {}
    for key in info.video_keys:
        name = f"videos/{key}"
        start, stop = get(f"{name}/from_timestamp", float), get(f"{name}/to_timestamp", float)
        if not (start >= 0 and abs((stop - start) * info.fps - length) < 0.5):
            raise SourceError(
                f"{where}: {name} goes from {start} to {stop} s, which is not its "
                f"{length} steps at {info.fps:g} a second"
            )
        (chunk, file), _ = place(name, key, start * info.fps)
        fields = {"chunk_index": chunk, "file_index": file, "video_key": key}
        videos[key] = Segment(
            path=_expand(root, info, "video_path", fields), start=start, stop=stop
        )
    return Entry(
        length=length,
        first_index=first,
        table=table,
        first_row=int(first_row),
        videos=videos,
        tasks=_texts(get("tasks", list), where),
    )


def _read_v2(root: Path, info: Info) -> tuple[dict[int, str], list[Entry]]:
    path = root / "meta/episodes.jsonl"
    entries: list[Entry] = []
    first = 0
    for number, row in enumerate(read_json_lines(path)):
        where = f"{path}: episode {number}"
        if row.get("episode_index") != number:
            raise SourceError(f"{where}: episode_index is {row.get('episode_index')}")
        length = at_least(1, get_field(row, where, "length", int), f"{where}: length")
        fields: dict[str, int | str] = {
            "episode_chunk": number // info.chunks_size,
            "episode_index": number,
        }
        videos = {
            key: Segment(path=_expand(root, info, "video_path", fields | {"video_key": key}))
            for key in info.video_keys
        }
        entries.append(
            Entry(
                length=length,
                first_index=first,
                table=_expand(root, info, "data_path", fields),
                first_row=0,
                videos=videos,
                tasks=_texts(get_field(row, where, "tasks", list), where),
            )
        )
        first += length
    num_videos = len(entries) * len(info.video_keys)
    if info.num_videos not in (None, num_videos):
        raise SourceError(
            f"{info.path}: total_videos is {info.num_videos}, but there are {len(entries)} "
            f"episodes, and as videos the features {info.video_keys}"
        )
    path = root / "meta/tasks.jsonl"
    pairs = [(row.get("task_index"), row.get("task")) for row in read_json_lines(path)]
    return _number_tasks(pairs, path), entries


def _number_tasks(pairs: list[tuple[Any, Any]], path: Path) -> dict[int, str]:
    tasks = {index: task for index, task in pairs if type(index) is int and isinstance(task, str)}
    if len(set(tasks.values())) != len(pairs):
        raise SourceError(f"{path} is no list of different tasks, each with a number")
    return tasks


def _texts(values: list[Any], where: str) -> tuple[str, ...]:
    if not values or not all(isinstance(value, str) for value in values):
        raise SourceError(f"{where}: tasks is {values!r}, not a list of texts")
    return tuple(values)


def _expand(root: Path, info: Info, which: str, fields: dict[str, int | str]) -> Path:
    """Fills in a pattern of paths; less than `str.format`, which could be made to do anything."""
    template: str = getattr(info, which)

    def fill(match: re.Match[str]) -> str:
        value = fields[match[1]]
        return str(value) if match[2] is None else f"{value:0{match[2]}d}"

    try:
        name = re.sub(r"\{(\w+)(?::0(\d)d)?\}", fill, template)
    except (KeyError, ValueError) as error:
        raise SourceError(
            f"{info.path}: {which} is {template!r}, of which {error} is not known"
        ) from error
    # Not resolved: a folder that a hub client filled has links to files elsewhere.
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise SourceError(f"{info.path}: {which} is {template!r}, which leads out of the data set")
    return root / name


def _read_rows(path: Path, keep: Callable[[str], bool]) -> list[dict[str, Any]]:
    rows = Rows(path, keep, 1024)
    table = rows.read(0, rows.num_rows) if rows.num_rows > 0 else None
    try:
        found: list[dict[str, Any]] = [] if table is None else table.to_pylist()
    except Exception as error:  # pyarrow raises what it likes
        raise SourceError(f"{path} is damaged ({error}); fetch it anew") from error
    return found
