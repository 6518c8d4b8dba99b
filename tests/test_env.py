"""Our environments against stock gym-aloha, gymnasium's own checker, and small foreign ones."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import warnings
from collections.abc import Callable
from typing import Any

import gymnasium
import numpy as np
import pytest
from drawing import has_opengl, needs_opengl
from gymnasium import spaces
from gymnasium.utils.env_checker import check_env

from act_lightning.sim import opengl, register_envs
from act_lightning.sim.env import STAGES, AlohaEnv, EnvConfig, data_spec, make_env
from act_lightning.sim.render import Renderer

TASKS = ("insertion", "transfer_cube")
REST = np.array([0, -0.96, 1.16, 0, -0.3, 0, 0.1] * 2)


@pytest.fixture
def stock_env() -> Callable[[str], Any]:
    """Makes gym-aloha's environment, without the three pictures that it renders every step."""
    reason = "gym-aloha's own environment needs dm_control, not installed from Python 3.13 on"
    pytest.importorskip("dm_control", reason=reason)
    if has_opengl():
        # dm_control chooses when it is imported; it must be what this process already uses.
        os.environ.setdefault("MUJOCO_GL", opengl.find_backend())
    import gym_aloha.env

    def make(task: str) -> Any:
        env = gym_aloha.env.AlohaEnv(task)
        env.stock_render = env._env.physics.render
        env._env.physics.render = lambda **_: np.zeros((2, 2, 3), np.uint8)
        return env

    return make


def actions_within(env: AlohaEnv, num_steps: int, seed: int = 0) -> np.ndarray:
    """A random walk that also leaves the bounds."""
    steps = np.random.default_rng(seed).normal(0, 0.08, (num_steps, 14))
    return REST + steps.cumsum(axis=0)


# --- the same simulation as gym-aloha's ---


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_joint_positions_and_rewards_equal_gym_aloha(
    task: str, dtype: type, stock_env: Callable[[str], Any]
) -> None:
    env, stock = make_env(EnvConfig(task=task)), stock_env(task)
    observation, _ = env.reset(seed=7)
    stock.reset(seed=7)
    physics = stock._env.physics
    np.testing.assert_array_equal(env.data.qpos, physics.data.qpos)
    for action in actions_within(env, 150).astype(dtype):
        observation, reward, terminated, _, info = env.step(action)
        _, stock_reward, stock_terminated, _, _ = stock.step(action)
        np.testing.assert_array_equal(env.data.qpos, physics.data.qpos)
        np.testing.assert_array_equal(env.data.qvel, physics.data.qvel)
        assert (reward, terminated) == (stock_reward, stock_terminated)
        assert info["is_success"] == terminated
    expected = stock._env.task.get_qpos(physics).astype(np.float32)
    np.testing.assert_array_equal(observation["qpos"], expected)
    expected = stock._env.task.get_env_state(physics).astype(np.float32)
    np.testing.assert_array_equal(observation["env_state"], expected)


def all_touching(stock: Any, pairs: list[tuple[str, str]]) -> int:
    """gym-aloha's reward, were these shapes in contact."""

    class Contact:
        def __init__(self, pair: tuple[str, str]) -> None:
            self.geom1, self.geom2 = pair

    class Fake:
        def __init__(self) -> None:
            self.data, self.model = self, self
            self.contact, self.ncon = [Contact(pair) for pair in pairs], len(pairs)

        def id2name(self, name: str, kind: str) -> str:
            return name

    return stock._env.task.get_reward(Fake())


