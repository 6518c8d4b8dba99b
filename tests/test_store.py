"""The store: what is written is read back, by us and by plain zarr; nothing complete is lost."""

import errno
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import zarr

from act_lightning.batch import DataSpec
from act_lightning.data import layout
from act_lightning.data.episode import Episode
from act_lightning.data.layout import write_rows
from act_lightning.data.store import Store
from act_lightning.data.writer import StoreWriter, check_settings

SPEC = DataSpec(
    task="insertion",
    fps=50,
    dim_qpos=3,
    dim_action=2,
    dim_env_state=4,
    cameras=("top", "wrist"),
    image_size=(6, 8),
)
PROVENANCE = {"settings": {"expert": {"steps": 300}}, "versions": {"mujoco": "3.8"}}


def episode(seed, length=50, spec=SPEC):
    rng = np.random.default_rng(seed)
    shape = (length, len(spec.cameras), 3, *spec.image_size)
    return Episode(
        qpos=rng.normal(size=(length, spec.dim_qpos)).astype(np.float32),
        actions=rng.normal(size=(length, spec.dim_action)).astype(np.float32),
        env_state=rng.normal(size=(length, spec.dim_env_state)).astype(np.float32)
        if spec.dim_env_state
        else None,
        images=rng.integers(0, 256, shape, np.uint8) if spec.cameras else None,
        id=seed,
        success=seed % 2 == 0,
    )


def record(path, episodes, spec=SPEC, finalize=True):
    with StoreWriter.create(path, spec, PROVENANCE, len(episodes)) as writer:
        for one in episodes:
            writer.append(one)
        if finalize:
            writer.finalize()
    return path


def assert_holds(store, episodes):
    lengths = [len(one.actions) for one in episodes]
    assert store.episode_ends.tolist() == np.cumsum(lengths).tolist()
    assert store.episode_ids.tolist() == [one.id for one in episodes]
    assert store.episode_success.tolist() == [one.success for one in episodes]
    for name in ("qpos", "actions", "env_state"):
        wanted = [getattr(one, name) for one in episodes]
        np.testing.assert_array_equal(getattr(store, name), np.concatenate(wanted))
    images = np.concatenate([one.images for one in episodes])
    np.testing.assert_array_equal(store.read_images(np.arange(store.num_frames)), images)


# 50-step episodes cross shards of 128 and chunks of 1024 at uneven places.
def test_round_trip_across_shards_and_chunks(tmp_path):
    episodes = [episode(seed, length) for seed, length in enumerate([50, 127, 1, 128, 300, 700])]
    store = Store.open(record(tmp_path / "a.zarr", episodes))
    assert store.spec == SPEC
    assert store.provenance == PROVENANCE
    assert_holds(store, episodes)
    assert store.locate(177) == "episode 2 (id 2), step 0"


def test_plain_zarr_and_diffusion_policy_read_it(tmp_path):
    episodes = [episode(seed) for seed in range(4)]
    root = zarr.open_group(record(tmp_path / "a.zarr", episodes), mode="r")
    ends = root["meta/episode_ends"][:]
    # diffusion_policy's ReplayBuffer: every member of data/ is an array over all frames.
    members = dict(root["data"].arrays())
    assert sorted(members) == ["action", "env_state", "images_top", "images_wrist", "qpos"]
    assert not list(root["data"].groups())
    assert all(array.shape[0] == ends[-1] == 200 for array in members.values())
    np.testing.assert_array_equal(members["action"][50:100], episodes[1].actions)
    wrist = np.concatenate([one.images[:, 1] for one in episodes]).transpose(0, 2, 3, 1)
    np.testing.assert_array_equal(members["images_wrist"][:], wrist)
    assert members["images_top"].chunks == (1, 6, 8, 3)
    assert root["meta/episode_id"][:].tolist() == [0, 1, 2, 3]


def test_units_stand_at_the_arrays(tmp_path):
    path = tmp_path / "a.zarr"
    units = {"qpos": "rad", "action": "m/s"}
    with StoreWriter.create(path, SPEC, PROVENANCE, 1, units) as writer:
        writer.append(episode(0))
    assert Store.open(path).units == units | {"env_state": "not stated"}
    assert zarr.open_array(path / "data/qpos", mode="r").attrs["units"] == "rad"


@pytest.mark.parametrize(("success", "stored"), [(True, 1), (False, 0), (None, -1)])
def test_success_may_be_unknown(tmp_path, success, stored):
    path = record(tmp_path / "a.zarr", [changed(success=success)])
    assert Store.open(path).episode_success.tolist() == [stored]


