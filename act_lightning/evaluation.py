"""Grades a run: its checkpoint plays the evaluation worlds, and `results.json` says how that went.

World i of an evaluation is the same for every run (seed 1,000,000 + i), no demonstration was
recorded in it, and no checkpoint was chosen by it. Every rate comes with its number of episodes and
its Wilson 95% interval.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich import box, get_console
from rich.table import Table

from act_lightning import __version__
from act_lightning.execution import ExecutionConfig
from act_lightning.latent import describe_latent
from act_lightning.policy import Policy
from act_lightning.sim.config import EnvConfig
from act_lightning.sim.env import STAGES
from act_lightning.sim.record import FIRST_EVALUATION_SEED
from act_lightning.sim.results import EpisodeResult, summarize
from act_lightning.sim.rollout import rollout


def evaluate_run(
    run: Path,
    env: EnvConfig,
    executions: Mapping[str, ExecutionConfig],
    *,
    episodes: int,
    checkpoint: str = "best",
    num_workers: int | None = None,
) -> dict[str, Any]:
    """Plays `episodes` evaluation worlds in each way of executing, writes and prints the result.

    Args:
        run: the run's folder.
        env: the world, and what is observed of it.
        executions: ways of executing a chunk, by name.
        episodes: number of worlds.
        checkpoint: `best`, `last`, or the path of a checkpoint.
        num_workers: simulator processes; default one a core.

    Returns:
        The content of `results.json`. With a latent, `latent` says what the validation before that
        checkpoint found out about it (the entries of `LatentCallback.summary`).

    Raises:
        FileNotFoundError: the run or the checkpoint does not exist.
        ValueError: `episodes` is not positive.
    """
    if episodes < 1:
        raise ValueError(f"episodes={episodes}; give 1 or more")
    path = find_checkpoint(run, checkpoint)
    policy = Policy.from_checkpoint(path, "cuda" if torch.cuda.is_available() else "cpu")
    seeds = [FIRST_EVALUATION_SEED + i for i in range(episodes)]
    with get_console().status(f"evaluating {path} in {episodes} worlds"):
        results = rollout(
            policy, env, seeds, executions, num_workers=num_workers, device=policy.device
        )
    target = run / "results.json"
    report = {
        "task": env.task,
        "checkpoint": checkpoint,
        "checkpoint_sha256": policy.sha256,
        "step": policy.step,
        "train_seconds": round(policy.train_seconds, 1),
        **({} if policy.latent is None else {"latent": policy.latent}),
        "execution": summarize(results),
        "worlds": _worlds(results),
        "versions": {
            "act_lightning": __version__,
            **{name: version(name) for name in ("torch", "mujoco")},
        },
    }
    _write_atomically(target, json.dumps(report, indent=1))
    print_report(report, target)
    return report


def find_checkpoint(run: Path, checkpoint: str) -> Path:
    """Path of the `best` or `last` checkpoint of a run, or of the file named.

    Raises:
        FileNotFoundError: it does not exist.
    """
    if not run.is_dir():
        raise FileNotFoundError(
            f"run {run} does not exist; give a folder such as runs/debug/version_0"
        )
    named = run / "checkpoints" / f"{checkpoint}.ckpt"
    path = named if checkpoint in ("best", "last") else Path(checkpoint)
    if not path.is_file():
        raise FileNotFoundError(
            f"checkpoint {path} does not exist; train on with `make resume RUN={run}`, "
            "or name another with --checkpoint"
        )
    return path


def print_report(report: Mapping[str, Any], path: Path) -> None:
    """Prints each way's success, stages and episode lengths, and what the latent does."""
    table = Table(
        title=f"{report['task']}: {report['checkpoint']} checkpoint, step {report['step']}",
        box=box.SIMPLE,
        collapse_padding=True,
        pad_edge=False,
    )
    for heading in ("execution", "success", "95% interval", "worlds"):
        table.add_column(heading, no_wrap=True)
    for heading in (*STAGES[:-1], "steps"):
        table.add_column(heading, no_wrap=True, justify="right")
    for name, summary in report["execution"].items():
        low, high = summary["wilson_95"]
        steps = summary["mean_steps_to_success"]
        table.add_row(
            name,
            f"{summary['success_rate']:.1%}",
            f"{low:.1%} - {high:.1%}",
            f"{summary['successes']}/{summary['episodes']}",
            *(f"{summary['stages'][stage]:.1%}" for stage in STAGES[:-1]),
            "-" if steps is None else f"{steps:.0f}",
        )
    get_console().print(table)
    if "latent" in report:
        line = describe_latent(report["latent"])
        get_console().print(line, highlight=False, soft_wrap=True)
    get_console().print(f"written to {path}", highlight=False, soft_wrap=True)


def _worlds(results: Sequence[EpisodeResult]) -> list[dict[str, Any]]:
    worlds: dict[int, dict[str, Any]] = {}
    for result in results:
        world = worlds.setdefault(result.seed, {"seed": result.seed})
        world[result.execution] = {
            "success": result.success,
            "max_reward": result.max_reward,
            "steps": result.steps,
        }
        if result.error:
            world[result.execution]["error"] = result.error
    return list(worlds.values())


def _write_atomically(path: Path, text: str) -> None:
    part = path.with_suffix(".part")
    part.write_text(text)
    os.replace(part, path)
