"""A LeRobotDataset as a source of episodes.

`observation.state` becomes qpos, `action` the action and `observation.environment_state`, where it
is, env_state; other keys by option. Cameras are `image` and `video` features. An episode counts as
a success when `next.success` is true at any of its steps; without that key, when `next.reward`,
being 0 or 1 throughout, is 1 at any of them; without either it is not known.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from act_lightning.batch import DataSpec
from act_lightning.data.episode import Episode
from act_lightning.ingest.columns import MAX_TABLE_BYTES, Columns, join_columns
from act_lightning.ingest.frames import FrameBlock, choose_cameras, common_size, make_episode
from act_lightning.ingest.lerobot.frames import TOLERANCE, ImageColumn, VideoSegment
from act_lightning.ingest.lerobot.index import Entry, Index, read_index
from act_lightning.ingest.lerobot.info import COLUMNS, INFO, NUMBER_DTYPES, Info
from act_lightning.ingest.lerobot.rows import Rows, as_array, brief
from act_lightning.ingest.source import IngestOptions, SourceError, describe
from act_lightning.lerobot.features import ACTION, ENV_STATE, IMAGES, QPOS, SUCCESS

FORMAT = "lerobot"
REWARD = "next.reward"
TABLE_WINDOW = 1024
IMAGE_WINDOW = 16
"""Rows held in memory; one with an image has up to a few hundred kilobytes."""


def matches(path: Path) -> bool:
    """Whether `path` is a folder such as LeRobotDataset's `root`."""
    return (path / INFO).is_file()


def open_source(path: Path, options: IngestOptions) -> LeRobotSource:
    """Opens a data set.

    Args:
        path: its folder, which holds `meta`, `data` and perhaps `videos`.
        options: keys are features, as `observation.state`; cameras may leave out
            `observation.images.`. Of several tasks, `task` takes the episodes of one.

    Raises:
        SourceError: it is damaged, of another version, or lacks what is asked for.
    """
    return LeRobotSource(path, options)


class LeRobotSource:
    """A LeRobotDataset, opened; see `Source`."""

    format = FORMAT

    def __init__(self, path: Path, options: IngestOptions) -> None:
        self._index = read_index(path)
        self._info = info = self._index.info
        self._options = options
        where = str(info.path)
        if options.fps not in (None, info.fps):
            raise SourceError(f"{where}: fps is {info.fps:g}; leave out --fps")
        if options.episodes is not None:
            raise SourceError(
                f"{where}: it has no named subsets of episodes; leave that option out"
            )
        task, self.ids = _choose_task(self._index, options.task)
        self._cameras = _choose_cameras(info, options)
        env_state = options.env_state or ((ENV_STATE,) if ENV_STATE in info.features else ())
        self._keys = {
            "qpos": _parse_keys(options.qpos or (QPOS,), "--qpos", info),
            "action": _parse_keys(options.action or (ACTION,), "--action", info),
            "env_state": _parse_keys(env_state, "--env-state", info),
        }
        self._tables: Rows | None = None
        self.units = {name: _units(info, keys) for name, keys in self._keys.items() if keys}
        sizes = {name: info.features[key].image_size or (0, 0) for name, key in self._cameras}
        self.spec = DataSpec(
            task=task,
            fps=info.fps,
            dim_qpos=_width(info, self._keys["qpos"]),
            dim_action=_width(info, self._keys["action"]),
            dim_env_state=_width(info, self._keys["env_state"]),
            cameras=tuple(sizes),
            image_size=common_size(sizes, options, where),
        )
        self.provenance = describe(
            FORMAT,
            path,
            options,
            cameras=self._cameras,
            codebase_version=info.version,
            task=task,
            **{name: [str(key) for key in keys] for name, keys in self._keys.items()},
        )
        self.provenance["versions"] |= {name: version(name) for name in ("av", "pyarrow")}
        used = {key.key for keys in self._keys.values() for key in keys}
        used |= {key for _, key in self._cameras} | {*COLUMNS, SUCCESS, REWARD}
        self.unused = tuple(key for key in info.features if key not in used)

    def name(self, id: int) -> str:
        """As `episode_index` counts them."""
        return f"episode {id}"

    def read(self, id: int) -> Episode:
        """Reads an episode; see `Source`."""
        entry = self._index.episodes[id]
        where = f"{entry.table}: {self.name(id)}"
        columns = self._read_columns(id, entry, where)
        self._check_steps(id, entry, columns, where)
        tables = {
            name: join_columns(keys, columns.__getitem__, where)
            for name, keys in self._keys.items()
            if keys
        }
        cameras = [self._open_camera(id, entry, name, key) for name, key in self._cameras]
        return make_episode(id, tables, cameras, self.spec, self._options, _success(columns))

    def _read_columns(self, id: int, entry: Entry, where: str) -> dict[str, NDArray[Any]]:
        """Every column of numbers of an episode, (T,) or (T, width)."""
        features = self._info.features
        widths = {
            key: math.prod(feature.shape)
            for key, feature in features.items()
            if NUMBER_DTYPES.fullmatch(feature.dtype)
        }
        if entry.length * sum(widths.values()) * 8 > MAX_TABLE_BYTES:
            raise SourceError(f"{where} has {entry.length} steps, too many to be true")
        if self._tables is None or self._tables.path != entry.table:
            self._tables = self._open_rows(entry, widths.__contains__, TABLE_WINDOW)
        table = self._tables.read(entry.first_row, entry.first_row + entry.length)
        columns = {}
        for key, width in widths.items():
            try:
                columns[key] = as_array(table.column(key), width)
            except Exception as error:  # pyarrow raises what it likes
                raise SourceError(f"{where}: {key} is damaged ({brief(error)})") from error
        return columns

    def _check_steps(
        self, id: int, entry: Entry, columns: dict[str, NDArray[Any]], where: str
    ) -> None:
        """Whether every row is the step of the episode that it should be."""
        steps = np.arange(entry.length)
        expected = {
            "episode_index": np.full(entry.length, id),
            "frame_index": steps,
            "index": steps + entry.first_index,
            "timestamp": steps / self._info.fps,
        }
        for key, values in expected.items():
            slack = TOLERANCE if key == "timestamp" else 0
            # Written so that NaN is wrong, too.
            wrong = np.flatnonzero(~(np.abs(columns[key] - values) <= slack))
            if len(wrong):
                step = wrong[0]
                raise SourceError(
                    f"{where}: {key} is {columns[key][step]} at step {step}, not {values[step]:g}"
                )
        tasks = {self._index.tasks.get(int(task)) for task in np.unique(columns["task_index"])}
        if not tasks <= set(entry.tasks):
            raise SourceError(f"{where}: its steps show {tasks}, and meta says {entry.tasks}")

    def _open_rows(self, entry: Entry, keep: Callable[[str], bool], window: int) -> Rows:
        rows = Rows(entry.table, keep, window)
        features = {k for k, feature in self._info.features.items() if feature.dtype != "video"}
        if set(rows.names) != features or len(rows.names) != len(features):
            raise SourceError(
                f"{entry.table} has the columns {sorted(rows.names)}, info.json says "
                f"{sorted(features)}"
            )
        if rows.num_rows != (expected := self._index.num_rows[entry.table]):
            raise SourceError(f"{entry.table} has {rows.num_rows} rows, meta says {expected}")
        return rows

    def _open_camera(self, id: int, entry: Entry, name: str, key: str) -> FrameBlock:
        feature = self._info.features[key]
        assert feature.image_size is not None
        where = f"{self.name(id)}, camera {name}"
        if feature.dtype == "video":
            return VideoSegment(
                entry.videos[key], entry.length, self._info.fps, feature.image_size, where
            )
        rows = self._open_rows(entry, lambda column: column == key, IMAGE_WINDOW)
        return ImageColumn(rows, key, entry.first_row, feature.image_size, where)


