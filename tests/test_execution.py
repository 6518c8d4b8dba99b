"""Chunk execution against brute force over all chunks ever predicted."""

import math

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from torch import Tensor

from act_lightning.execution import (
    ChunkQueue,
    ExecutionConfig,
    Executor,
    TemporalEnsembler,
    check_executions,
)

K, A = 5, 3
MAX_K = 7
DECAYS = [0.0, 0.01, -0.01, 0.1, -0.1, 1.0, -1.0, 100.0, -100.0]


def ensembled(chunks: list[Tensor], decay: float) -> Tensor:
    """The action of the step at which the last of `chunks`, one a step, came: the definition.

    Float64, and each weight from its own exponential, relative to the largest.
    """
    step = len(chunks) - 1
    answers = [chunk[step - s] for s, chunk in enumerate(chunks) if step - s < len(chunk)]
    powers = np.array([-decay * i for i in range(len(answers))])
    weights = np.exp(powers - powers.max())
    values = torch.stack(answers).double().numpy()
    return torch.from_numpy((weights[:, None] * values).sum(axis=0) / weights.sum())


def queued(chunks: list[Tensor], step: int, n_action_steps: int) -> Tensor:
    """The action of a step, by the definition: the chunk of the last query, at the steps since."""
    return chunks[step // n_action_steps][step % n_action_steps]


class Episodes:
    """Rows that start, act and end at random, and brute force that keeps all they were told."""

    def __init__(self, config: ExecutionConfig, num_rows: int, chunk_size: int, seed: int) -> None:
        self.executor: Executor = config.build(num_rows, chunk_size, A)
        self.config = config
        self.num_rows, self.chunk_size = num_rows, chunk_size
        self.chunks: list[list[Tensor]] = [[] for _ in range(num_rows)]
        self.steps = [0] * num_rows
        self.generator = torch.Generator().manual_seed(seed)

    def advance(self, offset: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
        """One control step of some rows, in any order: rows, actions, actions by brute force."""
        order = torch.randperm(self.num_rows, generator=self.generator)
        rows = order[: 1 + int(torch.randint(self.num_rows, (), generator=self.generator))]
        asking = rows[self.executor.needs_chunk[rows]]
        chunks = torch.randn(len(asking), self.chunk_size, A, generator=self.generator) + offset
        zero = torch.rand(chunks.shape, generator=self.generator) < 0.2
        chunks[zero] = 0.0  # the original takes a zero for a missing prediction
        for row, chunk in zip(asking.tolist(), chunks, strict=True):
            self.chunks[row].append(chunk.clone())
        self.executor.push(asking, chunks)
        chunks.fill_(math.nan)  # the executor has its own copy
        actions = self.executor.pop(rows)
        expected = torch.stack([self._by_definition(row) for row in rows.tolist()])
        for row in rows.tolist():
            self.steps[row] += 1
        return rows, actions, expected

    def end(self, rows: list[int]) -> None:
        self.executor.reset(torch.tensor(rows, dtype=torch.int64))
        for row in rows:
            self.chunks[row], self.steps[row] = [], 0

    def end_some(self) -> None:
        chance = torch.rand(self.num_rows, generator=self.generator)
        self.end((chance < 0.08).nonzero().flatten().tolist())

    def _by_definition(self, row: int) -> Tensor:
        if self.config.ensemble_decay is not None:
            return ensembled(self.chunks[row], self.config.ensemble_decay)
        steps = self.config.n_action_steps or self.chunk_size
        return queued(self.chunks[row], self.steps[row], steps)


def all_decays(test):
    """Gives a hypothesis test every decay of DECAYS too."""
    for decay in DECAYS:
        test = example(decay=decay, num_rows=3, chunk_size=MAX_K, seed=0)(test)
    return test


@all_decays
@given(
    decay=st.floats(-200, 200),
    num_rows=st.integers(1, 4),
    chunk_size=st.integers(1, MAX_K),
    seed=st.integers(0, 2**32),
)
@settings(max_examples=15, deadline=None, derandomize=True)
def test_ensembler_equals_brute_force(decay, num_rows, chunk_size, seed):
    episodes = Episodes(ExecutionConfig(ensemble_decay=decay), num_rows, chunk_size, seed)
    for _ in range(2 * chunk_size + 4):
        _, actions, expected = episodes.advance()
        assert actions.dtype == torch.float32
        torch.testing.assert_close(actions.double(), expected, rtol=1e-6, atol=1e-7)
        episodes.end_some()


@pytest.mark.parametrize("decay", [0.01, 0.0, -0.1])
def test_ensembler_equals_brute_force_over_a_long_episode_far_from_zero(decay):
    episodes = Episodes(ExecutionConfig(ensemble_decay=decay), 1, 50, seed=1)
    for _ in range(150):
        _, actions, expected = episodes.advance(offset=1000.0)
        # Nothing but the last rounding, to float32.
        torch.testing.assert_close(actions.double(), expected, rtol=6e-8, atol=0)


@given(num_rows=st.integers(2, 4), seed=st.integers(0, 2**32))
@settings(max_examples=3, deadline=None, derandomize=True)
@pytest.mark.parametrize(
    ("chunk_size", "n_action_steps"),
    [(k, n) for k in (1, 2, MAX_K) for n in (None, *range(1, k + 1))],
)
def test_chunk_queue_equals_brute_force_bit_for_bit(chunk_size, n_action_steps, num_rows, seed):
    config = ExecutionConfig(n_action_steps=n_action_steps)
    episodes = Episodes(config, num_rows, chunk_size, seed)
    for _ in range(2 * chunk_size + 2):
        _, actions, expected = episodes.advance()
        assert torch.equal(actions, expected)
        episodes.end_some()


@pytest.mark.parametrize(
    "config",
    [ExecutionConfig(), ExecutionConfig(n_action_steps=2), ExecutionConfig(ensemble_decay=-0.1)],
)
def test_nothing_is_handed_out_beyond_the_chunk(config):
    """A refused call changes nothing, for the rows that had an action left neither."""
    episodes = Episodes(config, 2, K, seed=0)
    both, first, second = torch.tensor([0, 1]), torch.tensor([0]), torch.tensor([1])
    due = 1 if config.ensemble_decay is not None else config.n_action_steps or K
    chunks = torch.randn(2, K, A)
    executor = episodes.executor
    executor.push(both, chunks)
    for _ in range(due):
        executor.pop(first)
    for pop in (executor.pop, executor.pop_block):
        with pytest.raises(ValueError, match=r"rows \[0\] need a chunk"):
            pop(both)
    assert executor.needs_chunk.tolist() == [True, False]
    for i in range(due):
        assert torch.equal(executor.pop(second), chunks[1:, i])
    assert executor.needs_chunk.tolist() == [True, True]


@pytest.mark.parametrize("decay", [20.0, -20.0, 100.0, -100.0, 1e308, -1e308])
def test_extreme_decay_is_the_oldest_or_the_newest_prediction(decay: float) -> None:
    chunk_size = 400  # exp(20 * 400) overflows float64
    ensembler = TemporalEnsembler(1, chunk_size, 1, decay)
    rows = torch.tensor([0])
    for step in range(6):
        ensembler.push(rows, torch.full((1, chunk_size, 1), float(step)))
        expected = 0.0 if decay > 0 else float(step)
        torch.testing.assert_close(
            ensembler.pop(rows), torch.tensor([[expected]]), rtol=0, atol=1e-7
        )


def test_nan_prediction_does_not_outlive_a_reset() -> None:
    ensembler = TemporalEnsembler(2, K, A, 0.1)
    rows = torch.tensor([0, 1])
    ensembler.push(rows, torch.full((2, K, A), math.nan))
    assert ensembler.pop(rows).isnan().all()
    ensembler.reset(rows)
    chunks = torch.randn(2, K, A)
    ensembler.push(rows, chunks)
    torch.testing.assert_close(ensembler.pop(rows), chunks[:, 0])


def test_pop_block_equals_single_pops() -> None:
    chunks = torch.randn(2, K, A)
    rows = torch.tensor([1, 0])
    one, block = ChunkQueue(2, K, A, 4), ChunkQueue(2, K, A, 4)
    for queue in (one, block):
        queue.push(rows, chunks)
        queue.pop(torch.tensor([0]))
    blocks = block.pop_block(rows)
    assert [len(b) for b in blocks] == [4, 3]
    assert block.needs_chunk.all()
    for row, actions in zip(rows, blocks, strict=True):
        for action in actions:
            assert torch.equal(one.pop(row[None])[0], action)

    ensembler = TemporalEnsembler(2, K, A, 0.0)
    ensembler.push(rows, chunks)
    assert torch.equal(torch.stack(ensembler.pop_block(rows)), chunks[:, :1])


@pytest.mark.parametrize("config", [ExecutionConfig(), ExecutionConfig(ensemble_decay=0.01)])
def test_needs_chunk_follows_push_pop_and_reset(config: ExecutionConfig) -> None:
    executor = config.build(2, 1, A)
    first = torch.tensor([0])
    assert executor.needs_chunk.tolist() == [True, True]
    executor.push(first, torch.zeros(1, 1, A))
    assert executor.needs_chunk.tolist() == [False, True]
    with pytest.raises(ValueError, match=r"rows \[1\] need a chunk"):
        executor.pop(torch.tensor([0, 1]))
    executor.pop(first)
    assert executor.needs_chunk.tolist() == [True, True]
    executor.push(first, torch.zeros(1, 1, A))
    executor.reset(first)
    assert executor.needs_chunk.tolist() == [True, True]


def test_errors_name_the_field_and_the_fix() -> None:
    with pytest.raises(ValueError, match="n_action_steps=0"):
        ExecutionConfig(n_action_steps=0)
    with pytest.raises(ValueError, match="give one of the two"):
        ExecutionConfig(n_action_steps=5, ensemble_decay=0.01)
    with pytest.raises(ValueError, match="ensemble_decay=nan"):
        ExecutionConfig(ensemble_decay=math.nan)
    with pytest.raises(ValueError, match="n_action_steps=6 must be from 1 to .*chunk_size=5"):
        ExecutionConfig(n_action_steps=6).build(1, K, A)
    ensembler = TemporalEnsembler(1, K, A, 0.0)
    with pytest.raises(ValueError, match="chunk_size=5"):
        ensembler.push(torch.tensor([0]), torch.zeros(1, 4, A))
    ensembler.push(torch.tensor([0]), torch.zeros(1, K, A))
    with pytest.raises(ValueError, match="second chunk"):
        ensembler.push(torch.tensor([0]), torch.zeros(1, K, A))


@pytest.mark.parametrize("name", ["seed", "a/b", "", "[/x]", "two words"])
def test_names_that_files_and_results_cannot_have_are_refused(name):
    with pytest.raises(ValueError, match="cannot be a name"):
        check_executions({"chunked": ExecutionConfig(), name: ExecutionConfig()})


def test_a_way_longer_than_the_chunk_is_named():
    ways = {"a-1": ExecutionConfig(n_action_steps=4), "b_0.5": ExecutionConfig(n_action_steps=5)}
    check_executions(ways)
    check_executions(ways, chunk_size=5)
    with pytest.raises(ValueError, match=r"executions\.b_0\.5: n_action_steps=5.*chunk_size=4"):
        check_executions(ways, chunk_size=4)
    with pytest.raises(ValueError, match="no way of executing"):
        check_executions({})
