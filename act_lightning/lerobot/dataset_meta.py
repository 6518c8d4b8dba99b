"""What a store is as features of a LeRobotDataset, and the table of its tasks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from act_lightning.data.store import Store
from act_lightning.lerobot.features import ACTION, ENV_STATE, IMAGES, QPOS, SUCCESS


def number_columns(store: Store) -> dict[str, NDArray[Any]]:
    """Every feature that is numbers, of all episodes, (T,) or (T, D)."""
    lengths = store.episode_ends - store.episode_starts
    episode = np.repeat(np.arange(store.num_episodes), lengths)
    step = np.arange(store.num_frames) - store.episode_starts[episode]
    columns: dict[str, NDArray[Any]] = {QPOS: store.qpos, ACTION: store.actions}
    if store.env_state is not None:
        columns[ENV_STATE] = store.env_state
    # LeRobot keeps a feature of one number as a number, not as a list of one.
    columns = {
        key: values[:, 0] if values.shape[1] == 1 else values for key, values in columns.items()
    }
    if np.all(store.episode_success >= 0):
        is_last = step == lengths[episode] - 1
        columns[SUCCESS] = is_last & (store.episode_success[episode] == 1)
    return columns | {
        "timestamp": (step / store.spec.fps).astype(np.float32),
        "frame_index": step,
        "episode_index": episode,
        "index": np.arange(store.num_frames),
        "task_index": np.zeros(store.num_frames, np.int64),
    }


def describe_features(
    store: Store, columns: dict[str, NDArray[Any]], image_feature: dict[str, Any]
) -> dict[str, Any]:
    """`features` of info.json: those of `number_columns`, and one a camera."""
    features: dict[str, Any] = {
        key: {"dtype": str(values.dtype), "shape": list(values.shape[1:]) or [1], "names": None}
        for key, values in columns.items()
    }
    for name, key in {"qpos": QPOS, "action": ACTION, "env_state": ENV_STATE}.items():
        if key in features:
            features[key]["units"] = store.units[name]
    return features | {f"{IMAGES}{name}": image_feature for name in store.spec.cameras}


def write_task(path: Path, task: str) -> None:
    """Writes the table of tasks as pandas would: LeRobot looks for their names in the index."""

    def column(name: str | None, kind: str, dtype: str, **details: Any) -> dict[str, Any]:
        names = {"name": name, "field_name": name}
        return names | {"pandas_type": kind, "numpy_type": dtype, "metadata": None} | details

    encoding = {"metadata": {"encoding": "UTF-8"}}
    description = {
        "index_columns": ["task"],
        "column_indexes": [column(None, "unicode", "object", **encoding)],
        "columns": [
            column("task_index", "int64", "int64"),
            column("task", "unicode", "object"),
        ],
        "pandas_version": "2.0.0",
    }
    table = pa.table({"task_index": pa.array([0], pa.int64()), "task": [task]})
    table = table.replace_schema_metadata({"pandas": json.dumps(description)})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, write_page_checksum=True)
