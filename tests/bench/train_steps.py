"""Training steps of one contender in a process of its own, for bench/train.py.

    .venv-lerobot/bin/python tests/bench/train_steps.py CONTENDER SIZE [--device cuda]

Takes a step for every line on stdin, and answers with a line of JSON once it is done: `peak_rss`
and `peak_gpu`, in bytes, so far. The first answer comes when the process is ready.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TextIO

import torch
from networks import FULL, INSERTION, LeRobot, Size, move
from torch import nn

from act_lightning.memory import keep_freed_memory
from act_lightning.nets.backbone import ResNet18

SIZES = {"full": FULL, "insertion": INSERTION}
LR = 1e-5
CLIP = 10.0
"""LeRobot's default."""


def ours(size: Size, device: str, bfloat16: bool) -> Callable[[], None]:
    """Loss, gradients, clipping and optimizer as in `fit`, without Lightning around them."""
    import act_lightning.module  # noqa: F401  a training process has all of it in memory

    keep_freed_memory()
    net = size.build().to(device).train()
    batch = size.batch().to(device)
    optimizer = torch.optim.AdamW(net.parameters(), lr=LR, weight_decay=1e-4, fused=True)

    def step() -> None:
        with torch.autocast(device, torch.bfloat16, enabled=bfloat16):
            loss = net.losses(batch, 0)["loss"]
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()

    return step


def lerobot(
    size: Size, device: str, bfloat16: bool, *, our_resnet: bool = False
) -> Callable[[], None]:
    """What LeRobot's training script does with a batch; bfloat16 as its `use_amp` would."""
    peer = LeRobot(size.build(backbone=FULL.config.backbone), device)
    policy = peer.policy.train()
    if our_resnet:
        policy.model.backbone = _FeatureMap(size).to(device)
        channels = size.config.backbone.dim_features
        projection = nn.Conv2d(channels, size.config.dim_model, kernel_size=1).to(device)
        policy.model.encoder_img_feat_input_proj = projection
    samples = move(LeRobot.samples(size.batch(), size.spec.cameras), device)
    optimizer = policy.config.get_optimizer_preset().build(policy.get_optim_params())

    def step() -> None:
        batch = peer.before(samples)
        with torch.autocast(device, torch.bfloat16, enabled=bfloat16):
            loss, _ = policy.forward(batch)
        loss.backward()
        nn.utils.clip_grad_norm_(policy.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()

    return step


class _FeatureMap(nn.Module):
    """Our ResNet in the form of LeRobot's backbone."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.resnet = ResNet18(size.config.backbone)

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"feature_map": self.resnet(images)}


CONTENDERS: dict[str, Callable[[Size, str], Callable[[], None]]] = {
    "LeRobot, float32": lambda size, device: lerobot(size, device, False),
    "LeRobot, bf16 autocast": lambda size, device: lerobot(size, device, True),
    "LeRobot with our ResNet, float32": lambda size, device: lerobot(
        size, device, False, our_resnet=True
    ),
    "LeRobot with our ResNet, bf16 autocast": lambda size, device: lerobot(
        size, device, True, our_resnet=True
    ),
    "ours, float32": lambda size, device: ours(size, device, False),
    "ours, bf16": lambda size, device: ours(size, device, True),
}


def peak_rss() -> int:
    """Bytes of this process's own; those of the parent count until exec in `ru_maxrss`."""
    status = Path("/proc/self/status")
    if status.is_file():
        line = next(x for x in status.read_text().splitlines() if x.startswith("VmHWM"))
        return 1024 * int(line.split()[1])
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def main() -> None:
    """Serves until stdin ends."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("contender", choices=CONTENDERS)
    parser.add_argument("size", choices=SIZES)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    arguments = parser.parse_args()
    # Whatever else prints does so to stderr.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    step = CONTENDERS[arguments.contender](SIZES[arguments.size], arguments.device)
    for _ in _orders(answers):
        step()
        if arguments.device == "cuda":
            torch.cuda.synchronize()


def _orders(answers: TextIO) -> Iterator[None]:
    while True:
        peak_gpu = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
        answers.write(json.dumps({"peak_rss": peak_rss(), "peak_gpu": peak_gpu}) + "\n")
        answers.flush()
        if not sys.stdin.readline():
            return
        yield


if __name__ == "__main__":
    main()
