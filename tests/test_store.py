"""The store: what is written is read back, by us and by plain zarr; nothing complete is lost."""

import errno
import json
import os
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
from act_lightning.data.images import DirectFrames, ZarrFrames, open_frames
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
        seed=seed,
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
    assert store.episode_seeds.tolist() == [one.seed for one in episodes]
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
    assert store.locate(177) == "episode 2 (seed 2), step 0"


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
    assert root["meta/episode_seed"][:].tolist() == [0, 1, 2, 3]


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


@pytest.mark.parametrize(
    "compressors", ["auto", zarr.codecs.BloscCodec(cname="lz4"), zarr.codecs.ZstdCodec(level=3)]
)
@pytest.mark.parametrize("sharded", [True, False])
def test_reader_falls_back_to_zarr_for_other_layouts(tmp_path, compressors, sharded):
    frames = np.random.default_rng(0).integers(0, 256, (20, 6, 8, 3), np.uint8)
    array = zarr.create_array(
        tmp_path / "images",
        shape=frames.shape,
        dtype="uint8",
        chunks=(1, 6, 8, 3),
        shards=(8, 6, 8, 3) if sharded else None,
        compressors=compressors,
    )
    array[:] = frames
    reader = open_frames(tmp_path / "images")
    blosc = isinstance(compressors, zarr.codecs.BloscCodec)
    assert type(reader) is (ZarrFrames if blosc or not sharded else DirectFrames)
    out = np.empty((6, 8, 3), np.uint8)
    for index in (19, 0, 7, 8):
        reader.read_into(index, out)
        np.testing.assert_array_equal(out, frames[index])


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
                assert writer.next_seed == done
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
        writer.append(episode(writer.next_seed))


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


def test_failed_seeds_are_remembered_in_order(tmp_path):
    path = tmp_path / "a.zarr"
    with StoreWriter.create(path, SPEC, PROVENANCE, 2) as writer:
        assert writer.next_seed == 0
        writer.record_failure(0)
        writer.append(episode(1))
        writer.record_failure(2)
    with StoreWriter.resume(path, SPEC, PROVENANCE, 2) as writer:
        assert (writer.next_seed, writer.num_failures, writer.num_episodes) == (3, 2, 1)
        with pytest.raises(ValueError, match="seed 2 comes after 2"):
            writer.append(episode(2))
        writer.append(episode(3))
    assert Store.open(path).failed_seeds == (0, 2)


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
        (changed(actions=np.full((10, 2), np.inf)), "seed 7: action is inf at step 0, dimension 0"),
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
            lambda p: edit(p / "zarr.json", lambda d: d["attributes"].update(version=2)),
            "version 2.*up to 1; update",
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
        (lambda p: flip(p / "data/qpos/c/0/0", 9), "data/qpos cannot be read"),
        (lose_chunk, r"data/qpos is nan in episode 0 \(seed 0\), step 0, dimension 0"),
        (lambda p: (p / "meta/episode_ends/c/0").unlink(), "episode_ends does not increase"),
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
        (lambda p: flip(p, 20), r"cannot be read: .*\(episode 0 \(seed 0\), step 0\)"),
    ],
)
def test_damaged_images_are_named_when_read(tmp_path, damage, message):
    path = record(tmp_path / "a.zarr", [episode(0), episode(1)])
    damage(path / "data/images_top/c/0/0/0/0")
    with pytest.raises(ValueError, match=message):
        Store.open(path).read_images(np.arange(60))
