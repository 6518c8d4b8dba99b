"""The DataModule under a real Trainer: exact resumption, fixed validation, clear refusals."""

import contextlib
import shutil
import threading
import warnings

import numpy as np
import psutil
import pytest
import torch
from left_over import left_over, loader_processes
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from act_lightning.batch import DataSpec
from act_lightning.data.datamodule import ACTDataModule
from act_lightning.data.episode import Episode
from act_lightning.data.writer import StoreWriter

SPEC = DataSpec(
    task="t",
    fps=50,
    dim_qpos=2,
    dim_action=2,
    dim_env_state=1,
    cameras=("top", "left"),
    image_size=(4, 6),
)
LENGTHS = (7, 9, 12, 5, 8, 11, 6, 10, 9, 13)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """qpos[:, 0] is the frame's position in the store, and so names the sample."""
    path = tmp_path_factory.mktemp("store") / "a.zarr"
    rng = np.random.default_rng(0)
    with StoreWriter.create(path, SPEC, {}, len(LENGTHS)) as writer:
        start = 0
        for seed, length in enumerate(LENGTHS):
            qpos = np.stack([np.arange(start, start + length), np.full(length, seed)], 1)
            writer.append(
                Episode(
                    qpos=qpos.astype(np.float32),
                    actions=rng.normal(size=(length, 2)),
                    env_state=rng.normal(size=(length, 1)),
                    images=rng.integers(0, 256, (length, 2, 3, 4, 6), np.uint8),
                    id=seed,
                )
            )
            start += length
    return str(path)


def data_of(path, **changes):
    return ACTDataModule(**({"path": path, "batch_size": 4, "chunk_size": 3} | changes))


class Recorder(LightningModule):
    """Trains one weight, and remembers which samples it saw."""

    def __init__(self, fail_at=None):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(2))
        self.fail_at = fail_at
        self.seen, self.validated = [], []

    def training_step(self, batch, batch_idx):
        if self.fail_at == len(self.seen):
            raise RuntimeError("died in a step")
        self.seen.append(batch.observation.qpos[:, 0].int().tolist())
        return ((batch.actions - self.weight) ** 2 * ~batch.is_pad[..., None]).mean()

    def validation_step(self, batch, batch_idx):
        self.log("score", float(self.global_step))
        self.validated.append(batch.observation.qpos[:, 0].int().tolist())

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.1)


def fit(data, tmp_path, steps, ckpt_path=None, module=None, **trainer_args):
    module = module or Recorder()
    settings = {
        "accelerator": "cpu",
        "max_steps": steps,
        "max_epochs": -1,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "val_check_interval": 2,
        "check_val_every_n_epoch": None,
        "num_sanity_val_steps": 0,
        "callbacks": [ModelCheckpoint(tmp_path, save_last=True, every_n_train_steps=2)],
        "use_distributed_sampler": False,
    }
    trainer = Trainer(**(settings | trainer_args))
    trainer.fit(module, datamodule=data, ckpt_path=ckpt_path)
    return module, trainer


@pytest.mark.parametrize("prefetch", [0, 2])
def test_two_steps_and_resume_to_four_equal_four_straight(path, tmp_path, prefetch):
    straight, _ = fit(data_of(path, prefetch=prefetch), tmp_path / "a", 4)
    first, _ = fit(data_of(path, prefetch=prefetch), tmp_path / "b", 2)
    last = tmp_path / "b" / "last.ckpt"
    second, trainer = fit(data_of(path, prefetch=prefetch), tmp_path / "b", 4, last)
    assert trainer.global_step == 4
    assert first.seen + second.seen == straight.seen
    assert torch.equal(second.weight, straight.weight)
    saved = torch.load(last, weights_only=True)["ACTDataModule"]
    assert saved["samples"] == 16
    assert second.validated == straight.validated[-len(second.validated) :]
    assert not [t for t in threading.enumerate() if t.name.startswith("act-data")]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_resume_at_every_step_with_accumulation_and_across_passes(path, tmp_path, num_workers):
    """25 steps of 2 batches of 4 are more than two passes over the training frames."""
    checkpoint = ModelCheckpoint(tmp_path, save_top_k=-1, every_n_train_steps=3)
    extra = {"accumulate_grad_batches": 2, "callbacks": [checkpoint], "val_check_interval": 7}
    straight, _ = fit(data_of(path), tmp_path, 25, **extra)
    extra["callbacks"] = []
    extra["enable_checkpointing"] = False
    files = list(tmp_path.glob("*.ckpt"))
    assert len(files) == 8
    for file in files:
        step = int(file.stem.split("step=")[1])
        data = data_of(path, num_workers=num_workers, start_method="fork")
        resumed, _ = fit(data, tmp_path, 25, file, **extra)
        assert resumed.seen == straight.seen[2 * step :]
        assert torch.equal(resumed.weight, straight.weight)


