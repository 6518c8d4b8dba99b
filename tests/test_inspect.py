"""The inspection: a planted fault is named at exactly its episode and step; clean data is clean."""

import dataclasses
import io
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import zarr
from PIL import Image
from rich.console import Console

from act_lightning.batch import DataSpec
from act_lightning.data.episode import Episode
from act_lightning.data.layout import StoreError
from act_lightning.data.store import Store
from act_lightning.data.writer import StoreWriter
from act_lightning.sim.config import EnvConfig
from act_lightning.sim.record import RecordConfig, record
from act_lightning.study.inspect.analysis import inspect_store
from act_lightning.study.inspect.draw import draw_report
from act_lightning.study.inspect.opening import open_leniently
from act_lightning.study.inspect.report import Limits
from act_lightning.study.inspect.show import print_report
from act_lightning.study.inspect.verb import inspect_verb

GOLDEN = Path(__file__).parent / "goldens" / "version_1.zarr"
NUM_EPISODES, LENGTH = 8, 150
SPEC = DataSpec(
    task="insertion",
    fps=50,
    dim_qpos=4,
    dim_action=4,
    dim_env_state=2,
    cameras=("top", "wrist"),
    image_size=(12, 16),
)


def demonstration(number, length=LENGTH, spec=SPEC, success=True, **changes):
    """Two swinging joints, one that rises and rests, and a gripper that closes at once."""
    rng = np.random.default_rng(number)
    time = np.arange(length + 2)
    qpos = np.empty((length + 2, spec.dim_qpos))
    for joint in range(spec.dim_qpos - 2):
        qpos[:, joint] = np.sin(time / rng.uniform(15, 25) + rng.uniform(0, 6))
    rise = np.clip((time - 40) / 60, 0, 1)
    qpos[:, -2] = rise**3 * (10 - 15 * rise + 6 * rise**2)  # minimal jerk
    qpos[:, -1] = time > 75
    shape = (length, len(spec.cameras), 3, *spec.image_size)
    parts = {
        "qpos": qpos[:-2],
        "actions": qpos[2:],
        "env_state": np.cos(time[:length, None] / 30 + rng.uniform(0, 6, spec.dim_env_state))
        if spec.dim_env_state
        else None,
        "images": rng.integers(0, 256, shape, np.uint8) if spec.cameras else None,
        "id": 3 * number + 1,
        "success": success,
    }
    return Episode(**(parts | changes))


def write(path, episodes, spec=SPEC, finalize=True):
    with StoreWriter.create(path, spec, {"settings": {}, "versions": {}}) as writer:
        for one in episodes:
            writer.append(one)
        if finalize:
            writer.finalize()
    return path


@pytest.fixture(scope="module")
def clean(tmp_path_factory):
    episodes = [demonstration(number) for number in range(NUM_EPISODES)]
    return write(tmp_path_factory.mktemp("inspect") / "clean.zarr", episodes)


@pytest.fixture
def store(clean, tmp_path):
    """A copy to damage."""
    return Path(shutil.copytree(clean, tmp_path / "store.zarr"))


def inspect(path, **options):
    return inspect_store(open_leniently(path), **options)


def places(report):
    """(kind, subject, episode, first step, last step) of every place of every finding."""
    return {
        (found.kind, found.subject, place.episode, place.step, place.last_step)
        for found in report.findings
        for place in found.places
    }


def row(episode, step):
    return episode * LENGTH + step


def edit(path, name, change):
    """Changes an array in place through zarr-python, which checks nothing of ours."""
    array = zarr.open_group(path, mode="r+")[name]
    values = array[:]
    change(values)
    array[:] = values


def test_clean_demonstrations_have_no_findings(clean):
    report = inspect(clean)
    assert report.findings == ()
    assert not report.damaged
    assert report.lengths == (LENGTH,) * NUM_EPISODES
    assert (report.successes, report.failures, report.unknown) == (NUM_EPISODES, 0, 0)
    assert report.pictures == 2 * NUM_EPISODES * LENGTH
    assert report.seconds == NUM_EPISODES * LENGTH / 50
    assert report.action_fit.lag == 2


