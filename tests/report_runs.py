"""Run folders as `fit` and `evaluate` leave them, made up for tests of reports."""

import json
from dataclasses import asdict

import numpy as np
from torch.utils.tensorboard import SummaryWriter

from act_lightning.execution import ExecutionConfig
from act_lightning.sim.config import EnvConfig

WAYS = {
    "chunked": asdict(ExecutionConfig()),
    "ensembled": asdict(ExecutionConfig(ensemble_decay=0.01)),
}


def write_events(folder, scalars):
    """Writes `{tag: {step: value}}` as an event file."""
    with SummaryWriter(str(folder)) as writer:
        for tag, values in scalars.items():
            for step, value in values.items():
                writer.add_scalar(tag, value, step)


def curves(rng, steps=(200, 400, 600, 800), kl=3.0):
    """Scalars of a training with a latent."""
    rates = np.sort(rng.integers(0, 11, len(steps))) / 10
    return {
        "rollout/success_rate": dict(zip(steps, rates.tolist(), strict=True)),
        "val/kl": {step: kl * (1 + 0.1 * rng.random()) for step in steps},
        "val/active_units": {step: i for i, step in enumerate(steps)},
    }


def write_results(folder, outcomes, *, smooth=0.0, chunk_size=0, first_seed=1_000_000, **changes):
    """Writes a results.json.

    Args:
        folder: of the run.
        outcomes: (W,) successes by way of executing.
        smooth: if not 0, path length of every episode; jumps are a hundredth of it.
        chunk_size: if not 0, that of `prediction`.
        first_seed: of the worlds.
        changes: entries that replace others; None leaves one out.
    """
    measures = {
        "mean_squared_jerk": 1000 * smooth,
        "spectral_arc_length": -2.0,
        "border_jump": smooth / 100,
        "inner_jump": smooth / 200,
        "path_length": smooth,
    }
    num_worlds = len(next(iter(outcomes.values())))
    worlds = []
    for i in range(num_worlds):
        episodes = {
            name: {"success": bool(values[i]), "max_reward": 4.0, "steps": 9}
            | ({"smoothness": measures} if smooth else {})
            for name, values in outcomes.items()
        }
        worlds.append({"seed": first_seed + i} | episodes)
    report = {
        "task": "insertion",
        "split": "standard",
        "checkpoint": "best",
        "checkpoint_sha256": str(folder),
        "step": 800,
        "train_seconds": 90.0,
        "training": {
            "experiment": None,
            "seed": 0,
            "max_steps": 800,
            "num_parameters": 123456,
            "cpu_seconds": 150.0,
            "device": "cpu",
            "num_devices": 1,
        },
        "latent": {"kl": 3.0, "active_units": 2, "l1_prior": 0.2, "l1_posterior": 0.1},
        "execution": {name: {"episodes": num_worlds} for name in outcomes},
        "worlds": worlds,
        "config": {
            "env": asdict(EnvConfig()),
            "executions": {name: WAYS[name] for name in outcomes},
        },
        "versions": {"torch": "2", "mujoco": "3"},
    }
    if chunk_size:
        errors = [0.1 + 0.01 * i for i in range(chunk_size - 1)] + [None]
        report["prediction"] = {"step": 800, "l1_by_horizon": errors}
    report = {name: value for name, value in (report | changes).items() if value is not None}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps(report))