@pytest.mark.parametrize("task", TASKS)
def test_reward_rules_equal_gym_aloha_for_any_contacts(
    task: str, stock_env: Callable[[str], Any]
) -> None:
    env, stock = make_env(EnvConfig(task=task)), stock_env(task)
    fingers = [f"vx300s_{arm}/10_{arm}_gripper_finger" for arm in ("left", "right")]
    fingers.append("vx300s_right/10_left_gripper_finger")
    objects = ["red_box"] if task == "transfer_cube" else ["red_peg", "socket-1", "socket-4"]
    others = [*objects, *fingers, "table", *(["pin"] if task == "insertion" else [])]
    candidates = [(a, b) for a in objects for b in others if a != b]
    candidates += [(b, a) for a, b in candidates]
    rng = np.random.default_rng(0)
    seen = set()
    for _ in range(600):
        chosen = rng.random(len(candidates)) < rng.uniform(0, 0.4)
        pairs = [pair for pair, is_chosen in zip(candidates, chosen, strict=True) if is_chosen]
        ids = {(env.model.geom(a).id, env.model.geom(b).id) for a, b in pairs}
        reward = env._reward_rule(ids)
        assert reward == all_touching(stock, pairs), pairs
        seen.add(reward)
    assert seen == {0, 1, 2, 3, 4}
    assert len(STAGES) == 4


@pytest.mark.parametrize("seed", [0, 1, 12345, 2**32 - 1])
def test_worlds_equal_gym_aloha(seed: int) -> None:
    from gym_aloha.utils import sample_box_pose, sample_insertion_pose

    env = make_env(EnvConfig(task="insertion"))
    env.reset(seed=seed)
    np.testing.assert_array_equal(env.data.qpos[16:], np.concatenate(sample_insertion_pose(seed)))
    env = make_env(EnvConfig(task="transfer_cube"))
    env.reset(seed=seed)
    np.testing.assert_array_equal(env.data.qpos[16:], sample_box_pose(seed))


@needs_opengl
@pytest.mark.parametrize("task", TASKS)
def test_full_quality_equals_gym_aloha_pixel_by_pixel(
    task: str, stock_env: Callable[[str], Any]
) -> None:
    size = (120, 160)
    cameras = ("top", "left_wrist", "angle")
    config = EnvConfig(task=task, cameras=cameras, image_size=size, render_quality="full")
    env, stock = make_env(config), stock_env(task)
    env.reset(seed=3)
    stock.reset(seed=3)
    for action in actions_within(env, 20):
        env.advance(action)
        stock.step(action)
    images = env.observe()["images"]
    for camera, image in zip(cameras, images, strict=True):
        expected = stock.stock_render(height=size[0], width=size[1], camera_id=camera)
        np.testing.assert_array_equal(image, expected.transpose(2, 0, 1))
    np.testing.assert_array_equal(env.picture(size=size), stock.stock_render(*size, "top"))
    env.close()


# --- our own additions ---


@needs_opengl
def test_fast_quality_looks_like_full_without_shadows() -> None:
    pictures = {}
    for quality in ("fast", "full"):
        env = make_env(EnvConfig(cameras=("top",), render_quality=quality))
        env.model.light_castshadow[:] = 0
        env.reset(seed=3)
        pictures[quality] = env.observe()["images"][0].astype(float)
        env.close()
    difference = np.abs(pictures["fast"] - pictures["full"])
    assert difference.mean() < 2.0
    assert (difference.max(axis=0) > 40).mean() < 0.01
    assert pictures["fast"].std() > 20