def test_statistics_are_those_of_the_arrays(clean):
    report, held = inspect(clean), Store.open(clean)
    for name, table in (
        ("qpos", held.qpos),
        ("action", held.actions),
        ("env_state", held.env_state),
    ):
        for index, dimension in enumerate(report.dimensions[name]):
            column = table[:, index].astype(np.float64)
            given = (dimension.min, dimension.max, dimension.mean, dimension.std)
            assert given == pytest.approx(
                (column.min(), column.max(), column.mean(), column.std()), rel=1e-9
            )
    sizes = {array.name: array for array in report.arrays}
    on_disk = sum(f.stat().st_size for f in (clean / "data/images_top").rglob("*") if f.is_file())
    assert sizes["data/images_top"].stored == on_disk
    assert sizes["data/images_top"].raw == NUM_EPISODES * LENGTH * 12 * 16 * 3


def test_simulated_demonstrations_have_no_findings(tmp_path):
    path = tmp_path / "simulated.zarr"
    env = EnvConfig(task="insertion", env_state=True, cameras=())
    record(RecordConfig(path=str(path), episodes=3), env, num_workers=1)
    report = inspect(path)
    assert report.findings == ()
    assert report.pictures == 0


def test_a_version_1_store_is_inspected():
    report = inspect(GOLDEN)
    assert report.version == 1
    assert report.successes == len(report.lengths) > 0
    assert not report.damaged


# --- low-dimensional faults: what, and where it must be found ---


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["qpos", "action", "env_state"])
def test_not_finite_values_are_named(store, name, value):
    def change(values):
        values[row(2, 17), 1] = value
        values[row(5, 0) : row(5, 4), 0] = value

    edit(store, f"data/{name}", change)
    report = inspect(store)
    subject = f"data/{name}"
    assert places(report) == {
        ("not_finite", subject, 2, 17, 17),
        ("not_finite", subject, 5, 0, 3),
    }
    assert report.damaged
    assert str(report.findings[0].places[0]) == (
        f"episode 2 (id 7), step 17: dimension 1: {np.float32(value)}"
    )
    with pytest.raises(StoreError, match=r"episode 2 \(id 7\), step 17"):
        Store.open(store)


def test_runs_of_nan_do_not_cross_episodes(store):
    edit(store, "data/qpos", lambda values: values[row(3, -2) : row(3, 2)].fill(np.nan))
    assert places(inspect(store)) == {
        ("not_finite", "data/qpos", 2, LENGTH - 2, LENGTH - 1),
        ("not_finite", "data/qpos", 3, 0, 1),
    }


def test_a_spike_is_one_jump(store):
    def change(values):
        values[row(4, 60), 0] += 3

    edit(store, "data/qpos", change)
    assert places(inspect(store)) == {("jump", "data/qpos", 4, 60, 60)}


def test_a_step_to_another_place_is_a_jump_and_the_start_of_an_episode_is_none(store):
    def change(values):
        values[row(4, 60) : row(5, 0), 1] += 2.5

    edit(store, "data/env_state", change)
    assert places(inspect(store)) == {("jump", "data/env_state", 4, 60, 60)}


def test_a_limit_decides_what_is_a_jump(store):
    edit(store, "data/env_state", lambda values: values[row(4, 60) : row(5, 0)].__iadd__(2.5))
    assert inspect(store, limits=Limits(jump=1000)).findings == ()


def test_clipped_dimension_is_found_with_each_visit(store):
    """A joint that swings from -1 to 1 but is cut off at 0.8, against the steps where it is."""
    held = Store.open(store)
    swing = held.qpos[:, 0] > 0.8
    edit(store, "data/qpos", lambda values: np.minimum(values, [0.8, 9, 9, 9], out=values))
    report = inspect(store)
    expected = set()
    for episode in range(NUM_EPISODES):
        inside = swing[row(episode, 0) : row(episode + 1, 0)]
        edges = np.flatnonzero(np.diff(inside.astype(int), prepend=0, append=0)).reshape(-1, 2)
        expected |= {
            ("clipped", "data/qpos", episode, int(first), int(end) - 1)
            for first, end in edges
            if first > 3 and end - first >= 3
        }
    assert places(report) == expected
    assert len(expected) > NUM_EPISODES / 2
    assert not report.damaged
    assert report.dimensions["qpos"][0].remarks == ("clipped at max",)


def test_constant_dimension_is_remarked(store):
    edit(store, "data/env_state", lambda values: values[:, 1].fill(0.25))
    report = inspect(store)
    assert report.dimensions["env_state"][1].remarks == ("constant",)
    assert report.findings == ()


