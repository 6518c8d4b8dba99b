"""Batches of demonstrations: endless and in a fixed order for training, a fixed few for validation.

At every step the ranks take consecutive runs of `batch_size` positions of the order of training, so
the position alone says where a run is: no epoch, sampler or worker state exists.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field, replace
from itertools import count, pairwise

import numpy as np
import torch
from numpy.typing import NDArray

from act_lightning.batch import Batch, Observation
from act_lightning.data.loader import StartMethod, read_in_processes, read_in_threads
from act_lightning.data.order import SampleOrder
from act_lightning.data.store import Store


@dataclass(frozen=True, kw_only=True)
class BatchReader:
    """Turns positions in a store into a batch."""

    store: Store
    chunk_size: int
    """K, actions a sample."""
    cameras: tuple[str, ...]
    """Cameras to read, in the order of the N axis; may be empty."""
    use_env_state: bool
    """Whether observations hold object poses."""
    pin_memory: bool = False
    """Whether batches lie in page-locked memory, for a GPU."""

    def __call__(self, frames: NDArray[np.int64]) -> Batch:
        """Reads observations at `frames`, (B,), and the actions that follow within each episode."""
        store = self.store
        episodes = np.searchsorted(store.episode_ends, frames, side="right")
        ends = store.episode_ends[episodes][:, None]
        steps = frames[:, None] + np.arange(self.chunk_size)
        images = env_state = None
        if self.cameras:
            images = torch.from_numpy(store.read_images(frames, self.cameras))
        if self.use_env_state:
            assert store.env_state is not None
            env_state = torch.from_numpy(store.env_state.take(frames, axis=0))
        batch = Batch(
            observation=Observation(
                qpos=torch.from_numpy(store.qpos.take(frames, axis=0)),
                images=images,
                env_state=env_state,
            ),
            actions=torch.from_numpy(store.actions.take(np.minimum(steps, ends - 1), axis=0)),
            is_pad=torch.from_numpy(steps >= ends),
        )
        return batch.pin_memory() if self.pin_memory else batch


@dataclass(kw_only=True)
class TrainingStream:
    """Endless batches of one rank, read ahead.

    Every `iter` starts again at `start`. Its threads, or processes, end when the iterator is closed
    or collected.
    """

    reader: BatchReader
    order: SampleOrder
    batch_size: int
    """Samples a step on each rank."""
    start: int = 0
    """Position in the order at which the first step begins, counted over all ranks."""
    rank: int = 0
    world_size: int = 1
    prefetch: int = 2
    """Batches read ahead, each by a thread of its own, or so many by each loader process; 0 reads
    in the caller's thread."""
    num_workers: int = 0
    """Loader processes; 0 reads in threads."""
    start_method: StartMethod = "forkserver"
    """How loader processes are started."""
    asked_at: float = field(default=0.0, init=False)
    """Time, by `time.perf_counter`, at which the last batch was asked for."""
    delivered_at: float = field(default=0.0, init=False)
    """Time at which it was there."""
    _delivering: weakref.ref[Generator[Batch, None, None]] | None = field(
        default=None, init=False, repr=False
    )

    def batch(self, step: int) -> Batch:
        """Reads the batch of step `step` after `start`, here and now."""
        return replace(self.reader(self._frames_at(step)), position=self._position(step))

    def __iter__(self) -> Iterator[Batch]:
        batches = self._deliver()
        self._delivering = weakref.ref(batches)
        return batches

    def close(self) -> None:
        """Ends threads and processes now, where a traceback may keep the iterator alive."""
        batches = None if self._delivering is None else self._delivering()
        if batches is not None:
            batches.close()

    def _position(self, step: int) -> int:
        return self.start + (step * self.world_size + self.rank) * self.batch_size

    def _frames_at(self, step: int) -> NDArray[np.int64]:
        return self.order(self._position(step), self.batch_size)

    def _deliver(self) -> Generator[Batch, None, None]:
        batches = self._read()
        try:
            for step in count():
                self.asked_at = time.perf_counter()
                batch = next(batches)
                self.delivered_at = time.perf_counter()
                yield replace(batch, position=self._position(step))
        finally:
            batches.close()

    def _read(self) -> Generator[Batch, None, None]:
        requests = (self._frames_at(step) for step in count())
        if self.num_workers == 0:
            return read_in_threads(self.reader, requests, self.prefetch)
        return read_in_processes(
            replace(self.reader, pin_memory=False),  # a loader process has no business on a GPU
            requests,
            num_workers=self.num_workers,
            start_method=self.start_method,
            prefetch=self.prefetch,
            pin_memory=self.reader.pin_memory,
        )


@dataclass(frozen=True, kw_only=True)
class FixedBatches:
    """The same batches every time: frames in order, in batches of about equal size."""

    reader: BatchReader
    frames: NDArray[np.int64]
    num_batches: int
    start: int = 0
    """Place of the first frame among those of all ranks."""

    def __len__(self) -> int:
        return self.num_batches

    def __iter__(self) -> Iterator[Batch]:
        bounds = [len(self.frames) * i // self.num_batches for i in range(self.num_batches + 1)]
        for start, end in pairwise(bounds):
            yield replace(self.reader(self.frames[start:end]), position=self.start + start)


def count_batches(num_frames: int, batch_size: int, world_size: int) -> int:
    """Into how many batches each rank divides its share of the frames that `spread` picks.

    As many on each, since some strategies exchange something in every forward pass.
    """
    ranks = world_size if num_frames >= world_size else 1
    fewest, most = num_frames // ranks, -(-num_frames // ranks)
    return min(-(-most // batch_size), fewest)


def spread(
    frames: NDArray[np.int64], limit: int, rank: int, world_size: int
) -> tuple[int, NDArray[np.int64]]:
    """Picks at most `limit` frames at equal distances, and of these one rank's share.

    Returns:
        Place of the share among the frames picked, and the share: consecutive frames, on some ranks
        one more than on others. With fewer frames than ranks each rank has all of them: validation
        of none would leave out the hooks in which ranks meet, and the mean is the same.
    """
    count_all = min(len(frames), limit)
    chosen = frames[np.arange(count_all) * len(frames) // max(count_all, 1)]
    if count_all < world_size:
        return 0, chosen
    start, end = (count_all * r // world_size for r in (rank, rank + 1))
    return start, chosen[start:end]
