"""What came of rollouts: one result an episode, their summary, and a picture."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binomtest

from act_lightning.sim.rewards import STAGES


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
    frames: NDArray[np.uint8] | None = field(default=None, compare=False, repr=False)
    """(F, 3, h, w) pictures at regular times and at the end, if asked for."""

    @property
    def stages(self) -> dict[str, bool]:
        """Which stages of the task were reached; rewards 1 to 4 stand for them."""
        reached = {name: self.max_reward >= i + 1 for i, name in enumerate(STAGES)}
        return reached | {"success": self.success}


def summarize(results: Iterable[EpisodeResult]) -> dict[str, dict[str, Any]]:
    """Rates and means for each way of executing, as plain numbers for results.json.

    Returns:
        By execution: episodes, successes, success_rate, wilson_95 [low, high], stages {name: rate},
        mean_return, mean_steps_to_success (None without a success), errors (episodes stopped).
    """
    groups: dict[str, list[EpisodeResult]] = {}
    for result in results:
        groups.setdefault(result.execution, []).append(result)
    return {name: _summarize(group) for name, group in groups.items()}


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


def _summarize(group: list[EpisodeResult]) -> dict[str, Any]:
    steps = [result.steps for result in group if result.success]
    low, high = binomtest(len(steps), len(group)).proportion_ci(0.95, method="wilson")
    return {
        "episodes": len(group),
        "successes": len(steps),
        "success_rate": len(steps) / len(group),
        "wilson_95": [float(low), float(high)],
        "stages": {s: sum(r.stages[s] for r in group) / len(group) for s in group[0].stages},
        "mean_return": sum(result.total_reward for result in group) / len(group),
        "mean_steps_to_success": sum(steps) / len(steps) if steps else None,
        "errors": sum(result.error is not None for result in group),
    }
