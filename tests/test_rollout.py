"""Rollouts against episodes computed by hand in this process, and every way a rollout can break."""

import math
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from fake_env import NUM_ACTIONS, FakeEnv
from torch import Tensor

from act_lightning.batch import Observation
from act_lightning.execution import ExecutionConfig
from act_lightning.sim.env import EnvConfig, make_env
from act_lightning.sim.results import EpisodeResult, film_strip, summarize
from act_lightning.sim.rollout import RolloutError, RolloutPool, rollout

K, A = 6, NUM_ACTIONS
EXECUTIONS = {
    "chunked": ExecutionConfig(),
    "short": ExecutionConfig(n_action_steps=4),
    "ensembled": ExecutionConfig(ensemble_decay=-0.3),
}


class FakePolicy:
    """A nonlinear function of all that is observed, row by row."""

    def __init__(self, nan_where: float = math.inf) -> None:
        self.nan_where = nan_where
        self.batch_sizes: list[int] = []

    def predict_chunk(self, observation: Observation, seeds: Tensor | None = None) -> Tensor:
        assert torch.is_inference_mode_enabled()
        assert observation.images is not None
        self.batch_sizes.append(len(observation))
        qpos = observation.qpos.double()
        steps = observation.images[:, 0, 0, 0, 0].double()
        coming = torch.arange(K)
        phase = steps[:, None, None] + coming[:, None] + qpos.flip(1)[:, None]
        chunks = (2.5 * torch.sin(0.2 * phase) + qpos[:, None]).float()
        chunks[steps >= self.nan_where, 1, 1] = math.nan
        return chunks


def play_by_hand(seed: int, execution: str) -> EpisodeResult:
    """One episode, one world, no batches: chunks executed by their definition."""
    env, policy = FakeEnv(), FakePolicy()
    observation, _ = env.reset(seed=seed)
    config = EXECUTIONS[execution]
    chunks: list[tuple[int, Tensor]] = []
    rewards: list[float] = []
    while True:
        step = len(rewards)
        query_every = 1 if config.ensemble_decay is not None else config.n_action_steps or K
        if step % query_every == 0:
            batch = {n: torch.from_numpy(v[None]) for n, v in observation.items()}
            with torch.inference_mode():
                chunks.append((step, policy.predict_chunk(Observation(**batch))[0]))
        predictions = [chunk[step - at].double() for at, chunk in chunks if step - at < K]
        if config.ensemble_decay is None:
            action = predictions[-1]
        else:
            weights = [math.exp(-config.ensemble_decay * i) for i in range(len(predictions))]
            weighted = [w * p for w, p in zip(weights, predictions, strict=True)]
            action = torch.stack(weighted).sum(0) / sum(weights)
        reward, terminated, truncated = env.advance(action.float().numpy())
        rewards.append(reward)
        observation = env.observe()
        if terminated or truncated:
            return EpisodeResult(
                execution=execution,
                seed=seed,
                success=terminated,
                max_reward=max(rewards),
                total_reward=sum(rewards),
                steps=len(rewards),
            )


def children() -> set[int]:
    """Processes of this one that a test started; other tests may have left theirs."""
    return {child.pid for child in psutil.Process().children(recursive=True)}


@pytest.fixture(autouse=True)
def _nothing_left_behind() -> Iterator[None]:
    before = children()
    files = psutil.Process().num_fds()
    yield
    assert children() == before
    # The shared memory has no name, only descriptors.
    assert psutil.Process().num_fds() <= files


@pytest.mark.parametrize(("num_workers", "slots"), [(1, 1), (2, 1), (2, 3), (1, 40)])
def test_episodes_equal_those_played_by_hand(num_workers: int, slots: int) -> None:
    seeds = [15, 7, 0, 11, 3, 12, 5]
    policy = FakePolicy()
    results = rollout(
        policy, FakeEnv, seeds, EXECUTIONS, num_workers=num_workers, slots_per_worker=slots
    )
    expected = [play_by_hand(seed, name) for name in EXECUTIONS for seed in sorted(seeds)]
    assert len({(r.success, r.steps) for r in expected}) > 5
    assert [(r.execution, r.seed) for r in results] == [(r.execution, r.seed) for r in expected]
    for result, by_hand in zip(results, expected, strict=True):
        assert (result.success, result.steps) == (by_hand.success, by_hand.steps)
        assert (result.max_reward, result.total_reward) == (
            by_hand.max_reward,
            by_hand.total_reward,
        )
    if num_workers * slots > 4:
        assert max(policy.batch_sizes) > 1


