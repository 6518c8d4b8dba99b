"""The order of training: a pure function of seed and position, which needs no memory of the past.

A pass visits every sample once, in an order drawn from (seed, pass), and passes follow each other
without a seam. A sample is a frame, or an episode of which one frame is drawn, as tonyzhaozh/act
does. Position i of that endless order is the same whatever the batch size and the number of ranks,
so a run that stops anywhere is resumed exactly by its position.

Everything is drawn from Philox's raw output, which numpy guarantees never to change, unlike
`permutation` and `integers`.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from act_lightning.data.store import Store

DRAWN_AHEAD = 50_000
"""Samples from which on a pass is drawn while the one before is used: sorting 4 million takes a
second, during which a training step would wait."""


def sample_order(seed: int, pass_index: int, num_samples: int) -> NDArray[np.int64]:
    """The order in which a pass visits the samples.

    Args:
        seed: any integer from 0 to 2**64 - 1.
        pass_index: number of the pass, from 0.
        num_samples: samples in a pass.

    Returns:
        (num_samples,) permutation of 0 .. num_samples - 1.
    """
    return np.argsort(_words(seed, pass_index, num_samples), kind="stable").astype(
        np.int64, copy=False
    )


class Sampling(Protocol):
    """What a pass consists of."""

    def __len__(self) -> int:
        """Samples in a pass."""

    def __call__(self, pass_index: int) -> NDArray[np.int64]:
        """Positions in the store of the samples of a pass, in the order of training."""


@dataclass(frozen=True, kw_only=True)
class FrameSampling:
    """Each frame once a pass: long episodes count more than short ones."""

    seed: int
    frames: NDArray[np.int64]
    """(num_samples,) positions in the store."""

    def __len__(self) -> int:
        return len(self.frames)

    def __call__(self, pass_index: int) -> NDArray[np.int64]:
        """Positions of all frames, in the order of the pass."""
        return self.frames[sample_order(self.seed, pass_index, len(self.frames))]


@dataclass(frozen=True, kw_only=True)
class EpisodeSampling:
    """Each episode once a pass, at a frame drawn uniformly: all episodes count the same."""

    seed: int
    starts: NDArray[np.int64]
    """(num_samples,) position in the store of each episode's first frame."""
    ends: NDArray[np.int64]
    """(num_samples,) position after its last."""

    def __len__(self) -> int:
        return len(self.starts)

    def __call__(self, pass_index: int) -> NDArray[np.int64]:
        """Positions of one frame of each episode, in the order of the pass."""
        # Another counter than that of the order's words, from which these must not follow.
        words = _words(self.seed, pass_index, len(self), counter=1)
        lengths = (self.ends - self.starts).astype(np.uint64)
        # The product's upper half: uniform up to one part in 2**32 / length.
        steps = (words >> np.uint64(32)) * lengths >> np.uint64(32)
        frames = self.starts + steps.astype(np.int64)
        return frames[sample_order(self.seed, pass_index, len(self))]


class SampleOrder:
    """The endless order of training samples, by position. For one thread."""

    def __init__(self, sampling: Sampling) -> None:
        if len(sampling) < 1:
            raise ValueError("there are no training samples to put in order")
        self._sampling = sampling
        self._index = -1
        self._pass = np.empty(0, np.int64)
        self._next: Future[NDArray[np.int64]] | None = None

    @property
    def num_samples(self) -> int:
        """Samples in a pass."""
        return len(self._sampling)

    def __call__(self, start: int, length: int) -> NDArray[np.int64]:
        """Frames at positions start .. start + length, across ends of passes."""
        parts = []
        while length > 0:
            pass_index, offset = divmod(start, self.num_samples)
            part = self._frames(pass_index)[offset : offset + length]
            parts.append(part)
            start, length = start + len(part), length - len(part)
        return np.concatenate(parts)

    def _frames(self, pass_index: int) -> NDArray[np.int64]:
        if pass_index != self._index:
            ahead = self._next if pass_index == self._index + 1 else None
            self._pass = self._sampling(pass_index) if ahead is None else ahead.result()
            self._index, self._next = pass_index, None
            if self.num_samples >= DRAWN_AHEAD:
                self._next = self._draw(pass_index + 1)
        return self._pass

    def _draw(self, pass_index: int) -> Future[NDArray[np.int64]]:
        pool = ThreadPoolExecutor(1, thread_name_prefix="act-order")
        frames = pool.submit(self._sampling, pass_index)
        pool.shutdown(wait=False)  # its thread ends with what it draws
        return frames


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


def _words(seed: int, pass_index: int, count: int, counter: int = 0) -> NDArray[np.uint64]:
    """Random 64-bit words of (seed, pass_index); each `counter` begins a stream of its own."""
    key = np.array([seed, pass_index], np.uint64)
    return np.random.Philox(key=key, counter=[0, 0, 0, counter]).random_raw(count)
