"""Worlds of other packages, by YAML alone: their demonstrators, and the whole path through them."""

import json
from pathlib import Path

import numpy as np
import pytest

from act_lightning import cli
from act_lightning.data.store import Store
from act_lightning.main import main
from act_lightning.sim.config import EnvConfig
from act_lightning.sim.env import data_spec, make_env
from act_lightning.sim.fetch import FetchExpertConfig
from act_lightning.sim.pusht import ENV_ID, PushTExpertConfig, _beside, _routes
from act_lightning.sim.record import RecordConfig, record, settings
from act_lightning.sim.tee import INERTIA, MASS_CENTER, OUTLINE, Pose, find_pushes, mismatch

EXPERIMENTS = Path(__file__).parent.parent / "experiments"
FETCH = ("FetchReach", "FetchPickAndPlace")


def fetch_config(task):
    pytest.importorskip("gymnasium_robotics")
    keys = {"qpos": "observation", "env_state": "desired_goal"}
    return EnvConfig(
        task=f"gymnasium_robotics:{task}-v4", observation_keys=keys, max_episode_steps=50
    )


def pusht_config():
    pytest.importorskip("gym_pusht")
    return EnvConfig(
        task=f"gym_pusht:{ENV_ID}",
        make_kwargs={"obs_type": "environment_state_agent_pos"},
        observation_keys={"qpos": "agent_pos", "env_state": "environment_state"},
    )


def play(env, expert, seed, max_steps=300):
    """Actions meant and executed until success, which is waited for."""
    env.reset(seed=seed)
    expert.reset(env, seed)
    meant, executed = [], []
    while not env.unwrapped.is_success and len(meant) < max_steps:
        meant.append(expert.act())
        executed.append(expert.perturb(meant[-1]))
        env.unwrapped.advance(executed[-1])
    return np.stack(meant), np.stack(executed)


@pytest.mark.parametrize("task", FETCH)
def test_fetch_is_demonstrated(task):
    env = make_env(fetch_config(task))
    expert = FetchExpertConfig().build(env.config.task)
    for seed in range(5):
        meant, executed = play(env, expert, seed, max_steps=50)
        assert env.is_success, seed
        assert len(meant) < 30
        assert np.abs(meant).max() <= 1
        np.testing.assert_array_equal(meant, executed)


@pytest.mark.parametrize("task", FETCH)
def test_fetch_stays_at_its_goal(task):
    env = make_env(fetch_config(task))
    expert = FetchExpertConfig().build(env.config.task)
    meant, _ = play(env, expert, 7)
    for _ in range(50 - len(meant)):
        env.advance(expert.act())
        assert env.is_success


def test_fetch_acts_upon_the_present_alone():
    env = make_env(fetch_config("FetchPickAndPlace"))
    config = FetchExpertConfig(action_noise=0.1)
    expert, fresh = (config.build(env.config.task) for _ in range(2))
    env.reset(seed=1)
    expert.reset(env, 1)
    for _ in range(30):
        fresh.reset(env, 1)
        meant = expert.act()
        np.testing.assert_array_equal(meant, fresh.act())
        env.advance(expert.perturb(meant))


@pytest.mark.parametrize(
    ("config", "make", "still"),
    [
        (FetchExpertConfig(action_noise=0.2), lambda: fetch_config("FetchReach"), [3]),
        (PushTExpertConfig(action_noise=3.0), pusht_config, []),
    ],
    ids=["fetch", "pusht"],
)
def test_noise_is_repeatable_and_of_the_asked_size(config, make, still):
    env = make_env(make())
    expert = config.build(env.config.task)
    env.reset(seed=0)
    action = (env.action_space.low + env.action_space.high) / 2
    runs = []
    for _ in range(2):
        expert.reset(env, 3)
        runs.append(np.stack([expert.perturb(action) - action for _ in range(3000)]))
    np.testing.assert_array_equal(*runs)
    assert not runs[0][:, still].any()
    assert np.delete(runs[0], still, axis=1).std() == pytest.approx(config.action_noise, rel=0.1)


def test_the_tee_is_the_worlds():
    world = make_env(pusht_config()).foreign.unwrapped
    world.reset(seed=0)
    block = world.block
    np.testing.assert_allclose(block.center_of_gravity, MASS_CENTER)
    assert block.moment / block.mass == pytest.approx(INERTIA)
    corners = {tuple(corner) for shape in block.shapes for corner in shape.get_vertices()}
    assert {tuple(corner) for corner in OUTLINE} <= corners
    goal = Pose(np.array(world.goal_pose[:2]), np.array(world.goal_pose[2]))
    # mismatch() against points all over the T.
    rng = np.random.default_rng(0)
    points = rng.uniform([-60, 0], [60, 120], (200_000, 2))
    points = points[(points[:, 1] < 30) | (np.abs(points[:, 0]) < 15)]
    pose = Pose(np.array([230.0, 300.0]), np.array(2.5))
    off = pose.place(points) - goal.place(points)
    assert mismatch(pose, goal) == pytest.approx(np.sqrt((off**2).sum(1).mean()), rel=0.005)
    np.testing.assert_allclose(pose.local(pose.place(points)), points, atol=1e-9)