def test_pool_plays_many_rollouts_with_the_same_processes() -> None:
    before = children()
    with RolloutPool(FakeEnv, num_workers=2, slots_per_worker=2) as pool:
        first = pool.rollout(FakePolicy(), range(5), EXECUTIONS)
        workers = children() - before
        assert len(workers) == 2
        second = pool.rollout(FakePolicy(), range(3, 8), {"short": EXECUTIONS["short"]})
        assert pool.rollout(FakePolicy(), [], EXECUTIONS) == []
        assert pool.rollout(FakePolicy(), range(5), EXECUTIONS) == first
        assert children() - before == workers
    assert second[:2] == [r for r in first if r.execution == "short"][3:]
    with pytest.raises(RolloutError, match="closed"):
        pool.rollout(FakePolicy(), [0], EXECUTIONS)


def test_frames_of_recorded_seeds_only() -> None:
    results = rollout(FakePolicy(), FakeEnv, range(8), EXECUTIONS, num_workers=1, record=[2, 5])
    assert {r.seed for r in results if r.frames is not None} == {2, 5}
    for result in results:
        if result.frames is None:
            continue
        assert result.frames.shape[1:] == (3, 120, 160)
        times = [*range(0, result.steps, 30), result.steps]
        assert result.frames[:, 0, 0, 0].tolist() == times
        strip = film_strip(result, num_frames=2)
        assert strip.shape == (3, 120, 320)
        assert strip[0, 0, [0, -1]].tolist() == [0, result.steps]
    with pytest.raises(ValueError, match="world 0"):
        film_strip(results[0])


@pytest.mark.parametrize("execution", ["chunked", "ensembled"])
def test_nan_action_stops_the_episode_and_names_the_step(execution: str) -> None:
    policy = FakePolicy(nan_where=7)
    executions = {execution: EXECUTIONS[execution]}
    results = rollout(policy, FakeEnv, range(6), executions, num_workers=1, slots_per_worker=2)
    sound = {r.seed: r for r in (play_by_hand(seed, execution) for seed in range(6))}
    # A chunk of 6 predicted at step 12 holds NaN from its second action on; an ensemble, at once
    # in the mean of the step after the first NaN.
    stop = 13 if execution == "chunked" else 8
    stopped = [r for r in results if r.error is not None]
    assert {r.seed for r in stopped} == {seed for seed, r in sound.items() if r.steps > stop}
    assert stopped
    for result in stopped:
        assert not result.success
        assert result.steps == stop
        assert result.error is not None
        assert f"nan from the policy at step {stop} (value 1)" in result.error
    summary = summarize(results)[execution]
    assert summary["errors"] == len(stopped)
    assert summary["successes"] == sum(r.success for r in results)


@pytest.mark.parametrize("execution", ["chunked", "ensembled"])
@pytest.mark.parametrize(
    ("trouble", "message"),
    [
        ("raise", "LookupError: the peg left the universe"),
        ("kill", r"died \(exit code -9\)"),
        ("hang", "no answer from the simulators for 1 s"),
    ],
)
def test_trouble_in_a_worker_is_a_prompt_error_naming_the_world(
    trouble: str, message: str, execution: str
) -> None:
    pool = RolloutPool(partial(FakeEnv, trouble), num_workers=2, slots_per_worker=2, timeout_s=30.0)
    pool.rollout(FakePolicy(), [0], EXECUTIONS)
    pool._timeout_s = 1.0
    start = time.monotonic()
    with pytest.raises(RolloutError, match=message) as error:
        pool.rollout(FakePolicy(), range(8), {execution: EXECUTIONS[execution]})
    assert f"world 4 ({execution})" in str(error.value)
    assert time.monotonic() - start < 5.0
    if trouble == "raise":
        assert "misbehave" in "".join(error.value.__notes__)


