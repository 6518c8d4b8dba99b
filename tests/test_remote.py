"""Stores at s3://, against a real S3 server on loopback that is slow and faulty on demand."""

import errno
import multiprocessing
import os
import pickle
import resource
import signal
import subprocess
import sys
import threading
import time
import warnings
import zlib
from itertools import islice
from multiprocessing import forkserver
from pathlib import Path

import numpy as np
import pytest
import zarr
from s3_server import FAULTS, S3Server

from act_lightning.batch import DataSpec
from act_lightning.data import mirror as mirror_module
from act_lightning.data import remote
from act_lightning.data.episode import Episode
from act_lightning.data.files import LocalFiles, open_files
from act_lightning.data.layout import StoreError
from act_lightning.data.mirror import MirrorConfig
from act_lightning.data.order import FrameSampling, SampleOrder
from act_lightning.data.remote import S3Files
from act_lightning.data.store import Store
from act_lightning.data.stream import BatchReader, TrainingStream
from act_lightning.data.writer import StoreWriter

SPEC = DataSpec(
    task="t",
    fps=50,
    dim_qpos=2,
    dim_action=3,
    dim_env_state=1,
    cameras=("top", "left"),
    image_size=(24, 32),
)
LENGTHS = (150, 1, 90, 80)  # 321 frames: 3 shards a camera
NO_MIRROR = MirrorConfig(max_gb=0)
LATENCY = 0.02

# Reads of all shards until so many are copied; for a process of its own, without torch.
READER = """
import os, sys, zlib
from act_lightning.data.mirror import MirrorConfig
from act_lightning.data.remote import S3Files
url, directory, expected, *shards = sys.argv[1:]
files = S3Files(url, MirrorConfig(directory=directory))
files.exists()
print("ready", flush=True)
sys.stdin.readline()
def copied():
    names = [name for _, _, names in os.walk(directory) for name in names]
    return sum("images" in name and not name.endswith(".part") for name in names)
while True:
    read = b"".join(files.read_range(name, 100, 5000) for name in shards)
    if copied() >= int(expected):
        break
print(zlib.crc32(read), flush=True)
"""


@pytest.fixture(scope="module")
def server():
    with S3Server() as server, pytest.MonkeyPatch.context() as patch:
        for name in list(os.environ):
            if name.startswith("AWS_"):
                patch.delenv(name)
        for name, value in server.environment.items():
            patch.setenv(name, value)
        # One that earlier tests started would keep an environment without these.
        forkserver._forkserver._stop()
        yield server


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return record(tmp_path_factory.mktemp("store") / "a.zarr", seed=0)


@pytest.fixture(scope="module")
def local(folder):
    return Store.open(folder)


@pytest.fixture(scope="module")
def url(server, folder):
    return server.upload(folder, "demos", "deep/a.zarr")


@pytest.fixture(autouse=True)
def _healthy(server):
    server.set()


@pytest.fixture
def config(tmp_path):
    return MirrorConfig(directory=str(tmp_path / "cache"))


def record(path, seed):
    rng = np.random.default_rng(seed)
    with StoreWriter.create(path, SPEC, {}, len(LENGTHS)) as writer:
        for number, length in enumerate(LENGTHS):
            writer.append(
                Episode(
                    qpos=rng.normal(size=(length, 2)),
                    actions=rng.normal(size=(length, 3)),
                    env_state=rng.normal(size=(length, 1)),
                    images=rng.integers(0, 256, (length, 2, 3, 24, 32), np.uint8),
                    id=number,
                )
            )
    return path


def stream_of(store, **changes):
    settings = {"batch_size": 16, "prefetch": 2} | changes
    cameras = ("left", "top")
    return TrainingStream(
        reader=BatchReader(store=store, chunk_size=4, cameras=cameras, use_env_state=True),
        order=SampleOrder(FrameSampling(seed=3, frames=np.arange(store.num_frames))),
        **settings,
    )


