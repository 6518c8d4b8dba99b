"""The demonstrations that tests/bench/data.py reads: simulated once, stored in every format.

Each is written by the project it belongs to, with that project's settings: LeRobotDataset by
LeRobot's own writer with its own codec, HDF5 as tonyzhaozh/act's record_sim_episodes.py does.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from act_lightning.batch import DataSpec
from act_lightning.data.episode import Episode
from act_lightning.data.writer import StoreWriter

CAMERAS = ("top", "left_wrist")
FPS = 50


@dataclass(frozen=True, kw_only=True)
class Recorded:
    """What was simulated, uncompressed: the truth that every reader is held against."""

    folder: Path
    """Holds the same demonstrations in all formats, and nothing else."""
    pictures: NDArray[np.uint8]
    """(T, 2, H, W, 3), mapped from a file."""
    qpos: NDArray[np.float32]
    """(T, 14); the first value is the number of the step, by which a reader's sample is known."""
    actions: NDArray[np.float32]
    """(T, 14)."""
    episode_steps: int
    """Steps of every episode."""

    @property
    def num_steps(self) -> int:
        """T, steps of all episodes."""
        return len(self.qpos)

    @property
    def image_size(self) -> tuple[int, int]:
        """(H, W) of the pictures."""
        return self.pictures.shape[2], self.pictures.shape[3]


def record(
    folder: Path, image_size: tuple[int, int], num_episodes: int, episode_steps: int, noise: float
) -> Recorded:
    """Simulates insertion, once; `noise` (standard deviation, of 255) imitates a real camera's."""
    height, width = image_size
    name = f"{height}x{width}-{num_episodes}x{episode_steps}-noise{noise:g}"
    once(
        folder / name, lambda path: _simulate(path, image_size, num_episodes, episode_steps, noise)
    )
    tables = np.load(folder / name / "tables.npz")
    return Recorded(
        folder=folder / name,
        pictures=np.load(folder / name / "pictures.npy", mmap_mode="r"),
        qpos=tables["qpos"],
        actions=tables["actions"],
        episode_steps=episode_steps,
    )


def _simulate(
    path: Path, image_size: tuple[int, int], num_episodes: int, episode_steps: int, noise: float
) -> None:
    from act_lightning.sim.config import EnvConfig  # slow to import, and needed once
    from act_lightning.sim.env import make_env
    from act_lightning.sim.expert import ExpertConfig

    env = make_env(EnvConfig(cameras=CAMERAS, image_size=image_size))
    expert = ExpertConfig().build("insertion")
    observations, actions = [], []
    for seed in range(num_episodes):
        observation, _ = env.reset(seed=seed)
        expert.reset(env, seed)
        for _ in range(episode_steps):
            observations.append(observation)
            actions.append(expert.act())
            env.unwrapped.advance(expert.perturb(actions[-1]))
            observation = env.unwrapped.observe()
    pictures = np.stack([one["images"] for one in observations]).transpose(0, 1, 3, 4, 2)
    if noise > 0:
        rng = np.random.default_rng(0)
        for at, picture in enumerate(pictures):
            noisy = picture + rng.normal(0, noise, picture.shape)
            pictures[at] = noisy.round().clip(0, 255)
    qpos = np.stack([one["qpos"] for one in observations])
    qpos[:, 0] = np.arange(len(qpos))
    path.mkdir()
    np.save(path / "pictures.npy", np.ascontiguousarray(pictures))
    np.savez(path / "tables.npz", qpos=qpos, actions=np.stack(actions).astype(np.float32))


def once(path: Path, make: Callable[[Path], None]) -> Path:
    """Makes a file or folder unless it is there; beside its final name, then moved into place."""
    if not path.exists():
        partial = path.with_name(f"{path.name}.partial")
        if partial.is_dir():
            shutil.rmtree(partial)
        partial.unlink(missing_ok=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        make(partial)
        partial.rename(path)
    return path


def size_on_disk(path: Path) -> int:
    """Bytes of a file, or of all files below a folder."""
    files = [path] if path.is_file() else path.rglob("*")
    return sum(file.stat().st_size for file in files if file.is_file())


def write_store(recorded: Recorded, path: Path) -> None:
    """Our own format, one array a camera."""
    spec = DataSpec(
        task="insertion",
        fps=FPS,
        dim_qpos=14,
        dim_action=14,
        cameras=CAMERAS,
        image_size=recorded.image_size,
    )
    ends = range(recorded.episode_steps, recorded.num_steps + 1, recorded.episode_steps)
    with StoreWriter.create(path, spec, {"made_by": "tests/bench/data.py"}, len(ends)) as writer:
        for number, end in enumerate(ends):
            steps = slice(end - recorded.episode_steps, end)
            writer.append(
                Episode(
                    qpos=recorded.qpos[steps],
                    actions=recorded.actions[steps],
                    images=recorded.pictures[steps].transpose(0, 1, 4, 2, 3),
                    id=number,
                    success=True,
                )
            )


def write_hdf5(recorded: Recorded, path: Path) -> None:
    """One file an episode, as tonyzhaozh/act records them: uncompressed, a frame a chunk."""
    import h5py

    path.mkdir()
    for episode in range(recorded.num_steps // recorded.episode_steps):
        steps = slice(episode * recorded.episode_steps, (episode + 1) * recorded.episode_steps)
        with h5py.File(path / f"episode_{episode}.hdf5", "w", rdcc_nbytes=2 * 1024**2) as root:
            root.attrs["sim"] = True
            images = root.create_group("observations/images")
            for number, camera in enumerate(CAMERAS):
                pictures = recorded.pictures[steps, number]
                images.create_dataset(camera, data=pictures, chunks=(1, *pictures.shape[1:]))
            root["observations/qpos"] = recorded.qpos[steps]
            root["observations/qvel"] = np.zeros_like(recorded.qpos[steps])
            root["action"] = recorded.actions[steps]


def write_lerobot(recorded: Recorded, path: Path, num_cameras: int) -> None:
    """LeRobotDataset by LeRobot's own writer, with its own video settings."""
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    names = {"dtype": "float32", "shape": (14,), "names": [f"joint_{i}" for i in range(14)]}
    picture = {
        "dtype": "video",
        "shape": (*recorded.image_size, 3),
        "names": ["height", "width", "channels"],
    }
    cameras = CAMERAS[:num_cameras]
    features = {"observation.state": names, "action": names}
    features |= {f"observation.images.{camera}": picture for camera in cameras}
    dataset = LeRobotDataset.create("bench/data", FPS, features, root=path)
    for step in range(recorded.num_steps):
        frame = {"observation.state": recorded.qpos[step], "action": recorded.actions[step]}
        for number, camera in enumerate(cameras):
            frame[f"observation.images.{camera}"] = np.array(recorded.pictures[step, number])
        dataset.add_frame(frame | {"task": "insertion"})
        if (step + 1) % recorded.episode_steps == 0:
            dataset.save_episode()
    dataset.finalize()