def test_diverged_simulation_is_a_failed_episode() -> None:
    env = partial(FakeEnv, "diverge")
    results = rollout(FakePolicy(), env, [4, 5], {"chunked": EXECUTIONS["chunked"]}, num_workers=1)
    assert (results[0].success, results[0].steps) == (False, 9)
    assert results[0].error == "the simulation diverged"
    assert results[1] == play_by_hand(5, "chunked")


def test_environment_that_cannot_be_made_says_why() -> None:
    with pytest.raises(
        RolloutError, match="starting its environment: ValueError: EnvConfig: no cam"
    ):
        rollout(FakePolicy(), partial(FakeEnv, "start"), [0], EXECUTIONS, num_workers=2)


def test_a_random_policy_plays_the_same_whatever_shares_its_batch() -> None:
    class Random(FakePolicy):
        asked: list[int] = []

        def predict_chunk(self, observation: Observation, seeds: Tensor | None = None) -> Tensor:
            assert seeds is not None
            self.asked += seeds.tolist()
            noise = [
                torch.randn(K, A, generator=torch.Generator().manual_seed(s))
                for s in seeds.tolist()
            ]
            return super().predict_chunk(observation) + torch.stack(noise)

    executions = {"short": EXECUTIONS["short"]}
    policy = Random()
    one = rollout(policy, FakeEnv, range(6), executions, num_workers=1)
    assert len(set(policy.asked)) == len(policy.asked) > 6, "every query has noise of its own"
    assert one == rollout(Random(), FakeEnv, range(6), executions, num_workers=2)
    assert one[2:4] == rollout(Random(), FakeEnv, [2, 3], executions, num_workers=1)
    assert one != rollout(FakePolicy(), FakeEnv, range(6), executions, num_workers=1)


def test_exception_in_the_policy_ends_the_workers() -> None:
    class Broken:
        def predict_chunk(self, observation: Observation, seeds: Tensor | None = None) -> Tensor:
            raise KeyboardInterrupt

    pool = RolloutPool(FakeEnv, num_workers=2)
    with pytest.raises(KeyboardInterrupt):
        pool.rollout(Broken(), range(8), EXECUTIONS)


def test_bad_arguments() -> None:
    class Wide:
        def predict_chunk(self, observation: Observation, seeds: Tensor | None = None) -> Tensor:
            return torch.zeros(len(observation), K, A + 1)

    with pytest.raises(ValueError, match=r"\(1, K, 2\)"):
        rollout(Wide(), FakeEnv, [0], {"chunked": ExecutionConfig()}, num_workers=1)
    with pytest.raises(ValueError, match="n_action_steps=7 must be from 1 to .*chunk_size=6"):
        rollout(FakePolicy(), FakeEnv, [0], {"a": ExecutionConfig(n_action_steps=7)}, num_workers=1)
    with pytest.raises(ValueError, match="twice"):
        rollout(FakePolicy(), FakeEnv, [0, 0], EXECUTIONS, num_workers=1)
    with pytest.raises(ValueError, match="num_workers=0"):
        RolloutPool(FakeEnv, num_workers=0)