def test_resume_from_a_checkpoint_saved_after_validation(path, tmp_path):
    best = ModelCheckpoint(tmp_path, monitor="score", mode="max", filename="best")
    straight, _ = fit(data_of(path), tmp_path, 9, callbacks=[best], val_check_interval=3)
    best = ModelCheckpoint(tmp_path / "b", monitor="score", mode="max", filename="best")
    fit(data_of(path), tmp_path, 4, callbacks=[best], val_check_interval=3)
    assert torch.load(tmp_path / "b/best.ckpt", weights_only=True)["global_step"] == 3
    resumed, _ = fit(data_of(path), tmp_path, 9, tmp_path / "b/best.ckpt", val_check_interval=3)
    assert resumed.seen == straight.seen[3:]


def test_interrupt_ends_the_threads(path, tmp_path):
    class Interrupted(Recorder):
        def training_step(self, batch, batch_idx):
            if len(self.seen) == 3:
                raise KeyboardInterrupt
            return super().training_step(batch, batch_idx)

    with contextlib.suppress(KeyboardInterrupt, SystemExit):
        fit(data_of(path), tmp_path, 9, module=Interrupted())
    assert not [t for t in threading.enumerate() if t.name.startswith("act-data")]


def test_checkpoint_after_a_crash_in_a_step_loses_no_batch(path, tmp_path):
    straight, _ = fit(data_of(path), tmp_path / "a", 6)
    data, module = data_of(path), Recorder(fail_at=3)
    trainer = None
    with pytest.raises(RuntimeError, match="died in a step"):
        fit(data, tmp_path / "b", 6, module=module)
    trainer = data.trainer
    trainer.save_checkpoint(tmp_path / "crash.ckpt")
    assert not [t for t in threading.enumerate() if t.name.startswith("act-data")]
    resumed, _ = fit(data_of(path), tmp_path / "b", 6, tmp_path / "crash.ckpt")
    assert module.seen + resumed.seen == straight.seen


def test_other_batch_size_goes_on_at_the_same_sample(path, tmp_path):
    straight, _ = fit(data_of(path), tmp_path / "a", 6)
    fit(data_of(path), tmp_path / "b", 2)
    resumed, _ = fit(data_of(path, batch_size=8), tmp_path / "b", 4, tmp_path / "b" / "last.ckpt")
    assert sum(resumed.seen, []) == sum(straight.seen[2:], [])


def test_another_order_on_resume_is_announced(path, tmp_path):
    fit(data_of(path), tmp_path, 2)
    with pytest.warns(UserWarning, match="seed=0, now it is 1"):
        fit(data_of(path, seed=1), tmp_path, 4, tmp_path / "last.ckpt")


def test_other_sampling_on_resume_is_announced(path, tmp_path):
    fit(data_of(path), tmp_path, 2)
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert saved["ACTDataModule"]["sampling"] == "frame"
    del saved["ACTDataModule"]["sampling"]  # as in checkpoints older than the setting
    torch.save(saved, tmp_path / "old.ckpt")
    for checkpoint in ("last.ckpt", "old.ckpt"):
        with pytest.warns(UserWarning, match="sampling=frame, now it is episode"):
            fit(data_of(path, sampling="episode"), tmp_path / "b", 4, tmp_path / checkpoint)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "the checkpoint was trained with")
        fit(data_of(path), tmp_path / "c", 4, tmp_path / "old.ckpt")


