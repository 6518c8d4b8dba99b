"""What augmentation costs of a training step, setting by setting, in one interleaved run.

    python tests/bench/augment.py [--device cuda] [--size 120 160] [--batch 32] [--rounds 20]

The network is that of experiments/insertion.yaml. Every round takes one step without augmentation
and augments the batch once with each setting; medians over the rounds are reported.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from networks import INSERTION, Size
from rich.console import Console
from rich.table import Table
from turns import take_turns

from act_lightning.batch import Batch
from act_lightning.nets.augment import Augmentation, AugmentConfig

COLOURS = {"brightness": 0.3, "contrast": 0.3, "saturation": 0.3}
SETTINGS = {
    "off": AugmentConfig(),
    "qpos_noise": AugmentConfig(qpos_noise=0.02),
    "shift": AugmentConfig(shift=4),
    "crop": AugmentConfig(crop=0.9),
    "brightness, contrast, saturation": AugmentConfig(**COLOURS),
    "hue": AugmentConfig(hue=0.05),
    "shift and all colours": AugmentConfig(shift=4, hue=0.05, **COLOURS),
    "everything": AugmentConfig(shift=4, crop=0.9, hue=0.05, qpos_noise=0.02, **COLOURS),
}


def make_step(size: Size, batch: Batch, device: str) -> Callable[[], None]:
    """One training step without augmentation, in bfloat16."""
    net = size.build().to(device)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4, fused=True)

    def step() -> None:
        with torch.autocast(device, torch.bfloat16):
            loss = net.losses(batch, 0)["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def main() -> None:
    """Measures, and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--size", type=int, nargs=2, default=[120, 160], help="pixels, H W")
    parser.add_argument("--cameras", type=int, default=1)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=20)
    arguments = parser.parse_args()
    size = replace(
        INSERTION,
        image_size=tuple(arguments.size),
        batch_size=arguments.batch,
        cameras=arguments.cameras,
    )
    spec = size.spec
    device: str = arguments.device
    batch = replace(size.batch(), position=0).to(device)
    std = torch.ones(spec.dim_qpos, device=device)
    augmentations = {name: Augmentation(config, spec, 0) for name, config in SETTINGS.items()}
    contenders: dict[str, Callable[[], object]] = {
        name: lambda augmentation=augmentation: augmentation(batch, std)
        for name, augmentation in augmentations.items()
    }
    contenders["a step"] = make_step(size, batch, device)

    synchronize = torch.cuda.synchronize if device == "cuda" else lambda: None
    seconds = take_turns(contenders, arguments.rounds, synchronize=synchronize)
    table = Table("", "ms", "% of a step", title=f"{spec.image_size}, batch {arguments.batch}")
    step = np.median(seconds["a step"])
    for name, times in seconds.items():
        median = np.median(times)
        table.add_row(name, f"{1000 * median:.2f}", f"{100 * median / step:.1f}")
    Console().print(f"{torch.get_num_threads()} threads, {device}, torch {torch.__version__}")
    Console().print(table)


if __name__ == "__main__":
    main()
