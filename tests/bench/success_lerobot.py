"""Trains LeRobot's ACT as LeRobot's own script does, by orders, for bench/success.py.

    .venv-lerobot/bin/python tests/bench/success_lerobot.py DATASET NUM_WORKERS

`lerobot_train.train` wants accelerate, which takes part in nothing on one CPU process. So its loop
stands here, of the same parts, in the same order, with the defaults of `TrainPipelineConfig` and
`ACTConfig`: `make_train_eval_datasets`, `make_policy`, `make_pre_post_processors`,
`make_optimizer_and_scheduler`, `EpisodeAwareSampler`, DataLoader, and for each step `update_policy`
itself. Of accelerate it has what `Alone` does. What is left out is in LeRobot's favour: progress
bar, means of what is logged, checkpoints.

Its orders:

    {"until": t}       trains until `time.monotonic` is t; answers with steps and loss
    {"save": folder}   writes the policy with its processors, and in check.npz what it predicts of
                       some samples
"""

from __future__ import annotations

import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lerobot.configs.default import DatasetConfig
from lerobot.configs.train import TrainPipelineConfig
from lerobot.datasets import EpisodeAwareSampler
from lerobot.datasets.factory import make_train_eval_datasets
from lerobot.optim.factory import make_optimizer_and_scheduler
from lerobot.policies import make_policy, make_pre_post_processors
from lerobot.policies.act.configuration_act import ACTConfig
from lerobot.scripts.lerobot_train import _dataloader_worker_kwargs, update_policy
from lerobot.utils.logging_utils import AverageMeter, MetricsTracker
from lerobot.utils.random_utils import set_seed
from lerobot.utils.utils import cycle
from peers import Orders
from turns import machine

CHECKED_SAMPLES = 4


class Alone:
    """accelerate's Accelerator, of one process on a CPU in float32."""

    num_processes = 1
    autocast = staticmethod(nullcontext)
    clip_grad_norm_ = staticmethod(torch.nn.utils.clip_grad_norm_)

    @staticmethod
    def backward(loss: torch.Tensor) -> None:
        loss.backward()

    @staticmethod
    def unwrap_model(model: Any, **_: Any) -> Any:
        return model


class Training:
    """What `lerobot_train.train` makes before its loop, and the loop, a part at a time."""

    def __init__(self, root: str, num_workers: int) -> None:
        self.config = config = TrainPipelineConfig(
            dataset=DatasetConfig(repo_id="bench/success", root=root),
            policy=ACTConfig(device="cpu", push_to_hub=False),
            num_workers=num_workers,
        )
        assert config.policy is not None
        config.optimizer = config.policy.get_optimizer_preset()
        config.scheduler = config.policy.get_scheduler_preset()
        assert config.seed is not None
        set_seed(config.seed)
        self.dataset, _ = make_train_eval_datasets(config)
        meta = self.dataset.meta
        self.policy = make_policy(cfg=config.policy, ds_meta=meta)
        self.before, self.after = make_pre_post_processors(
            policy_cfg=config.policy, dataset_stats=meta.stats
        )
        self.optimizer, self.scheduler = make_optimizer_and_scheduler(config, self.policy)
        sampler = EpisodeAwareSampler(
            meta.episodes["dataset_from_index"],
            meta.episodes["dataset_to_index"],
            shuffle=True,
            seed=config.seed,
        )
        loader = torch.utils.data.DataLoader(
            self.dataset,
            num_workers=num_workers,
            batch_size=config.batch_size,
            sampler=sampler,
            **_dataloader_worker_kwargs(config),
        )
        self.batches = cycle(loader)
        names = ("loss", "grad_norm", "lr", "update_s", "dataloading_s")
        self.tracker = MetricsTracker(
            config.batch_size,
            self.dataset.num_frames,
            self.dataset.num_episodes,
            {name: AverageMeter(name) for name in names},
            accelerator=Alone(),
        )
        self.steps = 0

    def train(self, until: float) -> dict[str, Any]:
        """Takes steps until that time, one at least."""
        while True:
            batch = self.before(next(self.batches))
            self.tracker, _ = update_policy(
                self.tracker,
                self.policy,
                batch,
                self.optimizer,
                self.config.optimizer.grad_clip_norm,
                accelerator=Alone(),
                lr_scheduler=self.scheduler,
            )
            self.tracker.step()
            self.steps += 1
            if time.monotonic() >= until:
                return {"steps": self.steps, "loss": self.tracker.loss.val}

    def save(self, folder: Path) -> dict[str, Any]:
        """Writes the policy, and what it predicts; says where."""
        for part in (self.policy, self.before, self.after):
            part.save_pretrained(folder)
        places = np.linspace(0, len(self.dataset) - 1, CHECKED_SAMPLES).astype(int).tolist()
        items = torch.utils.data.default_collate([self.dataset[place] for place in places])
        chunk = self.after(self.policy.predict_action_chunk(self.before(items)))
        np.savez(
            folder / "check.npz",
            qpos=items["observation.state"],
            env_state=items["observation.environment_state"],
            actions=chunk,
        )
        return {"machine": machine()}


def main() -> None:
    """Serves until no order comes."""
    orders = Orders()
    training = Training(sys.argv[1], int(sys.argv[2]))
    while (order := orders.next()) is not None:
        saves = "save" in order
        orders.answer(training.save(Path(order["save"])) if saves else training.train(**order))


if __name__ == "__main__":
    main()