def test_episode_sampling_visits_each_training_episode_once_a_pass(path, tmp_path):
    data = data_of(path, sampling="episode", batch_size=3)
    module, _ = fit(data, tmp_path, 9)
    ends = data.store.episode_ends
    episodes = [int(np.searchsorted(ends, f, side="right")) for f in sum(module.seen, [])]
    for start in (0, 9, 18):
        assert sorted(episodes[start : start + 9]) == data.train_episodes.tolist()


def test_processes_live_through_validation_and_end_with_each_fit(path, tmp_path):
    class Watches(Recorder):
        def on_validation_start(self):
            self.processes.append(sorted(p.pid for p in loader_processes()))

    data, module = data_of(path, num_workers=2, start_method="fork"), Watches()
    module.processes = []

    def open_files():
        """All but the store's own, which it keeps open while it lives."""
        return [f.path for f in psutil.Process().open_files() if not f.path.startswith(path)]

    before = open_files()
    for number in range(3):
        fit(data, tmp_path / str(number), 6, module=module)
        assert not left_over()
    assert [len(pids) for pids in module.processes] == [2] * 9
    assert len({tuple(pids) for pids in module.processes}) == 3
    assert len(open_files()) <= len(before)
    straight, _ = fit(data_of(path), tmp_path / "s", 6)
    assert module.seen == straight.seen * 3


def test_second_fit_of_the_same_trainer_goes_on(path, tmp_path):
    straight, _ = fit(data_of(path), tmp_path / "a", 4)
    data, module = data_of(path), Recorder()
    _, trainer = fit(data, tmp_path / "b", 2, module=module)
    trainer.fit_loop.epoch_loop.max_steps = 4
    trainer.fit(module, datamodule=data)
    assert module.seen == straight.seen
    fresh, _ = fit(data, tmp_path / "c", 4)  # a new trainer starts anew
    assert fresh.seen == straight.seen


def test_two_ranks_see_one_order(path, tmp_path):
    one, _ = fit(data_of(path, batch_size=8), tmp_path / "a", 4)
    seen = []
    for rank in range(2):
        data = data_of(path, batch_size=8)
        data._rank = lambda rank=rank: (rank, 2)
        seen.append(fit(data, tmp_path / str(rank), 4)[0].seen)
    together = [left + right for left, right in zip(*seen, strict=True)]
    assert together == one.seen


def test_validation_is_the_same_every_time_and_of_other_episodes(path, tmp_path):
    data = data_of(path, val_fraction=0.2, max_val_frames=10)
    module, _ = fit(data, tmp_path, 4)
    first, second = module.validated[:3], module.validated[3:]
    assert first == second
    frames = sum(first, [])
    assert len(frames) == 10
    store = data.store
    episodes = {int(np.searchsorted(store.episode_ends, f, side="right")) for f in frames}
    assert episodes == set(data.val_episodes.tolist())
    assert not episodes & set(data.train_episodes.tolist())
    trained = {
        int(np.searchsorted(store.episode_ends, f, side="right")) for f in sum(module.seen, [])
    }
    assert trained <= set(data.train_episodes.tolist())


def test_without_validation_episodes_nothing_is_validated(path, tmp_path):
    module, _ = fit(data_of(path, val_fraction=0), tmp_path, 4)
    assert module.validated == []
    assert len(data_of(path, val_fraction=0).train_episodes) == 10


def test_statistics_are_of_the_training_episodes_only(path):
    data = data_of(path, use_env_state=True, num_episodes=3)
    store = data.store
    rows = np.isin(store.qpos[:, 1], data.train_episodes)
    torch.testing.assert_close(data.stats.qpos_mean, torch.from_numpy(store.qpos[rows].mean(0)))
    torch.testing.assert_close(
        data.stats.env_state_mean, torch.from_numpy(store.env_state[rows].mean(0))
    )
    assert data_of(path).stats.env_state_mean is None


def test_num_episodes_leaves_validation_alone(path):
    all_of_them, few = data_of(path), data_of(path, num_episodes=2)
    assert few.train_episodes.tolist() == all_of_them.train_episodes.tolist()[:2]
    assert few.val_episodes.tolist() == all_of_them.val_episodes.tolist()


