"""Grades a run: its checkpoint plays the evaluation worlds, and `results.json` says how that went.

World i of an evaluation is the same for every run (seed 1,000,000 + i), no demonstration was
recorded in it, and no checkpoint was chosen by it. Every rate comes with its number of episodes and
its Wilson 95% interval. Held-out splits (`sim.splits`) change those worlds, and go to files of
their own: `results_<split>.json`.

Under `torch.distributed` every rank plays its share of the worlds, and rank 0 writes.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml
from jsonargparse import ArgumentParser
from rich import box, get_console
from rich.table import Table

from act_lightning import __version__
from act_lightning.execution import ExecutionConfig, check_executions
from act_lightning.latent import describe_latent
from act_lightning.main import brief
from act_lightning.new_file import write_file
from act_lightning.policy import Policy
from act_lightning.sim.config import FIRST_EVALUATION_SEED, OBJECT_RANGES, EnvConfig
from act_lightning.sim.opengl import find_backend
from act_lightning.sim.ranks import gather, play_share, rank, together
from act_lightning.sim.results import EpisodeResult, summarize
from act_lightning.sim.rollout import rollout
from act_lightning.sim.splits import STANDARD, split_env
from act_lightning.study.graded import results_path
from act_lightning.study.media import Media
from act_lightning.study.smoothness import (
    Smoothness,
    arm_values,
    mean_smoothness,
    paired_table,
    smoothness,
    smoothness_table,
)


def evaluate_run(
    run: Path,
    env: EnvConfig,
    executions: Mapping[str, ExecutionConfig],
    *,
    episodes: int,
    checkpoint: str = "best",
    split: str = STANDARD,
    num_workers: int | None = None,
    media: bool = True,
) -> dict[str, Any]:
    """Plays `episodes` evaluation worlds in each way of executing, writes and prints the result.

    Args:
        run: the run's folder.
        env: the world, and what is observed of it.
        executions: ways of executing a chunk, by name.
        episodes: number of worlds.
        checkpoint: `best`, `last`, or the path of a checkpoint.
        split: which worlds; `standard`, or a held-out split of `sim.splits`.
        num_workers: simulator processes of this rank; default one a core.
        media: whether to write videos, pictures of every failure, and plots into `run`/media.

    Returns:
        The content of `results.json`. `prediction`, and with a latent `latent`, say what the
        validation before that checkpoint found out (the entries of `PredictionCallback.summary` and
        `LatentCallback.summary`).

    Raises:
        FileNotFoundError: the run or the checkpoint does not exist.
        ValueError: `episodes` is not positive, the task has no such split, or a way of executing
            does not fit the policy's chunks.
        OpenGLNotFoundError: the policy sees cameras, and nothing can be drawn here.
    """
    if episodes < 1:
        raise ValueError(f"episodes={episodes}; give 1 or more")
    env = split_env(env, split)
    with together():
        if env.is_aloha and env.cameras:
            find_backend()  # or every episode would be lost, and count as failed
        path = find_checkpoint(run, checkpoint)
        policy = Policy.from_checkpoint(path, "cuda" if torch.cuda.is_available() else "cpu")
        check_executions(executions, policy.chunk_size)
    seeds = [FIRST_EVALUATION_SEED + i for i in range(episodes)]

    def play(mine: Sequence[int]) -> list[EpisodeResult]:
        return rollout(policy, env, mine, executions, num_workers=num_workers, device=policy.device)

    with get_console().status(f"evaluating {path} in {episodes} worlds ({split})"):
        results = gather(play_share(play, seeds, executions))
    report: dict[str, Any] = {
        "task": env.task,
        "split": split,
        "checkpoint": checkpoint,
        "checkpoint_sha256": policy.sha256,
        "step": policy.step,
        "train_seconds": round(policy.train_seconds, 1),
        "training": _training(run, policy),
        **({} if policy.latent is None else {"latent": policy.latent}),
        **({} if policy.prediction is None else {"prediction": policy.prediction}),
        **_outcomes(results, policy.spec.fps, env),
        "config": {
            "env": asdict(env),
            "executions": {name: asdict(execution) for name, execution in executions.items()},
        },
        "config_sha256": hashlib.sha256((run / "config.yaml").read_bytes()).hexdigest(),
        "versions": {
            "act_lightning": __version__,
            **{name: version(name) for name in ("torch", "mujoco")},
        },
    }
    text = json.dumps(report, indent=1)
    report = json.loads(text)  # tuples are lists there
    pictures = Media(
        folder=run / "media", split=split, env=env, executions=executions, fps=policy.spec.fps
    )
    with together():
        if rank() == 0:
            target = results_path(run, split)
            write_file(target, text.encode())
            print_report(report, target)
            for line in pictures.write(policy, results, num_workers) if media else ():
                get_console().print(line, highlight=False, soft_wrap=True)
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


def read_executions(path: Path) -> dict[str, ExecutionConfig]:
    """Ways of executing by name, from a YAML file such as experiments/executions.yaml.

    Raises:
        ValueError: the file cannot be read, or does not hold ways of executing.
    """
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--executions", type=dict[str, ExecutionConfig])
    try:
        found = parser.parse_object({"executions": yaml.safe_load(path.read_text())})
        executions: dict[str, ExecutionConfig] = parser.instantiate_classes(found).executions
        check_executions(executions)
    except (OSError, yaml.YAMLError, argparse.ArgumentError, TypeError, ValueError) as error:
        raise ValueError(f"{path} does not hold ways of executing: {brief(str(error))}") from error
    return executions


def print_report(report: Mapping[str, Any], path: Path) -> None:
    """Prints each way's success, stages, episode lengths and smoothness, and what the latent does.

    Args:
        report: content of a results.json.
        path: where it was written.
    """
    worlds = "" if report["split"] == STANDARD else f", {report['split']} worlds"
    table = Table(
        title=f"{report['task']}: {report['checkpoint']} checkpoint, step {report['step']}{worlds}",
        box=box.SIMPLE,
        collapse_padding=True,
        pad_edge=False,
    )
    summaries = report["execution"]
    stages = [name for name in next(iter(summaries.values()))["stages"] if name != "success"]
    for heading in ("execution", "success", "95% interval", "worlds"):
        table.add_column(heading, no_wrap=True)
    for heading in (*stages, "steps"):
        table.add_column(heading, no_wrap=True, justify="right")
    for name, summary in summaries.items():
        low, high = summary["wilson_95"]
        steps = summary["mean_steps_to_success"]
        table.add_row(
            name,
            f"{summary['success_rate']:.1%}",
            f"{low:.1%} - {high:.1%}",
            f"{summary['successes']}/{summary['episodes']}",
            *(f"{summary['stages'][stage]:.1%}" for stage in stages),
            "-" if steps is None else f"{steps:.0f}",
        )
    get_console().print(table)
    movements = {name: s["smoothness"] for name, s in summaries.items() if "smoothness" in s}
    if movements:
        unit = "rad" if report["task"] in OBJECT_RANGES else ""
        get_console().print(smoothness_table(movements, unit))
        if sum(summary["successes"] > 0 for summary in summaries.values()) > 1:
            get_console().print(paired_table(report["worlds"], list(movements), unit))
    for name, summary in summaries.items():
        if summary["errors"]:
            line = f"{name}: {summary['errors']} episodes were stopped, see `error` in the worlds"
            get_console().print(line, highlight=False, soft_wrap=True)
    if "latent" in report:
        line = describe_latent(report["latent"])
        get_console().print(line, highlight=False, soft_wrap=True)
    get_console().print(f"written to {path}", highlight=False, soft_wrap=True)


def _training(run: Path, policy: Policy) -> dict[str, Any]:
    """Entry `training` of results.json: which training this was, and what it took."""
    settings = yaml.safe_load((run / "config.yaml").read_text()) or {}
    return {
        "experiment": settings.get("experiment"),
        "seed": settings.get("seed_everything"),
        "max_steps": (settings.get("trainer") or {}).get("max_steps"),
        "num_parameters": sum(parameter.numel() for parameter in policy.net.parameters()),
        **policy.cost,
    }


def _outcomes(results: Sequence[EpisodeResult], fps: float, env: EnvConfig) -> dict[str, Any]:
    """Entries `execution` and `worlds` of results.json."""
    summaries = summarize(results)
    worlds: dict[int, dict[str, Any]] = {}
    smoothnesses: dict[str, list[Smoothness]] = {}
    for result in results:
        entry: dict[str, Any] = {
            "success": result.success,
            "max_reward": result.max_reward,
            "steps": result.steps,
        }
        if result.error:
            entry["error"] = result.error
        if result.commands is not None:
            values = arm_values(env, result.commands.shape[1])
            measured = smoothness(result.commands, result.queries, fps, values)
            smoothnesses.setdefault(result.execution, []).append(measured)
            entry["smoothness"] = measured.as_dict()
        worlds.setdefault(result.seed, {"seed": result.seed})[result.execution] = entry
    for name, episodes in smoothnesses.items():
        summaries[name]["smoothness"] = mean_smoothness(episodes)
    return {"execution": summaries, "worlds": list(worlds.values())}
