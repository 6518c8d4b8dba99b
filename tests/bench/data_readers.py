"""The readers that tests/bench/data.py compares; each delivers batches of the same samples.

What favours the peers: the HDF5 reader and LeRobotDataset deliver uint8 pictures (their own
training turns them into float32 while loading), zarr-python and the memory map are given the
low-dimensional arrays in memory.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zarr
import zstandard
from data_sets import CAMERAS, FPS, Recorded
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset, default_collate

from act_lightning.data.datamodule import ACTDataModule
from act_lightning.data.files import LocalFiles
from act_lightning.data.layout import SHARD_FRAMES, chunk_name, read_shard_index
from act_lightning.data.store import Store
from act_lightning.data.stream import BatchReader

CHUNK = 100
"""Actions a sample."""


@dataclass(frozen=True, kw_only=True)
class Samples:
    """A batch. The limit delivers `images` alone, and says which `steps` they are of."""

    images: Any
    """(B, N, H, W, 3) uint8, in any memory order."""
    qpos: Any = None
    """(B, 14) float32."""
    actions: Any = None
    """(B, 100, 14) float32; the last one of the episode, repeated, where there is no more."""
    is_pad: Any = None
    """(B, 100) bool."""
    steps: NDArray[np.int64] | None = None


class Reader:
    """Delivers batches of random samples, one after the other."""

    ahead = 0
    """Batches it may have read before they are asked for."""

    def __init__(self, batches: Iterator[Samples]) -> None:
        self._batches = batches

    def take(self, num_batches: int) -> tuple[float, Samples]:
        """Reads so many batches; returns the seconds it took, and the last batch."""
        start = time.perf_counter()
        for _ in range(num_batches):
            batch = next(self._batches)
        return time.perf_counter() - start, batch

    def close(self) -> None:
        """Ends threads and processes."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What is read in which batches."""

    recorded: Recorded
    num_cameras: int
    batch_size: int
    seed: int = 0

    def random_steps(self) -> Iterator[NDArray[np.int64]]:
        """Endless batches of random positions, each pass a permutation."""
        rng = np.random.default_rng(self.seed)
        size = self.batch_size
        while True:
            order = rng.permutation(self.recorded.num_steps)
            yield from order[: len(order) // size * size].reshape(-1, size)

    def low_dimensional(self, steps: NDArray[np.int64]) -> dict[str, NDArray[Any]]:
        """qpos, actions and is_pad of a batch, from memory."""
        recorded = self.recorded
        ends = (steps // recorded.episode_steps + 1)[:, None] * recorded.episode_steps
        wanted = steps[:, None] + np.arange(CHUNK)
        return {
            "qpos": recorded.qpos[steps],
            "actions": recorded.actions.take(np.minimum(wanted, ends - 1), axis=0),
            "is_pad": wanted >= ends,
        }


class OneThread(Reader):
    """Ours without prefetching: BatchReader in the caller's thread."""

    def __init__(self, setting: Setting, path: Path) -> None:
        read = BatchReader(
            store=Store.open(path),
            chunk_size=CHUNK,
            cameras=CAMERAS[: setting.num_cameras],
            use_env_state=False,
        )
        super().__init__(map(_of_ours, map(read, setting.random_steps())))


class Streaming(Reader):
    """Ours as training uses it: the data module's stream, by threads or loader processes."""

    ahead = 5

    def __init__(self, setting: Setting, path: Path, **options: Any) -> None:
        self._data = ACTDataModule(
            path=str(path),
            batch_size=setting.batch_size,
            chunk_size=CHUNK,
            cameras=CAMERAS[: setting.num_cameras],
            val_fraction=0,
            seed=setting.seed,
            **options,
        )
        self._data.setup("fit")
        self._stream = self._data.train_dataloader()
        super().__init__(map(_of_ours, iter(self._stream)))

    def close(self) -> None:
        """Ends threads and processes."""
        self._stream.close()


def _of_ours(batch: Any) -> Samples:
    return Samples(
        images=batch.observation.images.permute(0, 1, 3, 4, 2),
        qpos=batch.observation.qpos,
        actions=batch.actions,
        is_pad=batch.is_pad,
    )


class ZarrPython(Reader):
    """`array[i]` for each picture."""

    def __init__(self, setting: Setting, path: Path) -> None:
        group = zarr.open_group(path, mode="r")
        arrays = [group[f"data/images_{name}"] for name in CAMERAS[: setting.num_cameras]]
        super().__init__(
            Samples(
                images=np.stack([np.stack([array[i] for array in arrays]) for i in steps.tolist()]),
                **setting.low_dimensional(steps),
            )
            for steps in setting.random_steps()
        )


class MemoryMap(Reader):
    """Uncompressed pictures in one file, mapped by numpy."""

    def __init__(self, setting: Setting) -> None:
        pictures = setting.recorded.pictures[:, : setting.num_cameras]
        super().__init__(
            Samples(images=pictures[steps], **setting.low_dimensional(steps))
            for steps in setting.random_steps()
        )


class EpisodeFiles(Dataset[Any]):
    """tonyzhaozh/act's EpisodicDataset: the episode's file is opened for every sample."""

    def __init__(self, setting: Setting, folder: Path) -> None:
        self._folder = folder
        self._cameras = CAMERAS[: setting.num_cameras]
        self._episode_steps = setting.recorded.episode_steps

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        import h5py

        episode, start = divmod(index, self._episode_steps)
        with h5py.File(self._folder / f"episode_{episode}.hdf5", "r") as root:
            length = root["/action"].shape[0]
            qpos = root["/observations/qpos"][start]
            images = [root[f"/observations/images/{name}"][start] for name in self._cameras]
            actions = root["/action"][start : start + CHUNK]
        chunk = np.empty((CHUNK, actions.shape[1]), np.float32)
        chunk[: len(actions)], chunk[len(actions) :] = actions, actions[-1]
        is_pad = np.arange(start, start + CHUNK) >= length
        return tuple(map(torch.from_numpy, (np.stack(images), qpos, chunk, is_pad)))


class LeRobotSamples(Dataset[Any]):
    """LeRobotDataset with the actions that follow, its pictures left as uint8."""

    def __init__(self, setting: Setting, root: Path, backend: str) -> None:
        from lerobot.datasets.lerobot_dataset import LeRobotDataset

        self._cameras = [f"observation.images.{name}" for name in CAMERAS[: setting.num_cameras]]
        self._dataset = LeRobotDataset(
            "bench/data",
            root=root,
            delta_timestamps={"action": [step / FPS for step in range(CHUNK)]},
            video_backend=backend,
            return_uint8=True,
        )

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        item = self._dataset[index]
        images = torch.stack([item[name] for name in self._cameras]).permute(0, 2, 3, 1)
        return images, item["observation.state"], item["action"], item["action_is_pad"]


class Loaded(Reader):
    """A map-style data set through torch's DataLoader, as both peers train."""

    def __init__(self, setting: Setting, dataset: Dataset[Any], num_workers: int) -> None:
        self.ahead = 2 * num_workers + 1
        # forkserver: video decoders and their threads must not be forked from this process.
        workers = {"multiprocessing_context": "forkserver"} if num_workers else {}
        self._loader = DataLoader(
            dataset,
            batch_sampler=_Lists(setting),
            num_workers=num_workers,
            collate_fn=_collate,
            **workers,
        )
        self._iterator = iter(self._loader)
        super().__init__(self._iterator)

    def close(self) -> None:
        """Ends the processes."""
        if self._loader.num_workers:
            self._iterator._shutdown_workers()


class _Lists:
    def __init__(self, setting: Setting) -> None:
        self._setting = setting

    def __iter__(self) -> Iterator[list[int]]:
        return (steps.tolist() for steps in self._setting.random_steps())


def _collate(items: list[tuple[Any, ...]]) -> Samples:
    images, qpos, actions, is_pad = default_collate(items)
    return Samples(images=images, qpos=qpos, actions=actions, is_pad=is_pad)


class Limit(Reader):
    """The least that must be done: the same compressed bytes by preadv, decoded into one buffer.

    The files are open, their index is a list, nothing is checked that zstd does not check, and
    nothing but pictures is delivered.
    """

    def __init__(self, setting: Setting, path: Path, num_threads: int) -> None:
        self._setting = setting
        self._num_threads = num_threads
        self._descriptors: list[int] = []
        self._places = [self._index(path, name) for name in CAMERAS[: setting.num_cameras]]
        self._orders = [replace(setting, seed=seed).random_steps() for seed in range(num_threads)]
        self._threads = [self._decoder() for _ in range(num_threads)]

    def take(self, num_batches: int) -> tuple[float, Samples]:
        """Reads so many batches in all; returns the seconds it took, and the last batch."""
        share = -(-num_batches // self._num_threads)
        # Drawn beforehand: it takes as long as reading a small picture.
        orders = [[next(order).tolist() for _ in range(share)] for order in self._orders]
        others = [
            threading.Thread(target=decode, args=(order,))
            for decode, order in zip(self._threads[1:], orders[1:], strict=True)
        ]
        start = time.perf_counter()
        for other in others:
            other.start()
        images = self._threads[0](orders[0])
        for other in others:
            other.join()
        seconds = (time.perf_counter() - start) * num_batches / (share * self._num_threads)
        return seconds, Samples(images=images, steps=np.array(orders[0][-1]))

    def close(self) -> None:
        """Closes the files."""
        for descriptor in self._descriptors:
            os.close(descriptor)

    def _index(self, path: Path, camera: str) -> list[tuple[int, int, int]]:
        """Descriptor, offset and size of every picture."""
        places = []
        for shard in range(-(-self._setting.recorded.num_steps // SHARD_FRAMES)):
            name = f"data/images_{camera}/{chunk_name(shard, 4)}"
            index = read_shard_index(LocalFiles(path), name, SHARD_FRAMES).tolist()
            self._descriptors.append(os.open(path / name, os.O_RDONLY))
            places += [(self._descriptors[-1], offset, size) for offset, size in index]
        return places[: self._setting.recorded.num_steps]

    def _decoder(self) -> Callable[[list[list[int]]], NDArray[np.uint8]]:
        setting, places = self._setting, self._places
        shape = (setting.batch_size, setting.num_cameras, *setting.recorded.image_size, 3)
        batch = np.empty(shape, np.uint8)
        columns = [list(batch[:, column]) for column in range(setting.num_cameras)]
        largest = max(size for camera in places for _, _, size in camera)
        compressed = memoryview(bytearray(largest))
        stream_reader = zstandard.ZstdDecompressor().stream_reader
        preadv = os.preadv

        def decode(batches: list[list[int]]) -> NDArray[np.uint8]:
            for steps in batches:
                for camera, rows in zip(places, columns, strict=True):
                    for step, row in zip(steps, rows, strict=True):
                        descriptor, offset, size = camera[step]
                        blob = compressed[:size]
                        preadv(descriptor, [blob], offset)
                        stream_reader(blob).readinto(row)
            return batch

        return decode
