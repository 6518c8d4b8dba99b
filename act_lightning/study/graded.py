"""What an evaluation left in a run's folder, and whether two of them can be compared.

Two runs can be compared world by world if they played the same worlds: the same task, settings of
the world, split and seeds, under the same ways of executing. What the policies observe of a world
may differ: that is what ablations are about.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from act_lightning.settings import flatten
from act_lightning.sim.config import EnvConfig
from act_lightning.sim.splits import STANDARD

OBSERVED = ("cameras", "image_size", "render_quality", "env_state", "observation_keys")
"""Fields of `EnvConfig` that change what is observed of a world, and nothing in it."""

_MISSING = "not set"


@dataclass(frozen=True, kw_only=True)
class GradedRun:
    """A run's evaluation; worlds in the order of their seeds."""

    folder: Path
    """The run's folder."""
    label: str
    """Its short name in tables: A, B, ..."""
    task: str
    """What was played."""
    seeds: tuple[int, ...]
    """(W,) seeds of the worlds."""
    successes: dict[str, NDArray[np.bool_]]
    """(W,) whether each world ended in success, by way of executing."""
    stopped: dict[str, int]
    """Episodes that were stopped, and count as failed, by way of executing."""
    world: dict[str, Any] | None
    """Settings of the world, nested names joined by a dot; None if the file does not say."""
    executions: dict[str, dict[str, Any]] | None
    """Settings of each way of executing; None if the file does not say."""
    checkpoint: str
    """Which checkpoint was played: best, last, or a path."""
    checkpoint_sha256: str
    """Its hash."""
    versions: dict[str, str]
    """Versions of the software that played."""
    report: dict[str, Any]
    """All that the file says."""


def results_path(run: Path, split: str = STANDARD) -> Path:
    """Where the evaluation of a run in the worlds of a split is written."""
    return run / ("results.json" if split == STANDARD else f"results_{split}.json")


def read_graded(run: Path, label: str, split: str = STANDARD) -> GradedRun:
    """Reads a run's evaluation.

    Files written before worlds' settings were kept have no `config`: what it says is then None.

    Raises:
        FileNotFoundError: the run does not exist, or has not been evaluated in that split.
        ValueError: the file is damaged.
    """
    path = results_path(run, split)
    if not run.is_dir():
        raise FileNotFoundError(f"run {run} does not exist; give a folder as runs/debug/version_0")
    if not path.is_file():
        option = "" if split == STANDARD else f" --split {split}"
        raise FileNotFoundError(
            f"run {run} has no {path.name}: it was not evaluated in these worlds, or was "
            f"interrupted before; `python -m act_lightning evaluate {run}{option}` does that"
        )
    try:
        report = json.loads(path.read_text())
        return _graded(run, label, report)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(
            f"{path} is not the result of an evaluation, or is damaged ({error!r}); "
            "evaluate the run again"
        ) from error


def check_comparable(runs: Sequence[GradedRun], executions: Sequence[str]) -> list[str]:
    """Sees that all runs played the same worlds under the same ways of executing.

    Args:
        runs: one or more.
        executions: the ways of executing that are to be compared.

    Returns:
        What the reader of a comparison should know, a sentence each.

    Raises:
        ValueError: two runs differ in what they played; says in what.
    """
    first = runs[0]
    for run in runs[1:]:
        if run.task != first.task:
            raise ValueError(
                f"{_names(first, run)} played other tasks: {first.task} and {run.task}; compare "
                "runs of one task"
            )
        _check_seeds(first, run)
    told = [run for run in runs if run.world is not None]
    for run in told[1:]:
        _check_settings(told[0], run, executions)
    return [*_remarks(runs, told), *stopped_episodes(runs, executions)]


def stopped_episodes(runs: Sequence[GradedRun], executions: Sequence[str]) -> list[str]:
    """A sentence for each run of which episodes were stopped, by way of executing."""
    return [
        f"{run.label}: {run.stopped[name]} {name} episodes were stopped and count as failed."
        for run in runs
        for name in executions
        if run.stopped[name]
    ]


def common_executions(runs: Sequence[GradedRun], name: str | None) -> list[str]:
    """Ways of executing that every run was played in, or the one named.

    Raises:
        ValueError: there is none, or a run lacks the one named.
    """
    if name is not None:
        for run in runs:
            if name not in run.successes:
                raise ValueError(
                    f"--execution {name}: {run.folder} was played {', '.join(run.successes)}"
                )
        return [name]
    common = [name for name in runs[0].successes if all(name in r.successes for r in runs)]
    if not common:
        played = "; ".join(f"{run.folder}: {', '.join(run.successes)}" for run in runs)
        raise ValueError(f"the runs have no way of executing in common ({played})")
    return common


