"""`train/data_wait` against waits and steps of known length."""

import time

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from small_store import write_store

from act_lightning.data import datamodule
from act_lightning.data.datamodule import ACTDataModule
from act_lightning.data.stream import BatchReader
from act_lightning.data.wait import DataWait

pytestmark = pytest.mark.timeout(120)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return str(write_store(tmp_path_factory.mktemp("store") / "a.zarr", (30, 40, 20, 30)))


class SlowReader(BatchReader):
    """Takes 60 ms a batch; found by name in loader processes."""

    def __call__(self, frames):
        time.sleep(0.06)
        return super().__call__(frames)


class Sleeper(LightningModule):
    """A step of known length; validations and what callbacks do after them take very long."""

    def __init__(self, step_seconds):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(3))
        self.step_seconds = step_seconds

    def training_step(self, batch, batch_idx):
        time.sleep(self.step_seconds)
        return ((batch.actions - self.weight) ** 2).mean()

    def validation_step(self, batch, batch_idx):
        time.sleep(0.1)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def logged(tmp_path, data, step_seconds, steps=20, **changes):
    """Share by optimizer step, as it reached the logger."""
    logger = CSVLogger(tmp_path, flush_logs_every_n_steps=1)
    settings = {
        "accelerator": "cpu",
        "max_steps": steps,
        "max_epochs": -1,
        "logger": logger,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "val_check_interval": 5,
        "check_val_every_n_epoch": None,
        "num_sanity_val_steps": 0,
        "log_every_n_steps": 5,
        "callbacks": [DataWait()],
        "use_distributed_sampler": False,
    }
    trainer = Trainer(**(settings | changes))
    trainer.fit(Sleeper(step_seconds), datamodule=data)
    logger.finalize("success")
    rows = (tmp_path / "lightning_logs/version_0/metrics.csv").read_text().splitlines()
    names = rows[0].split(",")
    table = [dict(zip(names, row.split(","), strict=True)) for row in rows[1:]]
    return {
        int(row["step"]) + 1: float(row["train/data_wait"])
        for row in table
        if row["train/data_wait"]
    }


def data_of(path, **changes):
    return ACTDataModule(**({"path": path, "batch_size": 4, "chunk_size": 3} | changes))


def test_read_in_the_training_thread(path, tmp_path, monkeypatch):
    """60 ms of waiting beside 20 ms of work: 0.75, had a sleep no overhead."""
    monkeypatch.setattr(datamodule, "BatchReader", SlowReader)
    shares = logged(tmp_path, data_of(path, prefetch=0), 0.02)
    assert sorted(shares) == [5, 10, 15, 20]
    assert all(0.5 < share < 0.85 for share in shares.values())


@pytest.mark.parametrize("ahead", [{"prefetch": 2}, {"num_workers": 2, "start_method": "fork"}])
def test_two_readers_halve_the_wait(path, tmp_path, monkeypatch, ahead):
    """A batch every 30 ms, of which 10 are work: 0.67."""
    monkeypatch.setattr(datamodule, "BatchReader", SlowReader)
    shares = logged(tmp_path, data_of(path, **ahead), 0.01, steps=40, val_check_interval=40)
    assert 0.35 < sorted(shares.values())[len(shares) // 2] < 0.8


@pytest.mark.parametrize("ahead", [{}, {"num_workers": 2, "start_method": "fork"}])
def test_no_wait_where_reading_is_quicker_than_training(path, tmp_path, ahead):
    shares = logged(tmp_path, data_of(path, **ahead), 0.1)
    assert sorted(shares) == [5, 10, 15, 20]
    # Other load on the machine lengthens single waits, but does not shorten one.
    assert min(shares.values()) < 0.1


def test_logged_once_a_step_with_accumulation(path, tmp_path):
    shares = logged(
        tmp_path, data_of(path), 0.001, accumulate_grad_batches=3, val_check_interval=50
    )
    assert sorted(shares) == [5, 10, 15, 20]
    assert all(0 <= share <= 1 for share in shares.values())


def test_other_loaders_are_left_alone(tmp_path):
    class Other(Sleeper):
        def train_dataloader(self):
            return [torch.zeros(2)] * 3

        def training_step(self, batch, batch_idx):
            return (batch[0] - self.weight).sum()

    Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[DataWait()],
    ).fit(Other(0))


@pytest.mark.gpu
def test_no_step_waits_for_the_gpu(path, tmp_path):
    """Steps are queued without a pause between two logs, and after each log."""

    class Queues(Sleeper):
        def training_step(self, batch, batch_idx):
            torch.cuda._sleep(100_000_000)  # cycles: 50 ms or more
            return ((batch.actions - self.weight) ** 2).mean()

        def on_train_batch_start(self, batch, batch_idx):
            torch.cuda.set_sync_debug_mode("error")

        def on_train_batch_end(self, outputs, batch, batch_idx):
            torch.cuda.set_sync_debug_mode("default")

    Trainer(
        accelerator="gpu",
        devices=1,
        max_steps=20,
        max_epochs=-1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        log_every_n_steps=50,
        callbacks=[DataWait()],
        use_distributed_sampler=False,
    ).fit(Queues(0), datamodule=data_of(path))