def test_a_push_ends_where_it_is_computed_to():
    world = make_env(pusht_config()).foreign.unwrapped
    pushes = find_pushes(spacing=5.0, room=18.0)
    rng = np.random.default_rng(1)
    for which in rng.integers(len(pushes.point), size=8):
        world.reset(seed=0)
        world.block.angle = float(rng.uniform(-3, 3))
        world.block.position = tuple(rng.uniform(220, 290, 2))
        pose = Pose(np.array(world.block.position), np.array(world.block.angle))

        def agent_at(length, which=which, pose=pose):
            end = pushes.end(pose, which, np.array(length))
            return end.place(pushes.point[which] - 15 * pushes.normal[which])

        world.agent.position = tuple(agent_at(-2.0))
        world.agent.velocity = (0, 0)
        for step in range(20):
            world.step(agent_at(min(40.0, 3.0 * step)))
        found = Pose(np.array(world.block.position), np.array(world.block.angle))
        assert mismatch(pose, found) > 15
        assert mismatch(pushes.end(pose, which, np.array(40.0)), found) < 0.7


def test_the_way_round_the_tee_is_clear_and_no_longer_than_needed():
    pose = Pose(np.array([250.0, 220.0]), np.array(0.3))
    below, beside = np.array([0.0, 160.0]), np.array([-90.0, 15.0])
    above = np.array([[0.0, -40.0]])
    for start in (below, beside):
        (length,), (first,) = _routes(pose, start, above)
        straight = np.linalg.norm(above[0] - start)
        assert straight < length < 2 * straight
        # Going to the first place leaves just the rest.
        (rest,), _ = _routes(pose, first, above)
        assert length == pytest.approx(np.linalg.norm(first - start) + rest)
    assert _routes(pose, np.array([-80.0, -40.0]), above)[0][0] == pytest.approx(80.0)
    # Against a wall there is no way round.
    walled = Pose(np.array([70.0, 10.0]), np.array(0.0))
    assert np.isinf(_routes(walled, below, above)[0][0])


def test_pusht_is_demonstrated():
    env = make_env(pusht_config())
    expert = PushTExpertConfig().build(env.config.task)
    for seed in range(4):
        meant, _ = play(env, expert, seed)
        assert env.is_success, seed
        assert len(meant) < 250
        assert env.action_space.contains(meant.min(0))
        assert env.action_space.contains(meant.max(0))


def test_the_agent_leaves_the_tee_alone_on_its_way():
    env = make_env(pusht_config())
    expert = PushTExpertConfig().build(env.config.task)
    ways = 0
    for seed in range(10, 14):
        env.reset(seed=seed)
        expert.reset(env, seed)
        world = env.foreign.unwrapped
        before = np.array([*world.block.position, world.block.angle])
        agent = Pose(before[:2], before[2]).local(np.array(world.agent.position))
        if not np.array_equal(
            agent, _beside(Pose(before[:2], before[2]), np.array(world.agent.position))
        ):
            continue  # it starts at the T
        action = expert.act()
        while not expert._is_pushing:
            env.advance(action)
            action = expert.act()
        after = np.array([*world.block.position, world.block.angle])
        np.testing.assert_allclose(after, before, atol=1e-9)
        ways += 1
    assert ways >= 2


@pytest.mark.parametrize(
    ("config", "task", "names"),
    [
        (
            FetchExpertConfig(),
            "gymnasium_robotics:FetchPush-v4",
            "FetchReach and FetchPickAndPlace",
        ),
        (FetchExpertConfig(), "insertion", "task='insertion'"),
        (PushTExpertConfig(), "gymnasium_robotics:FetchReach-v4", "gym_pusht/PushT-v0"),
    ],
)
def test_a_demonstrator_refuses_what_it_cannot_play(config, task, names):
    with pytest.raises(ValueError, match=names):
        config.build(task)


@pytest.mark.parametrize(
    ("make", "names"),
    [
        (lambda: FetchExpertConfig(gain=0.0), "gain=0.0"),
        (lambda: FetchExpertConfig(action_noise=2.0), "action_noise=2.0"),
        (lambda: PushTExpertConfig(action_noise=-1.0), "action_noise=-1.0"),
    ],
)
def test_bad_settings_are_named(make, names):
    with pytest.raises(ValueError, match=names):
        make()


