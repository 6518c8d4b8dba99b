"""Films of episodes: which frames are taken, what is written over them, and where paths lie."""

from typing import Any

import gymnasium
import mujoco
import numpy as np
import pytest
from drawing import needs_opengl

from act_lightning.sim.detour import ENV_ID, NUM_STEPS, mode_paths
from act_lightning.sim.env import AlohaEnv, EnvConfig, make_env
from act_lightning.sim.film import Film, Filmer
from act_lightning.sim.kinematics import PINCH_DISTANCE
from act_lightning.sim.overlay import COLORS, draw_overlay


class Counter(gymnasium.Env[Any, Any]):
    """Renders the number of its steps as a grey level, and takes chunks for columns and rows."""

    def __init__(self, stages: tuple[str, ...] = (), size: tuple[int, int] = (40, 60)) -> None:
        self.stages, self.size = stages, size
        self.is_success = False
        self.count = 0

    def render(self) -> Any:
        return np.full((*self.size, 3), self.count, np.uint8)

    def path_in_picture(self, chunk: Any, size: tuple[int, int]) -> list[Any]:
        return [chunk]


def film(env: Counter, rewards: list[float], film: Film, end: int | None = None) -> Filmer:
    """Plays as a worker does: `step` after each step, `end` after the last."""
    filmer = Filmer(env, film)
    for reward in rewards:
        env.count += 1
        filmer.step(env.count, reward)
    filmer.end(env.count, rewards[-1] if rewards else 0.0)
    return filmer


# --- which frames ---


@pytest.mark.parametrize(
    ("steps", "expected"), [(7, [0, 3, 6, 7]), (6, [0, 3, 6]), (2, [0, 2]), (0, [0])]
)
def test_frames_come_at_regular_times_and_at_the_end_only_once(
    steps: int, expected: list[int]
) -> None:
    frames = film(Counter(), [0.0] * steps, Film(interval=3)).frames
    assert frames.shape == (len(expected), 3, 40, 60)
    assert frames.dtype == np.uint8
    assert frames[:, 0, 0, 0].tolist() == expected


def test_an_end_without_a_last_step_is_filmed_too() -> None:
    env = Counter()
    filmer = Filmer(env, Film(interval=2))
    filmer.step(1, 0.0)
    env.count = 9  # diverged in its second step
    filmer.end(1, 0.0)
    assert filmer.frames[:, 0, 0, 0].tolist() == [0, 9]


def test_rendered_pictures_are_shrunk_to_the_size_at_most_and_never_enlarged() -> None:
    for size, shape in (((240, 320), (120, 160)), ((500, 500), (100, 100)), ((90, 90), (90, 90))):
        assert film(Counter(size=size), [], Film()).frames.shape == (1, 3, *shape)


# --- the overlay ---


