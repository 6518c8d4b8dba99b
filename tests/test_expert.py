"""The demonstrators succeed, repeat themselves exactly, and are smooth enough to be imitated."""

from __future__ import annotations

import multiprocessing
from typing import Any

import mujoco
import numpy as np
import pytest

from act_lightning.sim.env import AlohaEnv, EnvConfig
from act_lightning.sim.expert import ExpertConfig
from act_lightning.sim.kinematics import (
    Arms,
    Pose,
    min_jerk,
    rotation_from_vector,
    rotation_vector,
)

TASKS = ("insertion", "transfer_cube")


def play(
    task: str, seed: int, config: ExpertConfig, max_steps: int = 300, **env_settings: Any
) -> dict[str, Any]:
    """One episode, ended by success: labels, executed actions, tracking errors and reward."""
    env = AlohaEnv(EnvConfig(task=task, max_episode_steps=max_steps, **env_settings))
    env.reset(seed=seed)
    expert = config.build(task)
    expert.reset(env, seed)
    labels, executed, errors, success = [], [], [], False
    for _ in range(max_steps):
        labels.append(expert.act())
        errors.append(np.abs(expert.tracking_error).max())
        executed.append(expert.perturb(labels[-1]))
        reward, success, _ = env.advance(executed[-1])
        if success:
            break
    return {
        "success": success,
        "labels": np.stack(labels),
        "executed": np.stack(executed),
        "errors": np.stack(errors),
    }


def succeeds(arguments: tuple[str, int, ExpertConfig]) -> bool:
    task, seed, config = arguments
    return bool(play(task, seed, config, max_steps=config.num_steps)["success"])


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize(
    "config",
    [
        ExpertConfig(),
        ExpertConfig(num_steps=200),
        ExpertConfig(style="style"),
        ExpertConfig(action_noise=0.02),
    ],
    ids=["plain", "fast", "style", "noise"],
)
def test_succeeds(task: str, config: ExpertConfig) -> None:
    assert succeeds((task, 3, config))


@pytest.mark.parametrize("task", TASKS)
def test_turned_objects_are_taken_too(task: str) -> None:
    assert play(task, 5, ExpertConfig(), object_yaw=0.4)["success"]


@pytest.mark.parametrize("task", TASKS)
def test_smooth_and_on_its_way(task: str) -> None:
    episode = play(task, 1, ExpertConfig())
    arms = np.delete(episode["labels"], [6, 13], axis=1)
    assert np.abs(np.diff(arms, axis=0)).max() < 0.05  # rad in a step
    assert np.abs(np.diff(arms, n=2, axis=0)).max() < 0.02  # no chattering
    assert episode["errors"].mean() < 0.01
    assert len(arms) < 0.85 * 300  # success leaves a slower policy time


def test_the_same_seed_gives_the_same_episode() -> None:
    config = ExpertConfig(style="style", action_noise=0.02)
    first, again = (play("insertion", 7, config) for _ in range(2))
    np.testing.assert_array_equal(first["executed"], again["executed"])
    other = play("insertion", 7, ExpertConfig(action_noise=0.02))
    length = min(len(first["labels"]), len(other["labels"]))
    assert not np.array_equal(first["labels"][:length], other["labels"][:length])


def test_reset_forgets_the_last_episode() -> None:
    env = AlohaEnv(EnvConfig(task="insertion"))
    expert = ExpertConfig(style="style", action_noise=0.03).build("insertion")
    runs = []
    for _ in range(2):
        env.reset(seed=2)
        expert.reset(env, 2)
        actions = []
        for _ in range(160):
            actions.append(expert.perturb(expert.act()))
            env.advance(actions[-1])
        runs.append(np.stack(actions))
    np.testing.assert_array_equal(*runs)


def test_labels_stay_clean_and_noise_has_the_asked_size() -> None:
    calm = play("insertion", 4, ExpertConfig())
    np.testing.assert_array_equal(calm["labels"], calm["executed"])
    noise = []
    env = AlohaEnv(EnvConfig(task="insertion"))
    env.reset(seed=0)
    for seed in range(4):
        expert = ExpertConfig(action_noise=0.02).build("insertion")
        expert.reset(env, seed)
        label = expert.act()
        kept = label.copy()
        for _ in range(800):  # the arms never move on: neither carrying nor precise
            expert._num_acts += 1
            noise.append(expert.perturb(label) - label)
        np.testing.assert_array_equal(label, kept)
    noise = np.stack(noise)
    assert not noise[:, [6, 13]].any()
    arms = np.delete(noise, [6, 13], axis=1)
    # Bursts are on half the time, so the variance is halved.
    assert arms.std() == pytest.approx(0.02 / np.sqrt(2), rel=0.15)