def test_a_missing_package_is_named_with_its_remedy():
    config = EnvConfig(task="no_such_worlds:Here-v0", observation_keys={"qpos": ""})
    with pytest.raises(ValueError, match="no_such_worlds.*pip install"):
        make_env(config)


def test_demonstrations_of_fetch_are_recorded(tmp_path):
    env = fetch_config("FetchReach")
    expert = FetchExpertConfig(action_noise=0.05)
    config = RecordConfig(path=str(tmp_path / "a.zarr"), episodes=3, expert=expert, hold_steps=2)
    record(config, env, num_workers=1)
    store = Store.open(config.path)
    assert store.num_episodes == 3
    spec = data_spec(env)
    assert (spec.dim_qpos, spec.dim_action, spec.dim_env_state, spec.fps) == (10, 4, 3, 25.0)
    assert store.actions.shape[1] == 4
    assert store.provenance["settings"]["expert"] == {
        "class_path": "act_lightning.sim.fetch.FetchExpertConfig",
        "gain": 0.4,
        "action_noise": 0.05,
    }
    assert {"gymnasium-robotics", "mujoco"} <= set(store.provenance["versions"])
    other = RecordConfig(path=config.path, episodes=3, expert=FetchExpertConfig(), hold_steps=2)
    with pytest.raises(ValueError, match="action_noise is 0.05 there and 0.0 now"):
        record(other, env)


def test_the_experiments_name_their_demonstrators():
    kinds = {
        "fetch_reach": FetchExpertConfig,
        "fetch_pick_and_place": FetchExpertConfig,
        "pusht": PushTExpertConfig,
        "pusht_pixels": PushTExpertConfig,
    }
    for name, kind in kinds.items():
        config = cli.ConfigReader(arguments(name)).config_init
        assert isinstance(config.demonstrations.expert, kind)
        config.demonstrations.expert.build(config.env.task)


def test_settings_of_the_aloha_expert_are_as_they_were():
    """Stores recorded before demonstrators could be chosen hold these."""
    assert settings(RecordConfig(), EnvConfig())["expert"] == {
        "style": "plain",
        "num_steps": 300,
        "feedback": 2.0,
        "action_noise": 0.0,
    }


def arguments(experiment):
    return [
        f"--config={EXPERIMENTS / 'base.yaml'}",
        f"--config={EXPERIMENTS / f'{experiment}.yaml'}",
    ]


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(
    ("experiment", "sizes"),
    [
        ("fetch_reach", (10, 4, 3)),
        ("fetch_pick_and_place", (25, 4, 3)),
        ("pusht", (2, 2, 16)),
        ("pusht_pixels", (2, 2, 0)),
    ],
)
def test_the_whole_path(experiment, sizes, tmp_path, monkeypatch):
    """Recorded, trained for a few steps, rolled out and evaluated."""
    pytest.importorskip("gym_pusht" if "pusht" in experiment else "gymnasium_robotics")
    monkeypatch.chdir(tmp_path)
    small = [
        "--demonstrations.episodes=3",
        "--data.val_fraction=0.34",
        "--data.batch_size=4",
        "--rollout.episodes=1",
        "--rollout.final_episodes=1",
        "--rollout.num_workers=1",
        "--env.max_episode_steps=250",
        "--trainer.accelerator=cpu",
        "--trainer.max_steps=4",
        "--trainer.val_check_interval=4",
        "--run=few",
    ]
    assert main(["record", *arguments(experiment), *small]) == 0
    assert main(["fit", *arguments(experiment), *small]) == 0
    spec = Store.open(next(Path("data").glob("*.zarr"))).spec
    assert (spec.dim_qpos, spec.dim_action, spec.dim_env_state) == sizes
    results = json.loads(Path("runs", experiment, "few", "results.json").read_text())
    assert "chunked" in results["execution"]
    for played in results["execution"].values():
        assert played["episodes"] == 1
        assert played["errors"] == 0
        assert set(played["stages"]) <= {"success"}


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(
    ("config", "make", "wanted"),
    [
        (FetchExpertConfig(), lambda: fetch_config("FetchPickAndPlace"), 98),
        (PushTExpertConfig(), pusht_config, 95),
    ],
    ids=["fetch", "pusht"],
)
def test_success_over_100_worlds(config, make, wanted):
    env = make_env(make())
    expert = config.build(env.config.task)
    successes = 0
    for seed in range(100):
        play(env, expert, seed, max_steps=env.config.max_episode_steps)
        successes += env.is_success
    assert successes >= wanted
