"""The recorder with the real simulator: successes only, exact continuation, clear refusals."""

import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from s3_server import S3Server

from act_lightning.data.layout import StoreMismatchError
from act_lightning.data.store import Store
from act_lightning.sim.config import FIRST_EVALUATION_SEED, EnvConfig
from act_lightning.sim.env import make_env
from act_lightning.sim.expert import ExpertConfig
from act_lightning.sim.record import RecordConfig, record

ENV = EnvConfig(task="transfer_cube", env_state=True)
NOISY = ExpertConfig(action_noise=0.02)


def config(path, episodes, **changes):
    return RecordConfig(path=str(path), episodes=episodes, expert=NOISY, **changes)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    path = tmp_path_factory.mktemp("stores") / "whole.zarr"
    record(config(path, 3), ENV, num_workers=2)
    return path


def test_store_says_what_made_it(whole):
    store = Store.open(whole)
    assert store.num_episodes == 3
    assert store.episode_ids.tolist() == [0, 1, 2]
    settings = store.provenance["settings"]
    assert settings["expert"]["action_noise"] == 0.02
    assert settings["env"]["task"] == "transfer_cube"
    assert {"act_lightning", "mujoco", "gym-aloha"} <= set(store.provenance["versions"])


def test_labels_are_the_experts_own_actions_not_the_noise(whole):
    """Played again here: the store holds what the expert meant, not what the arms were sent."""
    store = Store.open(whole)
    env, expert = make_env(ENV), NOISY.build(ENV.task)
    observation, _ = env.reset(seed=0)
    expert.reset(env, 0)
    disturbance = 0.0
    for step in range(store.episode_ends[0]):
        action = expert.act()
        executed = expert.perturb(action)
        assert np.array_equal(store.qpos[step], observation["qpos"])
        assert np.array_equal(store.actions[step], action)
        disturbance = max(disturbance, np.abs(executed - action).max())
        env.unwrapped.advance(executed)
        observation = env.unwrapped.observe()
    assert disturbance > 0.01


def test_continued_recording_equals_an_uninterrupted_one(whole, tmp_path):
    path = tmp_path / "a.zarr"
    record(config(path, 1), ENV, num_workers=1)
    record(config(path, 3), ENV, num_workers=2)
    one, other = Store.open(whole), Store.open(path)
    assert np.array_equal(one.episode_ends, other.episode_ends)
    for name in ("qpos", "actions", "env_state"):
        assert np.array_equal(getattr(one, name), getattr(other, name)), name


def test_complete_store_is_left_alone(whole):
    before = {file: file.stat().st_mtime_ns for file in whole.rglob("*")}
    start = time.monotonic()
    record(config(whole, 3), ENV)
    assert time.monotonic() - start < 2.0
    assert {file: file.stat().st_mtime_ns for file in whole.rglob("*")} == before


@pytest.mark.parametrize(
    ("changes", "env", "setting"),
    [
        ({"expert": ExpertConfig(action_noise=0.01)}, {}, "action_noise is 0.02 there and 0.01"),
        ({"hold_steps": 3}, {}, "hold_steps"),
        ({}, {"object_yaw": 0.1}, "object_yaw"),
        ({"episodes": 2}, {}, "demonstrations.episodes=2"),
    ],
)
def test_other_settings_are_refused_by_name(whole, changes, env, setting):
    settings = {"path": str(whole), "episodes": 3, "expert": NOISY} | changes
    with pytest.raises(StoreMismatchError, match=setting):
        record(RecordConfig(**settings), EnvConfig(task="transfer_cube", env_state=True, **env))


def test_recorded_store_in_an_object_store_is_checked_too(whole, monkeypatch, capsys):
    with S3Server() as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        url = server.upload(whole, "demos", "whole.zarr")
        record(config(url, 3), ENV)
        assert "3 demonstrations, taken as they are" in capsys.readouterr().out
        with pytest.raises(StoreMismatchError, match="demonstrations.episodes=4; set it to 3"):
            record(config(url, 4), ENV)
        with pytest.raises(StoreMismatchError, match="hold_steps"):
            record(config(url, 3, hold_steps=3), ENV)


def test_an_expert_that_fails_stops_the_recording(tmp_path):
    hopeless = EnvConfig(task="insertion", max_episode_steps=20)
    with pytest.raises(RuntimeError, match="20 of 20 demonstrations failed"):
        record(RecordConfig(path=str(tmp_path / "a.zarr"), episodes=5), hopeless, num_workers=2)
    store = Store.open(tmp_path / "a.zarr", allow_incomplete=True)
    assert store.num_episodes == 0
    assert len(store.skipped) == 20


def test_demonstrations_never_use_evaluation_worlds():
    with pytest.raises(ValueError, match="evaluation worlds"):
        RecordConfig(first_seed=FIRST_EVALUATION_SEED)


def test_ctrl_c_keeps_what_was_complete(tmp_path):
    path = tmp_path / "a.zarr"
    script = (
        "import sys; from act_lightning.main import main; sys.exit(main(["
        f"'record', '--config', 'experiments/base.yaml', '--demonstrations.path={path}', "
        "'--demonstrations.episodes=500', '--model.net={}']))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script], stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    deadline = time.monotonic() + 100
    while time.monotonic() < deadline:
        time.sleep(0.2)
        if path.exists() and Store.open(path, allow_incomplete=True).num_episodes >= 2:
            break
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 1
    assert "interrupted" in errors
    assert "Traceback" not in errors
    store = Store.open(path, allow_incomplete=True)
    assert store.num_episodes >= 2
    with pytest.raises(ValueError, match="make data"):
        Store.open(path)
