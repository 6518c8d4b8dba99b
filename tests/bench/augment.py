"""What augmentation costs of a training step, setting by setting, in one interleaved run.

    python tests/bench/augment.py [--device cuda] [--size 120 160] [--batch 32] [--rounds 20]

The network is that of experiments/insertion.yaml. Every round takes one step without augmentation
and augments the batch once with each setting; medians over the rounds are reported.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from turns import take_turns

from act_lightning.batch import Batch, DataSpec, Observation
from act_lightning.nets.act import ACTConfig
from act_lightning.nets.augment import Augmentation, AugmentConfig
from act_lightning.nets.backbone import BackboneConfig

CHUNK_SIZE = 50
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


def make_batch(spec: DataSpec, rows: int, device: str) -> Batch:
    """A batch laid out in memory as the loader's."""
    height, width = spec.image_size
    memory = torch.randint(0, 256, (rows, len(spec.cameras), height, width, 3), dtype=torch.uint8)
    return Batch(
        observation=Observation(
            qpos=torch.randn(rows, spec.dim_qpos), images=memory.permute(0, 1, 4, 2, 3)
        ),
        actions=torch.randn(rows, CHUNK_SIZE, spec.dim_action),
        is_pad=torch.zeros(rows, CHUNK_SIZE, dtype=torch.bool),
        position=0,
    ).to(device)


def make_step(spec: DataSpec, batch: Batch, device: str) -> Callable[[], None]:
    """One training step without augmentation, in bfloat16."""
    config = ACTConfig(
        chunk_size=CHUNK_SIZE,
        dim_model=128,
        num_heads=4,
        dim_feedforward=512,
        dropout=0.0,
        num_cvae_layers=1,
        num_obs_layers=2,
        backbone=BackboneConfig(weights="none", norm="group", stages=3, width=32),
    )
    net = config.build(spec).to(device)
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
    spec = DataSpec(
        task="t",
        fps=50,
        dim_qpos=14,
        dim_action=14,
        cameras=tuple(f"camera_{i}" for i in range(arguments.cameras)),
        image_size=tuple(arguments.size),
    )
    device: str = arguments.device
    torch.manual_seed(0)
    batch = make_batch(spec, arguments.batch, device)
    std = torch.ones(spec.dim_qpos, device=device)
    augmentations = {name: Augmentation(config, spec, 0) for name, config in SETTINGS.items()}
    contenders: dict[str, Callable[[], object]] = {
        name: lambda augmentation=augmentation: augmentation(batch, std)
        for name, augmentation in augmentations.items()
    }
    contenders["a step"] = make_step(spec, batch, device)

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