def assert_same_batches(store, local, steps, **changes):
    stream, reference = stream_of(store, **changes), stream_of(local, prefetch=0)
    batches = iter(stream)
    for step in range(steps):
        batch, expected = next(batches), reference.batch(step)
        assert (batch.observation.images == expected.observation.images).all()
        assert (batch.observation.qpos == expected.observation.qpos).all()
        assert (batch.actions == expected.actions).all()
    stream.close()


def shards_of(folder):
    return {
        path.relative_to(folder).as_posix(): path.stat().st_size
        for path in Path(folder).glob("data/images_*/c/*/0/0/0")
    }


def copies(config):
    return [p for p in config.path.rglob("*images*") if p.suffix != ".part"]


def read_until(store, condition, seconds=30):
    """Reads frames all over the store until the mirror is as wanted."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "the mirror does not come to it"
        store.read_images(np.arange(0, store.num_frames, 20))


def is_full(store):
    mirror = store.files._process.mirror
    return mirror is not None and mirror._next_try > 0 and not mirror._copying


def whole_reads(server, key, size):
    return server.counts()[f"/{key} bytes=0-{size - 1}"]


@pytest.mark.parametrize("max_gb", [0, 1])
def test_batches_equal_local_disk(url, local, config, server, max_gb):
    server.set(latency=LATENCY)
    store = Store.open(url, mirror=MirrorConfig(directory=config.directory, max_gb=max_gb))
    assert_same_batches(store, local, steps=45)  # over two passes
    assert bool(copies(config)) == bool(max_gb)
    assert (store.qpos == local.qpos).all()
    assert (store.episode_ends == local.episode_ends).all()


def test_opening_asks_once_for_each_small_file(url, folder, server):
    store = Store.open(url, mirror=NO_MIRROR)
    small = [p for p in folder.rglob("*") if p.is_file() and "/c/" not in p.as_posix()]
    tables = [p for p in folder.rglob("c/*") if p.is_file() or "images" not in p.as_posix()]
    assert server.counts()["requests"] <= 1 + 2 * len(small) + len(tables)
    assert str(store.files) == url


def test_mirrored_store_needs_no_request(url, local, folder, config, server):
    store = Store.open(url, mirror=config)
    shards = shards_of(folder)
    read_until(store, lambda: len(copies(config)) == len(shards))
    again = Store.open(url, mirror=config)
    server.set()
    assert_same_batches(again, local, steps=21)
    assert server.counts()["requests"] == 0
    assert not list(config.path.rglob("*.part"))


@pytest.mark.parametrize("fault", FAULTS)
def test_each_kind_of_failure_is_retried(url, local, server, fault):
    server.set(failures=0.1, faults=[fault], seed=1)
    store = Store.open(url, mirror=NO_MIRROR)
    assert (store.read_images(np.arange(60)) == local.read_images(np.arange(60))).all()
    assert server.counts()[f"fault {fault}"] > 3


def test_stall_is_retried(url, local, server, monkeypatch):
    monkeypatch.setattr(remote, "TIMEOUT", 1.0)
    server.set(failures=0.05, faults=["stall"], stall=20.0)
    store = Store.open(url, mirror=NO_MIRROR)
    assert (store.read_images(np.arange(30)) == local.read_images(np.arange(30))).all()
    assert server.counts()["fault stall"] > 0


@pytest.mark.parametrize("fault", FAULTS)
def test_failing_for_good_is_one_clear_error(url, server, monkeypatch, fault):
    monkeypatch.setattr(remote, "ATTEMPTS", 3)
    store = Store.open(url, mirror=NO_MIRROR)
    server.set(failures=1.0, faults=[fault])
    with pytest.raises(StoreError) as caught:
        store.read_images(np.array([200]))
    message = str(caught.value)
    for part in ("images_top/c/1/0/0/0", "3 tries", server.url, "AWS_ENDPOINT_URL", "episode 2"):
        assert part in message
    assert url in message


def test_opening_at_a_failing_server_is_told_soon(url, server):
    server.set(failures=1.0, faults=["503"])
    start = time.monotonic()
    with pytest.raises(OSError, match="SlowDown"):
        S3Files(url).read("zarr.json")
    assert time.monotonic() - start < 10


def test_killed_server_ends_the_stream(folder, monkeypatch):
    monkeypatch.setattr(remote, "ATTEMPTS", 4)
    with S3Server() as own:
        for name, value in own.environment.items():
            monkeypatch.setenv(name, value)
        own.set(latency=LATENCY)
        store = Store.open(own.upload(folder, "demos", "a.zarr"), mirror=NO_MIRROR)
        batches = iter(stream_of(store))
        next(batches)
        own.kill()
        start = time.monotonic()
        with pytest.raises(StoreError, match=r"images_\w+/c/.*4 tries.*AWS_ENDPOINT_URL"):
            list(islice(batches, 10))
        assert time.monotonic() - start < 20


@pytest.mark.parametrize(
    ("environment", "error", "match"),
    [
        ({"AWS_ACCESS_KEY_ID": "other"}, PermissionError, "InvalidAccessKeyId.*AWS_ACCESS_KEY_ID"),
        ({"AWS_ACCESS_KEY_ID": None}, PermissionError, "credentials.*AWS_ACCESS_KEY_ID"),
        ({"AWS_SECRET_ACCESS_KEY": None}, PermissionError, "AWS_SECRET_ACCESS_KEY"),
        ({"AWS_ENDPOINT_URL": "http://127.0.0.1:9"}, OSError, "127.0.0.1:9.*AWS_ENDPOINT_URL"),
        ({"AWS_ENDPOINT_URL": "nonsense"}, OSError, "nonsense.*AWS_ENDPOINT_URL"),
        ({"AWS_PROFILE": "nobody"}, OSError, "nobody.*AWS_PROFILE"),
    ],
)
def test_wrong_settings_are_told_at_once(url, monkeypatch, tmp_path, environment, error, match):
    monkeypatch.setenv("HOME", str(tmp_path))  # no credentials there
    for name, value in environment.items():
        monkeypatch.delenv(name) if value is None else monkeypatch.setenv(name, value)
    start = time.monotonic()
    with pytest.raises(error, match=match) as caught:
        Store.open(url)
    assert url in str(caught.value)
    assert time.monotonic() - start < 15


def test_missing_bucket_store_and_file(server, url):
    with pytest.raises(FileNotFoundError, match="no bucket 'nothing-here'"):
        Store.open("s3://nothing-here/a.zarr")
    with pytest.raises(FileNotFoundError, match="s3://demos/deep/b.zarr"):
        Store.open("s3://demos/deep/b.zarr")
    with pytest.raises(FileNotFoundError, match=f"{url}/data/none"):
        S3Files(url).read("data/none")


@pytest.mark.parametrize("bad", ["s3://", "s3:///a", "http://a/b", "s3://a/b?c=d"])
def test_bad_url(bad):
    with pytest.raises(ValueError, match="give s3://bucket/path"):
        S3Files(bad)


def test_files_agree_with_local_disk(url, folder, config):
    ours, theirs = open_files(url, config), LocalFiles(folder)
    name = "data/images_top/c/0/0/0/0"
    size = (folder / name).stat().st_size
    for _ in range(2):  # over the network, then from the mirror
        assert ours.read_tail(name, 10) == theirs.read_tail(name, 10)
        assert ours.read_tail(name, size + 9) == theirs.read_tail(name, size + 9)
        for start, length in ((0, 5), (7, 0), (size - 3, 10), (size, 4), (size + 9, 4)):
            assert ours.read_range(name, start, length) == theirs.read_range(name, start, length)
        end = time.monotonic() + 20
        while not copies(config) and time.monotonic() < end:
            time.sleep(0.01)
    assert ours.read("zarr.json") == theirs.read("zarr.json")
    for present in ("", "zarr.json", "data", "data/qpos", "dat", "none"):
        assert ours.exists(present) == theirs.exists(present)


@pytest.mark.parametrize("max_gb", [0, 1])
def test_zarr_python_reads_the_same(url, local, config, max_gb):
    files = S3Files(url, MirrorConfig(directory=config.directory, max_gb=max_gb))
    frames = zarr.open_array(files.zarr_store(), path="data/images_left", mode="r")
    expected = local.read_images(np.arange(120, 140), ["left"])[:, 0]
    for _ in range(2):  # over the network, then perhaps from the mirror
        assert (frames[120:140].transpose(0, 3, 1, 2) == expected).all()


@pytest.mark.parametrize("max_gb", [0, 1])
def test_changed_object_is_an_error(server, folder, tmp_path, max_gb):
    url = server.upload(folder, f"changing-{max_gb}", "a.zarr")
    config = MirrorConfig(directory=str(tmp_path), max_gb=max_gb)
    store = Store.open(url, mirror=config)
    key = "a.zarr/data/images_top/c/0/0/0/0"
    content = (folder / "data/images_top/c/1/0/0/0").read_bytes()
    server.client().put_object(Bucket=f"changing-{max_gb}", Key=key, Body=content)
    with pytest.raises(StoreError, match=r"images_top/c/0/0/0/0 was changed.*episode 0"):
        store.read_images(np.array([5]))
    with pytest.raises(StoreError, match="was changed"):  # as its parent, not as it is now
        pickle.loads(pickle.dumps(store)).read_images(np.array([5]))
    server.client().delete_object(Bucket=f"changing-{max_gb}", Key=key)
    with pytest.raises(StoreError, match="is gone now"):
        store.read_images(np.array([5]))


def test_changed_store_is_not_served_from_old_copies(server, tmp_path, config):
    for seed in (0, 1):
        folder = record(tmp_path / f"{seed}.zarr", seed)
        url = server.upload(folder, "renewed", "a.zarr")
        store = Store.open(url, mirror=config)
        expected = len(shards_of(folder)) * (seed + 1)
        read_until(store, lambda expected=expected: len(copies(config)) == expected)
        assert_same_batches(store, Store.open(folder), steps=21)


def start_reader(url, config, folder, expected):
    """Starts READER, which waits for a line; it ends when `expected` shards are copied."""
    arguments = [url, config.directory, str(expected), *sorted(shards_of(folder))]
    process = subprocess.Popen(
        [sys.executable, "-c", READER, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "ready\n"
    return process


def test_two_processes_copy_each_shard_once(url, folder, config, server):
    shards = shards_of(folder)
    readers = [start_reader(url, config, folder, len(shards)) for _ in range(2)]
    server.set(latency=LATENCY)
    for reader in readers:
        reader.stdin.write("\n")
        reader.stdin.flush()
    read = b"".join((folder / name).read_bytes()[100:5100] for name in sorted(shards))
    answers = [reader.communicate(timeout=60)[0] for reader in readers]
    assert answers == [f"{zlib.crc32(read)}\n"] * 2
    for name, size in shards.items():
        assert whole_reads(server, f"demos/deep/a.zarr/{name}", size) == 1


def test_killed_while_copying(url, local, folder, config, server):
    reader = start_reader(url, config, folder, 6)
    server.set(bandwidth=200_000)  # seconds a shard
    reader.stdin.write("\n")
    reader.stdin.flush()
    end = time.monotonic() + 30
    while not list(config.path.rglob("*.part")):
        assert time.monotonic() < end
        time.sleep(0.01)
    reader.send_signal(signal.SIGKILL)
    reader.communicate()
    left = list(config.path.rglob("*.part"))
    assert left
    server.set()
    store = Store.open(url, mirror=config)
    read_until(store, lambda: len(copies(config)) == len(shards_of(folder)))
    assert not list(config.path.rglob("*.part"))
    server.set()
    assert_same_batches(store, local, steps=21)
    assert server.counts()["requests"] == 0


def test_store_larger_than_the_mirror(url, local, folder, config, server):
    shards = shards_of(folder)
    limit = 2.5 * max(shards.values())
    store = Store.open(url, mirror=MirrorConfig(directory=config.directory, max_gb=limit / 1e9))
    with pytest.warns(UserWarning, match="Raise data.mirror.max_gb"):
        read_until(store, lambda: is_full(store))
    assert len(copies(config)) >= 2
    kept = {path: path.stat().st_ino for path in copies(config)}
    server.set()
    assert_same_batches(store, local, steps=42)
    assert kept == {path: path.stat().st_ino for path in copies(config)}
    assert sum(p.stat().st_size for p in copies(config)) <= limit
    assert sum(whole_reads(server, f"demos/deep/a.zarr/{n}", s) for n, s in shards.items()) == 0


def test_unused_stores_make_room_and_used_ones_do_not(server, tmp_path, config, folder):
    size = sum(shards_of(folder).values())
    bounded = MirrorConfig(directory=config.directory, max_gb=1.5 * size / 1e9)
    urls = [
        server.upload(record(tmp_path / f"{n}.zarr", seed=n), f"several-{n}", "a") for n in range(3)
    ]
    reader = start_reader(urls[0], bounded, folder, 6)
    reader.communicate("\n", timeout=60)  # all of the first store is copied, and nobody reads it
    assert len(copies(bounded)) == 6

    def copies_of(number):
        return [p for p in copies(bounded) if p.parent.name.startswith(f"several-{number}-")]

    second = Store.open(urls[1], mirror=bounded)
    read_until(second, lambda: len(copies_of(1)) == 6)
    assert 0 < len(copies_of(0)) < 6
    third = Store.open(urls[2], mirror=bounded)
    read_until(third, lambda: copies_of(2) and not copies_of(0))
    assert len(copies_of(1)) == 6
    assert len(copies_of(2)) < 6
    assert sum(p.stat().st_size for p in copies(bounded)) <= 1.5 * size


def test_folders_of_others_are_left_alone(url, tmp_path):
    config = MirrorConfig(directory=str(tmp_path), max_gb=1e-6)
    other = tmp_path / "mirror" / "holiday" / "photo.jpg"
    other.parent.mkdir(parents=True)
    other.write_bytes(bytes(100_000))
    store = Store.open(url, mirror=config)
    store.read_images(np.arange(40))
    assert other.stat().st_size == 100_000


def test_disk_that_is_nearly_full_is_left_free(url, local, config, monkeypatch):
    monkeypatch.setattr(mirror_module, "KEEP_FREE", 2**62)
    store = Store.open(url, mirror=config)
    with pytest.warns(UserWarning, match="no room for the whole store"):
        assert_same_batches(store, local, steps=10)
    assert not copies(config)


def limited_files(url, directory, connection):
    """Reads under a limit on the size of files, which ends writing as a full disk does."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        store = Store.open(url, mirror=MirrorConfig(directory=directory))
        images = [store.read_images(np.arange(0, 321, 30)).sum() for _ in range(3)]
        time.sleep(0.5)
    mirrored = [str(w.message) for w in caught if "mirror" in str(w.message)]
    connection.send((images, mirrored))


