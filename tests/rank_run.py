"""Runs that several ranks share: Lightning's fit with rollouts, of a network that learns nothing.

    python tests/rank_run.py FOLDER '{"ranks": 2, "trouble": "crash", "timeout_s": 5}'

Plays the cases in turn; writes what came of each to FOLDER/<case>.json: every episode of
all ranks, with a hash of the actions taken, and what was logged.
"""

import hashlib
import json
import sys
import warnings
from functools import partial
from itertools import count
from pathlib import Path

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import TensorBoardLogger

from act_lightning import callbacks
from act_lightning.batch import Batch, Observation
from act_lightning.callbacks import RolloutCallback
from act_lightning.execution import ExecutionConfig
from act_lightning.launch import LaunchConfig, Ranks
from act_lightning.module import ACTModule, OptimizerConfig
from act_lightning.nets.act import ACTConfig
from act_lightning.nets.normalize import Stats
from act_lightning.sim.config import FIRST_VALIDATION_SEED, EnvConfig
from act_lightning.sim.env import data_spec
from act_lightning.sim.ranks import gather
from act_lightning.sim.rollout import RolloutPool

EXECUTIONS = {
    "chunked": ExecutionConfig(n_action_steps=3),
    "ensembled": ExecutionConfig(ensemble_decay=0.01),
}
NET = ACTConfig(
    chunk_size=4,
    dim_model=16,
    num_heads=2,
    dim_feedforward=32,
    dropout=0.0,
    num_cvae_layers=1,
    num_obs_layers=1,
    num_decoder_layers=1,
    dim_latent=4,
)
TROUBLED_WORLD = FIRST_VALIDATION_SEED + 1
"""With two ranks, one of the second's."""


def make_case(name, trouble=""):
    """World, statistics, episodes and precision of a case."""
    if name == "point":
        env = EnvConfig(
            task="rank_world:RankWorld-v0",
            observation_keys={"qpos": "place"},
            make_kwargs={"trouble": trouble, "trouble_seed": TROUBLED_WORLD},
        )
        return env, Stats.identity(data_spec(env)), 5, "32-true"
    env = EnvConfig(task="insertion", env_state=True, cameras=(), max_episode_steps=100)
    spec = data_spec(env)
    arm = torch.tensor([0.0, -0.96, 1.16, 0.0, -0.3, 0.0, 0.5])  # about where the arms start
    stats = Stats.identity(spec)
    return env, stats_around(stats, torch.cat([arm, arm])), 2, "bf16-mixed"


def stats_around(stats, pose):
    """Statistics whose actions move about `pose`."""
    return Stats(
        qpos_mean=pose,
        qpos_std=stats.qpos_std,
        action_mean=pose,
        action_std=0.1 * stats.action_std,
        env_state_mean=stats.env_state_mean,
        env_state_std=stats.env_state_std,
    )


class Batches:
    """So many random batches; None: endless."""

    def __init__(self, spec, number):
        self.spec, self.number = spec, number

    def __iter__(self):
        return map(self.make, count() if self.number is None else range(self.number))

    def make(self, seed):
        generator = torch.Generator().manual_seed(seed)
        size = self.spec.dim_env_state
        return Batch(
            observation=Observation(
                qpos=torch.randn(4, self.spec.dim_qpos, generator=generator),
                env_state=torch.randn(4, size, generator=generator) if size else None,
            ),
            actions=torch.randn(4, NET.chunk_size, self.spec.dim_action, generator=generator),
            is_pad=torch.zeros(4, NET.chunk_size, dtype=torch.bool),
        )


class LogsAlone(Callback):
    """Logs from the first rank only, in training and validation."""

    def __init__(self, how):
        self.how = how

    def on_train_batch_end(self, trainer, pl_module, *args):
        if self.how and trainer.is_global_zero:
            pl_module.log("train/alone", 1.0, **self.how)

    def on_validation_epoch_end(self, trainer, pl_module):
        if self.how and trainer.is_global_zero:
            pl_module.log("val/alone", 1.0, **self.how)


def play(case, folder, settings):
    """One run; its weights are the same for any number of ranks, for the learning rate is 0."""
    env, stats, episodes, precision = make_case(case, settings.get("trouble", ""))
    spec = data_spec(env)
    torch.manual_seed(0)
    module = ACTModule(NET, spec, stats, OptimizerConfig(lr=0.0, backbone_lr=0.0))
    callback = RolloutCallback(EXECUTIONS, env, episodes=episodes, num_workers=1)
    ranks, waits = settings["ranks"], settings.get("timeout_min", 5.0)
    trainer = Trainer(
        accelerator="cpu",
        devices=ranks,
        strategy=Ranks(LaunchConfig(timeout_min=waits)) if ranks > 1 else "auto",
        precision=precision,
        max_steps=2,
        max_epochs=-1,
        val_check_interval=2,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        logger=TensorBoardLogger(folder, name="", version=case),
        callbacks=[callback, LogsAlone(settings.get("log", {}))],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    val_batches = settings.get("val_batches", [1] * ranks)[trainer.global_rank]
    trainer.fit(module, Batches(spec, None), Batches(spec, val_batches))
    results = gather(callback.results)
    if trainer.is_global_zero:
        report = {
            "episodes": [describe(result) for result in results],
            "logged": {
                name: value.item()
                for name, value in trainer.callback_metrics.items()
                if name.startswith("rollout/")
            },
        }
        (folder / f"{case}.json").write_text(json.dumps(report))
    return trainer


def describe(result):
    commands = b"" if result.commands is None else result.commands.tobytes()
    return {
        "execution": result.execution,
        "seed": result.seed,
        "success": result.success,
        "max_reward": result.max_reward,
        "total_reward": result.total_reward,
        "steps": result.steps,
        "error": result.error,
        "commands": hashlib.sha256(commands).hexdigest(),
    }


def main(folder, settings):
    warnings.filterwarnings("ignore", ".*(dataloader|DataLoader|LeafSpec).*")
    if timeout_s := settings.get("timeout_s"):
        callbacks.RolloutPool = partial(RolloutPool, timeout_s=timeout_s)
    for case in settings.get("cases", ["point"]):
        play(case, Path(folder), settings)
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]))