def test_pickled_store_is_opened_again(tmp_path):
    path = record(tmp_path / "a.zarr", [episode(0), episode(1)])
    pickled = pickle.dumps(Store.open(path))
    assert len(pickled) < 1000
    assert_holds(pickle.loads(pickled), [episode(0), episode(1)])
    shutil.rmtree(path)
    with pytest.raises(FileNotFoundError, match="no demonstrations at"):
        pickle.loads(pickled)


class Decoded:
    """Frames given out a few at a time, as from a video; notes what was asked for."""

    def __init__(self, images, num_shown=None):
        self.images, self.shape = images, images.shape
        self.num_shown = len(images) if num_shown is None else num_shown
        self.asked = []

    def read(self, camera, start, stop):
        self.asked.append((camera, start, stop))
        return self.images[start : min(stop, self.num_shown), camera].transpose(0, 2, 3, 1)


def test_frames_are_asked_for_once_and_a_few_at_a_time(tmp_path, monkeypatch):
    path = tmp_path / "a.zarr"
    episodes = [episode(0, 100), episode(1, 300)]
    frames = Decoded(episodes[1].images)
    monkeypatch.setattr("act_lightning.data.writer.BLOCK_BYTES", 120 * 6 * 8 * 3)
    with StoreWriter.create(path, SPEC, PROVENANCE, 2) as writer:
        writer.append(episodes[0])
        writer.append(changed(**vars(episodes[1]) | {"images": frames}))
    assert_holds(Store.open(path), episodes)
    ranges = [(0, 120), (120, 240), (240, 300)]
    assert frames.asked == [(camera, *span) for camera in (0, 1) for span in ranges]


def test_frames_that_end_early_are_refused_and_leave_nothing(tmp_path):
    path = tmp_path / "a.zarr"
    with StoreWriter.create(path, SPEC, PROVENANCE, 2) as writer:
        writer.append(episode(0, 100))
        short = Decoded(episode(1, 300).images, num_shown=200)
        with pytest.raises(ValueError, match="frames 0 to 300 of camera 0 are uint8 of shape"):
            writer.append(changed(**vars(episode(1, 300)) | {"images": short}))
        writer.append(episode(2, 30))
        writer.finalize()
    assert_holds(Store.open(path), [episode(0, 100), episode(2, 30)])
    assert len(list((path / "data/images_top/c").iterdir())) == 2


VERSION_1 = Path(__file__).parent / "goldens/version_1.zarr"
"""Written by version 1: episodes 0 and 2 of 5 and 7 steps, qpos [t, t + id], world 1 failed."""


def assert_is_version_1s(store):
    assert store.episode_ids.tolist() == [0, 2]
    assert store.episode_success.tolist() == [1, 1]
    assert store.skipped == (1,)
    steps = [*range(5), *range(7)]
    np.testing.assert_array_equal(store.qpos[:, 0], steps)
    np.testing.assert_array_equal(store.qpos[:, 1], np.add(steps, [0] * 5 + [2] * 7))
    pictures = store.read_images(np.arange(12))
    assert pictures[:, 0, 0, 0, 0].tolist() == [*range(5), *range(20, 27)]


def test_version_1_opens_as_it_is():
    store = Store.open(VERSION_1, allow_incomplete=True)
    assert_is_version_1s(store)
    assert json.loads((VERSION_1 / "zarr.json").read_text())["attributes"]["version"] == 1


def test_version_1_is_migrated_by_the_next_writer_however_often_it_is_killed(tmp_path, monkeypatch):
    path = tmp_path / "a.zarr"
    shutil.copytree(VERSION_1, path)
    before = Store.open(path, allow_incomplete=True)
    budget = [0]
    real_replace = Path.replace

    def replace(source, target):
        budget[0] -= 1
        if budget[0] < 0:
            raise Killed
        return real_replace(source, target)

    monkeypatch.setattr(Path, "replace", replace)
    monkeypatch.setattr(Path, "unlink", lambda *args, **kwargs: None)
    deaths = 0
    for allowed in range(100):
        budget[0] = allowed
        try:
            writer = StoreWriter.resume(path, before.spec, before.provenance, 3)
            break
        except Killed:
            deaths += 1
            assert_is_version_1s(Store.open(path, allow_incomplete=True))
    assert deaths > 6
    monkeypatch.undo()
    with writer:
        assert writer.next_id == 3
        writer.append(
            Episode(
                qpos=np.zeros((4, 2)),
                actions=np.zeros((4, 2)),
                images=np.zeros((4, 1, 3, 6, 8), np.uint8),
                id=3,
                success=False,
            )
        )
    store = Store.open(path)
    assert store.episode_ids.tolist() == [0, 2, 3]
    assert store.episode_success.tolist() == [1, 1, 0]
    np.testing.assert_array_equal(store.qpos[:12], before.qpos)
    assert json.loads((path / "zarr.json").read_text())["attributes"]["version"] == 2
    assert not (path / "meta/episode_seed").exists()


