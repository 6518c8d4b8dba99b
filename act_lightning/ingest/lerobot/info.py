"""`meta/info.json` of a LeRobotDataset, and how its JSON is read."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from act_lightning.ingest.source import SourceError

INFO = "meta/info.json"
CAMERA_DTYPES = ("image", "video")
NUMBER_DTYPES = re.compile(r"bool|u?int(8|16|32|64)|float(16|32|64)")
OTHER_DTYPES = ("string", "language")
COLUMNS = ("timestamp", "frame_index", "episode_index", "index", "task_index")
"""In every data set, beside what was recorded."""


@dataclass(frozen=True, kw_only=True)
class Feature:
    """One thing recorded at every step."""

    dtype: str
    shape: tuple[int, ...]
    units: str | None
    is_depth: bool

    @property
    def is_camera(self) -> bool:
        """Whether it has frames, of colours or of depths."""
        return self.dtype in CAMERA_DTYPES

    @property
    def image_size(self) -> tuple[int, int] | None:
        """(H, W) of a colour camera; None for what is none."""
        if not self.is_camera or self.is_depth or len(self.shape) != 3:
            return None
        if self.shape[2] == 3:
            return self.shape[:2]
        return self.shape[1:] if self.shape[0] == 3 else None


@dataclass(frozen=True, kw_only=True)
class Info:
    """`meta/info.json`, checked."""

    path: Path
    version: str
    fps: float
    features: dict[str, Feature]
    chunks_size: int
    """Episodes a folder, in v2.1."""
    data_path: str
    """Pattern of the tables' paths."""
    video_path: str
    """Pattern of the videos' paths; empty without videos."""
    num_episodes: int
    num_frames: int
    num_videos: int | None
    """Files, in v2.1."""

    @property
    def video_keys(self) -> list[str]:
        """Features whose frames are in mp4 files."""
        return [key for key, feature in self.features.items() if feature.dtype == "video"]


def read_info(root: Path) -> Info:
    """Reads and checks `meta/info.json`."""
    path = root / INFO
    content = read_json(path)
    get = partial(get_field, content, str(path))
    version = get("codebase_version", str)
    if version not in ("v2.0", "v2.1", "v3.0"):
        raise SourceError(
            f"{path}: codebase_version is {version!r}; v2.0, v2.1 and v3.0 can be read. "
            "Convert it with LeRobot"
        )
    fps = get("fps", float)
    if not (math.isfinite(fps) and fps > 0):
        raise SourceError(f"{path}: fps is {fps}")
    features = {
        key: _read_feature(value, f"{path}: feature {key}")
        for key, value in get("features", dict).items()
    }
    if missing := sorted(set(COLUMNS) - features.keys()):
        raise SourceError(f"{path}: features {missing} are missing")
    has_video = any(feature.dtype == "video" for feature in features.values())
    return Info(
        path=path,
        version=version,
        fps=fps,
        features=features,
        chunks_size=at_least(1, get("chunks_size", int), f"{path}: chunks_size"),
        data_path=get("data_path", str),
        video_path=get("video_path", str) if has_video else "",
        num_episodes=at_least(1, get("total_episodes", int), f"{path}: total_episodes"),
        num_frames=at_least(1, get("total_frames", int), f"{path}: total_frames"),
        num_videos=get("total_videos", int) if "total_videos" in content else None,
    )


def _read_feature(value: Any, where: str) -> Feature:
    if not isinstance(value, dict):
        raise SourceError(f"{where} is no object")
    dtype, shape = get_field(value, where, "dtype", str), get_field(value, where, "shape", list)
    if dtype not in CAMERA_DTYPES + OTHER_DTYPES and not NUMBER_DTYPES.fullmatch(dtype):
        raise SourceError(f"{where}: dtype {dtype!r} is unknown")
    if not all(type(side) is int and 0 < side < 2**31 for side in shape):
        raise SourceError(f"{where}: shape is {shape}")
    units = value.get("units")
    # Also under older names.
    details = [part for key in ("info", "video_info") if isinstance(part := value.get(key), dict)]
    is_depth = any(
        part.get(key) for part in details for key in ("is_depth_map", "video.is_depth_map")
    )
    return Feature(
        dtype=dtype,
        shape=tuple(shape),
        units=units if isinstance(units, str) else None,
        is_depth=is_depth,
    )


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise SourceError(f"{path} cannot be read ({error}); the data set is damaged") from error
    if not isinstance(content, dict):
        raise SourceError(f"{path} holds no JSON object; the data set is damaged")
    return content


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """Reads a file with a JSON object a line."""
    try:
        rows = [json.loads(line) for line in path.read_bytes().splitlines() if line.strip()]
    except (OSError, ValueError, RecursionError) as error:
        raise SourceError(f"{path} cannot be read ({error}); the data set is damaged") from error
    if not all(isinstance(row, dict) for row in rows):
        raise SourceError(f"{path}: a line holds no JSON object; the data set is damaged")
    return rows


def get_field(content: dict[str, Any], where: str, key: str, kind: type) -> Any:
    """A field of the right type; whole numbers pass for float, truth values for neither."""
    value = content.get(key)
    wanted: Any = (int, float) if kind is float else kind
    if not isinstance(value, wanted) or isinstance(value, bool):
        raise SourceError(f"{where}: {key} is {value!r}, not a {kind.__name__}")
    if kind is float:
        try:
            return float(value)
        except OverflowError as error:
            raise SourceError(f"{where}: {key} is too large") from error
    return value


def at_least(low: int, value: int, where: str) -> int:
    """The value, or the error that says why not."""
    if not low <= value < 2**62:
        raise SourceError(f"{where} is {value}; {low} or more is needed")
    return value