@needs_opengl
def test_supersampling_averages_two_by_two_pixels() -> None:
    env = make_env(EnvConfig(image_size=(48, 64), cameras=("right_wrist",)))
    env.reset(seed=0)
    averaged = env.observe()["images"][0]
    renderer = env._renderer((48, 64))
    renderer._gl.context.make_current()
    import mujoco

    pixels = np.empty((96, 128, 3), np.uint8)
    mujoco.mjr_readPixels(pixels, None, renderer._viewport, renderer._gl.drawing)
    sums = pixels[::-1].reshape(48, 2, 64, 2, 3).astype(int).sum(axis=(1, 3))
    np.testing.assert_array_equal(averaged, ((sums + 2) // 4).transpose(2, 0, 1))
    env.close()


@needs_opengl
def test_only_what_is_asked_for_is_rendered(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []
    draw = Renderer.draw
    monkeypatch.setattr(Renderer, "draw", lambda *args: (drawn.append(args[2]), draw(*args))[1])
    env = make_env(EnvConfig(cameras=("right_wrist", "top"), image_size=(24, 32)))
    env.reset(seed=0)
    drawn.clear()
    env.advance(REST)
    assert drawn == []
    assert env.observe()["images"].shape == (2, 3, 24, 32)
    assert [env.model.camera(camera).name for camera in drawn] == ["right_wrist", "top"]
    assert env.render().shape == (480, 640, 3)
    env.close()
    env.close()
    assert "images" not in make_env(EnvConfig()).reset(seed=0)[0]


@needs_opengl
def test_instances_share_no_state() -> None:
    config = EnvConfig(cameras=("top",), image_size=(24, 32))
    actions = actions_within(make_env(config), 10)

    def play(env: AlohaEnv, seed: int) -> list[np.ndarray]:
        env.reset(seed=seed)
        return [env.step(action)[0]["images"] for action in actions]

    alone = play(make_env(config), 4)
    first, second = make_env(config), make_env(EnvConfig(task="insertion", render_quality="full"))
    first.reset(seed=4)
    for action, expected in zip(actions, alone, strict=True):
        second.reset(seed=9)
        second.step(action)
        second.picture(size=(24, 32))
        np.testing.assert_array_equal(first.step(action)[0]["images"], expected)
    second.close()
    np.testing.assert_array_equal(first.observe()["images"], alone[-1])
    first.close()


def test_object_ranges_and_yaw() -> None:
    ranges = {"peg": ((0.0, 0.05), (0.3, 0.35))}
    env = make_env(EnvConfig(object_ranges=ranges, object_yaw=0.5))
    default = make_env(EnvConfig())
    poses = np.stack([env.sample_object_poses(seed) for seed in range(50)])
    assert ((poses[:, 0, 0] >= 0) & (poses[:, 0, 0] <= 0.05)).all()
    assert ((poses[:, 0, 1] >= 0.3) & (poses[:, 0, 1] <= 0.35)).all()
    np.testing.assert_array_equal(poses[3, 1, :3], default.sample_object_poses(3)[1, :3])
    np.testing.assert_allclose(np.linalg.norm(poses[..., 3:], axis=-1), 1)
    yaw = 2 * np.arctan2(poses[..., 6], poses[..., 3])
    assert np.abs(yaw).max() <= 0.5
    assert yaw.std() > 0.2


def test_explicit_object_poses() -> None:
    env = make_env(EnvConfig(task="transfer_cube"))
    pose = np.array([0.1, 0.55, 0.05, 0, 0, 0, 1])
    observation, _ = env.reset(options={"object_poses": pose})
    np.testing.assert_array_equal(observation["env_state"], pose.astype(np.float32))
    with pytest.raises(ValueError, match=r"shape \(3,\)"):
        env.reset(options={"object_poses": pose[:3]})
    with pytest.raises(ValueError, match="length 1"):
        env.reset(options={"object_poses": pose * 2})


def test_reset_without_seed_continues_the_seeded_generator() -> None:
    worlds = []
    for _ in range(2):
        env = make_env(EnvConfig())
        env.reset(seed=5)
        worlds.append([env.reset()[0]["env_state"] for _ in range(2)])
    np.testing.assert_array_equal(worlds[0], worlds[1])
    assert (worlds[0][0] != worlds[0][1]).any()


def test_action_bounds_are_the_actuators() -> None:
    env = make_env(EnvConfig())
    assert env.action_space.high[6] == env.action_space.high[13] == 1
    assert env.action_space.low[6] == env.action_space.low[13] == 0
    np.testing.assert_allclose(env.action_space.high[1], 1.25664)
    ends = []
    for action in (env.action_space.high, env.action_space.high + 1):
        env.reset(seed=0)
        for _ in range(5):
            env.advance(action)
        ends.append(env.data.qpos.copy())
    np.testing.assert_allclose(ends[0], ends[1], atol=1e-6)


def test_stages_name_the_rewards_before_success() -> None:
    for task in TASKS:
        assert make_env(EnvConfig(task=task)).stages == ("touched", "lifted", "contact")


def test_unperturbed_worlds_do_not_depend_on_how_the_poses_came() -> None:
    drawn, given = make_env(EnvConfig()), make_env(EnvConfig())
    drawn.reset(seed=3)
    given.reset(options={"object_poses": drawn.sample_object_poses(3)})
    for action in actions_within(drawn, 20):
        one, other = drawn.step(action)[0], given.step(action)[0]
        np.testing.assert_array_equal(drawn.data.qpos, given.data.qpos)
        np.testing.assert_array_equal(one["qpos"], other["qpos"])


def test_truncates_at_max_episode_steps() -> None:
    env = make_env(EnvConfig(max_episode_steps=3))
    for _ in range(2):
        env.reset(seed=0)
        assert [env.advance(REST)[1:] for _ in range(3)] == [(False, False)] * 2 + [(False, True)]


def test_bad_input_is_named() -> None:
    env = make_env(EnvConfig())
    env.reset(seed=0)
    with pytest.raises(ValueError, match=r"shape \(7,\)"):
        env.step(np.zeros(7))
    broken = REST.copy()
    broken[4] = np.nan
    with pytest.raises(ValueError, match=r"NaN or infinity at \[4\]"):
        env.step(broken)
    with pytest.raises(ValueError, match="no camera 'wrist'; it has .*left_wrist"):
        make_env(EnvConfig(cameras=("wrist",)))
    with pytest.raises(ValueError, match="seed=-1|seed"):
        env.sample_object_poses(-1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"task": "insert"}, "'insert' is none of insertion, transfer_cube"),
        ({"max_episode_steps": 0}, "max_episode_steps=0"),
        ({"image_size": (0, 10)}, "image_size"),
        ({"render_quality": "best"}, "render_quality='best'"),
        ({"cameras": ("top", "top")}, "twice"),
        ({"object_ranges": {"cube": ((0, 1), (0, 1))}}, "'cube'; insertion has peg, socket"),
        ({"object_ranges": {"peg": ((1, 0), (0, 1))}}, "low first"),
        ({"object_yaw": -1}, "object_yaw"),
        ({"observation_keys": {"qpos": "a"}}, "not for insertion"),
    ],
)
def test_config_is_checked(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EnvConfig(**settings)


def test_config_pickles() -> None:
    config = EnvConfig(cameras=("top",), object_ranges={"peg": ((0, 1), (0, 1))})
    assert pickle.loads(pickle.dumps(config)) == config


def test_data_spec() -> None:
    spec = data_spec(EnvConfig(task="transfer_cube", cameras=("top",), image_size=(24, 32)))
    assert (spec.dim_qpos, spec.dim_action, spec.dim_env_state, spec.fps) == (14, 14, 7, 50)
    assert (spec.cameras, spec.image_size) == (("top",), (24, 32))
    spec = data_spec(EnvConfig(env_state=False))
    assert (spec.dim_env_state, spec.image_size) == (0, (0, 0))


# --- gymnasium ---


@needs_opengl
@pytest.mark.parametrize("task", TASKS)
def test_passes_gymnasiums_checker(task: str) -> None:
    register_envs()
    ids = {"insertion": "AlohaInsertion-v0", "transfer_cube": "AlohaTransferCube-v0"}
    settings: dict[str, Any] = {"cameras": ("top", "left_wrist"), "image_size": (24, 32)}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # Advice, which true bounds cannot follow.
        warnings.filterwarnings("ignore", message=".*(infinity|symmetric and normalized).*")
        made = gymnasium.make(f"act_lightning/{ids[task]}", max_episode_steps=None, **settings)
        check_env(made.unwrapped)
        made.close()
        env = make_env(EnvConfig(task=task, **settings))
        check_env(env, skip_render_check=True)
        env.close()


@needs_opengl
def test_interpreter_exit_is_silent_without_close() -> None:
    code = """
import sys
from act_lightning.sim.env import EnvConfig, make_env
assert "torch" not in sys.modules and "dm_control" not in sys.modules
envs = [make_env(EnvConfig(cameras=("top",), image_size=(24, 32))) for _ in range(2)]
for env in envs:
    env.reset(seed=0)
env.render()
envs.append(env)
"""
    command = [sys.executable, "-W", "error::DeprecationWarning:act_lightning", "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


# --- finding OpenGL ---


@pytest.fixture
def bare_machine(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """No OpenGL, nothing set; every test asks afresh."""
    opengl.find_backend.cache_clear()
    for name in ("MUJOCO_GL", "PYOPENGL_PLATFORM"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(opengl, "_GPU_FILES", ())
    monkeypatch.setattr(opengl, "_egl_works", lambda: False)
    monkeypatch.setattr(opengl.ctypes.util, "find_library", lambda name: None)
    yield monkeypatch
    opengl.find_backend.cache_clear()


def test_says_what_to_install(bare_machine: pytest.MonkeyPatch, capsys: Any) -> None:
    with pytest.raises(opengl.OpenGLNotFoundError, match="apt-get install libosmesa6"):
        opengl.find_backend()
    assert opengl.main() == 1
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_prefers_egl_on_a_gpu_then_osmesa(bare_machine: pytest.MonkeyPatch) -> None:
    bare_machine.setattr(opengl, "_egl_works", lambda: True)
    assert opengl._choose() == "egl"
    bare_machine.setattr(opengl.ctypes.util, "find_library", lambda name: "lib.so")
    assert opengl._choose() == "osmesa"
    bare_machine.setattr(opengl, "_GPU_FILES", ("/",))
    assert opengl._choose() == "egl"


def test_mujoco_gl_decides(bare_machine: pytest.MonkeyPatch) -> None:
    bare_machine.setenv("PYOPENGL_PLATFORM", "osmesa")
    assert opengl.find_backend() == "osmesa"
    opengl.find_backend.cache_clear()
    bare_machine.setenv("MUJOCO_GL", "EGL")
    assert opengl.find_backend() == "egl"
    opengl.find_backend.cache_clear()
    bare_machine.setenv("MUJOCO_GL", "off")
    with pytest.raises(opengl.OpenGLNotFoundError, match="MUJOCO_GL=off"):
        opengl.find_backend()


# --- foreign environments ---


class Arena(gymnasium.Env[dict[str, Any], np.ndarray]):
    """A foreign environment with nested observations, pictures and a 2-D action."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}  # noqa: RUF012
    observation_space = spaces.Dict(
        {
            "agent_pos": spaces.Box(-1, 1, (2, 1)),
            "environment_state": spaces.Box(-1, 1, (3,)),
            "pixels": spaces.Dict({"top": spaces.Box(0, 255, (8, 12, 3), np.uint8)}),
            "gray": spaces.Box(0, 255, (8, 12, 1), np.uint8),
        }
    )
    action_space = spaces.Box(-1, 1, (1, 2), np.float64)

    def __init__(self, render_mode: str | None = None, success: bool = True) -> None:
        self.render_mode = render_mode
        self.success = success

    def _observe(self) -> dict[str, Any]:
        picture = np.arange(8 * 12 * 3).reshape(8, 12, 3).astype(np.uint8)
        return {
            "agent_pos": np.full((2, 1), self.count / 10, np.float32),
            "environment_state": np.full(3, 0.5, np.float32),
            "pixels": {"top": picture},
            "gray": picture[..., :1],
        }

    def reset(self, *, seed: Any = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.count = 0
        return self._observe(), {}

    def step(self, action: np.ndarray) -> Any:
        assert action.shape == (1, 2)
        assert action.dtype == np.float64
        assert np.abs(action).max() <= 1
        self.count += 1
        done = self.count == 4
        return self._observe(), 1.0, done, False, {"is_success": self.success and done}


KEYS = {
    "qpos": "agent_pos",
    "env_state": "environment_state",
    "images.top": "pixels.top",
    "images.gray": "gray",
}


@pytest.fixture
def arena() -> Any:
    gymnasium.register("Arena-v0", entry_point=Arena)
    yield "Arena-v0"
    del gymnasium.registry["Arena-v0"]


def test_foreign_environment_is_mapped(arena: str) -> None:
    config = EnvConfig(task=arena, observation_keys=KEYS, cameras=("top",), image_size=(4, 6))
    env = make_env(config)
    assert pickle.loads(pickle.dumps(config)) == config
    observation, _ = env.reset(seed=0)
    assert env.observation_space.contains(observation)
    np.testing.assert_array_equal(observation["env_state"], [0.5] * 3)
    picture = np.arange(8 * 12 * 3).reshape(8, 12, 3).astype(np.uint8)
    averages = picture.reshape(4, 2, 6, 2, 3).mean(axis=(1, 3)).transpose(2, 0, 1)
    assert np.abs(observation["images"][0] - averages).max() <= 0.5
    ends = [env.advance(np.array([3.0, 0.0])) for _ in range(4)]
    assert [terminated for _, terminated, _ in ends] == [False] * 3 + [True]
    assert env.is_success
    np.testing.assert_allclose(env.observe()["qpos"], [0.4, 0.4])
    spec = data_spec(config)
    assert (spec.dim_qpos, spec.dim_action, spec.dim_env_state, spec.fps) == (2, 2, 3, 10)


def test_foreign_environment_passes_the_checker(arena: str) -> None:
    config = EnvConfig(task=arena, observation_keys=KEYS, cameras=("top",))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        check_env(make_env(config), skip_render_check=True)


def test_foreign_failure_is_not_success(arena: str) -> None:
    config = EnvConfig(task=arena, observation_keys=KEYS, make_kwargs={"success": False})
    env = make_env(config)
    env.reset(seed=0)
    infos = [env.step(np.zeros(2))[-1]["is_success"] for _ in range(4)]
    assert infos == [False] * 4


def test_plain_observations_and_discrete_actions() -> None:
    config = EnvConfig(
        task="CartPole-v1",
        observation_keys={"qpos": ""},
        success_key="truncated",
        max_episode_steps=5,
    )
    env, plain = make_env(config), gymnasium.make("CartPole-v1")
    assert env.action_space == spaces.Box(0, 1, (1,), np.float32)
    observation, _ = env.reset(seed=3)
    np.testing.assert_array_equal(observation["qpos"], plain.reset(seed=3)[0])
    for step, action in enumerate([0.1, 0.9, 0.6, 0.4, 0.0]):
        observation, _, _, truncated, info = env.step(np.array([action]))
        np.testing.assert_array_equal(observation["qpos"], plain.step(round(action))[0])
        assert truncated == info["is_success"] == (step == 4)
    env.close()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"observation_keys": {"qpos": "nothing"}}, "qpos='nothing' leads to no array"),
        ({"observation_keys": {"qpos": "pixels"}}, "leads to no array"),
        ({"cameras": ("wrist",)}, "no camera 'wrist'; .*'top', 'gray'"),
        ({"cameras": ("gray",)}, r"images.gray is uint8 of shape \(8, 12, 1\)"),
        ({"task": "Nowhere-v0"}, "'Nowhere-v0' cannot be made"),
        ({"make_kwargs": {"colour": 1}}, "cannot be made"),
    ],
)
def test_foreign_mapping_is_checked(arena: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_env(EnvConfig(**({"task": arena, "observation_keys": KEYS} | settings)))


def test_foreign_bad_actions_and_missing_success(arena: str) -> None:
    env = make_env(EnvConfig(task=arena, observation_keys=KEYS, success_key="won"))
    env.reset(seed=0)
    with pytest.raises(ValueError, match=r"shape \(2,\)"):
        env.step(np.zeros(3))
    with pytest.raises(ValueError, match="finite"):
        env.step(np.array([0, np.nan]))
    for _ in range(3):
        env.step(np.zeros(2))
    with pytest.raises(ValueError, match=r"no 'won'.*'is_success'"):
        env.step(np.zeros(2))
