"""robomimic's data sets: all demonstrations in one HDF5 file.

    data                 attributes env_args (JSON: env_name, type, env_kwargs), total
    data/demo_<n>        attribute num_samples
        actions          (T, A); also actions_abs, ...
        rewards, dones   (T,)
        states           (T, S), the simulator's
        obs/<key>        (T, ...) numbers, or (T, H, W, 3) uint8 frames
        next_obs/<key>   not used here
    mask/<filter key>    names of demonstrations, as `train`; chosen with --episodes

Choices made here: the rate is robosuite's `control_freq`; success is known where rewards are sparse
(`reward_shaping` is false), and then means that any reward is positive. `dones` cannot tell: they
may mark nothing but the last step.

Source: ARISE-Initiative/robomimic docs/datasets/overview.md, scripts/dataset_states_to_obs.py (the
writer), utils/file_utils.py (`create_hdf5_filter_key`).
"""

from __future__ import annotations

import json
import re
from functools import partial
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from act_lightning.batch import DataSpec
from act_lightning.data.episode import Episode
from act_lightning.ingest import hdf5
from act_lightning.ingest.columns import Columns, join_columns
from act_lightning.ingest.frames import (
    check_same_cameras,
    choose_cameras,
    common_size,
    exact_uint8,
    make_episode,
)
from act_lightning.ingest.source import IngestOptions, SourceError, describe, need_fps

FORMAT = "robomimic"
DEFAULT_QPOS = ("robot0_eef_pos", "robot0_eef_quat", "robot0_gripper_qpos")
"""What robomimic's own policies see of the robot, by default."""


def matches(path: Path) -> bool:
    """Whether a file has robomimic's demonstrations."""
    if not path.is_file():
        return False
    try:
        with hdf5.open_hdf5(path) as file:
            return any(re.fullmatch(r"demo_\d+", key) for key in file.get("data", ()))
    except SourceError:
        return False


def open_source(path: Path, options: IngestOptions) -> RobomimicSource:
    """Opens a file.

    Raises:
        SourceError: it is damaged, of another format, or an option does not fit.
    """
    return RobomimicSource(path, options)


class RobomimicSource:
    """Demonstrations of robomimic; see `Source`."""

    format = FORMAT

    def __init__(self, path: Path, options: IngestOptions) -> None:
        self._path = path
        self._options = options
        self._qpos = [Columns.parse(key) for key in options.qpos or DEFAULT_QPOS]
        self._action = [Columns.parse(key) for key in options.action or ("actions",)]
        self._env_state = [Columns.parse(key) for key in options.env_state]
        with hdf5.open_hdf5(path) as file:
            self.ids = _number(file, path, options.episodes)
            env = _read_env(file, path)
            faults = []
            for id in self.ids:
                try:
                    self._read_layout(file, id, env)
                    break
                except SourceError as error:
                    faults.append(str(error))
            else:
                raise SourceError(f"{path}: no demonstration can be read. The first: {faults[0]}")
        self._sparse_rewards = env["env_kwargs"].get("reward_shaping") is False
        self.units = dict.fromkeys(("qpos", "action", "env_state"), "as in the source")
        self.provenance = describe(
            FORMAT,
            path,
            options,
            cameras=self._cameras,
            qpos=self._qpos,
            action=self._action,
            env_name=env["env_name"],
            env_version=env.get("env_version"),
        )

    def name(self, id: int) -> str:
        """The group's name."""
        return f"demo_{id}"

    def read(self, id: int) -> Episode:
        """Reads a demonstration.

        Raises:
            SourceError: it is damaged, or other than the first.
        """
        where = f"{self._path}: {self.name(id)}"
        with hdf5.open_hdf5(self._path) as file:
            tables = self._read_tables(file, id)
            num_steps = len(tables["action"])
            self._check_cameras(file, id)
            readers = []
            for (name, key), size in zip(self._cameras, self._sizes, strict=True):
                dataset = hdf5.find_dataset(file, f"data/demo_{id}/obs/{key}", where)
                if dataset.shape != (num_steps, *size, 3):
                    raise SourceError(
                        f"{where}: camera {name} has shape {dataset.shape}, "
                        f"not {(num_steps, *size, 3)}"
                    )
                readers.append(partial(_read_frames, self._path, dataset.name, where))
            success = self._read_success(file, id, num_steps)
        return make_episode(id, tables, readers, self.spec, self._options, success)

    def _read_layout(self, file: h5py.File, id: int, env: dict[str, Any]) -> None:
        """Learns from one demonstration what all of them hold."""
        where = f"{self._path}: {self.name(id)}"
        obs = hdf5.children(file, f"data/demo_{id}/obs", where)
        if self._options.qpos is None and not set(DEFAULT_QPOS) <= set(obs):
            raise SourceError(
                f"{where} has not all of {', '.join(DEFAULT_QPOS)}; say with --qpos KEY ... what "
                f"the robot senses of itself, of {', '.join(obs)}"
            )
        tables = self._read_tables(file, id)
        self._found = _find_cameras(obs)
        self._cameras = choose_cameras(list(self._found), self._options, where)
        self._sizes = [self._found[key] for _, key in self._cameras]
        sizes = {name: self._found[key] for name, key in self._cameras}
        taken = {part.key for part in (*self._qpos, *self._action, *self._env_state)}
        taken |= {key for _, key in self._cameras} | {"obs", "next_obs", "rewards", "dones"}
        held = [*file[f"data/demo_{id}"], *obs]
        self.unused = tuple(key for key in held if key not in taken)
        fps = self._options.fps or env["env_kwargs"].get("control_freq")
        self.spec = DataSpec(
            task=self._options.task or env["env_name"],
            fps=float(need_fps(fps, str(self._path), "robosuite's default is 20")),
            dim_qpos=tables["qpos"].shape[1],
            dim_action=tables["action"].shape[1],
            dim_env_state=tables["env_state"].shape[1] if "env_state" in tables else 0,
            cameras=tuple(sizes),
            image_size=common_size(sizes, self._options, where),
        )

    def _check_cameras(self, file: h5py.File, id: int) -> None:
        """Sees that no camera is left out without a word, where all were asked for."""
        where = f"{self._path}: {self.name(id)}"
        found = set(_find_cameras(hdf5.children(file, f"data/demo_{id}/obs", where)))
        check_same_cameras(found, set(self._found), self._options, where)

    def _read_tables(self, file: h5py.File, id: int) -> dict[str, NDArray[np.float64]]:
        where = f"{self._path}: {self.name(id)}"
        group = f"data/demo_{id}"

        def read(key: str) -> NDArray[Any]:
            inside = f"{group}/obs/{key}"
            return hdf5.read_table(file, inside if inside in file else f"{group}/{key}", where)

        parts = {"qpos": self._qpos, "action": self._action, "env_state": self._env_state}
        tables = {
            name: join_columns(columns, read, where) for name, columns in parts.items() if columns
        }
        claimed = file[group].attrs.get("num_samples")
        if claimed is not None and claimed != len(tables["action"]):
            raise SourceError(
                f"{where}: num_samples is {claimed}, but there are {len(tables['action'])} actions"
            )
        return tables

    def _read_success(self, file: h5py.File, id: int, num_steps: int) -> bool | None:
        where, name = f"{self._path}: {self.name(id)}", f"data/demo_{id}/rewards"
        if not self._sparse_rewards or name not in file:
            return None
        rewards = hdf5.read_table(file, name, where)
        if rewards.shape != (num_steps,) or not np.all(np.isfinite(rewards)):
            raise SourceError(
                f"{where}: rewards of shape {rewards.shape} are not {num_steps} numbers"
            )
        return bool(np.any(rewards > 0))


