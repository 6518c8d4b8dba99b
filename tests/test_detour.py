"""The detour world: what succeeds, what the demonstrator shows, and how it is recorded."""

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from act_lightning.data.store import Store
from act_lightning.sim import register_envs
from act_lightning.sim.config import EnvConfig
from act_lightning.sim.detour import ENV_ID, NUM_STEPS, OBSTACLE_RADIUS, mode_paths
from act_lightning.sim.env import data_spec, make_env
from act_lightning.sim.expert import ExpertConfig
from act_lightning.sim.record import RecordConfig, record

STYLE = ExpertConfig(style="style")


def config(num_obstacles=1):
    return EnvConfig(
        task=ENV_ID,
        observation_keys={"qpos": "time"},
        env_state=False,
        max_episode_steps=NUM_STEPS,
        make_kwargs={"num_obstacles": num_obstacles},
    )


def play(env, path, seed=0):
    """The end of an episode on `path`: reward, terminated, truncated, success."""
    env.reset(seed=seed)
    for action in path[:-1]:
        assert env.advance(np.float32(action)) == (0.0, False, False)
        assert not env.is_success
    return *env.advance(np.float32(path[-1])), env.is_success


@pytest.mark.filterwarnings("ignore:.*symmetric and normalized.*")
def test_passes_gymnasiums_checker():
    register_envs()
    check_env(gymnasium.make(ENV_ID, render_mode="rgb_array").unwrapped)


@pytest.mark.parametrize("num_obstacles", [1, 2])
def test_every_mode_succeeds_and_their_mean_does_not(num_obstacles):
    env, paths = make_env(config(num_obstacles)), mode_paths(num_obstacles)
    assert paths.shape == (2**num_obstacles, NUM_STEPS, 2)
    for path in paths:
        assert play(env, path) == (1.0, True, False, True)
    assert np.allclose(paths.mean(axis=0)[:, 1], 0)
    assert play(env, paths.mean(axis=0)) == (0.0, False, True, False)


def test_modes_are_in_the_order_that_is_told():
    """Left is where y is positive; x at the obstacles is 0.25 and 0.75 of the way."""
    first, second = (mode_paths(2)[:, [4, 14], 1] > 0).T.tolist()
    assert first == [True, True, False, False]
    assert second == [True, False, True, False]


def test_an_obstacle_between_two_steps_is_hit():
    """It is jumped over: no position is inside, but the way between two of them is."""
    path = np.zeros((NUM_STEPS, 2))
    path[10:, 0] = 1.0
    assert np.linalg.norm(path - [0.5, 0.0], axis=1).min() > OBSTACLE_RADIUS
    env = make_env(config())
    assert play(env, path) == (0.0, False, True, False)
    path[10, :] = [0.5, 0.4]  # around it
    assert play(env, path)[3]


def test_the_goal_must_be_reached():
    env, path = make_env(config()), mode_paths()[0]
    assert play(env, path + np.linspace(0, 0.04, NUM_STEPS)[:, None] * [0, 1])[3]
    assert not play(env, path + np.linspace(0, 0.06, NUM_STEPS)[:, None] * [0, 1])[3]


def test_the_time_is_all_that_is_seen():
    spec = data_spec(config(2))
    assert (spec.dim_qpos, spec.dim_action, spec.dim_env_state) == (1, 2, 0)
    env = make_env(config(2))
    seen = []
    for path in mode_paths(2):
        observations = [env.reset(seed=3)[0]["qpos"]]
        observations += [env.step(np.float32(action))[0]["qpos"] for action in path]
        seen.append(np.concatenate(observations))
    assert all(np.array_equal(one, seen[0]) for one in seen)
    assert np.allclose(seen[0], np.arange(NUM_STEPS + 1) / NUM_STEPS)


@pytest.mark.parametrize("num_obstacles", [1, 2])
def test_demonstrator_succeeds_in_every_mode_equally_often(num_obstacles):
    env, expert = make_env(config(num_obstacles)), STYLE.build(ENV_ID)
    paths = mode_paths(num_obstacles)
    chosen, off = [], []
    for seed in range(400):
        env.reset(seed=seed)
        expert.reset(env, seed)
        actions = []
        while not env.is_success:
            action = expert.act()
            actions.append(expert.perturb(action))
            env.advance(actions[-1])
            assert len(actions) <= NUM_STEPS, "the demonstration failed"
        distances = np.sqrt(np.square(np.stack(actions) - paths).sum(-1).mean(-1))
        chosen.append(distances.argmin())
        off.append(distances.min())
    share = np.bincount(chosen) / len(chosen)
    # Three standard deviations of a binomial share.
    bound = 3 * np.sqrt((1 / len(paths)) * (1 - 1 / len(paths)) / len(chosen))
    assert np.abs(share - 1 / len(paths)).max() < bound
    assert 0.02 < np.sqrt(np.square(off).mean()) < 0.03
    assert np.mean(np.array(off) < 0.05) > 0.98


def test_demonstrations_repeat_and_plain_ones_have_no_noise():
    env = make_env(config())

    def demonstrate(expert_config, seed):
        expert = expert_config.build(ENV_ID)
        expert.reset(env, seed)
        return np.stack([expert.act() for _ in range(NUM_STEPS)])

    assert np.array_equal(demonstrate(STYLE, 5), demonstrate(STYLE, 5))
    assert not np.array_equal(demonstrate(STYLE, 5), demonstrate(STYLE, 6))
    plain = demonstrate(ExpertConfig(), 5)
    assert (plain == mode_paths().astype(np.float32)).all(axis=(1, 2)).any()


def test_settings_without_a_meaning_here_are_refused():
    with pytest.raises(ValueError, match=r"expert.action_noise=0.1.*nothing to recover"):
        ExpertConfig(action_noise=0.1).build(ENV_ID)
    with pytest.raises(ValueError, match="num_obstacles=4; give 1 or 2"):
        make_env(config(4))


def test_record_fills_a_store(tmp_path):
    path = tmp_path / "detour.zarr"
    settings = RecordConfig(path=str(path), episodes=6, expert=STYLE)
    record(settings, config(), num_workers=1)
    store = Store.open(path)
    assert store.num_episodes == 6
    assert store.episode_ends.tolist() == [NUM_STEPS * (i + 1) for i in range(6)]
    times = store.qpos[:].reshape(6, NUM_STEPS)
    assert np.allclose(times, np.arange(NUM_STEPS) / NUM_STEPS)
    env, expert = make_env(config()), STYLE.build(ENV_ID)
    for seed, actions in enumerate(store.actions[:].reshape(6, NUM_STEPS, 2)):
        expert.reset(env, seed)
        assert np.array_equal(actions, [expert.act() for _ in range(NUM_STEPS)])
        assert play(env, actions)[3]


def test_picture_shows_the_way():
    env = make_env(config())
    env.reset()
    before = env.render()
    assert before.shape == (120, 160, 3)
    assert before.dtype == np.uint8
    for action in mode_paths()[0]:
        env.advance(np.float32(action))
    changed = (env.render() != before).any(axis=2)
    assert changed[:55].any()  # above the middle: left
    assert not changed[65:].any()