def _graded(run: Path, label: str, report: Mapping[str, Any]) -> GradedRun:
    worlds = sorted(report["worlds"], key=lambda world: int(world["seed"]))
    seeds = tuple(int(world["seed"]) for world in worlds)
    if not seeds or len(set(seeds)) < len(seeds):
        raise ValueError("it names no worlds, or one twice")
    executions = list(report["execution"])
    config = report.get("config")
    return GradedRun(
        folder=run,
        label=label,
        task=str(report["task"]),
        seeds=seeds,
        successes={
            name: np.array([bool(world[name]["success"]) for world in worlds])
            for name in executions
        },
        stopped={name: sum("error" in world[name] for world in worlds) for name in executions},
        world=None if config is None else _world_settings(config["env"]),
        executions=None
        if config is None
        else {name: dict(config["executions"][name]) for name in executions},
        checkpoint=str(report["checkpoint"]),
        checkpoint_sha256=str(report["checkpoint_sha256"]),
        versions=dict(report["versions"]),
        report=dict(report),
    )


def _world_settings(env: Mapping[str, Any]) -> dict[str, Any]:
    """All fields, those younger than the file at their defaults, which is how it was played."""
    defaults = json.loads(json.dumps(asdict(EnvConfig())))
    return flatten(defaults) | flatten(env)


def _differing(first: Mapping[str, Any], second: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Names of the settings that differ, with both values."""
    for name in dict.fromkeys([*first, *second]):
        values = first.get(name, _MISSING), second.get(name, _MISSING)
        if values[0] != values[1]:
            yield name, f"{name} {_shown(values[0])} and {_shown(values[1])}"


def _check_settings(first: GradedRun, second: GradedRun, executions: Sequence[str]) -> None:
    found = [
        text
        for name, text in _differing(first.world or {}, second.world or {})
        if name.split(".")[0] not in OBSERVED
    ]
    if found:
        raise ValueError(
            f"{_names(first, second)} played in other worlds: {'; '.join(found)}; evaluate both "
            "with the same `env`"
        )
    for name in executions:
        settings = [(run.executions or {}).get(name, {}) for run in (first, second)]
        if found := [text for _, text in _differing(*settings)]:
            raise ValueError(
                f"{_names(first, second)} mean other ways of executing by {name}: "
                f"{'; '.join(found)}; evaluate both with the same settings, or name another by "
                "--execution"
            )


def _check_seeds(first: GradedRun, second: GradedRun) -> None:
    if differing := sorted(set(first.seeds) ^ set(second.seeds)):
        raise ValueError(
            f"{_names(first, second)} were evaluated in {len(first.seeds)} and "
            f"{len(second.seeds)} worlds, of which {len(differing)} are not common to both, the "
            f"first of them {differing[0]}; evaluate both with the same --episodes"
        )


def _remarks(runs: Sequence[GradedRun], told: Sequence[GradedRun]) -> Iterator[str]:
    """Sentences about `runs`, of which `told` say how they were played."""
    if silent := [run.label for run in runs if run.world is None]:
        yield (
            f"{', '.join(silent)}: evaluated before the settings of world and execution were "
            "kept, so only the task and the seeds of the worlds were checked."
        )
    observed = [
        (run, "; ".join(text for _, text in _differing(told[0].world or {}, run.world or {})))
        for run in told[1:]
    ]
    for labels, found in _together(told[:1], observed):
        yield f"{labels} observe differently: {found}."
    checkpoints: dict[str, list[str]] = {}
    for run in runs:
        checkpoints.setdefault(run.checkpoint_sha256, []).append(run.label)
    for same in checkpoints.values():
        if len(same) > 1:
            *others, last = same
            yield f"{', '.join(others)} and {last} are the same checkpoint."
    first = runs[0]
    chosen = [(run, f"{first.checkpoint} and {run.checkpoint}") for run in runs[1:]]
    differing = [
        (run, text)
        for run, text in chosen
        if run.checkpoint != first.checkpoint and run.checkpoint_sha256 != first.checkpoint_sha256
    ]
    for labels, found in _together(runs[:1], differing):
        yield f"{labels} were chosen differently: {found}."
    played = [
        (run, "; ".join(text for _, text in _differing(first.versions, run.versions)))
        for run in runs[1:]
    ]
    for labels, found in _together(runs[:1], played):
        yield f"{labels} were played by other versions: {found}."


def _together(
    first: Sequence[GradedRun], found: Sequence[tuple[GradedRun, str]]
) -> Iterator[tuple[str, str]]:
    """Labels of `first` and of all runs that differ from it in the same, and in what."""
    labels: dict[str, list[str]] = {}
    for run, text in found:
        if text:
            labels.setdefault(text, []).append(run.label)
    for text, others in labels.items():
        yield f"{first[0].label} and {', '.join(others)}", text


def _names(*runs: GradedRun) -> str:
    return " and ".join(str(run.folder) for run in runs)


def _shown(value: Any) -> str:
    return value if value is _MISSING else json.dumps(value)
