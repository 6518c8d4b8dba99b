"""A store damaged before or during training ends it with one clear error, and nothing hangs.

Each fault meets the three ways of reading: in the training thread, in threads, in processes. The
error must be a StoreError in the training process that names file, array, episode and step.
"""

import json
import shutil

import numpy as np
import pytest
import torch
from left_over import left_over
from lightning.pytorch import LightningModule, Trainer
from small_store import write_store

from act_lightning.data.datamodule import ACTDataModule
from act_lightning.data.layout import StoreError, write_rows

LENGTHS = (40, 30, 1, 50, 60, 20)
"""Frames 0 to 127 are in the first shard; episode 4, of id 104, spans both."""
WAYS = {
    "training thread": {"prefetch": 0},
    "threads": {"prefetch": 3},
    "processes": {"num_workers": 2, "start_method": "fork"},
}
ANYWHERE = r"\(episode \d \(id 10\d\), step \d+\)"

pytestmark = pytest.mark.timeout(60)


@pytest.fixture(scope="module")
def intact(tmp_path_factory):
    return write_store(tmp_path_factory.mktemp("store") / "a.zarr", LENGTHS)


@pytest.fixture
def store(intact, tmp_path):
    return shutil.copytree(intact, tmp_path / "copy.zarr")


@pytest.fixture(params=WAYS)
def way(request):
    return WAYS[request.param]


class Trains(LightningModule):
    """Takes steps, and does something to the store before the third."""

    def __init__(self, damage):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(3))
        self.damage = damage
        self.lengths = []

    def training_step(self, batch, batch_idx):
        if batch_idx == 2:
            self.damage()
        self.lengths += (~batch.is_pad).sum(1).tolist()
        return ((batch.actions - self.weight) ** 2 * ~batch.is_pad[..., None]).mean()

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.1)


def fit(path, way, damage=lambda: None, steps=60):
    """Trains for more than two passes over all frames."""
    settings = {"path": str(path), "batch_size": 8, "chunk_size": 3, "val_fraction": 0}
    module = Trains(damage)
    Trainer(
        accelerator="cpu",
        max_steps=steps,
        max_epochs=-1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    ).fit(module, datamodule=ACTDataModule(**settings, **way))
    return module


def fault(path, way, pattern, damage=lambda: None):
    with pytest.raises(StoreError, match=pattern) as caught:
        fit(path, way, damage)
    assert not left_over()
    message = str(caught.value)
    assert str(path) in message
    assert "Traceback" not in message
    assert "\n" not in message
    return message


def shard(store, number=0, camera="top"):
    return store / f"data/images_{camera}/c/{number}/0/0/0"


def flip(file, place):
    content = bytearray(file.read_bytes())
    content[place] ^= 1
    file.write_bytes(content)


