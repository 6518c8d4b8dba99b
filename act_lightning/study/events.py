"""Scalars of a run, read from its event files by TensorBoard's own reader."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator


class Series(NamedTuple):
    """A scalar over the steps of training; N values."""

    steps: NDArray[np.int64]
    """(N,) optimizer steps taken."""
    values: NDArray[np.float64]
    """(N,) the scalar."""
    times: NDArray[np.float64]
    """(N,) when it was logged, in seconds since 1970."""


class RunEvents:
    """Scalars of a run's event files; nothing is read before the first `reload`.

    Of a run that was resumed, steps that were taken again count as taken the second time.

    Args:
        folder: of the run.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        # All scalars, one of what else there is: none is not possible, as 0 means all.
        guidance = {"scalars": 0, "images": 1, "histograms": 1, "tensors": 1}
        self._events = EventAccumulator(str(folder), size_guidance=guidance)
        self._found = False

    def reload(self) -> None:
        """Reads what was written since the last time; does nothing while there are no files."""
        self._found = self._found or any(self.folder.glob("events.out.tfevents.*"))
        if self._found:
            self._events.Reload()

    @property
    def scalars(self) -> dict[str, Series]:
        """By tag."""
        if not self._found:
            return {}
        return {tag: self._series(tag) for tag in self._events.Tags()["scalars"]}

    def _series(self, tag: str) -> Series:
        events = self._events.Scalars(tag)
        steps = np.array([event.step for event in events], np.int64)
        # What comes before a step that is not later was cut off, and taken again.
        lowest_from_here = np.minimum.accumulate(steps[::-1])[::-1]
        kept = np.append(steps[:-1] < lowest_from_here[1:], True)
        return Series(
            steps[kept],
            np.array([event.value for event in events], np.float64)[kept],
            np.array([event.wall_time for event in events], np.float64)[kept],
        )
