"""Batches of demonstrations in an order that needs no memory: a pure function of seed and position.

Training samples are frames; a pass visits each of them once in an order drawn from (seed, pass),
and passes follow each other without a seam. Position i of that endless order is the same whatever
the batch size and the number of ranks: at every step the ranks take consecutive runs of
`batch_size` positions. So a run that stops anywhere is resumed exactly by its position, and no
epoch, sampler or worker state exists.

Frames are read by threads of the training process: reading and decompressing release the
interpreter lock, and loader processes would pay for copying images through shared memory (facts: a
third of the speed).
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import count

import numpy as np
import torch
from numpy.typing import NDArray

from act_lightning.batch import Batch, Observation
from act_lightning.data.store import Store


def sample_order(seed: int, pass_index: int, num_samples: int) -> NDArray[np.int64]:
    """The order in which a pass visits the samples.

    Sorts Philox's raw output, which numpy guarantees never to change, unlike `permutation`.

    Args:
        seed: any integer from 0 to 2**64 - 1.
        pass_index: number of the pass, from 0.
        num_samples: samples in a pass.

    Returns:
        (num_samples,) permutation of 0 .. num_samples - 1.
    """
    keys = np.random.Philox(key=np.array([seed, pass_index], np.uint64)).random_raw(num_samples)
    return np.argsort(keys, kind="stable").astype(np.int64)


class SampleOrder:
    """The endless order of training samples, by position."""

    def __init__(self, seed: int, num_samples: int) -> None:
        if num_samples < 1:
            raise ValueError("there are no training samples to put in order")
        self.seed = seed
        self.num_samples = num_samples
        self._cached: dict[int, NDArray[np.int64]] = {}

    def __call__(self, start: int, length: int) -> NDArray[np.int64]:
        """Samples at positions start .. start + length, across ends of passes."""
        parts = []
        while length > 0:
            pass_index, offset = divmod(start, self.num_samples)
            part = self._order(pass_index)[offset : offset + length]
            parts.append(part)
            start, length = start + len(part), length - len(part)
        return np.concatenate(parts)

    def _order(self, pass_index: int) -> NDArray[np.int64]:
        if pass_index not in self._cached:
            self._cached = {pass_index: sample_order(self.seed, pass_index, self.num_samples)}
        return self._cached[pass_index]


def split_episodes(
    num_episodes: int, val_fraction: float, seed: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Splits episodes into training and validation ones, both in increasing order.

    Args:
        num_episodes: episodes in the store.
        val_fraction: share of them for validation, rounded; at least one if above 0.
        seed: decides which.

    Raises:
        ValueError: `val_fraction` leaves no episode to train on.
    """
    num_val = round(num_episodes * val_fraction)
    if val_fraction > 0:
        num_val = max(num_val, 1)
    if num_val >= num_episodes:
        raise ValueError(
            f"val_fraction={val_fraction} of {num_episodes} episodes leaves none to train on; "
            "record more episodes or set val_fraction to 0"
        )
    order = sample_order(seed, 0, num_episodes)
    return np.sort(order[num_val:]), np.sort(order[:num_val])


def frames_of(store: Store, episodes: NDArray[np.int64]) -> NDArray[np.int64]:
    """Positions in the store of all frames of some episodes."""
    spans = zip(store.episode_starts[episodes], store.episode_ends[episodes], strict=True)
    return np.concatenate([np.empty(0, np.int64), *(np.arange(a, b) for a, b in spans)])


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
            env_state = torch.from_numpy(store.env_state[frames])
        batch = Batch(
            observation=Observation(
                qpos=torch.from_numpy(store.qpos[frames]), images=images, env_state=env_state
            ),
            actions=torch.from_numpy(store.actions[np.minimum(steps, ends - 1)]),
            is_pad=torch.from_numpy(steps >= ends),
        )
        return batch.pin_memory() if self.pin_memory else batch


@dataclass(kw_only=True)
class TrainingStream:
    """Endless batches of one rank, read ahead by threads.

    Every `iter` starts again at `start`. Its threads end when the iterator is closed or collected.
    """

    reader: BatchReader
    frames: NDArray[np.int64]
    """(num_samples,) positions in the store of the training samples."""
    order: SampleOrder
    batch_size: int
    """Samples a step on each rank."""
    start: int = 0
    """Position in the order at which the first step begins, counted over all ranks."""
    rank: int = 0
    world_size: int = 1
    prefetch: int = 2
    """Batches read ahead, each by a thread of its own; 0 reads in the caller's thread."""
    _reading: weakref.ref[Generator[Batch, None, None]] | None = field(
        default=None, init=False, repr=False
    )

    def batch(self, step: int) -> Batch:
        """Reads the batch of step `step` after `start`; with several threads, in any order."""
        return self.reader(self._frames_at(step))

    def __iter__(self) -> Iterator[Batch]:
        if self.prefetch == 0:
            return map(self.batch, count())
        batches = self._read_ahead()
        self._reading = weakref.ref(batches)
        return batches

    def close(self) -> None:
        """Ends the threads now, where a traceback may keep the iterator alive."""
        batches = None if self._reading is None else self._reading()
        if batches is not None:
            batches.close()

    def _frames_at(self, step: int) -> NDArray[np.int64]:
        position = self.start + (step * self.world_size + self.rank) * self.batch_size
        return self.frames[self.order(position, self.batch_size)]

    def _read_ahead(self) -> Generator[Batch, None, None]:
        pool = ThreadPoolExecutor(self.prefetch, thread_name_prefix="act-data")
        pending: deque[Future[Batch]] = deque()
        try:
            for step in count():
                # The order is looked up here: its cache is not shared between threads.
                pending.append(pool.submit(self.reader, self._frames_at(step)))
                if len(pending) > self.prefetch:
                    yield pending.popleft().result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


@dataclass(frozen=True, kw_only=True)
class FixedBatches:
    """The same batches every time: frames in order, the last batch shorter."""

    reader: BatchReader
    frames: NDArray[np.int64]
    batch_size: int

    def __len__(self) -> int:
        return -(-len(self.frames) // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        for start in range(0, len(self.frames), self.batch_size):
            yield self.reader(self.frames[start : start + self.batch_size])


def spread(frames: NDArray[np.int64], limit: int, rank: int, world_size: int) -> NDArray[np.int64]:
    """Picks at most `limit` frames at equal distances, and of these one rank's share.

    Every rank gets equally many (up to `world_size` - 1 frames are left out), as ranks that average
    a metric wait for each other.
    """
    count_all = min(len(frames), limit)
    chosen = frames[np.arange(count_all) * len(frames) // max(count_all, 1)]
    if count_all < world_size:
        return chosen
    return chosen[: count_all - count_all % world_size][rank::world_size]