@pytest.mark.parametrize(
    "end", [signal.SIGINT, pytest.param(signal.SIGKILL, marks=pytest.mark.slow)]
)
def test_workers_end_with_their_parent_and_need_no_main_guard(
    end: signal.Signals, tmp_path: Path
) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent("""
        from fake_env import FakeEnv
        from test_rollout import EXECUTIONS, FakePolicy
        from act_lightning.sim.rollout import RolloutPool
        with RolloutPool(FakeEnv, num_workers=2) as pool:
            while True:
                pool.rollout(FakePolicy(), range(4), EXECUTIONS)
                print("played", flush=True)
        """)
    )
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    parent = subprocess.Popen(
        [sys.executable, str(script)],
        env=os.environ | {"PYTHONPATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert parent.stdout is not None
        assert parent.stdout.readline() == "played\n"
        workers = psutil.Process(parent.pid).children(recursive=True)
        assert len(workers) == 2
        parent.send_signal(end)
        _, errors = parent.communicate(timeout=20)
        assert psutil.wait_procs(workers, timeout=5)[1] == []
        assert errors.count("Traceback") == (end == signal.SIGINT)
    finally:
        parent.kill()
        parent.communicate()


def test_simulator_plays_the_same_in_workers_as_here() -> None:
    config = EnvConfig(
        task="insertion", cameras=("top",), image_size=(24, 32), max_episode_steps=35
    )
    executions = {"chunked": ExecutionConfig(n_action_steps=10)}
    seeds = [1_000_000, 1_000_001, 1_000_002]

    class Reach:
        """Moves by what it sees, so that a wrong or late observation shows in the rewards."""

        seen: dict[tuple[float, ...], Tensor] = {}

        def predict_chunk(self, observation: Observation, seeds: Tensor | None = None) -> Tensor:
            assert observation.images is not None
            assert observation.env_state is not None
            for poses, image in zip(observation.env_state, observation.images, strict=True):
                self.seen[tuple(poses.tolist())] = image
            shade = observation.images.float().mean((1, 2, 3, 4))[:, None, None] / 255
            towards = observation.env_state[:, None, :1].sin() + shade
            return (observation.qpos[:, None] + 0.2 * towards).expand(-1, 12, -1)

    here = make_env(config)
    expected: dict[tuple[float, ...], Tensor] = {}
    policy = Reach()
    for seed in seeds:
        observation, _ = here.reset(seed=seed)
        for step in range(35):
            if step % 10 == 0:
                observation = here.observe()
                batch = {n: torch.from_numpy(v[None]) for n, v in observation.items()}
                chunk = policy.predict_chunk(Observation(**batch))[0]
                expected[tuple(observation["env_state"].tolist())] = batch["images"][0]
            here.advance(chunk[step % 10].numpy())
    here.close()
    for num_workers in (1, 2):
        policy.seen.clear()
        results = rollout(policy, config, seeds, executions, num_workers=num_workers, record=seeds)
        assert policy.seen.keys() == expected.keys()
        assert all(torch.equal(policy.seen[poses], image) for poses, image in expected.items())
        assert [(r.seed, r.steps, r.error) for r in results] == [(s, 35, None) for s in seeds]
        assert all(r.frames is not None and r.frames.shape == (3, 3, 120, 160) for r in results)


def test_torch_threads_are_given_back() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        rollout(FakePolicy(), FakeEnv, [0], {"short": EXECUTIONS["short"]}, num_workers=1)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_summary_matches_hand_counts() -> None:
    def result(seed: int, max_reward: float, steps: int) -> EpisodeResult:
        return EpisodeResult(
            execution="chunked",
            seed=seed,
            success=max_reward == 4,
            max_reward=max_reward,
            total_reward=10.0 * seed,
            steps=steps,
        )

    summary = summarize(
        [result(1, 4, 200), result(2, 4, 100), result(3, 2, 300), result(4, 0, 300)]
    )
    assert list(summary) == ["chunked"]
    chunked = summary["chunked"]
    assert chunked["episodes"] == 4
    assert chunked["success_rate"] == 0.5
    assert chunked["stages"] == {"touched": 0.75, "lifted": 0.75, "contact": 0.5, "success": 0.5}
    assert chunked["mean_return"] == 25.0
    assert chunked["mean_steps_to_success"] == 150.0
    # Wilson 1927, eq. for p = 1/2, n = 4: 1/2 +- z sqrt(1 / (4 (n + z^2))).
    z = 1.959964
    half = z * math.sqrt(1 / (4 * (4 + z**2)))
    np.testing.assert_allclose(chunked["wilson_95"], [0.5 - half, 0.5 + half], rtol=1e-6)
    assert summarize([result(3, 2, 300)])["chunked"]["mean_steps_to_success"] is None
