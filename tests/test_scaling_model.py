"""The arithmetic behind experiments/SCALING.md, against simulations and known cases."""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent / "bench"))
from scaling_model import (
    NETWORKS,
    NVLINK_BYTES_S,
    Assumptions,
    Costs,
    all_reduce_seconds,
    exposed_seconds,
    ring_seconds,
    rollout_seconds,
    step_seconds,
    strong_efficiency,
    validation_seconds,
    weak_efficiency,
)

MACHINE = Assumptions(host_s=25e-6)
COSTS = Costs(
    name="any",
    batch_size=64,
    parameters=12_500_000,
    flops=1e9,
    step_operators=1000,
    query_operators=200,
    evaluate_operators=500,
    backward_share=0.6,
    buckets=((0.2, 25_000_000), (1.0, 25_000_000)),
    small_buckets=((0.1, 50_000_000),),
    stored_bytes=0.0,
    delivered_bytes=1000,
    read_s=0.0,
    train_frames=10_000,
    val_frames=1000,
    interval_steps=1000,
    episodes=20,
    episode_steps=300,
    chunk_size=50,
    advance_s=1e-3,
    observe_s=5e-3,
    checkpoint_bytes=10**8,
)


def play_ring(num_bytes, ranks, hop_s, bytes_s):
    """Passes parts round a ring, hop by hop: reduce-scatter, then all-gather."""
    clock = np.zeros(ranks)
    for _ in range(2 * (ranks - 1)):
        sent = clock + hop_s + num_bytes / ranks / bytes_s
        clock = np.maximum(sent, np.roll(sent, 1))
    return clock.max()


@pytest.mark.parametrize("ranks", [1, 2, 5, 8])
def test_a_ring_takes_as_long_as_passing_its_parts_round(ranks):
    assert ring_seconds(1e8, ranks, 1e-3, 1e9) == pytest.approx(play_ring(1e8, ranks, 1e-3, 1e9))


def play_backward(buckets, backward_s, seconds):
    """The same in ticks of 0.1 ms: each sends what is full, one bucket at a time."""
    tick, now, left, waiting = 1e-4, 0.0, 0.0, list(buckets)
    while waiting or left > 0:
        if left <= 0 and waiting and now >= waiting[0][0] * backward_s:
            left = seconds(waiting.pop(0)[1])
        now += tick
        left -= tick
    return max(0.0, now - backward_s)


@pytest.mark.parametrize("bytes_s", [1e8, 5e8, 1e10])
def test_what_is_exposed_is_what_is_sent_after_the_backward_pass(bytes_s):
    buckets = [(0.1, 10_000_000), (0.3, 30_000_000), (0.35, 5_000_000), (1.0, 2_000_000)]
    seconds = lambda size: size / bytes_s  # noqa: E731
    played = play_backward(buckets, 0.2, seconds)
    assert exposed_seconds(buckets, 0.2, seconds) == pytest.approx(played, abs=1e-3)


def test_large_messages_take_what_the_slowest_link_takes():
    size = 1e10
    for network in NETWORKS:
        within = all_reduce_seconds(size, 8, network)
        assert within == pytest.approx(2 * 7 / 8 * size / NVLINK_BYTES_S, rel=0.01)
        slowest = min(NVLINK_BYTES_S, network.node_bytes_s)
        between = all_reduce_seconds(size, 64, network)
        assert between == pytest.approx(2 * 63 / 64 * size / slowest, rel=0.05)


def test_small_messages_take_the_latency_of_every_hop():
    infiniband, ethernet = NETWORKS[0], NETWORKS[-1]
    # Protocol LL: 112 hops within nodes, 1.8 times slower where there are several, and 14 between.
    assert all_reduce_seconds(4, 64, infiniband) == pytest.approx(
        3.6e-6 + 112 * 1.8 * 0.47e-6 + 14 * 2.7e-6, rel=1e-3
    )
    assert all_reduce_seconds(4, 64, ethernet) > 14 * 40e-6
    assert all_reduce_seconds(4, 1, ethernet) == 0


def test_one_gpu_is_fully_efficient_and_more_never_gain():
    for network in NETWORKS:
        weak = [weak_efficiency(COSTS, n, 64, network, MACHINE) for n in (1, 2, 8, 16, 64)]
        assert weak[0] == 1
        assert weak == sorted(weak, reverse=True)
        assert strong_efficiency(COSTS, 1, 64, network, MACHINE) == 1


def test_a_step_that_the_host_bounds_gains_nothing_from_more_ranks():
    # 64 samples of 1 GFLOP are done long before 1000 operators are launched.
    assert strong_efficiency(COSTS, 8, 64, NETWORKS[0], MACHINE) < 1 / 8
    heavy = replace(COSTS, flops=1e13)
    assert strong_efficiency(heavy, 8, 64, NETWORKS[0], MACHINE) == pytest.approx(1, abs=0.01)
    assert strong_efficiency(heavy, 16, 8, NETWORKS[0], MACHINE) == 0  # fewer samples than ranks


def test_gradients_of_half_the_bytes_or_sent_earlier_cost_less():
    plain = step_seconds(COSTS, 16, 64, NETWORKS[-1], MACHINE)
    assert step_seconds(COSTS, 16, 64, NETWORKS[-1], MACHINE, compression=2) < plain
    early = replace(COSTS, buckets=((0.1, 25_000_000), (0.2, 25_000_000)))
    assert step_seconds(early, 16, 64, NETWORKS[-1], MACHINE) < plain


def test_accumulated_batches_exchange_once():
    one, four = (step_seconds(COSTS, 64, 64, NETWORKS[-1], MACHINE, accumulate=n) for n in (1, 4))
    alone = step_seconds(COSTS, 1, 64, NETWORKS[-1], MACHINE)
    assert four - one == pytest.approx(3 * alone, rel=0.2)  # and three scalars
    assert weak_efficiency(COSTS, 64, 64, NETWORKS[-1], MACHINE, 4) == pytest.approx(
        4 * alone / four
    )


def test_a_step_is_not_quicker_than_its_data():
    slow = replace(COSTS, read_s=0.01)
    assert step_seconds(slow, 1, 64, NETWORKS[0], MACHINE) == pytest.approx(64 * 0.01 / 2)


def test_the_longest_episode_bounds_rollouts():
    longest = 300 * (0.006 + 200 * 25e-6)
    assert rollout_seconds(COSTS, 20, MACHINE) == pytest.approx(longest)
    assert rollout_seconds(COSTS, 64, MACHINE) == pytest.approx(longest)
    few_cores = replace(MACHINE, cores=1)
    work = 20 * (2 * 300 * 0.001 + 306 * 0.005)
    assert rollout_seconds(COSTS, 1, few_cores) == pytest.approx(work)
    assert rollout_seconds(replace(COSTS, episodes=0), 8, MACHINE) == 0


def test_validation_is_divided_among_ranks():
    alone, eight = (validation_seconds(COSTS, n, 64, MACHINE) for n in (1, 8))
    assert alone == pytest.approx(16 * 500 * 25e-6)
    assert eight == pytest.approx(2 * 500 * 25e-6)
