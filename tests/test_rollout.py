"""Rollouts against episodes computed by hand in this process, and every way a rollout can break."""

import math
import os
import re
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
from fake_env import NUM_ACTIONS, BlindEnv, BoundedEnv, FakeEnv, PatientEnv, make_fragile_env
from torch import Tensor

from act_lightning.batch import DataSpec, Observation
from act_lightning.execution import ExecutionConfig
from act_lightning.nets.act import ACT, ACTConfig
from act_lightning.nets.backbone import BackboneConfig
from act_lightning.sim.env import EnvConfig, make_env
from act_lightning.sim.film import Film
from act_lightning.sim.results import EpisodeResult, film_strip, summarize
from act_lightning.sim.rollout import RolloutError, RolloutPool, _one_torch_thread, rollout
from act_lightning.sim.worker import Episode

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


class NoisyPolicy(FakePolicy):
    """Adds noise that is a function of the seeds."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[int] = []

    def predict_chunk(self, observation: Observation, seeds: Tensor | None = None) -> Tensor:
        assert seeds is not None
        self.asked += seeds.tolist()
        noise = [
            torch.randn(K, A, generator=torch.Generator().manual_seed(s)) for s in seeds.tolist()
        ]
        return super().predict_chunk(observation) + torch.stack(noise)


class StayingPolicy:
    """Asks the joints to stay where they are."""

    def predict_chunk(self, observation: Observation, seeds: Tensor | None = None) -> Tensor:
        return observation.qpos[:, None].expand(-1, K, -1)


def play_by_hand(seed: int, execution: str) -> EpisodeResult:
    """One episode, one world, no batches: chunks executed by their definition."""
    env, policy = FakeEnv(), FakePolicy()
    observation, _ = env.reset(seed=seed)
    config = EXECUTIONS[execution]
    chunks: list[tuple[int, Tensor]] = []
    commands: list[Tensor] = []
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
        commands.append(action.float())
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
                stage_names=("touched", "lifted", "contact"),
                commands=torch.stack(commands).numpy(),
                queries=tuple(at for at, _ in chunks),
            )


def children() -> set[int]:
    """Processes of this one that a test started; other tests may have left theirs."""
    return {child.pid for child in psutil.Process().children(recursive=True)}


def kill_and_wait(pids: set[int]) -> None:
    """Kills children of this process and waits until they are dead, but does not reap them."""
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
        while psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
            time.sleep(0.01)


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
        assert result == by_hand
        assert result.queries == by_hand.queries
        np.testing.assert_allclose(result.commands, by_hand.commands, rtol=1e-6, atol=1e-6)
    assert set(policy.batch_sizes) == {4}


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


FILMED = {2: Film(), 5: Film()}


def test_frames_of_recorded_seeds_only() -> None:
    results = rollout(FakePolicy(), FakeEnv, range(8), EXECUTIONS, num_workers=1, record=FILMED)
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


def assert_same(results: list[EpisodeResult], expected: list[EpisodeResult]) -> None:
    """Equal bit for bit, with all that was sent and filmed."""
    assert results == expected
    for result, other in zip(results, expected, strict=True):
        assert result.queries == other.queries
        for name in ("commands", "frames"):
            np.testing.assert_array_equal(getattr(result, name), getattr(other, name), strict=True)


@pytest.mark.parametrize(
    ("trouble", "cause", "execution"),
    [
        ("raise", "LookupError: the peg left the universe", "short"),
        ("kill", "the process died (exit code -9)", "ensembled"),
        ("hang", "no answer for 2 s", "short"),
    ],
)
def test_an_episode_that_is_always_in_trouble_fails_alone(
    trouble: str, cause: str, execution: str
) -> None:
    executions = {execution: EXECUTIONS[execution]}
    expected = rollout(NoisyPolicy(), FakeEnv, range(8), executions, num_workers=2, record=FILMED)
    with RolloutPool(partial(FakeEnv, trouble), num_workers=2, slots_per_worker=2) as pool:
        pool.rollout(FakePolicy(), [0], EXECUTIONS)  # so that the workers have started
        pool._timeout_s = 2.0 if trouble == "hang" else 30.0
        with pytest.warns(RuntimeWarning) as warned:
            results = pool.rollout(NoisyPolicy(), range(8), executions, record=FILMED)
    failed = results.pop(4)
    del expected[4]
    assert_same(results, expected)
    assert (failed.execution, failed.seed, failed.success) == (execution, 4, False)
    assert failed.stages == dict.fromkeys(["touched", "lifted", "contact", "success"], False)
    assert failed.error is not None
    assert failed.error.count(f"playing world 4 ({execution}): {cause}") == 2
    messages = [str(warning.message) for warning in warned]
    assert len(messages) == 2
    for message in messages:
        assert f"playing world 4 ({execution}): {cause}; the worker was restarted" in message


@pytest.mark.parametrize("trouble", ["raise", "kill", "hang"])
def test_an_episode_played_again_is_the_undisturbed_one(trouble: str, tmp_path: Path) -> None:
    expected = rollout(NoisyPolicy(), FakeEnv, range(8), EXECUTIONS, num_workers=2, record=FILMED)
    env = partial(FakeEnv, trouble, 4, tmp_path / "once")
    with RolloutPool(env, num_workers=1, timeout_s=30.0) as pool:
        pool.rollout(FakePolicy(), [0], EXECUTIONS)
        pool._timeout_s = 2.0 if trouble == "hang" else 30.0
        with pytest.warns(RuntimeWarning, match=r"playing world 4 \(chunked\)") as warned:
            results = pool.rollout(NoisyPolicy(), range(8), EXECUTIONS, record=FILMED)
    assert len(warned) == 1
    assert_same(results, expected)


def test_a_worker_that_hangs_is_noticed_while_others_go_on(tmp_path: Path) -> None:
    env = partial(PatientEnv, tmp_path / "replayed")
    with RolloutPool(env, num_workers=2, slots_per_worker=1) as pool:
        pool.rollout(FakePolicy(), [], EXECUTIONS)
        pool._timeout_s = 2.0
        with pytest.warns(RuntimeWarning, match=r"world 4 \(short\): no answer for 2 s"):
            results = pool.rollout(FakePolicy(), [4, 5], {"short": EXECUTIONS["short"]})
    assert [(r.steps >= 40, r.error) for r in results] == [(True, None)] * 2


def test_workers_killed_between_rollouts_or_while_starting_are_replaced() -> None:
    expected = rollout(FakePolicy(), FakeEnv, range(6), EXECUTIONS, num_workers=2)
    before = children()
    with RolloutPool(FakeEnv, num_workers=2, slots_per_worker=2) as pool:
        # On a busy machine the first ones have started before they are killed.
        for doing in ("starting its environment|waiting", "waiting"):
            killed = children() - before
            assert len(killed) == 2
            kill_and_wait(killed)
            with pytest.warns(RuntimeWarning) as warned:
                results = pool.rollout(FakePolicy(), range(6), EXECUTIONS)
            assert_same(results, expected)
            messages = sorted(str(warning.message) for warning in warned)
            assert len(messages) == 2
            for number, message in enumerate(messages):
                assert re.fullmatch(
                    rf"rollout worker {number}, ({doing}): the process died \(exit code -9\); "
                    "the worker was restarted",
                    message,
                )
        assert not killed & children()


@pytest.mark.parametrize("num_workers", [1, 2])
def test_a_worker_that_cannot_be_restarted_is_given_up(num_workers: int, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    executions = {"chunked": EXECUTIONS["chunked"]}
    expected = rollout(FakePolicy(), FakeEnv, range(10), executions, num_workers=1)
    env = partial(make_fragile_env, broken)
    with RolloutPool(env, num_workers=num_workers, slots_per_worker=1) as pool:
        pool.rollout(FakePolicy(), range(2), executions)
        with pytest.warns(RuntimeWarning) as warned:
            results = pool.rollout(FakePolicy(), range(10), executions)
        if num_workers == 2:
            assert_same(results, expected)
        else:
            assert "OSError: no display; the worker was given up" in str(warned[-1].message)
            assert_same(results[:4], expected[:4])
            for result in results[4:]:
                assert result.error is not None
                assert "no simulator is left; the last: rollout worker 0" in result.error
                assert "OSError: no display" in result.error
            with pytest.warns(RuntimeWarning, match="given up"):
                assert pool.rollout(FakePolicy(), [0], executions)[0].error is not None
        broken.unlink()
        assert_same(pool.rollout(FakePolicy(), range(4), executions), expected[:4])


def test_without_room_for_a_process_the_others_go_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def full(*_: object, **__: object) -> None:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    before = children()
    expected = rollout(FakePolicy(), FakeEnv, range(6), EXECUTIONS, num_workers=1)
    env = partial(FakeEnv, "kill", 4, tmp_path / "once")
    with RolloutPool(env, num_workers=2, slots_per_worker=2) as pool:
        pool.rollout(FakePolicy(), range(2), EXECUTIONS)
        monkeypatch.setattr(subprocess, "Popen", full)
        with pytest.warns(RuntimeWarning, match="world 4 .*; the worker was given up"):
            assert_same(pool.rollout(FakePolicy(), range(6), EXECUTIONS), expected)
        kill_and_wait(children() - before)
        with pytest.warns(RuntimeWarning, match="waiting: .*; the worker was given up"):
            results = pool.rollout(FakePolicy(), range(6), EXECUTIONS)
        assert all("no simulator is left" in str(result.error) for result in results)
        with pytest.raises(RolloutError, match="no worker can be started"):
            pool.rollout(FakePolicy(), range(6), EXECUTIONS)


@pytest.mark.parametrize(
    ("action_margin", "command", "refused"),
    [
        (0.25, (1.49, 0.0), None),  # the range is 2, so 0.5 beyond the bounds is let through
        (0.25, (-1.49, 1e30), None),
        (0.25, (0.0, -1e30), None),  # without an upper bound there is no range to be a share of
        (0.25, (1.51, 0.0), "action 1.51 from the policy at step 4 (value 0) is beyond its bounds"),
        (0.25, (-1.51, 0.0), "bounds -1 to 1 by more than 0.25 of their range"),
        (0.0, (1.001, 0.0), "bounds -1 to 1 by more than 0 of their range"),
        (0.0, (1.0, 0.0), None),
        (None, (1e30, 0.0), None),
        (None, (math.inf, 0.0), "action inf from the policy at step 4 (value 0)"),
        (0.25, (0.0, -math.inf), "action -inf from the policy at step 4 (value 1)"),
        (0.25, (0.0, math.nan), "action nan from the policy at step 4 (value 1)"),
    ],
)
def test_actions_far_beyond_their_bounds_are_refused(
    action_margin: float | None, command: tuple[float, float], refused: str | None
) -> None:
    episode = Episode(BoundedEnv(action_margin))
    episode.reset(0, None)
    actions = np.zeros((6, 2), np.float32)
    actions[4] = command
    outcome = episode.play(actions, None)
    if refused is None:
        assert outcome is None or outcome.error is None
    else:
        assert outcome is not None
        assert (outcome.success, outcome.steps) == (False, 4)
        assert refused in str(outcome.error)


def test_a_refused_action_is_not_among_the_commands() -> None:
    for execution, num_queries in (("short", 2), ("ensembled", 5)):
        policy, executions = FakePolicy(nan_where=4), {execution: EXECUTIONS[execution]}
        (result,) = rollout(policy, FakeEnv, [2], executions, num_workers=1)
        assert (result.steps, result.error is None) == (5, False)
        assert result.commands is not None
        assert result.commands.shape == (5, A)
        assert np.isfinite(result.commands).all()
        assert len(result.queries) == num_queries


def make_act(dim_model: int) -> ACT:
    """A small ACT, untrained, that sees what a FakeEnv shows."""
    spec = DataSpec(
        task="insertion",
        fps=50,
        dim_qpos=NUM_ACTIONS,
        dim_action=NUM_ACTIONS,
        cameras=("top",),
        image_size=(32, 32),
    )
    config = ACTConfig(
        chunk_size=10,
        dim_model=dim_model,
        num_heads=4,
        dim_feedforward=4 * dim_model,
        num_cvae_layers=1,
        num_obs_layers=2,
        num_decoder_layers=1,
        backbone=BackboneConfig(weights="none", norm="group", stages=3, width=16),
    )
    torch.manual_seed(0)
    return config.build(spec, pretrained=False).eval()


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("batch", [4, 8])
def test_a_prediction_depends_on_its_row_alone(batch: int, bf16: bool) -> None:
    net = make_act(dim_model=64)
    generator = torch.Generator().manual_seed(0)
    qpos = torch.randn(16, NUM_ACTIONS, generator=generator)
    images = torch.randint(0, 256, (16, 1, 3, 32, 32), dtype=torch.uint8, generator=generator)

    def predict(rows: Tensor) -> Tensor:
        observation = Observation(qpos=qpos[rows], images=images[rows])
        autocast = torch.autocast("cpu", torch.bfloat16, enabled=bf16)
        with torch.inference_mode(), _one_torch_thread(), autocast:
            return net.predict_chunk(observation)

    alone = torch.cat([predict(torch.full((batch,), row))[:1] for row in range(16)])
    for _ in range(8):
        rows = torch.randperm(16, generator=generator)[:batch]
        assert torch.equal(predict(rows), alone[rows])


def test_act_plays_the_same_on_any_slots_and_beside_any_worlds() -> None:
    executions = {"short": ExecutionConfig(n_action_steps=4), "ensembled": EXECUTIONS["ensembled"]}
    policy = make_act(dim_model=64)
    expected = rollout(policy, FakeEnv, range(7), executions, num_workers=1)
    assert len({r.commands.tobytes() for r in expected if r.commands is not None}) == 14
    for num_workers, slots, seeds in ((2, 3, [*range(7)]), (1, 1, [2, 5]), (2, 8, [1, 6, 0])):
        results = rollout(
            policy, FakeEnv, seeds, executions, num_workers=num_workers, slots_per_worker=slots
        )
        assert_same(results, [r for r in expected if r.seed in seeds])


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
    with (
        pytest.warns(RuntimeWarning, match="starting its environment: the process died"),
        pytest.raises(RolloutError, match="starting its environment: the process died"),
    ):
        rollout(FakePolicy(), partial(FakeEnv, "kill at start"), [0], EXECUTIONS, num_workers=2)


def test_a_random_policy_plays_the_same_whatever_shares_its_batch() -> None:
    executions = {"short": EXECUTIONS["short"]}
    policy = NoisyPolicy()
    one = rollout(policy, FakeEnv, range(6), executions, num_workers=1)
    assert len(set(policy.asked)) == sum(len(r.queries) for r in one), "noise of each query's own"
    assert one == rollout(NoisyPolicy(), FakeEnv, range(6), executions, num_workers=2)
    assert one[2:4] == rollout(NoisyPolicy(), FakeEnv, [2, 3], executions, num_workers=1)
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

    with pytest.raises(ValueError, match=r"\(4, K, 2\)"):
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


@pytest.mark.slow
def test_a_thousand_episodes_leave_memory_as_it_was() -> None:
    def resident() -> list[float]:
        workers = [psutil.Process(pid) for pid in sorted(children() - before)]
        return [p.memory_info().rss / 2**20 for p in (psutil.Process(), *workers)]

    before = children()
    config = EnvConfig(cameras=("top",), image_size=(24, 32), max_episode_steps=12)
    executions = {"chunked": ExecutionConfig(), "ensembled": EXECUTIONS["ensembled"]}
    film = dict.fromkeys(range(40), Film(interval=3, overlay=True))
    policy = StayingPolicy()
    with RolloutPool(config, num_workers=2, slots_per_worker=2) as pool:
        for _ in range(2):  # until each slot has made its environment and filmed
            pool.rollout(policy, range(40), executions, record=film)
        descriptors, start = psutil.Process().num_fds(), resident()
        num_episodes = 0
        for _ in range(5):
            num_episodes += len(pool.rollout(policy, range(100), executions, record=film))
        assert num_episodes == 1000
        assert psutil.Process().num_fds() == descriptors
        growth = [after - former for after, former in zip(resident(), start, strict=True)]
    assert len(growth) == 3
    assert max(growth) < 3.0, f"MiB of this process and two workers: {growth}"


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
    films = dict.fromkeys(seeds, Film())
    for num_workers in (1, 2):
        policy.seen.clear()
        results = rollout(policy, config, seeds, executions, num_workers=num_workers, record=films)
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
            stage_names=("touched", "lifted", "contact"),
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


def test_an_episode_that_cannot_be_filmed_is_played() -> None:
    results = rollout(FakePolicy(), BlindEnv, range(3), EXECUTIONS, num_workers=1, record=FILMED)
    assert results == rollout(FakePolicy(), FakeEnv, range(3), EXECUTIONS, num_workers=1)
    assert all(result.frames is None for result in results)