def test_cameras_are_chosen_in_order(path):
    data = data_of(path, cameras=("left",))
    assert data.spec.cameras == ("left",)
    assert data.spec.dim_env_state == 0
    batch = next(iter(data.val_dataloader()))
    frames = batch.observation.qpos[:, 0].numpy().astype(int)
    np.testing.assert_array_equal(batch.observation.images, data.store.read_images(frames)[:, 1:])
    assert batch.observation.env_state is None
    blind = data_of(path, cameras=(), use_env_state=True)
    assert blind.spec.image_size == (0, 0)
    assert blind.spec.dim_env_state == 1
    assert next(iter(blind.train_dataloader())).observation.images is None
    assert data_of(path).spec.cameras == ("top", "left")


def test_construction_needs_no_store():
    data = data_of("/nowhere/a.zarr")
    with pytest.raises(FileNotFoundError, match="no demonstrations at /nowhere/a.zarr"):
        data.spec  # noqa: B018


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 0}, "data.batch_size=0; give 1 or more"),
        ({"num_workers": -1}, "data.num_workers=-1; give 0 or more"),
        ({"num_workers": 1, "prefetch": 0}, "data.prefetch=0; give 1 or more"),
        ({"val_fraction": 1.0}, "data.val_fraction=1.0"),
        ({"num_episodes": 0}, "data.num_episodes=0"),
        ({"num_episodes": 10}, "num_episodes=10, but .* has 9 training demonstrations"),
        ({"cameras": ("wrist",)}, r"no camera \['wrist'\]; it has \['top', 'left'\]"),
        ({"cameras": ("top", "top")}, "names a camera twice"),
        ({"chunk_size": 14}, "chunk_size=14 is longer than every .* 5 to 13 steps"),
    ],
)
def test_bad_settings_are_named(path, settings, message):
    with pytest.raises(ValueError, match=message):
        data_of(path, **settings).train_dataloader()


def test_env_state_must_be_there(path, tmp_path):
    spec = DataSpec(task="t", fps=50, dim_qpos=1, dim_action=1)
    with StoreWriter.create(tmp_path / "b.zarr", spec, {}, 1) as writer:
        writer.append(Episode(qpos=np.zeros((5, 1)), actions=np.zeros((5, 1)), id=0))
    with pytest.raises(ValueError, match="use_env_state=true, but .*env.env_state"):
        data_of(str(tmp_path / "b.zarr"), use_env_state=True).setup("fit")


def test_damaged_frame_ends_the_fit_with_its_name(path, tmp_path):
    copy = tmp_path / "copy.zarr"
    shutil.copytree(path, copy)
    shard = copy / "data/images_top/c/0/0/0/0"
    content = bytearray(shard.read_bytes())
    content[40] ^= 1
    shard.write_bytes(content)
    with pytest.raises(ValueError, match=r"images_top.*episode 0 \(id 0\), step 0"):
        fit(data_of(str(copy), val_fraction=0), tmp_path, 40)
    assert not [t for t in threading.enumerate() if t.name.startswith("act-data")]


def test_the_batch_is_divided_among_ranks(path):
    data = data_of(path, batch_size=12)
    for ranks, size in ((1, 12), (3, 4)):
        data._rank = lambda ranks=ranks: (0, ranks)
        assert (data.rank_batch_size, data.global_batch_size) == (size, 12)
    for ranks, fix in ((5, "give 10 or 15, or data.batch_size_per_rank"), (16, "give 16, or")):
        data._rank = lambda ranks=ranks: (0, ranks)
        with pytest.raises(ValueError, match=f"data.batch_size=12 cannot be divided .*{fix}"):
            _ = data.rank_batch_size
    data = data_of(path, batch_size=12, batch_size_per_rank=7)
    data._rank = lambda: (0, 5)
    assert (data.rank_batch_size, data.global_batch_size) == (7, 35)
    with pytest.raises(ValueError, match="data.batch_size_per_rank=0; give 1 or more"):
        data_of(path, batch_size_per_rank=0)
