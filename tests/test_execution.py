"""Chunk execution against brute force over all chunks ever predicted."""

import math

import pytest
import torch
from torch import Tensor

from act_lightning.execution import ChunkQueue, ExecutionConfig, TemporalEnsembler

K, A = 5, 3


def brute_force(chunks: list[Tensor], decay: float) -> Tensor:
    """The ensembled action of step t = len(chunks) - 1, as the paper defines it."""
    step = len(chunks) - 1
    covering = [(s, c) for s, c in enumerate(chunks) if s <= step < s + K]
    weights = [math.exp(-decay * i) for i in range(len(covering))]
    total = sum(w * c[step - s].double() for w, (s, c) in zip(weights, covering, strict=True))
    return (total / sum(weights)).float()


@pytest.mark.parametrize("decay", [0.01, 0.0, -0.1, 1.5, -3.0])
def test_ensembler_equals_brute_force_with_rows_reset_at_different_times(decay: float) -> None:
    torch.manual_seed(0)
    ensembler = TemporalEnsembler(3, K, A, decay)
    history: list[list[Tensor]] = [[], [], []]
    for step in range(23):
        # Row 2 moves at every other step only, so rows are at different steps of their episodes.
        rows = [0, 1, 2] if step % 2 else [1, 0]
        for row, at in ((0, 7), (1, 11), (1, 12)):
            if step == at:
                ensembler.reset(torch.tensor([row]))
                history[row] = []
        chunks = torch.randn(len(rows), K, A)
        chunks[torch.rand(chunks.shape) < 0.3] = 0.0  # the original takes zeros for "missing"
        if step in (3, 4, 5):
            chunks[:] = 0.0
        ensembler.push(torch.tensor(rows), chunks)
        actions = ensembler.pop(torch.tensor(rows))
        for row, chunk, action in zip(rows, chunks, actions, strict=True):
            history[row].append(chunk)
            torch.testing.assert_close(
                action, brute_force(history[row], decay), rtol=1e-6, atol=1e-7
            )


@pytest.mark.parametrize("decay", [20.0, -20.0])
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


@pytest.mark.parametrize("n_action_steps", [None, 1, 3])
def test_chunk_queue_plays_each_rows_own_chunks(n_action_steps: int | None) -> None:
    queue = ChunkQueue(3, K, A, n_action_steps)
    steps = K if n_action_steps is None else n_action_steps
    played: list[list[Tensor]] = [[], [], []]
    pushed: list[list[Tensor]] = [[], [], []]
    generator = torch.Generator().manual_seed(0)
    for step in range(17):
        if step == 4:
            queue.reset(torch.tensor([1]))
            played[1], pushed[1] = [], []
        rows = queue.needs_chunk.nonzero().flatten()
        chunks = torch.randn(len(rows), K, A, generator=generator)
        queue.push(rows, chunks)
        for row, chunk in zip(rows.tolist(), chunks, strict=True):
            pushed[row].append(chunk[:steps])
        for row, action in enumerate(queue.pop(torch.arange(3))):
            played[row].append(action)
    for row in range(3):
        expected = torch.cat(pushed[row])[: len(played[row])]
        assert torch.equal(torch.stack(played[row]), expected)


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