def test_object_stores_are_not_written_to():
    with pytest.raises(ValueError, match="s3://bucket/a.zarr: an object store is read only"):
        StoreWriter.create("s3://bucket/a.zarr", SPEC, PROVENANCE)


def test_images_are_channels_last_in_memory(tmp_path):
    store = Store.open(record(tmp_path / "a.zarr", [episode(0)]))
    images = store.read_images(np.array([3, 1]), ("wrist",))
    assert images.shape == (2, 1, 3, 6, 8)
    assert images.transpose(0, 1, 3, 4, 2).flags.c_contiguous
    np.testing.assert_array_equal(images[:, 0], episode(0).images[[3, 1], 1])


def test_low_dimensional_store_without_cameras(tmp_path):
    spec = DataSpec(task="t", fps=50, dim_qpos=3, dim_action=2)
    store = Store.open(record(tmp_path / "a.zarr", [episode(5, spec=spec)], spec))
    assert store.env_state is None
    assert store.cameras == {}


class Killed(BaseException):
    pass


def test_killed_at_any_write_loses_nothing_complete(tmp_path, monkeypatch):
    """Dies after every single file operation of an append in turn, unfinished files left behind."""
    episodes = [episode(seed, 90) for seed in range(3)]
    path = record(tmp_path / "a.zarr", episodes[:1], finalize=False)
    budget = [10**9]
    real_replace = Path.replace

    def replace(source, target):
        budget[0] -= 1
        if budget[0] < 0:
            raise Killed
        return real_replace(source, target)

    monkeypatch.setattr(Path, "replace", replace)
    monkeypatch.setattr(Path, "unlink", lambda *args, **kwargs: None)
    done, deaths = 1, 0
    while done < 3:
        for allowed in range(100):
            budget[0] = 10**9
            with StoreWriter.resume(path, SPEC, PROVENANCE, 3) as writer:
                assert writer.num_episodes == done
                assert writer.next_id == done
                budget[0] = allowed
                try:
                    writer.append(episodes[done])
                    break
                except Killed:
                    deaths += 1
            assert_holds(Store.open(path, allow_incomplete=True), episodes[:done])
        done += 1
    assert deaths > 20
    assert_holds(Store.open(path), episodes)  # complete: it holds as many as expected
    ends = zarr.open_group(path, mode="r")["meta/episode_ends"]
    assert ends[:].tolist() == [90, 180, 270]


def test_resume_removes_leftovers(tmp_path, monkeypatch):
    path = record(tmp_path / "a.zarr", [episode(0, 100)], finalize=False)
    with StoreWriter.resume(path, SPEC, PROVENANCE, 3) as writer:
        monkeypatch.setattr(layout, "set_length", lambda *args: None)
        writer._write(episode(1, 200), episode(1, 200).checked_tables(SPEC))
        monkeypatch.undo()
    (path / "data/qpos/c/0/0.123.partial").touch()
    (path / "zarr.json.123.partial").touch()
    top = path / "data/images_top/c"
    assert len(list(top.iterdir())) == 3
    StoreWriter.resume(path, SPEC, PROVENANCE, 3).close()
    assert len(list(top.iterdir())) == 1
    assert not list(path.rglob("*.partial"))
    assert_holds(Store.open(path, allow_incomplete=True), [episode(0, 100)])


def test_sigkill_leaves_a_store_that_opens(tmp_path):
    path = tmp_path / "a.zarr"
    script = (
        "import sys; sys.path.insert(0, sys.argv[2])\n"
        "from test_store import *\n"
        "writer = StoreWriter.create(sys.argv[1], SPEC, PROVENANCE, 10**6)\n"
        "for seed in range(10**6): writer.append(episode(seed, 90))\n"
    )
    child = subprocess.Popen([sys.executable, "-c", script, path, Path(__file__).parent])
    try:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and not (path / "data/images_top/c/3").exists():
            time.sleep(0.02)
        with pytest.raises(ValueError, match="another process is recording"):
            StoreWriter.resume(path, SPEC, PROVENANCE)
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
    store = Store.open(path, allow_incomplete=True)
    assert store.num_episodes >= 4
    assert_holds(store, [episode(seed, 90) for seed in range(store.num_episodes)])
    with StoreWriter.resume(path, SPEC, PROVENANCE) as writer:  # the lock died with its holder
        writer.append(episode(writer.next_id))


