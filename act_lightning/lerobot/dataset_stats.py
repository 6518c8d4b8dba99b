"""Statistics of a LeRobotDataset v3.0, of every feature: what LeRobot normalises with.

LeRobot estimates quantiles from histograms, and those of the data set as the mean of its episodes'.
Here they are exact: low-dimensional arrays are in memory, and pixels have 256 values. Frames are
sampled in time and space as LeRobot samples them, so `count` is the number of frames looked at.

Source: LeRobot 0.6.1, `datasets/compute_stats.py`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

QUANTILES = {"q01": 0.01, "q10": 0.10, "q50": 0.50, "q90": 0.90, "q99": 0.99}
Stats = dict[str, list[Any]]


def table_stats(values: NDArray[Any]) -> Stats:
    """Statistics of (T,) or (T, D) numbers, over time: lists of D numbers, and `count`."""
    table = values.reshape(len(values), -1).astype(np.float64)
    quantiles = np.quantile(table, list(QUANTILES.values()), axis=0)
    return {
        "min": table.min(axis=0).tolist(),
        "max": table.max(axis=0).tolist(),
        "mean": table.mean(axis=0).tolist(),
        "std": table.std(axis=0).tolist(),
        "count": [len(table)],
    } | dict(zip(QUANTILES, quantiles.tolist(), strict=True))


class ImageStats:
    """Statistics of frames by colour, gathered a block at a time."""

    def __init__(self) -> None:
        self._num_frames = 0
        self._histogram = np.zeros((3, 256), np.int64)

    def add(self, frames: NDArray[np.uint8]) -> None:
        """Counts the pixels of (n, H, W, 3) frames, of large ones a grid."""
        height, width = frames.shape[1:3]
        longer = width if width > height else height
        step = longer // 150 if max(width, height) >= 300 else 1
        pixels = frames[:, ::step, ::step]
        for colour, counts in enumerate(self._histogram):
            counts += np.bincount(pixels[..., colour].ravel(), minlength=256)
        self._num_frames += len(frames)

    def merge(self, other: ImageStats) -> None:
        """Adds what another one has gathered."""
        self._num_frames += other._num_frames
        self._histogram += other._histogram

    def result(self) -> Stats:
        """Statistics of values from 0 to 1: lists of (3, 1, 1) numbers, and `count`."""
        values = np.arange(256) / 255
        weights = self._histogram / self._histogram.sum(axis=1, keepdims=True)
        cumulative = np.cumsum(self._histogram, axis=1)
        mean = weights @ values
        std = np.sqrt(np.sum(weights * (values - mean[:, None]) ** 2, axis=1))
        by_colour = {
            "min": values[(self._histogram > 0).argmax(axis=1)],
            "max": values[255 - (self._histogram > 0)[:, ::-1].argmax(axis=1)],
            "mean": mean,
            "std": std,
        } | {
            name: values[(cumulative >= share * cumulative[:, -1:]).argmax(axis=1)]
            for name, share in QUANTILES.items()
        }
        stats: Stats = {name: value.reshape(3, 1, 1).tolist() for name, value in by_colour.items()}
        return stats | {"count": [self._num_frames]}


def sampled_steps(num_steps: int) -> NDArray[np.int64]:
    """Steps of an episode whose frames are looked at: at least 100, if it has so many."""
    count = max(min(100, num_steps), min(int(num_steps**0.75), 10_000))
    return np.round(np.linspace(0, num_steps - 1, count)).astype(np.int64)