def test_full_disk_turns_the_mirror_off(url, local, config):
    ours, theirs = multiprocessing.Pipe()
    context = multiprocessing.get_context("fork")
    process = context.Process(target=limited_files, args=(url, config.directory, theirs))
    process.start()
    images, messages = ours.recv() if ours.poll(60) else (None, None)
    process.join()
    assert images == [local.read_images(np.arange(0, 321, 30)).sum()] * 3
    assert len(messages) == 1
    assert os.strerror(errno.EFBIG) in messages[0]
    assert "data.mirror.directory" in messages[0]
    assert not list(config.path.rglob("*images*"))


def test_directory_that_cannot_be_made(url, local, tmp_path):
    (tmp_path / "file").write_text("")
    store = Store.open(url, mirror=MirrorConfig(directory=str(tmp_path / "file")))
    with pytest.warns(UserWarning, match=r"the mirror in .* is off"):
        store.read_images(np.arange(3))
    assert (store.read_images(np.arange(9)) == local.read_images(np.arange(9))).all()


def test_lost_and_cut_copies_are_fetched_again(url, local, folder, config):
    store = Store.open(url, mirror=config)
    read_until(store, lambda: len(copies(config)) == 6)
    read_until(store, lambda: not store.files._process.busy)
    for path in copies(config):
        path.unlink()
    assert (store.read_images(np.arange(321)) == local.read_images(np.arange(321))).all()
    read_until(store, lambda: len(copies(config)) == 6)
    os.truncate(copies(config)[0], 10)
    again = Store.open(url, mirror=config)
    assert (again.read_images(np.arange(321)) == local.read_images(np.arange(321))).all()


