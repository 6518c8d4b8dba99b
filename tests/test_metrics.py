"""Sums over ranks give what one process would have counted."""

import numpy as np
import pytest

from act_lightning.sim.metrics import RolloutMetrics
from act_lightning.sim.results import EpisodeResult, summarize

EXECUTIONS = ("chunked", "ensembled")
STAGES = ("touched", "lifted")


def make_results(number, seed=0):
    """Random results; returns are multiples of 1/8, so that sums do not depend on their order."""
    rng = np.random.default_rng(seed)
    return [
        EpisodeResult(
            execution=execution,
            seed=world,
            success=bool(rng.random() < 0.4),
            max_reward=float(rng.integers(0, 4)),
            total_reward=float(rng.integers(0, 1000)) / 8,
            steps=int(rng.integers(1, 300)),
            error="stopped" if rng.random() < 0.2 else None,
            stage_names=STAGES,
        )
        for execution in EXECUTIONS
        for world in range(number)
    ]


def count_on_ranks(shares, executions=EXECUTIONS):
    """What each of several ranks computes, of which each got a share of the results."""
    ranks = [RolloutMetrics(executions, STAGES) for _ in shares]
    for metrics, results in zip(ranks, shares, strict=True):
        metrics.update(results)
    computed = []
    for mine in ranks:
        states = {id(getattr(mine, name)): name for name in mine.metric_state}

        def gather(state, group, states=states):
            return [getattr(metrics, states[id(state)]).clone() for metrics in ranks]

        mine.dist_sync_fn, mine.distributed_available_fn = gather, lambda: True
        computed.append(mine.compute())
    return computed


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_every_rank_computes_the_summaries_of_all_results(num_ranks):
    results = make_results(7)
    expected = summarize(results)
    assert len({str(summary) for summary in expected.values()}) == 2
    shares = [results[rank::num_ranks] for rank in range(num_ranks)]
    assert count_on_ranks(shares) == [expected] * num_ranks


def test_a_rank_without_episodes_computes_the_same():
    results = make_results(2)
    assert count_on_ranks([results, []]) == [summarize(results)] * 2


def test_updates_add_up():
    results = make_results(6)
    metrics = RolloutMetrics(EXECUTIONS, STAGES)
    for result in results:
        metrics.update([result])
    assert metrics.compute() == summarize(results)


def test_without_success_there_is_no_mean_length():
    lost = [result for result in make_results(8) if not result.success]
    metrics = RolloutMetrics(EXECUTIONS, STAGES)
    metrics.update(lost)
    for summary in metrics.compute().values():
        assert (summary["successes"], summary["mean_steps_to_success"]) == (0, None)


def test_an_episode_of_a_rank_that_failed_counts_for_no_stage():
    lost = EpisodeResult(
        execution="chunked",
        seed=9,
        success=False,
        max_reward=0.0,
        total_reward=0.0,
        steps=0,
        error="rank 1: no simulator",
    )
    played = [result for result in make_results(3) if result.execution == "chunked"]
    computed = count_on_ranks([played, [lost]], ["chunked"])
    assert computed == [summarize([*played, lost])] * 2
    assert list(computed[1]["chunked"]["stages"]) == [*STAGES, "success"]


def test_an_execution_that_nobody_played_has_no_rates():
    metrics = RolloutMetrics(EXECUTIONS, STAGES)
    metrics.update([result for result in make_results(2) if result.execution == "chunked"])
    with pytest.raises(ValueError, match="no episodes"):
        metrics.compute()