def cut(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def edit(file, change):
    document = json.loads(file.read_text())
    change(document)
    file.write_text(json.dumps(document))


def frame_offset(file, slot):
    index = np.frombuffer(file.read_bytes()[-(128 * 16 + 4) : -4], "<u8").reshape(128, 2)
    return int(index[slot, 0] + index[slot, 1] // 2)


# ---- frames ------------------------------------------------------------------------------------


def test_an_intact_store_trains(store, way):
    """The episode of one step included: its chunk is one action and padding."""
    assert {1, 2, 3} == set(fit(store, way).lengths)
    assert not left_over()


def test_only_episodes_of_one_step(tmp_path, way):
    path = write_store(tmp_path / "short.zarr", (1,) * 9)
    data = {**way, "chunk_size": 1}
    settings = {"path": str(path), "batch_size": 4, "val_fraction": 0.2, "sampling": "episode"}
    batches = iter(ACTDataModule(**settings, **data).train_dataloader())
    for _ in range(5):
        assert not next(batches).is_pad.any()
    batches.close()
    assert not left_over()


def test_cut_shard(store, way):
    cut(shard(store, 1))
    fault(store, way, r"images_top/c/1/0/0/0.*cut off|" + ANYWHERE)


def test_flipped_byte_in_a_frame(store, way):
    """Frame 70 is the only one of episode 2, frame 125 is step 4 of episode 4."""
    flip(shard(store), frame_offset(shard(store), 70))
    fault(store, way, r"images_top/c/0/0/0/0: frame 70 .*\(episode 2 \(id 102\), step 0\)")


def test_flipped_byte_in_a_shard_index(store, way):
    flip(shard(store, 1, "left"), -50)
    fault(store, way, r"images_left/c/1/0/0/0: .*checksum.*" + ANYWHERE)


def test_missing_shard(store, way):
    shard(store, 1).unlink()
    fault(store, way, r"images_top/c/1/0/0/0: .*missing.*" + ANYWHERE)


def test_store_deleted_under_the_loader(store, way):
    fault(store, way, r"images_(top|left)/c/\d/0/0/0: .*" + ANYWHERE, lambda: shutil.rmtree(store))


def test_store_unreadable_under_the_loader(store, way):
    """Folders in place of files: root may read what has no permissions."""

    def damage():
        for file in (shard(store, 0), shard(store, 1)):
            file.unlink()
            file.mkdir()

    fault(store, way, r"images_top/c/\d/0/0/0: .*directory.*" + ANYWHERE, damage)


def test_shard_cut_under_the_loader(store, way):
    """Its index is in memory by then, or is read from what is left."""

    def damage():
        cut(shard(store, 0))
        cut(shard(store, 1))

    fault(store, way, r"images_top/c/\d/0/0/0: .*" + ANYWHERE, damage)


def test_processes_of_the_default_start_method_report_too(store):
    flip(shard(store), frame_offset(shard(store), 70))
    with pytest.raises(StoreError, match=r"frame 70 .*\(episode 2 \(id 102\), step 0\)") as caught:
        fit(store, {"num_workers": 2})
    assert "Traceback" not in str(caught.value)


# ---- found when the store is opened ------------------------------------------------------------


def test_flipped_byte_in_a_table(store, way):
    """One chunk holds all 201 rows."""
    flip(store / "data/action/c/0/0", 99)
    fault(store, way, r"data/action/c/0/0.*episode 0 \(id 100\), step 0.*episode 5 \(id 105\)")


def test_missing_chunk_of_a_table(store, way):
    (store / "data/qpos/c/0/0").unlink()
    fault(store, way, r"data/qpos.*episode 0 \(id 100\), step 0")


def test_flipped_byte_in_the_ends_of_episodes(store, way):
    flip(store / "meta/episode_ends/c/0", 3)
    fault(store, way, r"meta/episode_ends")


@pytest.mark.parametrize("name", ["spec", "format", "complete", "skipped"])
def test_missing_attribute(store, name):
    edit(store / "zarr.json", lambda document: document["attributes"].pop(name))
    fault(store, WAYS["threads"], name)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("data/images_top", "uint16"), ("data/qpos", "float64"), ("meta/episode_ends", "int32")],
)
def test_wrong_dtype(store, name, dtype):
    edit(store / name / "zarr.json", lambda document: document.update(data_type=dtype))
    fault(store, WAYS["threads"], rf"{name} .*{dtype}")


@pytest.mark.parametrize("file", ["data/images_top/zarr.json", "data/qpos/zarr.json", "zarr.json"])
def test_cut_document(store, file):
    cut(store / file)
    fault(store, WAYS["threads"], file.removesuffix("/zarr.json").removesuffix("zarr.json"))


@pytest.mark.parametrize("ends", [[40, 40, 71, 121, 181, 201], [40, 30, 71, 121, 181, 201]])
def test_episode_without_steps(store, way, ends):
    write_rows(store / "meta/episode_ends", 0, np.array(ends, np.int64))
    fault(store, way, r"meta/episode_ends.*episode 1\b.*(0|-10) steps")


def test_more_frames_than_rows(store):
    write_rows(store / "meta/episode_ends", 0, np.array([40, 70, 71, 121, 181, 999], np.int64))
    fault(store, WAYS["threads"], r"data/qpos has 201 rows instead of 999")