def test_the_label_pulls_back_to_the_way() -> None:
    env = AlohaEnv(EnvConfig(task="insertion"))
    actions = []
    for push in (0.0, 0.01):
        env.reset(seed=0)
        expert = ExpertConfig().build("insertion")
        expert.reset(env, 0)
        env.data.qpos[0] += push
        actions.append(expert.act()[0])
    assert actions[1] < actions[0] - 0.01


def test_clean_action_depends_on_the_present_only() -> None:
    """An expert at the same time, place and world acts alike, whatever was executed before."""
    env = AlohaEnv(EnvConfig(task="insertion"))
    env.reset(seed=0)
    first, second = (ExpertConfig().build("insertion") for _ in range(2))
    first.reset(env, 0)
    second.reset(env, 0)
    for _ in range(60):
        action = first.act()
        env.advance(action)
    second._time = first._time
    np.testing.assert_array_equal(first.act(), second.act())


@pytest.mark.parametrize("task", TASKS)
def test_objects_stay_in_hand_after_success(task: str) -> None:
    env = AlohaEnv(EnvConfig(task=task))
    env.reset(seed=6)
    expert = ExpertConfig().build(task)
    expert.reset(env, 6)
    rewards = [env.advance(expert.act())[0] for _ in range(290)]
    reached = rewards.index(4)
    assert reached < 255
    assert min(rewards[reached:]) >= 2  # nothing falls; a contact may flicker for a step
    assert np.mean(np.array(rewards[reached:]) == 4) > 0.9


def test_kinematics_match_mujoco_and_invert() -> None:
    env = AlohaEnv(EnvConfig(task="insertion"))
    arms, rng = Arms(env.model), np.random.default_rng(0)
    data = mujoco.MjData(env.model)
    for _ in range(50):
        joints = np.array([0.0, -0.6, 1.1, 0.0, 0.6, 0.0]) + rng.uniform(-0.4, 0.4, (2, 6))
        data.qpos[[[*range(6)], [*range(8, 14)]]] = joints
        mujoco.mj_kinematics(env.model, data)
        pinch = arms.pinch(joints)
        for arm, name in enumerate(("left", "right")):
            link = data.body(f"vx300s_{name}/gripper_link")
            rotation = link.xmat.reshape(3, 3)
            np.testing.assert_allclose(pinch.rotation[arm], rotation, atol=1e-9)
            np.testing.assert_allclose(
                pinch.position[arm], link.xpos + 0.15 * rotation[:, 0], atol=1e-9
            )
        np.testing.assert_allclose(arms.solve(pinch, np.ones(2)), joints, atol=1e-7)


def test_small_mathematics() -> None:
    rng = np.random.default_rng(0)
    vectors = rng.uniform(-1.0, 1.0, (20, 3))
    vectors[0] = 0.0
    rotations = rotation_from_vector(vectors)
    np.testing.assert_allclose(rotation_vector(rotations), vectors, atol=1e-9)
    pose = Pose(rotation=rotations, position=rng.normal(size=(20, 3)))
    identity = pose @ pose.inverse()
    np.testing.assert_allclose(identity.rotation, np.broadcast_to(np.eye(3), (20, 3, 3)), atol=1e-9)
    np.testing.assert_allclose(identity.position, 0.0, atol=1e-9)
    assert min_jerk(np.array([-1.0, 0.0, 5.0, 10.0, 11.0]), 0.0, 10.0).tolist() == [0, 0, 0.5, 1, 1]


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ({"style": "wild"}, "style='wild'"),
        ({"num_steps": 20}, "num_steps=20"),
        ({"feedback": 9.0}, "feedback=9.0"),
        ({"action_noise": -0.1}, "action_noise=-0.1"),
    ],
)
def test_bad_settings_are_named(settings: dict[str, Any], names: str) -> None:
    with pytest.raises(ValueError, match=names):
        ExpertConfig(**settings)


def test_a_task_without_an_expert_lists_those_with_one() -> None:
    with pytest.raises(ValueError, match="CartPole.*insertion, transfer_cube.*class_path"):
        ExpertConfig().build("CartPole-v1")


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize(
    ("style", "num_steps", "wanted"), [("plain", 300, 198), ("style", 400, 190)]
)
def test_success_over_200_worlds(task: str, style: Any, num_steps: int, wanted: int) -> None:
    config = ExpertConfig(style=style, num_steps=num_steps)
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        results = pool.map(succeeds, [(task, seed, config) for seed in range(200)])
    assert sum(results) >= wanted
