"""Training steps of one contender in a process of its own, for bench/train.py.

    .venv-lerobot/bin/python tests/bench/train_steps.py CONTENDER SIZE [--device cuda]

Takes a step when it is ordered to, and answers once it is done: `peak_rss` and `peak_gpu`, in
bytes, so far. The first answer comes when the process is ready.
"""

from __future__ import annotations

import argparse
import resource
from collections.abc import Callable
from pathlib import Path

import torch
from networks import FULL, INSERTION, LeRobot, Size, move
from peers import Orders
from torch import nn

from act_lightning.memory import keep_freed_memory

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
    net = size.build() if our_resnet else size.build(backbone=FULL.config.backbone)
    peer = LeRobot(net, device)
    policy = peer.policy.train()
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
    """Serves until no order comes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("contender", choices=CONTENDERS)
    parser.add_argument("size", choices=SIZES)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    arguments = parser.parse_args()
    orders = Orders()
    step = CONTENDERS[arguments.contender](SIZES[arguments.size], arguments.device)
    orders.answer(peaks())
    while orders.next() is not None:
        step()
        if arguments.device == "cuda":
            torch.cuda.synchronize()
        orders.answer(peaks())


def peaks() -> dict[str, int]:
    """Bytes that this process has held at most so far."""
    peak_gpu = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    return {"peak_rss": peak_rss(), "peak_gpu": peak_gpu}


if __name__ == "__main__":
    main()