def test_full_disk_names_the_store_and_spares_it(tmp_path, monkeypatch):
    path = record(tmp_path / "a.zarr", [episode(0)], finalize=False)
    writer = StoreWriter.resume(path, SPEC, PROVENANCE, 2)
    calls = []

    def full(descriptor):
        calls.append(descriptor)
        if len(calls) > 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ValueError, match=r"a\.zarr: writing episode 1 .*No space left on device"):
        writer.append(episode(1))
    assert not list(path.rglob("*.partial"))
    assert_holds(Store.open(path, allow_incomplete=True), [episode(0)])
    monkeypatch.undo()
    writer.append(episode(1))  # there is space again
    writer.close()
    assert_holds(Store.open(path), [episode(0), episode(1)])


def test_skipped_ids_are_remembered_in_order(tmp_path):
    path = tmp_path / "a.zarr"
    with StoreWriter.create(path, SPEC, PROVENANCE, 2) as writer:
        assert writer.next_id == 0
        writer.skip(0)
        writer.append(episode(1))
        writer.skip(2)
    with StoreWriter.resume(path, SPEC, PROVENANCE, 2) as writer:
        assert (writer.next_id, writer.num_skipped, writer.num_episodes) == (3, 2, 1)
        with pytest.raises(ValueError, match="id 2 comes after 2"):
            writer.append(episode(2))
        writer.append(episode(3))
    assert Store.open(path).skipped == (0, 2)


def test_incomplete_store_says_how_far_it_is(tmp_path):
    path = tmp_path / "a.zarr"
    with StoreWriter.create(path, SPEC, PROVENANCE, 50) as writer:
        assert Store.open(path, allow_incomplete=True).num_frames == 0
        with pytest.raises(ValueError, match="holds no episode"):
            writer.finalize()
        writer.append(episode(0))
    with pytest.raises(ValueError, match="holds 1 of 50 episodes.*make data"):
        Store.open(path)


def test_complete_store_can_be_extended(tmp_path):
    path = record(tmp_path / "a.zarr", [episode(0)])
    with StoreWriter.resume(path, SPEC, PROVENANCE, 1) as writer:
        assert writer.complete
    with StoreWriter.resume(path, SPEC, PROVENANCE, 2) as writer:
        with pytest.raises(ValueError, match="holds 1 of 2"):
            Store.open(path)
        writer.append(episode(1))
    assert Store.open(path).num_episodes == 2


def test_existing_store_is_neither_overwritten_nor_reused(tmp_path):
    path = record(tmp_path / "a.zarr", [episode(0)])
    with pytest.raises(ValueError, match="exists already"):
        StoreWriter.create(path, SPEC, PROVENANCE)
    other = {"settings": {"expert": {"steps": 400}, "noise": 0.1}, "versions": {"mujoco": "3.9"}}
    with pytest.raises(layout.StoreMismatchError) as caught:
        StoreWriter.resume(path, SPEC, other)
    message = str(caught.value)
    assert "provenance.settings.expert.steps is 300 there and 400 now" in message
    assert "provenance.settings.noise is not set there and 0.1 now" in message
    assert "mujoco" not in message
    with pytest.raises(layout.StoreMismatchError, match=r"spec.cameras is \['top', 'wrist'\]"):
        check_settings(path, DataSpec(task="insertion", fps=50, dim_qpos=3, dim_action=2), {})


def test_other_versions_are_noted(tmp_path):
    path = record(tmp_path / "a.zarr", [episode(0)])
    newer = PROVENANCE | {"versions": {"mujoco": "3.9"}}
    for _ in range(2):
        StoreWriter.resume(path, SPEC, newer, 5).close()
    attributes = json.loads((path / "zarr.json").read_text())["attributes"]
    assert attributes["resumed_with"] == [{"first_episode": 1, "versions": {"mujoco": "3.9"}}]