def _number(file: h5py.File, path: Path, filter_key: str | None) -> list[int]:
    """Numbers of the demonstrations, of all or of those that a filter key names."""
    names = set(hdf5.children(file, "data", str(path)))
    if filter_key is not None:
        masks = hdf5.children(file, "mask", str(path)) if "mask" in file else {}
        if filter_key not in masks:
            raise SourceError(
                f"{path}: there is no filter key {filter_key}; it has {', '.join(masks) or 'none'}"
            )
        chosen = {name.decode() for name in hdf5.read_table(file, f"mask/{filter_key}", str(path))}
        if missing := sorted(chosen - names):
            raise SourceError(f"{path}: mask/{filter_key} names {missing[0]}, which is not there")
        names = chosen
    numbers = [re.fullmatch(r"demo_(0|[1-9]\d{0,8})", name) for name in names]
    ids = sorted(int(number[1]) for number in numbers if number)
    if len(ids) != len(names) or not ids:
        other = next(iter(names - {f"demo_{id}" for id in ids}), "nothing")
        raise SourceError(f"{path}: data holds {other}, not demo_0, demo_1, ...")
    return ids


def _read_env(file: h5py.File, path: Path) -> dict[str, Any]:
    """`env_args`, with env_name and env_kwargs at least."""
    text = file["data"].attrs.get("env_args", "{}")
    try:
        env = json.loads(text)
        env.setdefault("env_kwargs", {}).get("control_freq")
    except (ValueError, TypeError, AttributeError) as error:
        raise SourceError(f"{path}: data's env_args is no JSON object ({error})") from error
    return {"env_name": path.stem, **env}


def _find_cameras(obs: dict[str, Any]) -> dict[str, tuple[int, int]]:
    """(H, W) of the observations that are frames, by key."""
    return {
        key: dataset.shape[1:3]
        for key, dataset in obs.items()
        if isinstance(dataset, h5py.Dataset) and dataset.ndim == 4 and dataset.shape[3] == 3
    }


def _read_frames(path: Path, name: str, where: str, start: int, stop: int) -> NDArray[np.uint8]:
    return exact_uint8(hdf5.read_rows(path, name, where, start, stop), f"{where}: {name}", start)
