"""Two ranks of two loader processes each, on a store that all nodes see: each sample once.

Real processes run Lightning's fit (tests/resumable_run.py) on a folder, and on an S3 server with
and without copies on local disk. Together they must see what one rank without loaders sees, in
its order, also where a run goes on with another number of ranks.
"""

import json
from collections import Counter

import pytest
import resumable_run
import torch
from s3_server import S3Server
from small_store import write_store
from test_resume import BATCH, LENGTHS, STEPS, assert_saw_the_same, read_log, run

from act_lightning.data.datamodule import ACTDataModule
from act_lightning.data.order import frames_of

ONE_RANK = {}
TWO_BY_TWO = {"data": {"num_workers": 2}, "trainer": {"devices": 2, "strategy": "ddp"}}
FORKED = {"data": {"num_workers": 2, "start_method": "fork"}}
"""Loader processes that need not import torch once more."""

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return str(write_store(tmp_path_factory.mktemp("store") / "a.zarr", LENGTHS))


@pytest.fixture(scope="module")
def straight(store, tmp_path_factory):
    """Folder of a run of one rank in this process, which reads without threads."""
    folder = tmp_path_factory.mktemp("straight")
    resumable_run.main(store, folder, {"max_steps": STEPS, "data": {"prefetch": 0}})
    return folder


@pytest.fixture(scope="module")
def server():
    with S3Server() as server, pytest.MonkeyPatch.context() as patch:
        for name, value in server.environment.items():
            patch.setenv(name, value)
        yield server


@pytest.fixture(scope="module")
def url(server, store):
    return server.upload(store, "demos", "a.zarr")


def validations(folder):
    """How often each frame was validated, by step, over all ranks."""
    seen = {}
    for log in folder.glob("validation*.log"):
        for line in log.read_text().splitlines():
            step, frames = json.loads(line)
            seen.setdefault(step, Counter()).update(frames)
    return seen


def assert_each_sample_once(folder, straight, store):
    """In each pass of training, and in each validation."""
    assert_saw_the_same(folder, straight)
    data = ACTDataModule(path=store, batch_size=BATCH, chunk_size=3)
    places = {}
    for _, position, frames, _ in read_log(folder):
        for place, frame in enumerate(frames, start=position):
            assert place not in places
            places[place] = frame
    order = [places[place] for place in range(STEPS * BATCH)]
    wanted = frames_of(data.store, data.train_episodes).tolist()
    for start in range(0, len(order) - len(wanted) + 1, len(wanted)):
        assert sorted(order[start : start + len(wanted)]) == wanted
    assert start > 0  # there was a second pass
    once = Counter(frames_of(data.store, data.val_episodes).tolist())
    assert validations(folder) == dict.fromkeys(range(5, STEPS + 1, 5), once)


def assert_learned_the_same(folder, straight):
    ours, theirs = (torch.load(place / "weight.pt") for place in (folder, straight))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_a_shared_folder(store, straight, tmp_path):
    run(store, tmp_path, TWO_BY_TWO)
    assert len(list(tmp_path.glob("rank*.log"))) == 2
    assert_each_sample_once(tmp_path, straight, store)
    assert_learned_the_same(tmp_path, straight)


def test_s3_copied_to_local_disk(store, url, server, straight, tmp_path):
    mirror = {"directory": str(tmp_path / "cache")}
    server.set(latency=0.005)
    run(url, tmp_path / "run", TWO_BY_TWO | FORKED | {"mirror": mirror})
    assert_each_sample_once(tmp_path / "run", straight, store)
    copied = [path for path in (tmp_path / "cache").rglob("*images*") if path.suffix != ".part"]
    assert copied
    # Six processes read them, two ranks and two loaders of each; one of them copies.
    sizes = {f"bytes=0-{path.stat().st_size - 1}" for path in copied}
    whole = {
        asked: times
        for asked, times in server.counts().items()
        if "/images" in asked and asked.split(" ")[-1] in sizes
    }
    assert list(whole.values()) == [1] * len(copied)


def test_s3_and_another_number_of_ranks_in_between(store, url, server, straight, tmp_path):
    server.set(latency=0.005)
    no_mirror = {"mirror": {"max_gb": 0}}
    two = TWO_BY_TWO | FORKED
    for steps, ranks in ((10, two), (16, ONE_RANK), (STEPS, two)):
        run(url, tmp_path, ranks | no_mirror | {"max_steps": steps})
    assert_each_sample_once(tmp_path, straight, store)
    assert_learned_the_same(tmp_path, straight)