def test_action_far_outside_of_its_joint(store):
    edit(store, "data/action", lambda values: values[row(6, 30) : row(6, 33)].fill(4.5))
    assert places(inspect(store)) == {
        ("outside", "data/action", 6, 30, 32),
        ("jump", "data/action", 6, 30, 30),
        ("jump", "data/action", 6, 33, 33),
    }


def test_actions_in_other_units(store):
    edit(store, "data/action", lambda values: values[:, :2].__imul__(57.3))
    (found,) = inspect(store).findings
    assert found.kind == "scale"
    assert "dimension 0 57.3 times" in found.title
    assert "dimension 1 57.3 times" in found.title


@pytest.mark.parametrize(("lag", "said"), [(-4, "trail the joints by 4"), (0, "equal"), (5, None)])
def test_lag_between_actions_and_joints(tmp_path, lag, said):
    """Joints follow the actions by `lag` steps; without a delay, actions teach to copy."""
    episodes = []
    for number in range(4):
        long = demonstration(number, LENGTH + 10)
        episodes.append(
            dataclasses.replace(
                demonstration(number),
                qpos=long.qpos[5 : LENGTH + 5],
                actions=long.qpos[5 + lag : LENGTH + 5 + lag],
            )
        )
    report = inspect(write(tmp_path / "lag.zarr", episodes))
    assert report.action_fit.lag == lag
    assert [found.kind for found in report.findings] == (["lag"] if said else [])
    assert said is None or said in report.findings[0].title


def test_actions_that_are_no_positions_are_not_compared(tmp_path):
    rng = np.random.default_rng(0)
    episodes = [demonstration(number, actions=rng.normal(size=(LENGTH, 4))) for number in range(3)]
    report = inspect(write(tmp_path / "velocities.zarr", episodes))
    assert report.findings == ()
    assert report.action_fit.lag is None


# --- episodes ---


def test_odd_lengths_and_single_steps(tmp_path):
    lengths = [90, 100, 1, 30, 110, 400, 100]
    path = write(tmp_path / "s.zarr", [demonstration(i, size) for i, size in enumerate(lengths)])
    assert places(inspect(path)) == {
        ("single_step", "episodes", 2, None, None),
        ("length", "episodes", 3, None, None),
        ("length", "episodes", 5, None, None),
    }


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("lengths", [[1], [1, 1, 1, 1], [2]])
def test_tiny_stores_are_inspected_and_drawn(tmp_path, lengths):
    path = write(tmp_path / "s.zarr", [demonstration(i, size) for i, size in enumerate(lengths)])
    opened = open_leniently(path)
    report = inspect_store(opened)
    single = [("single_step", i) for i, size in enumerate(lengths) if size == 1]
    assert [(kind, episode) for kind, _, episode, *_ in sorted(places(report))] == single
    assert draw_report(opened, report).startswith(b"\x89PNG")


def test_repeated_episode(tmp_path):
    episodes = [demonstration(number) for number in range(5)]
    again = dataclasses.replace(episodes[1], id=40, images=demonstration(77).images)
    path = write(tmp_path / "s.zarr", [*episodes, again])
    (found,) = inspect(path).findings
    assert found.kind == "repeated"
    assert [str(place) for place in found.places] == [
        "episode 5 (id 40): the same as episode 1 (id 4)"
    ]


def test_success_is_counted(tmp_path):
    known = [True, False, None, False]
    episodes = [demonstration(i, success=success) for i, success in enumerate(known)]
    report = inspect(write(tmp_path / "s.zarr", episodes))
    assert (report.successes, report.failures, report.unknown) == (1, 2, 1)


def test_an_unfinished_store_is_inspected(tmp_path):
    path = write(tmp_path / "s.zarr", [demonstration(0), demonstration(1)], finalize=False)
    report = inspect(path)
    assert (report.complete, report.findings) == (False, ())
    empty = inspect(write(tmp_path / "e.zarr", [], finalize=False))
    assert (empty.lengths, empty.frames, empty.findings) == ((), 0, ())
    assert draw_report(open_leniently(tmp_path / "e.zarr"), empty).startswith(b"\x89PNG")


def test_broken_labels_of_episodes(store):
    edit(store, "meta/episode_ends", lambda ends: ends.__setitem__(3, row(3, 0)))
    edit(store, "meta/episode_id", lambda ids: ids.__setitem__(6, 2))
    edit(store, "meta/episode_success", lambda success: success.__setitem__(1, 7))
    report = inspect(store)
    assert {
        ("no_steps", "meta/episode_ends", 3, None, None),
        ("ids", "meta/episode_id", 6, None, None),
        ("success", "meta/episode_success", 1, None, None),
    } <= places(report)
    assert report.lengths[2:5] == (LENGTH, 0, 2 * LENGTH)


