"""A store on a shared disk, with copies on the node's own: the same frames, none of half a copy."""

import os
import pickle
import time

import numpy as np
import pytest
from small_store import SPEC, write_store

from act_lightning.data import mirrored as mirrored_module
from act_lightning.data.episode import Episode
from act_lightning.data.files import LocalFiles, open_files
from act_lightning.data.mirror import MirrorConfig
from act_lightning.data.mirrored import MirroredFiles
from act_lightning.data.store import Store
from act_lightning.data.writer import StoreWriter

SHARD = "data/images_top/c/0/0/0/0"


@pytest.fixture
def folder(tmp_path):
    return write_store(tmp_path / "a.zarr", (9, 12, 7))


@pytest.fixture
def mirror(tmp_path):
    return MirrorConfig(directory=str(tmp_path / "cache"))


def copies(mirror):
    files = (mirror.path / "mirror").glob("*/*")
    return sorted(file.name for file in files if "images" in file.name and file.suffix != ".part")


def wait_for_copies(mirror, number):
    wait_until(lambda: len(copies(mirror)) >= number)


def wait_until(condition):
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_folder_has_copies_only_if_they_have_one(folder, tmp_path):
    directory = str(tmp_path)
    for mirror in (None, MirrorConfig(), MirrorConfig(directory=directory, max_gb=0)):
        assert isinstance(open_files(folder, mirror), LocalFiles)
    assert isinstance(open_files(folder, MirrorConfig(directory=directory)), MirroredFiles)


def test_files_are_those_of_the_folder(folder, mirror):
    ours, theirs = open_files(folder, mirror), LocalFiles(folder)
    size = (folder / SHARD).stat().st_size
    for _ in range(2):  # from the folder, then from the copy
        assert ours.read_tail(SHARD, 10) == theirs.read_tail(SHARD, 10)
        for start, length in ((0, 5), (7, 0), (size - 3, 10), (size, 4)):
            expected = theirs.read_range(SHARD, start, length)
            assert ours.read_range(SHARD, start, length) == expected
        wait_for_copies(mirror, 1)
    assert ours.read("zarr.json") == theirs.read("zarr.json")
    assert [ours.exists(name) for name in ("", "data/qpos", "none")] == [True, True, False]
    with pytest.raises(FileNotFoundError):
        ours.read_range("none", 0, 1)
    assert str(ours) == str(theirs)


def test_frames_come_from_the_copies_once_they_are_there(folder, mirror):
    frames = np.arange(28)
    expected = Store.open(folder).read_images(frames)
    store = Store.open(folder, mirror=mirror)
    assert (store.read_images(frames) == expected).all()
    wait_for_copies(mirror, 2)
    # Nothing is read from the folder now, by no process of the node.
    for camera in ("top", "left"):
        (folder / f"data/images_{camera}/c/0/0/0/0").write_bytes(b"damaged")
    assert (store.read_images(frames) == expected).all()
    assert (pickle.loads(pickle.dumps(store)).read_images(frames) == expected).all()


def test_a_folder_that_changes_is_another_version(folder, mirror):
    before = open_files(folder, mirror)
    content = (folder / SHARD).read_bytes()
    before.read_range(SHARD, 0, 4)
    wait_for_copies(mirror, 1)
    (folder / SHARD).write_bytes(content[::-1])
    after = open_files(folder, mirror)
    assert after.read_range(SHARD, 0, 4) == content[::-1][:4]
    wait_for_copies(mirror, 2)
    assert after.read_range(SHARD, 0, 4) == content[::-1][:4]
    assert before.read_range(SHARD, 0, 4) == content[:4]


def test_what_has_changed_since_it_was_opened_is_not_copied(folder, mirror):
    files = open_files(folder, mirror)
    (folder / SHARD).write_bytes(b"changed!" * 100)
    with pytest.raises(OSError, match=f"{SHARD} was changed since"):
        files._read_unchanged(SHARD, 0, 8)
    assert files.read_range(SHARD, 0, 8) == b"changed!"
    time.sleep(0.2)
    assert copies(mirror) == []


@pytest.mark.parametrize("read_before", [[], [0, 19]])
def test_a_store_that_is_extended_in_use_is_read_on(tmp_path, mirror, monkeypatch, read_before):
    folder = write_store(tmp_path / "a.zarr", (9, 12))
    monkeypatch.setattr(MirroredFiles, "_read_unchanged", refuse)  # no copy before it changes
    plain, mirrored = Store.open(folder), Store.open(folder, mirror=mirror)
    expected = Store.open(folder).read_images(np.arange(21))
    for store in (plain, mirrored):
        store.read_images(np.array(read_before, np.int64))
    monkeypatch.undo()
    extend(folder, length=30)
    for _ in range(2):
        for store in (plain, mirrored):
            assert (store.read_images(np.arange(21)) == expected).all()
        time.sleep(0.2)
    assert copies(mirror) == []
    assert (Store.open(folder, mirror=mirror).read_images(np.arange(21)) == expected).all()


def test_a_file_that_has_changed_is_not_tried_again(folder, mirror):
    files = open_files(folder, mirror)
    (folder / SHARD).write_bytes(b"changed!" * 100)
    files.read_range(SHARD, 0, 8)
    tried, _ = files._processes[os.getpid()]
    wait_until(lambda: SHARD in files._changed)
    tried._begin = None  # would be called
    assert files.read_tail(SHARD, 8) == (b"changed!", 800)


def test_a_file_may_be_moved_while_the_folder_is_listed(folder, mirror, monkeypatch):
    real = mirrored_module._version

    def version(file):
        if file.name == "0":
            raise FileNotFoundError(file)
        return real(file)

    monkeypatch.setattr(mirrored_module, "_version", version)
    assert SHARD not in MirroredFiles(folder, mirror)._listing


def refuse(*args):
    raise OSError


def extend(folder, length):
    with StoreWriter.resume(folder, SPEC, {}, 3) as writer:
        images = np.random.default_rng(1).integers(0, 256, (length, 2, 3, *SPEC.image_size))
        writer.append(
            Episode(
                qpos=np.zeros((length, SPEC.dim_qpos), np.float32),
                actions=np.zeros((length, SPEC.dim_action), np.float32),
                env_state=np.zeros((length, 1), np.float32),
                images=images.astype(np.uint8),
                id=200,
            )
        )
