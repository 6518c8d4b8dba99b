"""`export_dataset`: a demonstration store as a LeRobotDataset v3.0, which LeRobot's class opens.

What a store has and LeRobot has no place for: the episodes' ids (numbered from 0 there), and
whether an episode succeeded when that is not known of all (else `next.success`, true at the last
step of a success). Units go into the features, where LeRobot ignores them and `ingest` finds them.
Everything else comes back from `ingest` bit for bit; frames do from images, not from videos.

Source: LeRobot 0.6.1, `datasets/dataset_writer.py` and `dataset_metadata.py`.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from PIL import Image
from rich.progress import track

from act_lightning.data.store import Store
from act_lightning.lerobot.dataset_files import (
    CHUNKS_SIZE,
    CODEC,
    GOP,
    PIXEL_FORMAT,
    Place,
    TableFiles,
    VideoFiles,
)
from act_lightning.lerobot.dataset_meta import describe_features, number_columns, write_task
from act_lightning.lerobot.dataset_stats import ImageStats, sampled_steps, table_stats
from act_lightning.lerobot.features import IMAGES
from act_lightning.lerobot.new_folder import new_folder

CRF = 18
"""Quality of the videos; see README for how it compares with LeRobot's."""
DATA_FILE_MB = 100
VIDEO_FILE_MB = 200
"""LeRobot's own limits."""
FILES = "chunk-{chunk_index:03d}/file-{file_index:03d}"
DATA_PATH = f"data/{FILES}.parquet"
EPISODES_PATH = f"meta/episodes/{FILES}.parquet"
VIDEO_PATH = f"videos/{{video_key}}/{FILES}.mp4"
BLOCK_BYTES = 2**25
"""Of decoded frames in memory."""
EPISODE_ROWS = 64
"""Of `meta/episodes`, kept in memory and written together."""
PNG_LEVEL = 3
"""Of 9; higher ones take twice the time for a few percent."""
PNG = pa.struct({"bytes": pa.binary(), "path": pa.string()})


def export_dataset(
    location: str | Path,
    folder: Path,
    *,
    images: bool = False,
    crf: int = CRF,
    data_files_size_in_mb: float = DATA_FILE_MB,
    video_files_size_in_mb: float = VIDEO_FILE_MB,
) -> None:
    """Writes a store as a LeRobotDataset, wholly or not at all.

    Args:
        location: of the store.
        folder: to be made; what LeRobot calls `root`.
        images: keep frames as PNG in the tables, exact, instead of as h264 video.
        crf: quality of the videos, 0 to 51; lower is better.
        data_files_size_in_mb: size from which on a new table begins.
        video_files_size_in_mb: size from which on a new video begins.

    Raises:
        FileExistsError: there is something in `folder`.
        FileNotFoundError: there is no store.
        ValueError: the store is damaged or incomplete, or LeRobot cannot hold what it holds.
    """
    store = Store.open(location)
    limits = (data_files_size_in_mb, video_files_size_in_mb)
    if not 0 <= crf <= 51:
        raise ValueError(f"--crf {crf}: give 0 to 51")
    if not min(limits) > 0:
        raise ValueError(f"file sizes of {limits[0]:g} and {limits[1]:g} MB: give more than 0")
    check_exportable(store, images)
    with new_folder(folder) as part:
        Exporter(store, part, images, crf, *limits).write()


def check_exportable(store: Store, images: bool) -> None:
    """Checks that LeRobot can hold what the store holds.

    Raises:
        ValueError: it cannot.
    """
    spec = store.spec
    if not float(spec.fps).is_integer():
        raise ValueError(f"{store.files}: fps is {spec.fps:g}; LeRobot's are whole numbers")
    if bad := [name for name in spec.cameras if not re.fullmatch(r"[\w.-]+", name)]:
        raise ValueError(f"{store.files}: LeRobot has no camera called {bad[0]!r}")
    if not images and any(side % 2 for side in spec.image_size):
        height, width = spec.image_size
        raise ValueError(
            f"{store.files}: frames of {height}x{width} pixels make no {CODEC} video, which "
            "needs even numbers; export with --images"
        )