# --- damaged files of low-dimensional arrays ---


def test_a_damaged_chunk_is_named_by_its_steps_and_the_rest_is_read(store):
    chunk = store / "data/qpos/c/0/0"
    content = bytearray(chunk.read_bytes())
    content[500] ^= 1
    chunk.write_bytes(content)
    report = inspect(store)
    last = 1024 % LENGTH
    assert places(report) == {
        *(("unreadable", "data/qpos", i, 0, LENGTH - 1) for i in range(6)),
        ("unreadable", "data/qpos", 6, 0, last - 1),
    }
    assert report.dimensions["qpos"][0].remarks == ("not finite",)
    assert report.dimensions["action"][0].remarks == ()


def test_a_lost_chunk_is_named(store):
    (store / "data/action/c/1/0").unlink()
    found = places(inspect(store))
    assert found == {
        ("not_finite", "data/action", 6, 1024 % LENGTH, LENGTH - 1),
        ("not_finite", "data/action", 7, 0, LENGTH - 1),
    }


def test_a_short_or_missing_array_is_named(store):
    document = json.loads((store / "data/qpos/zarr.json").read_text())
    document["shape"][0] -= 30
    (store / "data/qpos/zarr.json").write_text(json.dumps(document))
    shutil.rmtree(store / "data/env_state")
    report = inspect(store)
    found = places(report)
    assert ("unreadable", "data/qpos", 7, LENGTH - 30, LENGTH - 1) in found
    assert ("unreadable", "data/env_state", 0, 0, LENGTH - 1) in found
    assert report.dimensions["action"][0].remarks == ()


def test_another_dtype_is_named(store):
    group = zarr.open_group(store, mode="r+")
    values = group["data/qpos"][:]
    group.create_array("data/qpos", data=values.astype(np.float64), overwrite=True)
    (found,) = inspect(store).findings
    assert (found.kind, found.subject, found.damaged) == ("layout", "data/qpos", True)
    assert "float64" in str(found.places[0])


# --- pictures ---


def test_frozen_frames_are_found_where_the_robot_moves(store):
    """One frame at the fastest step of an episode, and ten in a row in another."""
    qpos = Store.open(store).qpos[row(1, 0) : row(2, 0)]
    step = int(np.abs(np.diff(qpos[:, :2], axis=0)).max(axis=1).argmax()) + 1

    def change(frames):
        frames[row(1, step)] = frames[row(1, step - 1)]
        frames[row(6, 80) : row(6, 90)] = frames[row(6, 79)]

    edit(store, "data/images_wrist", change)
    assert places(inspect(store)) == {
        ("frozen", "camera wrist", 1, step, step),
        ("frozen", "camera wrist", 6, 80, 89),
    }


def test_the_same_picture_of_a_resting_robot_is_fine(tmp_path):
    """Simulated cameras have no noise: nothing moves, so the picture stays."""
    episodes = []
    for number in range(4):
        one = demonstration(number)
        for values in (one.qpos, one.actions, one.images):
            values[120:] = values[120]
        episodes.append(one)
    assert inspect(write(tmp_path / "s.zarr", episodes)).findings == ()


def test_a_trembling_joint_is_no_motion(tmp_path):
    """Encoder noise of one tick is half of the range of a joint that rests."""
    rng = np.random.default_rng(0)
    still = demonstration(0).images[:1].repeat(LENGTH, axis=0)
    episodes = [
        demonstration(i, qpos=rng.integers(-1, 2, (LENGTH, 4)) * 0.001, images=still)
        for i in range(3)
    ]
    assert inspect(write(tmp_path / "s.zarr", episodes)).findings == ()


def test_a_picture_of_another_episode_is_found(store):
    held = Store.open(store)
    assert np.abs(held.qpos[row(0, 10)] - held.qpos[row(5, 99)]).max() > 0.2
    edit(store, "data/images_top", lambda f: f.__setitem__(row(5, 99), f[row(0, 10)]))
    (found,) = inspect(store).findings
    assert found.kind == "shown_again"
    assert [str(place) for place in found.places] == [
        "episode 5 (id 16), step 99: the same picture as in episode 0 (id 1), step 10"
    ]


