"""All settings of each variant of a study, checked before the first run starts.

What `fit` would say of a wrong setting after minutes of other runs is said here at once: names and
types by the schema of the command line, values by the settings' own checks.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import yaml
from jsonargparse import ArgumentParser

from act_lightning.cli import ConfigReader
from act_lightning.data.datamodule import ACTDataModule
from act_lightning.module import OptimizerConfig
from act_lightning.nets.augment import AugmentConfig
from act_lightning.nets.chunk_net import ChunkNetConfig
from act_lightning.settings import flatten
from act_lightning.sim.config import EnvConfig
from act_lightning.sim.record import RecordConfig
from act_lightning.study.study import EXPERIMENTS, PlannedRun, Study, Variant

OF_ONE_RUN = (
    "seed_everything",
    "data.seed",
    "model.seed",
    "run",
    "ckpt_path",
    "trainer.logger",
    "trainer.precision",
)
"""Settings, and beginnings of their names, in which runs of a variant differ; the precision does
where it follows from the machine."""

NAMED_BY_USER = ("rollout.executions", "env.make_kwargs", "env.observation_keys")
"""Sections whose names are no settings of ours: no version brings new ones."""


@dataclass(frozen=True, kw_only=True)
class Resolved:
    """A variant's settings, and what follows from them."""

    settings: dict[str, Any]
    """Of `fit`, by dotted name, without those of a single run."""
    max_steps: int
    """Optimizer steps of a run."""
    executions: tuple[str, ...]
    """Ways of executing that its rollouts play."""
    demonstrations: RecordConfig
    """What is recorded for it."""
    recorded_env: EnvConfig
    """The world of the recording, and what is observed of it."""


def resolve_study(study: Study) -> dict[str, Resolved]:
    """Resolves each variant, by name.

    Raises:
        ValueError: a variant's experiment does not exist, or a setting is wrong; names both.
    """
    return {variant.name: _resolve(study, variant) for variant in study.variants}


def varying_settings(study: Study, resolved: Mapping[str, Resolved]) -> dict[str, list[Any]]:
    """Settings in which the variants differ, with their values.

    Those that the study names; all, if its variants start from several experiments.
    """
    names = [name for variant in study.variants for name in variant.settings]
    if len({variant.experiment for variant in study.variants}) > 1:
        names += [name for settings in resolved.values() for name in settings.settings]
    found = {}
    for name in dict.fromkeys(names):
        values = [
            settings.settings[name] for settings in resolved.values() if name in settings.settings
        ]
        if values and (len(values) < len(resolved) or any(value != values[0] for value in values)):
            found[name] = values
    return found


def check_run(run: PlannedRun, resolved: Resolved) -> None:
    """Sees that the run in a folder was made with the settings that are planned.

    Raises:
        ValueError: it was not, or its configuration is damaged.
    """
    path = run.folder / "config.yaml"
    try:
        made = flatten(yaml.safe_load(path.read_text()))
    except (OSError, yaml.YAMLError, AttributeError) as error:
        raise ValueError(f"{path} is damaged ({error}); delete {run.folder}") from error
    # A setting that only one of the two has is of another version, in which it had its default.
    differing = [
        f"{name} {made[name]} there and {planned} now"
        for name, planned in resolved.settings.items()
        if name in made and made[name] != planned
    ]
    for section in NAMED_BY_USER:
        there, now = _names_below(section, made), _names_below(section, resolved.settings)
        if there != now and (there or section in made):
            differing.append(f"{section} holds {_listed(there)} there and {_listed(now)} now")
    if differing:
        raise ValueError(
            f"{run.folder} was trained with other settings: {'; '.join(differing[:5])}"
            f"{' and more' if len(differing) > 5 else ''}. Delete it to train it anew, set the "
            "study back, or give its file another name"
        )


def _names_below(section: str, settings: Mapping[str, Any]) -> set[str]:
    start = f"{section}."
    return {name[len(start) :].split(".")[0] for name in settings if name.startswith(start)}


def _listed(names: set[str]) -> str:
    return ", ".join(sorted(names)) or "nothing"


def _resolve(study: Study, variant: Variant) -> Resolved:
    experiment = EXPERIMENTS / f"{variant.experiment}.yaml"
    if not experiment.is_file():
        raise ValueError(f"study {study.name}, {variant.name}: there is no {experiment}")
    try:
        reader = _read(list(study.run(variant, study.seeds[0]).arguments))
        recording = _read(study.recording_arguments(variant)) if study.record else reader
    except (argparse.ArgumentError, TypeError, ValueError) as error:
        raise ValueError(f"study {study.name}, {variant.name}: {error}") from error
    nested = yaml.safe_load(reader.parser.dump(reader.config, skip_none=False))
    _check_values(study, variant, nested)
    return Resolved(
        settings={
            name: value
            for name, value in flatten(nested).items()
            if not name.startswith(OF_ONE_RUN)
        },
        max_steps=nested["trainer"]["max_steps"],
        executions=tuple(reader.config_init.rollout.executions),
        demonstrations=recording.config_init.demonstrations,
        recorded_env=recording.config_init.env,
    )


def _read(arguments: list[str]) -> ConfigReader:
    return ConfigReader(arguments, exit_on_error=False)


def _check_values(study: Study, variant: Variant, settings: Mapping[str, Any]) -> None:
    """Builds what checks its own settings, but neither opens a store nor builds a network."""
    types = {"net": ChunkNetConfig, "optimizer": OptimizerConfig, "augment": AugmentConfig}
    parser = ArgumentParser(exit_on_error=False)
    for name, kind in types.items():
        parser.add_argument(f"--{name}", type=kind)
    parser.add_class_arguments(ACTDataModule, "data")
    linked = {
        "chunk_size": settings["model"]["net"]["init_args"]["chunk_size"],
        "path": settings["demonstrations"]["path"],
    }
    given = {name: settings["model"][name] for name in types} | {"data": settings["data"] | linked}
    try:
        parser.instantiate_classes(parser.parse_object(given))
    except (argparse.ArgumentError, TypeError, ValueError) as error:
        raise ValueError(f"study {study.name}, {variant.name}: {error}") from error