class Exporter:
    """Writes one data set into an empty folder."""

    def __init__(
        self, store: Store, root: Path, images: bool, crf: int, data_mb: float, video_mb: float
    ) -> None:
        self._store = store
        self._root = root
        self._fps = int(store.spec.fps)
        self._limits = {"data_files_size_in_mb": data_mb, "video_files_size_in_mb": video_mb}
        self._cameras = {f"{IMAGES}{name}": name for name in store.spec.cameras}
        self._images = images
        self._crf = crf
        self._columns = number_columns(store)
        self._tables = TableFiles(root, DATA_PATH, data_mb)
        self._episodes = TableFiles(root, EPISODES_PATH, data_mb)
        self._videos = {
            key: VideoFiles(
                root,
                VIDEO_PATH.replace("{video_key}", key),
                video_mb,
                fps=self._fps,
                image_size=store.spec.image_size,
                crf=crf,
            )
            for key in ({} if images else self._cameras)
        }
        self._image_stats = {key: ImageStats() for key in self._cameras}

    def write(self) -> None:
        """Writes everything."""
        rows = []
        for episode in track(range(self._store.num_episodes), description="export", transient=True):
            rows.append(self._write_episode(episode))
            if len(rows) == EPISODE_ROWS:
                self._write_episode_rows(rows)
                rows = []
        if rows:
            self._write_episode_rows(rows)
        self._tables.close()
        self._episodes.close()
        for videos in self._videos.values():
            videos.close()
        write_task(self._root / "meta/tasks.parquet", self._store.spec.task)
        stats = {key: table_stats(values) for key, values in self._columns.items()}
        stats |= {key: gathered.result() for key, gathered in self._image_stats.items()}
        self._write_json("stats.json", stats)
        self._write_json("info.json", self._info())

    def _write_episode(self, episode: int) -> dict[str, Any]:
        """Writes an episode's table and frames, and returns its row of `meta/episodes`."""
        store = self._store
        start, stop = int(store.episode_starts[episode]), int(store.episode_ends[episode])
        place = self._tables.place(stop - start)
        row: dict[str, Any] = {
            "episode_index": episode,
            "tasks": [store.spec.task],
            "length": stop - start,
            "data/chunk_index": place.chunk,
            "data/file_index": place.file,
            "dataset_from_index": start,
            "dataset_to_index": stop,
        }
        stats = {key: table_stats(values[start:stop]) for key, values in self._columns.items()}
        gathered = {key: ImageStats() for key in self._cameras}
        if self._images:
            self._write_rows_with_images(start, stop, gathered)
        else:
            self._tables.write(self._rows(start, stop))
            for key, files in self._videos.items():
                blocks = self._read_blocks(key, start, stop, gathered[key])
                row |= self._video_row(key, files.write(stop - start, blocks), stop - start)
        for key, of_episode in gathered.items():
            self._image_stats[key].merge(of_episode)
            stats[key] = of_episode.result()
        return row | {
            f"stats/{key}/{name}": value for key, of in stats.items() for name, value in of.items()
        }

    def _video_row(self, key: str, place: Place, num_steps: int) -> dict[str, Any]:
        return {
            f"videos/{key}/chunk_index": place.chunk,
            f"videos/{key}/file_index": place.file,
            f"videos/{key}/from_timestamp": place.first_step / self._fps,
            f"videos/{key}/to_timestamp": (place.first_step + num_steps) / self._fps,
        }

    def _rows(self, start: int, stop: int) -> pa.Table:
        return pa.table({key: _column(values[start:stop]) for key, values in self._columns.items()})

    def _write_rows_with_images(
        self, start: int, stop: int, gathered: dict[str, ImageStats]
    ) -> None:
        """Writes row groups small enough to be held, of one episode each."""
        blocks = {key: self._read_blocks(key, start, stop, gathered[key]) for key in self._cameras}
        while start < stop:
            frames = {key: next(camera) for key, camera in blocks.items()}
            end = start + len(next(iter(frames.values()))) if frames else stop
            table = self._rows(start, end)
            for key, block in frames.items():
                cells = [{"bytes": encode_png(frame), "path": None} for frame in block]
                table = table.append_column(key, pa.array(cells, PNG))
            self._tables.write(table)
            start = end

    def _read_blocks(
        self, key: str, start: int, stop: int, gathered: ImageStats
    ) -> Iterator[NDArray[np.uint8]]:
        """Frames of a camera, (n, H, W, 3) at a time, some of them looked at for statistics."""
        height, width = self._store.spec.image_size
        size = max(1, BLOCK_BYTES // (height * width * 3 * len(self._cameras)))
        sampled = sampled_steps(stop - start) + start
        for first in range(start, stop, size):
            steps = np.arange(first, min(first + size, stop))
            block = self._store.read_images(steps, [self._cameras[key]])[:, 0]
            frames = block.transpose(0, 2, 3, 1)
            gathered.add(frames[np.isin(steps, sampled)])
            yield frames

    def _write_episode_rows(self, rows: list[dict[str, Any]]) -> None:
        place = self._episodes.place(len(rows))
        file = {"meta/episodes/chunk_index": place.chunk, "meta/episodes/file_index": place.file}
        self._episodes.write(pa.Table.from_pylist([row | file for row in rows]))

    def _info(self) -> dict[str, Any]:
        store = self._store
        return {
            "codebase_version": "v3.0",
            "robot_type": None,
            "total_episodes": store.num_episodes,
            "total_frames": store.num_frames,
            "total_tasks": 1,
            "chunks_size": CHUNKS_SIZE,
            **self._limits,
            "fps": self._fps,
            "splits": {"train": f"0:{store.num_episodes}"},
            "data_path": DATA_PATH,
            "video_path": VIDEO_PATH if self._videos else None,
            "features": describe_features(store, self._columns, self._image_feature()),
        }

    def _image_feature(self) -> dict[str, Any]:
        """What is the same of every camera."""
        height, width = self._store.spec.image_size
        feature: dict[str, Any] = {
            "dtype": "image" if self._images else "video",
            "shape": [height, width, 3],
            "names": ["height", "width", "channels"],
        }
        if self._images:
            return feature
        details = {
            "video.height": height,
            "video.width": width,
            "video.codec": CODEC,
            "video.pix_fmt": PIXEL_FORMAT,
            "video.fps": self._fps,
            "video.channels": 3,
            "video.g": GOP,
            "video.crf": self._crf,
            "has_audio": False,
            "is_depth_map": False,
        }
        return feature | {"info": details}

    def _write_json(self, name: str, content: dict[str, Any]) -> None:
        (self._root / "meta" / name).write_text(json.dumps(content, indent=4, allow_nan=False))


def _column(values: NDArray[Any]) -> pa.Array:
    if values.ndim == 1:
        return pa.array(values)
    return pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), values.shape[1])


def encode_png(frame: NDArray[np.uint8]) -> bytes:
    """An (H, W, 3) frame as PNG."""
    content = io.BytesIO()
    Image.fromarray(frame).save(content, "PNG", compress_level=PNG_LEVEL)
    return content.getvalue()