def read_sum(store, connection):
    connection.send(int(store.read_images(np.arange(0, store.num_frames, 7)).sum()))


@pytest.mark.parametrize(
    "method",
    [
        "fork",
        pytest.param("forkserver", marks=pytest.mark.slow),
        pytest.param("spawn", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("max_gb", [0, 1])
def test_processes_started_after_use(url, local, config, method, max_gb):
    store = Store.open(url, mirror=MirrorConfig(directory=config.directory, max_gb=max_gb))
    reading = threading.Event()
    thread = threading.Thread(target=keep_reading, args=(store, reading))
    thread.start()
    try:
        ours, theirs = multiprocessing.Pipe()
        context = multiprocessing.get_context(method)
        process = context.Process(target=read_sum, args=(store, theirs))
        process.start()
        assert ours.poll(60)
        assert ours.recv() == local.read_images(np.arange(0, 321, 7)).sum()
        process.join(30)
        assert process.exitcode == 0
    finally:
        reading.set()
        thread.join()


def keep_reading(store, end):
    while not end.is_set():
        store.read_images(np.arange(0, 321, 40))


def test_ending_does_not_wait_for_copies(url, config, folder, server):
    reader = start_reader(url, config, folder, 0)  # reads each shard once
    server.set(bandwidth=40_000)  # half a minute for four shards
    start = time.monotonic()
    reader.communicate("\n", timeout=60)
    assert reader.returncode == 0
    assert time.monotonic() - start < 20
    assert list(config.path.rglob("*.part"))


def test_mirror_settings(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert MirrorConfig().path == tmp_path / "act_lightning"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert MirrorConfig().path == tmp_path / ".cache" / "act_lightning"
    assert MirrorConfig(directory="~/x").path == tmp_path / "x"
    for bad in (-1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=r"mirror\.max_gb"):
            MirrorConfig(max_gb=bad)


@pytest.mark.slow
@pytest.mark.parametrize("max_gb", [0, 1])
@pytest.mark.parametrize("failures", [0, 0.01])
def test_two_loader_workers(url, local, config, server, max_gb, failures):
    server.set(latency=LATENCY, failures=failures)
    store = Store.open(url, mirror=MirrorConfig(directory=config.directory, max_gb=max_gb))
    assert_same_batches(store, local, steps=60, num_workers=2)
    assert (server.counts()["requests"] > server.counts()["fault None"]) == bool(failures)


@pytest.mark.slow
def test_one_percent_of_failures_in_many_requests(url, local, server):
    server.set(latency=LATENCY, failures=0.01)
    store = Store.open(url, mirror=NO_MIRROR)
    assert_same_batches(store, local, steps=100)  # 3,200 requests
    assert server.counts()["requests"] - server.counts()["fault None"] > 10


@pytest.mark.slow
@pytest.mark.parametrize("num_workers", [0, 2])
def test_killed_server_by_default_settings(folder, monkeypatch, num_workers):
    with S3Server() as own:
        for name, value in own.environment.items():
            monkeypatch.setenv(name, value)
        own.set(latency=LATENCY)
        store = Store.open(own.upload(folder, "demos", "a.zarr"), mirror=NO_MIRROR)
        batches = iter(stream_of(store, num_workers=num_workers))
        for _ in range(max(1, num_workers)):  # each process has opened the store by then
            next(batches)
        own.kill()
        start = time.monotonic()
        with pytest.raises(StoreError, match=r"/c/.*8 tries"):  # of a frame, or a loader's table
            list(islice(batches, 10))
        assert time.monotonic() - start < 60
