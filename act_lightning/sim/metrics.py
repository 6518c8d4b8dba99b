"""What rollouts come to over all ranks: sums that each rank adds to, reduced once."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from act_lightning.sim.results import Counts, EpisodeResult, count, summary


class RolloutMetrics(Metric):
    """`sim.results.summarize` over the results of all ranks, of which only sums are exchanged.

    Sums of lengths and counts are int64 and exact; those of returns are float64, and may differ in
    the last digit when another number of ranks adds them in another order.

    Args:
        executions: names of the ways of executing.
        stages: names of the stages before success, for ranks that play no episode know none.
    """

    full_state_update = False
    episodes: Tensor
    successes: Tensor
    stages: Tensor
    total_return: Tensor
    steps_to_success: Tensor
    errors: Tensor

    def __init__(self, executions: Iterable[str], stages: Sequence[str]) -> None:
        super().__init__()
        self._executions = tuple(executions)
        self._stage_names = tuple(stages)
        ways = len(self._executions)
        for name, shape, dtype in (
            ("episodes", (ways,), torch.int64),
            ("successes", (ways,), torch.int64),
            ("stages", (ways, len(self._stage_names)), torch.int64),
            ("total_return", (ways,), torch.float64),
            ("steps_to_success", (ways,), torch.int64),
            ("errors", (ways,), torch.int64),
        ):
            self.add_state(name, torch.zeros(shape, dtype=dtype), dist_reduce_fx="sum")

    def update(self, results: Sequence[EpisodeResult]) -> None:
        """Adds results of this rank; a rank without any gives none."""
        for row, execution in enumerate(self._executions):
            counts = count(result for result in results if result.execution == execution)
            self.episodes[row] += counts.episodes
            self.successes[row] += counts.successes
            for column, stage in enumerate(self._stage_names):
                self.stages[row, column] += counts.stages.get(stage, 0)
            self.total_return[row] += counts.total_return
            self.steps_to_success[row] += counts.steps_to_success
            self.errors[row] += counts.errors

    def compute(self) -> dict[str, dict[str, Any]]:
        """Summaries of all ranks' results, as `sim.results.summarize` makes them.

        Raises:
            ValueError: some way of executing was not played on any rank.
        """
        return {
            execution: summary(
                Counts(
                    episodes=int(self.episodes[row]),
                    successes=int(self.successes[row]),
                    stages=dict(zip(self._stage_names, self.stages[row].tolist(), strict=True)),
                    total_return=float(self.total_return[row]),
                    steps_to_success=int(self.steps_to_success[row]),
                    errors=int(self.errors[row]),
                )
            )
            for row, execution in enumerate(self._executions)
        }