def test_black_and_blank_pictures_are_found(store):
    def change(frames):
        frames[row(3, 5) : row(3, 9)] = 2
        frames[row(4, 0)] = (10, 200, 30)

    edit(store, "data/images_top", change)
    (found,) = inspect(store).findings
    assert found.kind == "blank"
    assert [str(place) for place in found.places] == [
        "episode 3 (id 10), steps 5 to 8: black",
        "episode 4 (id 13), step 0: of one colour, RGB 10 200 30",
    ]


def test_two_cameras_with_the_same_pictures(store):
    shutil.rmtree(store / "data/images_wrist")
    shutil.copytree(store / "data/images_top", store / "data/images_wrist")
    (found,) = inspect(store).findings
    assert (found.kind, found.subject) == ("same_cameras", "cameras top and wrist")


def frame_bytes(store, camera, frame):
    """Where a frame's compressed bytes lie: file and offset, from the index at the shard's end."""
    shard, slot = divmod(frame, 128)
    path = store / f"data/images_{camera}/c/{shard}/0/0/0"
    index = np.frombuffer(path.read_bytes()[-(128 * 16 + 4) : -4], "<u8").reshape(128, 2)
    return path, int(index[slot, 0]), int(index[slot, 1])


@pytest.mark.parametrize(("episode", "step"), [(0, 0), (3, 77), (7, LENGTH - 1)])
def test_a_flipped_byte_of_a_frame_is_found_at_its_step(store, episode, step):
    path, offset, size = frame_bytes(store, "top", row(episode, step))
    content = bytearray(path.read_bytes())
    content[offset + size // 2] ^= 0x10
    path.write_bytes(content)
    report = inspect(store)
    assert places(report) == {("unreadable", "camera top", episode, step, step)}
    assert report.damaged


@pytest.mark.parametrize("damage", ["missing", "cut"])
def test_a_lost_shard_is_found_at_its_steps(store, damage):
    path, *_ = frame_bytes(store, "wrist", 128)
    path.unlink() if damage == "missing" else path.write_bytes(path.read_bytes()[:-1000])
    assert places(inspect(store)) == {
        ("unreadable", "camera wrist", 0, 128, LENGTH - 1),
        ("unreadable", "camera wrist", 1, 0, 255 - LENGTH),
    }


def test_a_camera_that_cannot_be_opened_leaves_the_other(store):
    (store / "data/images_top/zarr.json").write_text("{")
    report = inspect(store)
    assert [(found.kind, found.subject) for found in report.findings] == [
        ("unreadable", "data/images_top")
    ]
    assert report.pictures == NUM_EPISODES * LENGTH


def test_quick_reads_three_frames_an_episode(store):
    def change(frames):
        frames[row(2, LENGTH - 1)] = 1
        frames[row(2, 3)] = 1  # not looked at

    edit(store, "data/images_top", change)
    report = inspect(store, quick=True)
    assert report.pictures == 2 * 3 * NUM_EPISODES
    assert places(report) == {("blank", "camera top", 2, LENGTH - 1, LENGTH - 1)}


def test_frames_of_another_codec_are_read(store):
    group = zarr.open_group(store, mode="r+")
    frames = group["data/images_top"][:]
    frames[row(2, 9)] = 0
    group.create_array("data/images_top", data=frames, chunks=(100, 12, 16, 3), overwrite=True)
    assert places(inspect(store)) == {("blank", "camera top", 2, 9, 9)}


# --- the views, and the verb ---


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize("dims", [4, 64])
def test_tables_fit_the_terminal(tmp_path, monkeypatch, width, dims):
    monkeypatch.chdir(tmp_path)  # a long path is cut
    spec = dataclasses.replace(SPEC, dim_qpos=dims, dim_action=dims)
    path = write(Path("s.zarr"), [demonstration(i, spec=spec) for i in range(3)], spec)
    edit(path, "data/qpos", lambda values: values[5, 2:].fill(np.nan))
    console = Console(width=width, file=io.StringIO(), force_terminal=False)
    print_report(inspect(path), console)
    printed = console.file.getvalue()
    assert max(map(len, printed.splitlines())) <= width
    assert "…" not in printed
    assert "episode 0 (id 1), step 5" in printed
    assert re.search(rf"^ ?{dims - 1}  ", printed, re.MULTILINE)


def test_long_lists_are_cut_in_the_table_and_whole_in_json(store, tmp_path, capsys):
    edit(store, "data/qpos", lambda values: values[: row(1, 0) : 2].fill(np.nan))
    with pytest.raises(StoreError, match=f"damaged at {LENGTH // 2} places"):
        inspect_verb([str(store), "--json", str(tmp_path / "report.json")])
    assert f"and {LENGTH // 2 - 5} more places" in capsys.readouterr().out
    document = json.loads((tmp_path / "report.json").read_text())
    assert document["damaged"] is True
    assert [place["step"] for place in document["findings"][0]["places"]] == [*range(0, LENGTH, 2)]


def test_picture_is_a_png_and_shows_the_frames(clean, tmp_path, capsys):
    inspect_verb([str(clean), "--out", str(tmp_path / "deep" / "look.png"), "--episodes", "2", "5"])
    assert "nothing odd was found" in capsys.readouterr().out
    picture = Image.open(tmp_path / "deep" / "look.png")
    picture.load()
    assert picture.width == 1760
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["look.png"]


def test_picture_of_a_damaged_store_is_drawn(store, tmp_path):
    edit(store, "data/qpos", lambda values: values[row(4, 10) :, 0].fill(np.nan))
    shutil.rmtree(store / "data/images_wrist")
    path, offset, _ = frame_bytes(store, "top", 0)
    path.write_bytes(path.read_bytes()[: offset + 10])
    opened = open_leniently(store)
    content = draw_report(opened, inspect_store(opened))
    Image.open(io.BytesIO(content)).load()


def test_experiment_names_the_store_and_the_picture(clean, tmp_path, capsys, monkeypatch):
    base = Path("experiments/base.yaml").absolute()
    monkeypatch.chdir(tmp_path)
    Path("own.yaml").write_text(f"{{experiment: own, demonstrations: {{path: {clean}}}}}\n")
    inspect_verb(["--config", str(base), "--config", "own.yaml", "--quick"])
    assert str(clean.name) in capsys.readouterr().out
    assert Path("runs/own/demonstrations.png").exists()


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ([], "give a STORE"),
        (["{store}", "--config", "x.yaml"], "unrecognized"),
        (["{store}", "--frobnicate"], "unrecognized"),
        (["{store}", "--out", "x.jpg"], "ends in .png"),
    ],
)
def test_bad_usage_is_refused(clean, capsys, args, said):
    with pytest.raises(SystemExit) as error:
        inspect_verb([arg.format(store=clean) for arg in args])
    assert error.value.code == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--limits", "jump"], "NAME=NUMBER"),
        (["--limits", "jmp=3"], "no limit jmp"),
        (["--limits", "jump=-3"], "more than 0"),
        (["--limits", "length=0.5"], "more than 1"),
        (["--out", "x.png", "--episodes", "99"], "--episodes 99"),
    ],
)
def test_bad_settings_are_named(clean, args, said):
    with pytest.raises(ValueError, match=said):
        inspect_verb([str(clean), "--quick", *args])


