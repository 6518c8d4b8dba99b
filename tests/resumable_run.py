"""A run to be killed: trains on a store with the real data module, and logs a hash of every batch.

    python tests/resumable_run.py STORE FOLDER '{"max_steps": 20, "data": {...}, "trainer": {...}}'

Goes on from FOLDER/last.ckpt if there is one. Each rank appends a line of JSON for every batch to
FOLDER/rank<r>.log: optimizer steps before it, its place in the order, the frame of each sample, and
a hash of each sample's tensors. FOLDER/validation<r>.log has steps and frames of validations.
"""

import hashlib
import json
import sys
import time
import warnings
from pathlib import Path

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from act_lightning.checkpoint import AtomicCheckpointIO
from act_lightning.data.datamodule import ACTDataModule
from act_lightning.data.mirror import MirrorConfig
from act_lightning.data.wait import DataWait


def hashes(batch):
    """Hash of every tensor of each sample, dtype and shape included."""
    seen = batch.observation
    tensors = (seen.qpos, seen.images, seen.env_state, batch.actions, batch.is_pad)
    samples = []
    for row in range(len(batch)):
        digest = hashlib.sha256()
        for tensor in tensors:
            digest.update(f"{tensor.dtype}{tuple(tensor.shape[1:])}".encode())
            digest.update(tensor[row].contiguous().numpy().tobytes())
        samples.append(digest.hexdigest()[:16])
    return samples


class Logs(LightningModule):
    """Trains one weight; logs each batch before it is used."""

    def __init__(self, folder, pause):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(3))
        self.folder = folder
        self.pause = pause

    def training_step(self, batch, batch_idx):
        frames = batch.observation.qpos[:, 0].int().tolist()
        line = [self.global_step, batch.position, frames, hashes(batch)]
        with (self.folder / f"rank{self.global_rank}.log").open("a") as log:
            log.write(json.dumps(line) + "\n")
        time.sleep(self.pause)
        return ((batch.actions - self.weight) ** 2 * ~batch.is_pad[..., None]).mean()

    def validation_step(self, batch, batch_idx):
        frames = batch.observation.qpos[:, 0].int().tolist()
        with (self.folder / f"validation{self.global_rank}.log").open("a") as log:
            log.write(json.dumps([self.global_step, frames]) + "\n")

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.1)


def main(store, folder, settings):
    warnings.simplefilter("ignore")
    folder = Path(folder)
    folder.mkdir(exist_ok=True)
    defaults = {"path": store, "batch_size": 8, "chunk_size": 3, "use_env_state": True}
    mirror = MirrorConfig(**settings.get("mirror", {}))
    data = ACTDataModule(**(defaults | settings.get("data", {})), mirror=mirror)
    saves = ModelCheckpoint(
        folder, filename="last", every_n_train_steps=2, enable_version_counter=False
    )
    trainer = Trainer(
        **{
            "accelerator": "cpu",
            "max_steps": settings["max_steps"],
            "max_epochs": -1,
            "logger": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "val_check_interval": 5,
            "check_val_every_n_epoch": None,
            "num_sanity_val_steps": 0,
            "log_every_n_steps": 5,
            "callbacks": [DataWait(), saves],
            "plugins": [AtomicCheckpointIO()],
            "use_distributed_sampler": False,
        }
        | settings.get("trainer", {})
    )
    module = Logs(folder, settings.get("pause", 0.0))
    last = folder / "last.ckpt"
    trainer.fit(module, datamodule=data, ckpt_path=last if last.exists() else None)
    if trainer.is_global_zero:
        torch.save(module.weight.detach(), folder / "weight.pt")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], json.loads(sys.argv[3]))
