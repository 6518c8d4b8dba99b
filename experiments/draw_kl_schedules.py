"""Draws every kind of KL schedule, and what free bits do, into results/kl_schedules.png.

Run from anywhere: `python experiments/draw_kl_schedules.py`. The curves are what training calls.
"""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from act_lightning.nets.losses import KLSchedule, kl_divergence

TARGET = Path(__file__).parent / "results" / "kl_schedules.png"
NUM_STEPS = 3000
SCHEDULES = (
    KLSchedule(kind="constant"),
    KLSchedule(kind="linear", warmup_steps=1000),
    KLSchedule(kind="cosine", warmup_steps=1000),
    KLSchedule(kind="cyclical", cycle_steps=750),
    KLSchedule(kind="cyclical", cycle_steps=750, cycle_ratio=1.0, num_cycles=3),
)
FREE_BITS = 0.5


def draw_schedule(axes: Axes, schedule: KLSchedule) -> None:
    """Draws the weight at each of the first `NUM_STEPS` steps."""
    axes.plot([schedule(step) for step in range(NUM_STEPS)], linewidth=1.5)
    settings = [(field, getattr(schedule, field.name)) for field in fields(schedule)]
    title = [
        f"{field.name}: {value}"
        for field, value in settings
        if field.name in ("kind", "weight") or value != field.default
    ]
    axes.set_title("\n".join([", ".join(title[:2]), ", ".join(title[2:]) or " "]), fontsize=8)
    axes.set_xlabel("training step", fontsize=8)
    axes.set_ylabel("weight of the KL term", fontsize=8)
    axes.set_ylim(-0.5, 11)


def draw_free_bits(axes: Axes) -> None:
    """Draws the KL term of one dimension against its divergence, with and without free bits."""
    mu = torch.linspace(0, 2, 201).sqrt()  # of a batch of one, with variance 1: KL = mu^2 / 2
    posteriors = [(m.view(1, 1), torch.zeros(1, 1)) for m in mu]
    kl = [float(kl_divergence(*posterior)) for posterior in posteriors]
    floored = [float(kl_divergence(*p, free_bits=FREE_BITS)) for p in posteriors]
    axes.plot(kl, kl, linewidth=1.0, linestyle="--", label="free_bits: 0.0")
    axes.plot(kl, floored, linewidth=1.5, label=f"free_bits: {FREE_BITS}")
    axes.set_title("one latent dimension with free bits:\nno gradient below the floor", fontsize=8)
    axes.set_xlabel("KL of the dimension [nats]", fontsize=8)
    axes.set_ylabel("what the loss counts [nats]", fontsize=8)
    axes.set_ylim(0, 1.05)
    axes.legend(fontsize=7)


def main(target: Path = TARGET) -> None:
    """Draws all panels and writes the picture to `target`."""
    figure = Figure(figsize=(9, 4.8), layout="constrained")
    panels = figure.subplots(2, 3).flat
    for axes, schedule in zip(panels, SCHEDULES, strict=False):
        draw_schedule(axes, schedule)
    draw_free_bits(figure.axes[-1])
    for axes in figure.axes:
        axes.tick_params(labelsize=7)
        axes.grid(alpha=0.3)
    target.parent.mkdir(exist_ok=True)
    # Without matplotlib's version in it, so that drawing again changes the file only if it differs.
    figure.savefig(target, metadata={"Software": None})
    print(f"written to {target}")


if __name__ == "__main__":
    main()