def test_what_is_no_store_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no demonstrations at"):
        inspect_verb([str(tmp_path / "none.zarr")])
    (tmp_path / "zarr.json").write_text("[]")
    with pytest.raises(StoreError, match="not a store"):
        inspect_verb([str(tmp_path)])


def test_large_frames_are_inspected_in_bounded_memory(tmp_path):
    """600 frames of 240x320 are 138 MB; the inspection holds a few at a time."""
    spec = dataclasses.replace(SPEC, cameras=("top",), image_size=(240, 320))
    episodes = [demonstration(i, 100, spec, images=None) for i in range(6)]
    with StoreWriter.create(tmp_path / "s.zarr", spec, {}) as writer:
        for one in episodes:
            frames = np.arange(100, dtype=np.uint8)[:, None, None, None, None] + np.arange(
                320, dtype=np.uint8
            )
            writer.append(
                dataclasses.replace(one, images=np.broadcast_to(frames, (100, 1, 3, 240, 320)))
            )
        writer.finalize()
    code = (
        "import resource, sys\n"
        "from act_lightning.study.inspect.analysis import inspect_store\n"
        "from act_lightning.study.inspect.opening import open_leniently\n"
        "opened = open_leniently(sys.argv[1])\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "assert inspect_store(opened).pictures == 600\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "s.zarr")],
        capture_output=True,
        text=True,
        check=True,
    )
    assert int(done.stdout) < 30_000  # kB