def changed(**changes):
    return Episode(**(vars(episode(7, 10)) | changes))


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (changed(qpos=np.where(np.eye(10, 3) * [[0, 1, 0]], np.nan, 0)), "qpos is nan at step 1, "),
        (
            changed(actions=np.full((10, 2), np.inf)),
            "episode 7: action is inf at step 0, dimension 0",
        ),
        (changed(qpos=np.zeros((9, 3))), r"qpos has shape \(9, 3\), not \(10, 3\)"),
        (changed(env_state=None), "env_state has shape None"),
        (changed(images=None), "images are None"),
        (changed(images=np.zeros((10, 2, 3, 6, 8))), "float64"),
        (changed(actions=np.zeros((0, 2))), "no steps"),
    ],
)
def test_bad_episodes_are_refused(tmp_path, bad, message):
    with StoreWriter.create(tmp_path / "a.zarr", SPEC, PROVENANCE) as writer:
        with pytest.raises(ValueError, match=message):
            writer.append(bad)
        assert writer.num_episodes == 0


def edit(path, change):
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


def flip(path, offset):
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    path.write_bytes(content)


def lose_chunk(path):
    (path / "data/qpos/c/0/0").unlink()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda p: edit(p / "zarr.json", lambda d: d["attributes"].update(version=3)),
            "version 3.*up to 2; update",
        ),
        (
            lambda p: edit(p / "zarr.json", lambda d: d["attributes"].pop("spec")),
            r"\['spec'\] are missing",
        ),
        (
            lambda p: edit(p / "zarr.json", lambda d: d["attributes"]["spec"].update(fps=0)),
            "attribute spec is damaged",
        ),
        (lambda p: (p / "zarr.json").write_text("{"), "not a store of demonstrations"),
        (lambda p: (p / "data/action/zarr.json").unlink(), "data/action cannot be read"),
        (lambda p: (p / "data/images_top/zarr.json").unlink(), "images_top cannot be read"),
        (
            lambda p: edit(p / "data/qpos/zarr.json", lambda d: d.update(shape=[9, 3])),
            "data/qpos has 9 rows instead of 100",
        ),
        (
            lambda p: edit(p / "zarr.json", lambda d: d["attributes"]["spec"].update(dim_qpos=4)),
            r"data/qpos is float32 of shape \(100, 3\), not float32 of shape \('T', 4\)",
        ),
        (
            lambda p: edit(p / "data/qpos/zarr.json", lambda d: d.update(data_type="float64")),
            "data/qpos is float64",
        ),
        (
            lambda p: edit(p / "data/images_top/zarr.json", lambda d: d.update(data_type="int8")),
            "data/images_top is int8 of shape",
        ),
        (
            lambda p: edit(p / "data/qpos/zarr.json", lambda d: d.update(attributes=None)),
            "data/qpos cannot be read",
        ),
        (
            lambda p: flip(p / "data/qpos/c/0/0", 9),
            r"data/qpos/c/0/0 .* episode 0 \(id 0\), step 0 to episode 1 \(id 1\), step 49: ",
        ),
        (lose_chunk, r"data/qpos is nan in episode 0 \(id 0\), step 0, dimension 0"),
        (lambda p: (p / "meta/episode_ends/c/0").unlink(), "does not increase at episode 0"),
        (lambda p: (p / "meta/episode_id/c/0").unlink(), "episode_id is -128 at episode 0"),
        (
            lambda p: write_rows(p / "meta/episode_id", 1, np.zeros(1, np.int64)),
            "episode_id is 0 at episode 1, and must increase",
        ),
        (lambda p: (p / "meta/episode_success/c/0").unlink(), "episode_success is -128 at"),
        (
            lambda p: edit(p / "zarr.json", lambda d: d["attributes"].update(skipped=3)),
            "attribute skipped is 3",
        ),
        (
            lambda p: edit(p / "zarr.json", lambda d: d["attributes"].update(provenance=None)),
            "attribute provenance is None",
        ),
    ],
)
def test_damage_is_named_at_opening(tmp_path, damage, message):
    path = record(tmp_path / "a.zarr", [episode(0), episode(1)])
    damage(path)
    with pytest.raises(ValueError, match=message):
        Store.open(path)


def test_nothing_at_path(tmp_path):
    with pytest.raises(FileNotFoundError, match="no demonstrations at .*make data"):
        Store.open(tmp_path / "a.zarr")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: p.unlink(), "missing"),
        (lambda p: os.truncate(p, 100), "cut off"),
        (lambda p: os.truncate(p, 5000), "checksum"),
        (lambda p: flip(p, -40), "checksum"),
        (lambda p: flip(p, 20), r"cannot be read: .*\(episode 0 \(id 0\), step 0\)"),
    ],
)
def test_damaged_images_are_named_when_read(tmp_path, damage, message):
    path = record(tmp_path / "a.zarr", [episode(0), episode(1)])
    damage(path / "data/images_top/c/0/0/0/0")
    with pytest.raises(ValueError, match=message):
        Store.open(path).read_images(np.arange(60))
