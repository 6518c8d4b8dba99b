"""What came of rollouts: one result an episode, their summary, and a picture."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binomtest


@dataclass(frozen=True, kw_only=True)
class EpisodeResult:
    """How one episode went."""

    execution: str
    """Name of the way of executing."""
    seed: int
    """Seed of the world."""
    success: bool
    """Whether the episode ended in success."""
    max_reward: float
    """Highest reward of any step."""
    total_reward: float
    """Sum of the rewards: the return."""
    steps: int
    """Control steps played."""
    error: str | None = None
    """Why the episode was stopped and counted as failed; None if nothing went wrong."""
    stage_names: tuple[str, ...] = ()
    """Stages before success, for which the rewards 1, 2, ... stand; () for tasks without stages."""
    commands: NDArray[np.float32] | None = field(default=None, compare=False, repr=False)
    """(steps, A) actions sent to the environment, physical units; None if they are not known."""
    queries: tuple[int, ...] = field(default=(), compare=False, repr=False)
    """Steps at which the first action of a new prediction was taken, ascending."""
    frames: NDArray[np.uint8] | None = field(default=None, compare=False, repr=False)
    """(F, 3, h, w) pictures at regular times and at the end, if asked for."""

    @classmethod
    def lost(
        cls, execution: str, seed: int, error: str, stage_names: tuple[str, ...] = ()
    ) -> EpisodeResult:
        """An episode that could not be played, for the reason `error`."""
        return cls(
            execution=execution,
            seed=seed,
            success=False,
            max_reward=0.0,
            total_reward=0.0,
            steps=0,
            error=error,
            stage_names=stage_names,
        )

    @property
    def stages(self) -> dict[str, bool]:
        """Which stages of the task were reached, `success` last."""
        reached = {name: self.max_reward >= i + 1 for i, name in enumerate(self.stage_names)}
        return reached | {"success": self.success}


class Counts(NamedTuple):
    """What is counted of the episodes of one way of executing; all sums, which ranks add up."""

    episodes: int
    successes: int
    stages: dict[str, int]
    """Episodes that reached each stage on the way; `success` is not among them."""
    total_return: float
    """Sum of the returns."""
    steps_to_success: int
    """Sum of the lengths of the episodes that succeeded, in control steps."""
    errors: int
    """Episodes that were stopped."""


def count(results: Iterable[EpisodeResult]) -> Counts:
    """Counts episodes of one way of executing."""
    results = list(results)
    stages: dict[str, int] = {}
    for result in results:
        for name in result.stage_names:
            stages[name] = stages.get(name, 0) + result.stages[name]
    return Counts(
        episodes=len(results),
        successes=sum(result.success for result in results),
        stages=stages,
        total_return=sum(result.total_reward for result in results),
        steps_to_success=sum(result.steps for result in results if result.success),
        errors=sum(result.error is not None for result in results),
    )


def summary(counts: Counts) -> dict[str, Any]:
    """Rates and means of one way of executing; see `summarize`.

    Raises:
        ValueError: there are no episodes.
    """
    episodes, successes = counts.episodes, counts.successes
    if episodes == 0:
        raise ValueError("no episodes; there are no rates of nothing")
    low, high = wilson_interval(successes, episodes)
    reached = counts.stages | {"success": successes}
    return {
        "episodes": episodes,
        "successes": successes,
        "success_rate": successes / episodes,
        "wilson_95": [low, high],
        "stages": {name: number / episodes for name, number in reached.items()},
        "mean_return": counts.total_return / episodes,
        "mean_steps_to_success": counts.steps_to_success / successes if successes else None,
        "errors": counts.errors,
    }


def wilson_interval(successes: int, episodes: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of one policy's success rate.

    Assumes that the worlds are drawn independently from those one wants to know about.

    Raises:
        ValueError: there are no episodes, or `successes` is not from 0 to their number.

    Source: Wilson 1927, computed by scipy.
    """
    low, high = binomtest(successes, episodes).proportion_ci(confidence, method="wilson")
    return float(low), float(high)


def summarize(results: Iterable[EpisodeResult]) -> dict[str, dict[str, Any]]:
    """Rates and means for each way of executing, as plain numbers for results.json.

    Returns:
        By execution: episodes, successes, success_rate, wilson_95 [low, high], stages {name: rate},
        mean_return (of an episode that was stopped what it had, of one that was lost 0),
        mean_steps_to_success (None without a success), errors (episodes stopped or lost).
    """
    groups: dict[str, list[EpisodeResult]] = {}
    for result in results:
        groups.setdefault(result.execution, []).append(result)
    return {name: summary(count(group)) for name, group in groups.items()}


def film_strip(result: EpisodeResult, num_frames: int = 10) -> NDArray[np.uint8]:
    """Frames of one episode side by side, first and last included.

    Returns:
        (3, h, n * w), n = `num_frames` or as many as there are.

    Raises:
        ValueError: if the episode was not recorded.
    """
    if result.frames is None:
        raise ValueError(f"no frames of world {result.seed}; list its seed in `record`")
    num_frames = min(num_frames, len(result.frames))
    chosen = np.linspace(0, len(result.frames) - 1, num_frames).round().astype(int)
    return np.concatenate(list(result.frames[chosen]), axis=2)