def _choose_task(index: Index, asked: str | None) -> tuple[str, list[int]]:
    """Name of the task, and numbers of the episodes that show it."""
    used = list(dict.fromkeys(task for entry in index.episodes for task in entry.tasks))
    if len(used) == 1:
        return asked or used[0], list(range(len(index.episodes)))
    ids = [n for n, entry in enumerate(index.episodes) if entry.tasks == (asked,)]
    if asked is None or not ids:
        raise SourceError(
            f"{index.info.path.parent}: the data set shows {len(used)} tasks: "
            f"{', '.join(map(repr, used[:10]))}. Choose one with --task"
        )
    return asked, ids


def _choose_cameras(info: Info, options: IngestOptions) -> tuple[tuple[str, str], ...]:
    """(name in the store, feature) of the cameras to take."""
    short = {
        key.removeprefix(IMAGES): key
        for key, feature in info.features.items()
        if feature.image_size
    }
    # A depth map has one value a pixel. What is neither that nor colours is not left out unasked.
    for key, feature in info.features.items():
        is_known = feature.image_size or (feature.is_depth and 3 not in feature.shape)
        if feature.is_camera and not is_known and options.cameras is None:
            raise SourceError(
                f"{info.path}: {key} has the shape {list(feature.shape)}"
                f"{', and depths' if feature.is_depth else ''}; choose others with --cameras"
            )
    if options.cameras is not None:
        asked = tuple((name, key.removeprefix(IMAGES)) for name, key in options.cameras)
        options = replace(options, cameras=asked)
    chosen = choose_cameras(list(short), options, str(info.path))
    return tuple((name, short[key]) for name, key in chosen)


def _parse_keys(texts: tuple[str, ...], option: str, info: Info) -> tuple[Columns, ...]:
    numbers = [k for k, feature in info.features.items() if NUMBER_DTYPES.fullmatch(feature.dtype)]
    try:
        keys = tuple(Columns.parse(text) for text in texts)
    except ValueError as error:
        raise SourceError(f"{option}: {error}") from error
    for key in keys:
        if key.key not in numbers:
            listed = ", ".join(key for key in numbers if key not in COLUMNS)
            raise SourceError(
                f"{info.path}: there are no numbers called {key.key}; choose with {option} "
                f"among {listed}"
            )
    return keys


def _width(info: Info, keys: tuple[Columns, ...]) -> int:
    """Number of columns that the keys make together."""
    return sum(len(range(math.prod(info.features[k.key].shape))[k.columns]) for k in keys)


def _units(info: Info, keys: tuple[Columns, ...]) -> str:
    """What the features say of their units, once each; our own exporter writes them there."""
    said = [info.features[key.key].units for key in keys]
    return ", ".join(dict.fromkeys(text for text in said if text)) or "as in the source"


def _success(columns: dict[str, NDArray[Any]]) -> bool | None:
    if SUCCESS in columns:
        return bool(columns[SUCCESS].any())
    rewards = columns.get(REWARD)
    if rewards is not None and np.isin(rewards, (0, 1)).all():
        return bool(rewards.any())
    return None
