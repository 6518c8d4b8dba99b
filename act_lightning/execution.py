"""How predicted chunks become actions: one after the other, or temporally ensembled.

Both ways hold one row an episode, so that many episodes share one call of the policy, and rows
start and end independently of each other. A control step of all rows reads

    rows = executor.needs_chunk.nonzero().flatten()
    executor.push(rows, policy.predict_chunk(observation[rows]))
    actions = executor.pop(all_rows)

Source: Zhao et al. 2023 (arXiv 2304.13705), Algorithm 2. Departures from tonyzhaozh/act:
- The ensemble is a running mean for each coming step, so memory is (K, A) a row instead of
  (T, T + K, A) an episode, and a step costs O(K).
- Predictions are counted; the original takes one with a component equal to 0 for missing.
- Any decay is allowed, negative ones (newest prediction weighs most) without overflow.

Shape suffixes: B rows, K chunk size, A action size, n rows given, S steps.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class ExecutionConfig:
    """One way of executing chunks; chunked unless `ensemble_decay` is given."""

    n_action_steps: int | None = None
    """Actions taken from a chunk before the policy is asked again; None takes the whole chunk."""
    ensemble_decay: float | None = None
    """m of the weights exp(-m * i), i = 0 the oldest prediction, of temporal ensembling (the paper
    has 0.01; a negative m weighs the newest most, 0 all the same). None switches it off."""

    def __post_init__(self) -> None:
        if self.n_action_steps is not None and self.n_action_steps < 1:
            raise ValueError(
                f"ExecutionConfig: n_action_steps={self.n_action_steps} must be 1 or more, or null "
                "for the whole chunk"
            )
        if self.ensemble_decay is None:
            return
        if not math.isfinite(self.ensemble_decay):
            raise ValueError(f"ExecutionConfig: ensemble_decay={self.ensemble_decay} is not finite")
        if self.n_action_steps is not None:
            raise ValueError(
                f"ExecutionConfig: n_action_steps={self.n_action_steps} together with "
                f"ensemble_decay={self.ensemble_decay}; ensembling asks the policy at every step: "
                "give one of the two"
            )

    def build(self, num_rows: int, chunk_size: int, dim_action: int) -> Executor:
        """Makes the executor of `num_rows` episodes.

        Args:
            num_rows: B, episodes held.
            chunk_size: K, actions in each predicted chunk.
            dim_action: A, values in each action.

        Raises:
            ValueError: if `n_action_steps` exceeds `chunk_size`.
        """
        if self.ensemble_decay is not None:
            return TemporalEnsembler(num_rows, chunk_size, dim_action, self.ensemble_decay)
        return ChunkQueue(num_rows, chunk_size, dim_action, self.n_action_steps)


def check_executions(
    executions: Mapping[str, ExecutionConfig], chunk_size: int | None = None
) -> None:
    """Checks ways of executing by name, as `rollout.executions` holds them.

    Args:
        executions: ways of executing.
        chunk_size: K of the policy that is to be executed so; None: not known yet.

    Raises:
        ValueError: there is none, a name is not fit for files and results, or one takes more
            actions than a chunk has.
    """
    if not executions:
        raise ValueError("executions names no way of executing; give one, such as chunked: {}")
    for name, execution in executions.items():
        if name == "seed" or not re.fullmatch(r"[\w.+-]+", name):
            raise ValueError(
                f"executions: {name!r} cannot be a name; use letters, digits, and _ . + -, not seed"
            )
        if chunk_size is not None:
            try:
                execution.build(1, chunk_size, 1)
            except ValueError as error:
                raise ValueError(f"executions.{name}: {error}") from error


class ChunkQueue:
    """Executes the first `n_action_steps` actions of a chunk, then asks for the next chunk."""

    def __init__(
        self, num_rows: int, chunk_size: int, dim_action: int, n_action_steps: int | None = None
    ) -> None:
        steps = chunk_size if n_action_steps is None else n_action_steps
        if not 1 <= steps <= chunk_size:
            raise ValueError(
                f"n_action_steps={n_action_steps} must be from 1 to the policy's "
                f"chunk_size={chunk_size}"
            )
        self._actions_bsa = torch.zeros(num_rows, steps, dim_action)
        self._cursor_b = torch.full((num_rows,), steps)
        self._chunk_size = chunk_size
        self._steps = steps

    @property
    def needs_chunk(self) -> Tensor:
        """(B,) bool, True where every action has been handed out."""
        return self._cursor_b == self._steps

    def reset(self, rows: Tensor) -> None:
        """Forgets the chunks of `rows` (n,), whose episodes are over."""
        self._cursor_b[rows] = self._steps

    def push(self, rows: Tensor, chunks: Tensor) -> None:
        """Queues a fresh chunk for each of `rows`, in place of what is left of the former one.

        Args:
            rows: (n,) distinct row numbers.
            chunks: (n, K, A) predicted actions, physical units.
        """
        _check_chunks(rows, chunks, self._chunk_size)
        self._actions_bsa[rows] = chunks[:, : self._steps].to(self._actions_bsa)
        self._cursor_b[rows] = 0

    def pop(self, rows: Tensor) -> Tensor:
        """Hands out the next action of each of `rows` (n,), as (n, A) float32.

        Raises:
            ValueError: if one of the rows needs a chunk first.
        """
        _check_available(rows, ~self.needs_chunk)
        actions_na = self._actions_bsa[rows, self._cursor_b[rows]]
        self._cursor_b[rows] += 1
        return actions_na

    def pop_block(self, rows: Tensor) -> list[Tensor]:
        """Hands out all actions due before the next chunk: one (S, A) float32 for each of `rows`.

        Raises:
            ValueError: if one of the rows needs a chunk first.
        """
        _check_available(rows, ~self.needs_chunk)
        starts = self._cursor_b[rows].tolist()
        self._cursor_b[rows] = self._steps
        return [
            self._actions_bsa[row, start:].clone() for row, start in zip(rows, starts, strict=True)
        ]


class TemporalEnsembler:
    """Averages, at every step, what all chunks so far predicted for this step.

    The action is sum_i w_i a_i / sum_i w_i, w_i = exp(-m i), a_i the predictions, oldest first.
    Kept as a running mean for each of the K coming steps: the i-th prediction moves the mean by
    w_i / (w_0 + ... + w_i) = 1 / (exp(0 m) + exp(1 m) + ... + exp(i m)) of its distance, a gain
    that is between 0 and 1 for any m. Held in float64, so that rounding does not add up.
    """

    def __init__(self, num_rows: int, chunk_size: int, dim_action: int, decay: float) -> None:
        self._gain_k = 1 / torch.exp(decay * torch.arange(chunk_size, dtype=torch.float64)).cumsum(
            0
        )
        self._mean_bka = torch.zeros(num_rows, chunk_size, dim_action, dtype=torch.float64)
        self._count_bk = torch.zeros(num_rows, chunk_size, dtype=torch.int64)
        self._fresh_b = torch.zeros(num_rows, dtype=torch.bool)
        self._chunk_size = chunk_size

    @property
    def needs_chunk(self) -> Tensor:
        """(B,) bool, True where no chunk came since the last action."""
        return ~self._fresh_b

    def reset(self, rows: Tensor) -> None:
        """Forgets the chunks of `rows` (n,), whose episodes are over."""
        self._mean_bka[rows] = 0
        self._count_bk[rows] = 0
        self._fresh_b[rows] = False

    def push(self, rows: Tensor, chunks: Tensor) -> None:
        """Adds the chunk predicted at the current step to the ensemble of each of `rows`.

        Args:
            rows: (n,) distinct row numbers.
            chunks: (n, K, A) predicted actions, physical units.

        Raises:
            ValueError: if one of the rows already got a chunk at its current step.
        """
        _check_chunks(rows, chunks, self._chunk_size)
        if bool(self._fresh_b[rows].any()):
            raise ValueError(f"rows {rows.tolist()}: a second chunk pushed for one control step")
        gain_nk1 = self._gain_k[self._count_bk[rows]].unsqueeze(-1)
        self._mean_bka[rows] = self._mean_bka[rows].lerp(chunks.to(self._mean_bka), gain_nk1)
        self._count_bk[rows] += 1
        self._fresh_b[rows] = True

    def pop(self, rows: Tensor) -> Tensor:
        """Hands out the next action of each of `rows` (n,), as (n, A) float32.

        Raises:
            ValueError: if one of the rows needs a chunk first.
        """
        _check_available(rows, self._fresh_b)
        mean_nka, count_nk = self._mean_bka[rows], self._count_bk[rows]
        self._mean_bka[rows, :-1] = mean_nka[:, 1:]
        self._count_bk[rows, :-1] = count_nk[:, 1:]
        self._mean_bka[rows, -1] = 0
        self._count_bk[rows, -1] = 0
        self._fresh_b[rows] = False
        return mean_nka[:, 0].float()

    def pop_block(self, rows: Tensor) -> list[Tensor]:
        """Hands out all actions due before the next chunk: one (1, A) float32 for each of `rows`.

        Raises:
            ValueError: if one of the rows needs a chunk first.
        """
        return list(self.pop(rows).unsqueeze(1))


Executor = ChunkQueue | TemporalEnsembler


def _check_chunks(rows: Tensor, chunks: Tensor, chunk_size: int) -> None:
    if chunks.shape[:2] != (len(rows), chunk_size):
        raise ValueError(
            f"chunks of shape {tuple(chunks.shape)} pushed for {len(rows)} rows "
            f"of chunk_size={chunk_size}"
        )


def _check_available(rows: Tensor, available_b: Tensor) -> None:
    if not bool(available_b[rows].all()):
        missing = rows[~available_b[rows]].tolist()
        raise ValueError(f"rows {missing} need a chunk before their next action")