def texts(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Collects what is written over frames from now on."""
    written: list[str] = []

    def draw(image: Any, text: str, paths: Any) -> Any:
        written.append(text)
        return image

    monkeypatch.setattr("act_lightning.sim.film.draw_overlay", draw)
    return written


def test_the_furthest_stage_is_written_then_success(monkeypatch: pytest.MonkeyPatch) -> None:
    written = texts(monkeypatch)
    env = Counter(stages=("touched", "lifted"))
    filmer = Filmer(env, Film(interval=1, overlay=True))
    for step, reward in enumerate([0, 1, 2, 1], start=1):
        filmer.step(step, reward)
    # The world is ahead of the picture that waits for its plan.
    env.is_success = True
    filmer.step(5, 3)
    filmer.end(5, 3)
    assert written == [
        *("step 0", "step 1", "step 2  touched", "step 3  lifted", "step 4  lifted"),
        "step 5  success",
    ]


def test_without_stages_the_reward_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    written = texts(monkeypatch)
    film(Counter(), [0.25, -1.0], Film(interval=1, overlay=True))
    assert written == ["step 0  reward 0", "step 1  reward 0.25", "step 2  reward -1"]


def test_a_frame_shows_the_plan_made_after_it_was_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    env = Counter()
    seen: list[Any] = []
    env.path_in_picture = lambda chunk, size: seen.append(chunk.tolist()) or []  # type: ignore
    filmer = Filmer(env, Film(interval=1, overlay=True))
    filmer.plan(np.array([[0, 1], [2, 3]], np.float32))
    filmer.step(1, 0.0)
    filmer.step(2, 0.0)
    filmer.plan(np.array([[4, 5]], np.float32))
    filmer.end(3, 0.0)
    # What is left of the first plan, then the second, then nothing left of it.
    assert seen == [[[0, 1], [2, 3]], [[2, 3]], [[4, 5]], []]


def test_without_overlay_frames_are_as_rendered() -> None:
    env = Counter(stages=("touched",))
    filmer = Filmer(env, Film(interval=1))
    filmer.plan(np.array([[20, 20], [40, 30]], np.float32))
    assert (filmer.frames == 0).all()


def test_a_path_begins_strong_in_its_colour_and_fades() -> None:
    image = np.full((200, 300, 3), 128, np.uint8)
    path = np.stack([np.linspace(50, 250, 21), np.full(21, 100.0)], axis=-1)
    drawn = draw_overlay(image, "", [path])
    assert (image == 128).all()
    difference = np.abs(drawn[100].astype(int) - COLORS[0]).sum(axis=-1)
    assert difference[50] < 10
    assert (np.diff(difference[[50, 100, 150, 200, 245]]) > 0).all()
    assert (drawn[80] == 128).all()
    second = draw_overlay(image, "", [path[:0], path])
    assert np.abs(second[100, 50].astype(int) - COLORS[1]).sum() < 10


def test_what_cannot_be_drawn_is_left_out() -> None:
    image = np.full((90, 120, 3), 128, np.uint8)
    bare = draw_overlay(image, "step 3", [])
    nowhere = np.array([[np.nan, 3], [np.inf, 4], [1e12, -1e12]])
    assert (draw_overlay(image, "step 3", [nowhere, np.zeros((0, 2))]) == bare).all()
    some = np.array([[10, 10], [np.nan, np.nan], [40, 40], [60, 40]], float)
    drawn = draw_overlay(image, "step 3", [some])
    assert (drawn[40, 50] != bare[40, 50]).any()
    assert (drawn[25, 25] == bare[25, 25]).all()


def test_text_stands_in_the_lowest_rows() -> None:
    image = np.full((120, 160, 3), 100, np.uint8)
    drawn = draw_overlay(image, "step 120  lifted", [])
    rows, columns = np.nonzero((drawn != image).any(axis=-1))
    assert rows.min() > 100
    assert drawn[rows, columns].max() > 200  # light letters on a dark strip
    assert (drawn != draw_overlay(image, "step 121  lifted", [])).any()


# --- where paths lie ---


@needs_opengl
@pytest.mark.parametrize("size", [(120, 160), (300, 300)])
@pytest.mark.parametrize("arm", ["left", "right"])
def test_a_path_begins_where_the_camera_sees_the_pinch_point(
    arm: str, size: tuple[int, int]
) -> None:
    """A small box at the pinch point, which MuJoCo computes, alone in the picture it renders."""
    env = AlohaEnv(EnvConfig(task="insertion", render_quality="full"))
    rng = np.random.default_rng(2)
    model, data = env.model, env.data
    for _ in range(3):
        present = np.zeros(14, np.float32)
        present[:6], present[7:13] = rng.normal([0, -0.7, 1.0, 0.1, 0.3, 0], 0.15, (2, 6))
        model.cam_pos[model.camera("top").id] += rng.normal(0, 0.02, 3)
        model.cam_quat[model.camera("top").id] += rng.normal(0, 0.02, 4)
        data.qpos[:6], data.qpos[8:14] = present[:6], present[7:13]
        mujoco.mj_forward(model, data)
        link = data.body(f"vx300s_{arm}/gripper_link")
        place = link.xpos + PINCH_DISTANCE * link.xmat.reshape(3, 3)[:, 0]
        data.joint("red_peg_joint").qpos[:3] = place
        mujoco.mj_forward(model, data)
        model.geom_rgba[:, 3] = 0
        model.geom_matid[:] = -1
        empty = env.picture(size=size).astype(int)
        box = model.geom("red_peg").id
        model.geom_size[box] = 0.008
        model.geom_rgba[box] = 1
        rows, columns = np.nonzero(np.abs(env.picture(size=size) - empty).sum(axis=-1))
        left, right = env.path_in_picture(np.stack([present] * 2), size)
        path = left if arm == "left" else right
        assert path.shape == (2, 2)
        assert len(rows) >= 4
        expected = columns.mean() + 0.5, rows.mean() + 0.5
        np.testing.assert_allclose(path, [expected] * 2, atol=0.8)
    env.close()


def test_points_behind_the_camera_are_nowhere() -> None:
    env = AlohaEnv(EnvConfig())
    top = env.model.camera("top").id
    env.data.cam_xmat[top] = np.diag([-1.0, 1.0, -1.0]).ravel()  # looks up
    for path in env.path_in_picture(np.zeros((3, 14), np.float32), (120, 160)):
        assert np.isnan(path).all()


def test_the_detour_draws_plans_where_the_point_then_goes() -> None:
    env = make_env(
        EnvConfig(task=ENV_ID, observation_keys={"qpos": "time"}, success_key="is_success")
    )
    env.reset(seed=0)
    chunk = mode_paths()[0].astype(np.float32)
    (path,) = env.path_in_picture(chunk, (120, 160))
    assert path.shape == (NUM_STEPS, 2)
    for action in chunk:
        env.advance(action)
    image = env.render()
    for column, row in path:
        assert image[round(row), round(column)].tolist() != [255, 255, 255]
    (lower,) = env.path_in_picture(chunk, (60, 160))
    np.testing.assert_allclose(lower, path * [1, 0.5])
