"""Held-out worlds: object places, perturbations, and what of them a store compares."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium
import mujoco
import numpy as np
import pytest
from drawing import needs_opengl
from gymnasium import spaces
from scipy.spatial.transform import Rotation

from act_lightning.data.layout import StoreMismatchError
from act_lightning.data.writer import StoreWriter, check_settings
from act_lightning.sim.config import FIRST_EVALUATION_SEED, EnvConfig, Perturbation
from act_lightning.sim.env import data_spec, make_env
from act_lightning.sim.poses import CLEARANCE, object_ranges, sample_poses
from act_lightning.sim.record import RecordConfig, settings
from act_lightning.sim.splits import FAR, GRID, SPLITS, object_poses, split_env

REST = np.array([0, -0.96, 1.16, 0, -0.3, 0, 0.1] * 2)
FIRST = FIRST_EVALUATION_SEED


def perturbed(task: str = "insertion", cameras: tuple[str, ...] = (), **changes: Any) -> EnvConfig:
    return EnvConfig(
        task=task, cameras=cameras, image_size=(24, 32), perturbation=Perturbation(**changes)
    )


# --- where objects stand ---


@pytest.mark.parametrize("task", ["insertion", "transfer_cube"])
def test_far_objects_are_all_outside_their_ranges_but_near(task: str) -> None:
    config = split_env(EnvConfig(task=task), "far")
    places = object_poses(config, range(FIRST, FIRST + 500))
    for name, bounds in object_ranges(config).items():
        low, high = np.array(bounds).T
        xy = places[name]
        beyond = np.maximum(low - xy, xy - high).max(axis=1)
        assert beyond.min() > 0
        assert 0.95 * FAR < beyond.max() <= FAR
        # Evenly over the frame around the range: each side gets its share of the area.
        frame = (high - low + 2 * FAR).prod() - (high - low).prod()
        share = FAR * (high - low + 2 * FAR)[::-1] / frame
        for side in (xy < low, xy > high):
            np.testing.assert_allclose(side.mean(axis=0), share, atol=0.07)
    if len(places) > 1:
        apart = np.linalg.norm(places["peg"] - places["socket"], axis=1)
        assert apart.min() >= CLEARANCE


def test_far_keeps_the_ranges_of_the_run() -> None:
    ranges = {"cube": ((-0.3, -0.29), (0.7, 0.71))}
    config = split_env(EnvConfig(task="transfer_cube", object_ranges=ranges), "far")
    xy = object_poses(config, range(100))["cube"]
    assert np.abs(xy - [-0.295, 0.705]).max() <= 0.005 + FAR
    assert np.abs(xy - [-0.295, 0.705]).max(axis=1).min() > 0.005


def test_objects_never_start_inside_each_other() -> None:
    ranges = {"peg": ((0.0, 0.01), (0.5, 0.51)), "socket": ((-0.01, 0.0), (0.5, 0.51))}
    config = EnvConfig(object_ranges=ranges, object_beyond=0.1)
    places = object_poses(config, range(50))
    assert np.linalg.norm(places["peg"] - places["socket"], axis=1).min() >= CLEARANCE
    config = replace(config, object_beyond=0.01)
    with pytest.raises(ValueError, match=r"object_beyond=0\.01: no places .* farther apart"):
        sample_poses(config, 0)


@pytest.mark.parametrize("num_cells", [1, 3, 8])
@pytest.mark.parametrize("round_", [-2, 0, 1, 5])
def test_each_round_of_the_grid_visits_every_cell_of_every_object_once(
    num_cells: int, round_: int
) -> None:
    config = EnvConfig(object_grid=num_cells)
    start = FIRST + round_ * num_cells**2
    places = object_poses(config, range(start, start + num_cells**2))
    for name, bounds in object_ranges(config).items():
        sides = [
            low + (np.arange(num_cells) + 0.5) * (high - low) / num_cells for low, high in bounds
        ]
        centres = np.stack(np.meshgrid(*sides, indexing="ij"), axis=-1).reshape(-1, 2)
        order = np.lexsort(places[name].round(9).T[::-1])
        np.testing.assert_allclose(places[name][order], centres, atol=1e-12)


def test_rounds_of_the_grid_pair_objects_differently() -> None:
    config = split_env(EnvConfig(), "grid")
    cells = GRID**2
    places = object_poses(config, range(FIRST, FIRST + 2 * cells))
    pairs = np.concatenate([places["peg"], places["socket"]], axis=1).round(9)
    first, second = ({tuple(pair) for pair in half} for half in (pairs[:cells], pairs[cells:]))
    assert len(first & second) < cells / 8
    assert (places["peg"][:cells] != places["peg"][cells:]).any()
    # Within a round, one object's cell says nothing about the other's.
    assert abs(np.corrcoef(pairs[:cells, 1], pairs[:cells, 3])[0, 1]) < 0.4


def test_yaw_and_height_are_those_of_the_standard_world() -> None:
    config = EnvConfig(object_yaw=0.5)
    standard = sample_poses(config, 3)
    for split in ("far", "grid"):
        poses = sample_poses(split_env(config, split), 3)
        np.testing.assert_array_equal(poses[:, 2:], standard[:, 2:])
        assert (poses[:, :2] != standard[:, :2]).any(axis=1).all()


# --- perturbations ---


def play(config: EnvConfig, seed: int, num_steps: int = 12) -> list[np.ndarray]:
    env = make_env(config)
    env.reset(seed=seed)
    actions = REST + np.random.default_rng(0).normal(0, 0.05, (num_steps, 14)).cumsum(axis=0)
    states = []
    for action in actions:
        env.advance(action)
        states.append(env.data.qpos.copy())
    return states


@pytest.mark.parametrize("delay", [1, 3])
def test_delayed_actions_are_the_same_actions_later(delay: int) -> None:
    prompt, late = make_env(EnvConfig()), make_env(perturbed(action_delay=delay))
    actions = REST + np.random.default_rng(0).normal(0, 0.05, (15, 14)).cumsum(axis=0)
    # The start pose's command, as an environment that was reset holds it.
    prompt.reset(seed=5)
    held = prompt.data.ctrl.copy()
    for _ in range(2):  # The second episode must not see the first one's actions.
        late.reset(seed=5)
        prompt.reset(seed=5)
        for step, action in enumerate(actions):
            late.advance(action)
            if step >= delay:
                prompt.advance(actions[step - delay])
            else:
                np.testing.assert_array_equal(late.data.ctrl, held)
                mujoco.mj_step2(prompt.model, prompt.data)
                mujoco.mj_step(prompt.model, prompt.data, prompt._num_substeps - 1)
                mujoco.mj_step1(prompt.model, prompt.data)
            np.testing.assert_array_equal(late.data.qpos, prompt.data.qpos)


def test_noise_is_of_the_asked_size_and_leaves_the_simulation_alone() -> None:
    config = perturbed(qpos_noise=0.01, env_state_noise=0.002)
    clean, noisy = make_env(EnvConfig()), make_env(config)
    differences: dict[str, list[np.ndarray]] = {"qpos": [], "env_state": []}
    for seed in range(3):
        pairs = [(clean.reset(seed=seed)[0], noisy.reset(seed=seed)[0])]
        pairs += [(clean.step(REST)[0], noisy.step(REST)[0]) for _ in range(60)]
        for one, other in pairs:
            assert noisy.observation_space.contains(other)
            for name, found in differences.items():
                found.append(other[name] - one[name])
        np.testing.assert_array_equal(clean.data.qpos, noisy.data.qpos)
    qpos = np.stack(differences["qpos"])
    assert abs(qpos.mean()) < 0.001
    assert abs(qpos.std() / 0.01 - 1) < 0.1
    assert abs(np.corrcoef(qpos[:-1].ravel(), qpos[1:].ravel())[0, 1]) < 0.1
    objects = np.stack(differences["env_state"]).reshape(-1, 2, 7)
    assert abs(objects[..., :3].std() / 0.002 - 1) < 0.1
    assert (objects[..., 3:] == 0).all()


def test_noise_of_a_step_does_not_depend_on_how_often_one_looks() -> None:
    config = perturbed(qpos_noise=0.01, env_state_noise=0.002)
    often, rarely = make_env(config), make_env(config)
    often.reset(seed=9)
    rarely.reset(seed=1)
    rarely.reset(seed=9)
    for _ in range(5):
        often.step(REST)
        often.observe()
        rarely.advance(REST)
    one, other = often.observe(), rarely.observe()
    for name, values in one.items():
        np.testing.assert_array_equal(values, other[name])
    # One kind of noise does not change another.
    alone = make_env(perturbed(qpos_noise=0.01))
    alone.reset(seed=9)
    for _ in range(5):
        alone.advance(REST)
    np.testing.assert_array_equal(alone.observe()["qpos"], one["qpos"])
    often.reset(seed=10)
    assert (often.step(REST)[0]["qpos"] != one["qpos"]).all()


@needs_opengl
def test_image_noise() -> None:
    images = {}
    for name, size in (("clean", 0.0), ("noisy", 5.0)):
        env = make_env(perturbed(cameras=("top", "angle"), image_noise=size))
        env.reset(seed=2)
        images[name] = env.step(REST)[0]["images"]
        env.close()
    assert images["noisy"].dtype == np.uint8
    middle = (images["clean"] > 30) & (images["clean"] < 225)  # where nothing is clipped
    difference = images["noisy"].astype(float) - images["clean"]
    assert abs(difference[middle].std() / 5 - 1) < 0.1
    assert np.abs(difference).max() < 40  # no value wraps around


def camera_poses(config: EnvConfig, seed: int) -> tuple[np.ndarray, np.ndarray]:
    env = make_env(config)
    env.reset(seed=seed)
    for _ in range(4):
        env.advance(REST)
    return env.data.cam_xpos.copy(), env.data.cam_xmat.reshape(-1, 3, 3).copy()


def test_cameras_move_and_turn_within_bounds_wherever_they_aim() -> None:
    shift, turn = 0.01, 0.05
    config = perturbed(camera_shift=shift, camera_turn=turn)
    for seed in range(3):
        positions, rotations = camera_poses(EnvConfig(), seed)
        moved, turned = camera_poses(config, seed)
        away = np.einsum("nij,ni->nj", rotations, moved - positions)  # along the camera's own axes
        assert (np.abs(away) <= shift + 1e-12).all()
        assert (np.linalg.norm(away, axis=1) > shift / 20).all()
        change = np.swapaxes(rotations, 1, 2) @ turned
        turns = Rotation.from_matrix(change).as_rotvec()  # about the camera's own axes
        assert (np.abs(turns) <= turn + 1e-9).all()
        assert (np.linalg.norm(turns, axis=1) > turn / 20).all()
        np.testing.assert_allclose(turned @ np.swapaxes(turned, 1, 2) - np.eye(3), 0, atol=1e-9)
    assert len({camera_poses(config, seed)[0].tobytes() for seed in range(3)}) == 3


def scene(env: Any) -> list[np.ndarray]:
    model, data = env.model, env.data
    arrays = (model.light_diffuse, model.light_dir, model.vis.headlight.diffuse)
    return [np.array(a) for a in (*arrays, data.light_xdir, data.cam_xpos, data.cam_xmat)]


def test_scene_belongs_to_the_world_and_the_instance() -> None:
    config = perturbed(camera_shift=0.01, camera_turn=0.05, light=0.3)
    env, other, plain = make_env(config), make_env(config), make_env(EnvConfig())
    env.reset(seed=4)
    fourth = scene(env)
    env.reset(seed=5)
    fifth = scene(env)
    for one, two in zip(fourth, fifth, strict=True):
        assert (one != two).any()
    for _ in range(3):
        env.reset(seed=4)
    other.reset(seed=8)
    other.reset(seed=4)
    for expected, *same in zip(fourth, scene(env), scene(other), strict=True):
        for values in same:
            np.testing.assert_array_equal(values, expected)
    # Watching other cameras does not change the world.
    observed = make_env(replace(config, env_state=False))
    observed.reset(seed=4)
    np.testing.assert_array_equal(scene(observed)[-1], fourth[-1])
    plain.reset(seed=4)
    np.testing.assert_array_equal(plain.model.light_dir, make_env(EnvConfig()).model.light_dir)
    factors = fourth[0] / plain.model.light_diffuse
    assert (np.abs(factors - 1) <= 0.3).all()
    assert np.ptp(factors) > 0
    np.testing.assert_allclose(np.linalg.norm(fourth[1], axis=1), 1)


def test_seen_scene_and_noise_leave_physics_alone() -> None:
    config = perturbed(camera_shift=0.1, camera_turn=0.5, light=1.0, qpos_noise=1.0)
    for one, other in zip(play(EnvConfig(), 6), play(config, 6), strict=True):
        np.testing.assert_array_equal(one, other)


@needs_opengl
@pytest.mark.parametrize("changes", [{"camera_turn": 0.05}, {"camera_shift": 0.03}, {"light": 0.3}])
def test_pictures_show_the_changed_scene(changes: dict[str, float]) -> None:
    env, plain = (make_env(perturbed(cameras=("top",), **c)) for c in (changes, {}))
    first = env.reset(seed=1)[0]["images"]
    nominal = plain.reset(seed=1)[0]["images"]
    assert np.abs(first.astype(int) - nominal).mean() > 0.3
    picture = env.picture(size=(24, 32)).transpose(2, 0, 1)
    np.testing.assert_array_equal(picture, first[0])
    later = env.step(REST)[0]["images"]
    np.testing.assert_array_equal(env.observe()["images"], later)  # looking twice moves nothing
    assert np.abs(later.astype(int) - first).mean() < 0.3
    env.close()
    plain.close()


# --- other gymnasium ids ---


class Line(gymnasium.Env[np.ndarray, np.ndarray]):
    """A point that goes where it is told; observes its place."""

    metadata = {"render_modes": ["rgb_array"]}  # noqa: RUF012
    observation_space = spaces.Box(-10, 10, (2,), np.float32)
    action_space = spaces.Box(-1, 1, (1,), np.float32)

    def __init__(self, render_mode: str | None = None) -> None:
        self.render_mode = render_mode

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.place = np.zeros(2, np.float32)
        return self.place, {}

    def step(self, action: np.ndarray) -> Any:
        self.place = np.array([action[0], self.place[0]], np.float32)
        return self.place, 0.0, False, False, {"is_success": False}


@pytest.fixture
def line() -> Any:
    gymnasium.register("Line-v0", entry_point=Line)
    yield "Line-v0"
    del gymnasium.registry["Line-v0"]


def test_foreign_actions_are_delayed_and_observations_noisy(line: str) -> None:
    keys = {"qpos": "", "env_state": ""}
    config = EnvConfig(task=line, observation_keys=keys)
    assert make_env(config).stages == ()
    env = make_env(split_env(config, "delay_2"))
    actions = [0.1, 0.2, 0.3, 0.4, 0.5]
    for _ in range(2):
        env.reset(seed=0)
        places = [env.step(np.array([action], np.float32))[0]["qpos"][0] for action in actions]
        np.testing.assert_allclose(places, [0.1, 0.1, 0.1, 0.2, 0.3])
    env = make_env(split_env(config, "noise"))
    seen = [
        env.reset(seed=0)[0]["qpos"],
        env.reset(seed=0)[0]["qpos"],
        env.reset(seed=1)[0]["qpos"],
    ]
    np.testing.assert_array_equal(seen[0], seen[1])
    assert (seen[0] != seen[2]).all()
    assert 0 < np.abs(seen[0]).max() < 0.1
    assert (env.observe()["env_state"] != 0).all()


def test_what_a_foreign_task_cannot_do_is_named(line: str) -> None:
    config = EnvConfig(task=line, observation_keys={"qpos": ""})
    for split in ("far", "grid"):
        with pytest.raises(ValueError, match="Line-v0 has no objects .*: delay_1"):
            split_env(config, split)
    with pytest.raises(ValueError, match="no camera is observed"):
        split_env(config, "camera")
    with pytest.raises(ValueError, match=r"cannot move its cameras .*light to 0"):
        replace(config, perturbation=Perturbation(light=0.1))
    with pytest.raises(ValueError, match="object_grid: for the ALOHA"):
        replace(config, object_grid=3)
    with pytest.raises(ValueError, match="does not say where"):
        object_poses(config, [0])


# --- settings ---


@pytest.mark.parametrize("split", SPLITS)
def test_every_split_changes_one_thing(split: str) -> None:
    run = EnvConfig(cameras=("top",), perturbation=Perturbation(image_noise=1.0))
    config = split_env(run, split)
    changed = {
        name
        for name in ("object_beyond", "object_grid", "perturbation")
        if getattr(config, name) != getattr(run, name)
    }
    assert len(changed) == 1
    assert replace(config, **{name: getattr(run, name) for name in changed}) == run
    assert config.perturbation.image_noise == (5.0 if split == "noise" else 1.0)
    assert split_env(config, split) == config


def test_standard_and_unknown_splits() -> None:
    config = EnvConfig()
    assert split_env(config, "standard") is config
    with pytest.raises(ValueError, match=r"split='near'; choose one of: standard, far, grid"):
        split_env(config, "near")
    with pytest.raises(ValueError, match="no camera is observed"):
        split_env(config, "light")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"camera_shift": -0.1}, "camera_shift=-0.1; give 0 or more"),
        ({"image_noise": float("nan")}, "image_noise=nan"),
        ({"camera_turn": 45.0}, "camera_turn=45.0; give at most pi"),
        ({"light": 1.5}, "light=1.5; give at most 1"),
        ({"action_delay": 1.5}, "action_delay=1.5; give whole control steps"),
        ({"action_delay": 51}, "action_delay=51"),
    ],
)
def test_perturbation_is_checked(changes: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Perturbation(**changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"object_beyond": -0.1}, "object_beyond=-0.1"),
        ({"object_beyond": 0.3}, r"object_beyond=0.3 takes peg from .* off the table"),
        ({"object_grid": -1}, "object_grid=-1"),
        ({"object_grid": 2, "object_beyond": 0.01}, "exclude each other"),
        ({"object_grid": 2, "object_ranges": {"peg": ((0, 0), (0.4, 0.6))}}, "has no cells"),
        ({"action_margin": -1.0}, "action_margin=-1.0"),
        ({"action_margin": float("nan")}, "action_margin=nan"),
    ],
)
def test_config_is_checked(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EnvConfig(**changes)


BEFORE = {
    "task": "insertion",
    "cameras": [],
    "image_size": [120, 160],
    "render_quality": "fast",
    "max_episode_steps": 300,
    "env_state": True,
    "object_ranges": None,
    "object_yaw": 0.0,
    "observation_keys": {},
    "success_key": "is_success",
    "make_kwargs": {},
}
"""What stores say about their world that were recorded before worlds could be perturbed."""


def test_stores_from_before_perturbations_still_match(tmp_path: Path) -> None:
    env, config = EnvConfig(), RecordConfig()
    now = settings(config, env)
    assert json.loads(json.dumps(now["env"])) == BEFORE
    path = tmp_path / "old.zarr"
    with StoreWriter.create(path, data_spec(env), {"settings": now | {"env": BEFORE}}):
        pass

    def check(env: EnvConfig) -> None:
        check_settings(path, data_spec(env), {"settings": settings(config, env)})

    check(env)
    check(replace(env, action_margin=None))
    with pytest.raises(StoreMismatchError, match=r"env\.object_grid is not set there and 3 now"):
        check(replace(env, object_grid=3))
    with pytest.raises(StoreMismatchError, match=r"perturbation\.light is not set there and 0\.3"):
        check(replace(env, perturbation=Perturbation(light=0.3)))


def test_perturbed_stores_match_only_themselves(tmp_path: Path) -> None:
    env, config = perturbed(qpos_noise=0.01), RecordConfig()
    path = tmp_path / "noisy.zarr"
    with StoreWriter.create(path, data_spec(env), {"settings": settings(config, env)}):
        pass
    check_settings(path, data_spec(env), {"settings": settings(config, env)})
    for other in (EnvConfig(image_size=(24, 32)), perturbed(qpos_noise=0.02)):
        with pytest.raises(StoreMismatchError, match=r"perturbation\.qpos_noise is 0\.01 there"):
            check_settings(path, data_spec(other), {"settings": settings(config, other)})


def test_splits_need_no_torch() -> None:
    code = "import sys; import act_lightning.sim.splits, act_lightning.sim.env; "
    code += "assert not {'torch', 'matplotlib'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
