"""A study: runs that differ in what is asked about, and in their training seeds.

A file in `experiments/studies` names an experiment, what all runs set differently, what varies
between them, and the seeds. Settings are named as on the command line, and given whole:

    experiment: insertion_state
    settings: {trainer.max_steps: 700}
    variants: {constant: {}, linear: {model.net.init_args.kl_schedule.kind: linear}}
    grid: {model.net.init_args.kl_schedule.weight: [0.1, 1]}
    seeds: [0, 1, 2]

This makes four variants (constant,weight=0.1 and so on) of three runs each, in
`runs/studies/<study>/<variant>/seed_<n>`. Nothing is trained here, nor checked by the schema of
the settings: see `sweep`.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentParser

from act_lightning.main import brief

EXPERIMENTS = Path("experiments")
OWN_SETTINGS = ("experiment", "run", "seed_everything", "ckpt_path")
"""Settings that a study decides for each run, so that its file cannot."""
FREE = ("settings", "variants", "grid", "record")
"""Entries that hold settings, whose types the command line knows."""
KEPT = ("sweep", "report")
"""Folders beside those of the variants."""


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """What the report of a study looks at."""

    reference: str | None = None
    """Variant that the others are compared with; null compares all pairs."""


@dataclass(frozen=True, kw_only=True)
class StudyConfig:
    """Content of a study's file."""

    title: str
    """Heading of the report."""
    question: str
    """What the study is to find out."""
    experiment: str
    """Name below experiments/, of the experiment that all runs start from."""
    settings: dict[str, Any] = field(default_factory=dict)
    """What all runs set beyond it."""
    variants: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Alternatives by name; each may name an `experiment` of its own."""
    grid: dict[str, list[Any]] = field(default_factory=dict)
    """Settings and their values; every combination, with every alternative."""
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    """Training seeds of every variant."""
    record: dict[str, Any] = field(default_factory=dict)
    """What the recording alone sets, where runs see less than is recorded."""
    report: ReportConfig = field(default_factory=ReportConfig)
    """What the report looks at."""

    def __post_init__(self) -> None:
        if not self.seeds or len(set(self.seeds)) < len(self.seeds) or min(self.seeds) < 0:
            raise ValueError(f"seeds={self.seeds}; give different ones, 0 or more")
        for name, values in self.grid.items():
            shown = [shown_value(value) for value in values]
            if not values or len(set(shown)) < len(shown):
                raise ValueError(f"grid.{name}={values}; give different values")
        for name in self.variants:
            if not isinstance(name, str):
                raise ValueError(f"variants: YAML reads a name as {name}; put it in quotes")
        chosen = [("settings", self.settings), ("grid", self.grid), ("record", self.record)]
        chosen += [(f"variants.{name}", settings) for name, settings in self.variants.items()]
        for section, settings in chosen:
            own = {*OWN_SETTINGS} - ({"experiment"} if section.startswith("variants.") else set())
            if taken := own & settings.keys():
                raise ValueError(f"{section} sets {', '.join(sorted(taken))}, which the study does")


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A way of training; its runs differ in their seeds."""

    name: str
    """Names the folder of its runs."""
    experiment: str
    """Name below experiments/."""
    settings: dict[str, Any]
    """What varies: dotted names, and values."""


@dataclass(frozen=True, kw_only=True)
class PlannedRun:
    """One training of a study."""

    variant: str
    """Name of its variant."""
    seed: int
    """Training seed."""
    folder: Path
    """Where `fit` puts it."""
    arguments: tuple[str, ...]
    """Of `fit`."""


@dataclass(frozen=True, kw_only=True)
class Study:
    """Ways of training, each with several seeds."""

    name: str
    """The file's, without .yaml."""
    title: str
    """Heading of the report."""
    question: str
    """What the study is to find out."""
    variants: tuple[Variant, ...]
    """In the order of the file."""
    seeds: tuple[int, ...]
    """Of each variant."""
    settings: dict[str, Any]
    """What all runs set beyond the experiment."""
    record: dict[str, Any]
    """What the recording alone sets."""
    reference: str | None
    """Variant that the others are compared with; None: all pairs."""

    @property
    def folder(self) -> Path:
        """Of its runs, its report and what the launcher keeps."""
        return Path("runs", "studies", self.name)

    def runs(self) -> list[PlannedRun]:
        """All runs, seed by seed, so that an unfinished study has something of every variant."""
        return [self.run(variant, seed) for seed in self.seeds for variant in self.variants]

    def run(self, variant: Variant, seed: int) -> PlannedRun:
        """The training of a variant with a seed."""
        return PlannedRun(
            variant=variant.name,
            seed=seed,
            folder=self.folder / variant.name / f"seed_{seed}",
            arguments=(
                *self.training_arguments(variant),
                f"--experiment=studies/{self.name}/{variant.name}",
                f"--run=seed_{seed}",
                f"--seed_everything={seed}",
            ),
        )

    def training_arguments(self, variant: Variant) -> list[str]:
        """Arguments that all runs of a variant share."""
        return [
            *("--config", str(EXPERIMENTS / "base.yaml")),
            *("--config", str(EXPERIMENTS / f"{variant.experiment}.yaml")),
            *_arguments(self.settings | variant.settings),
        ]

    def recording_arguments(self, variant: Variant) -> list[str]:
        """Arguments of `record` for the demonstrations of a variant."""
        return [*self.training_arguments(variant), *_arguments(self.record)]


def read_study(path: Path) -> Study:
    """Reads the file of a study.

    Raises:
        ValueError: it cannot be read or does not describe a study; says what is wrong.
    """
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--study", type=StudyConfig)
    try:
        content = yaml.safe_load(path.read_text())
        if not isinstance(content, dict):
            raise ValueError("it holds no settings")
        content = {name: value for name, value in content.items() if value is not None}
        parsed = parser.parse_object({"study": deepcopy(content)})
        config: StudyConfig = parser.instantiate_classes(parsed).study
        # As YAML has them: jsonargparse makes false of 'off', and 0.001 of 1e-3.
        config = replace(config, **{name: content[name] for name in FREE if name in content})
        variants = _variants(config)
        reference = config.report.reference
        names = [variant.name for variant in variants]
        if reference is not None and reference not in names:
            raise ValueError(f"report.reference={reference}; the variants are {', '.join(names)}")
    except OSError as error:
        raise ValueError(f"{path}: {error}; {_studies_beside(path)}") from error
    except (yaml.YAMLError, argparse.ArgumentError, TypeError, ValueError) as error:
        raise ValueError(f"{path} does not describe a study: {brief(str(error))}") from error
    return Study(
        name=path.stem,
        title=config.title,
        question=config.question,
        variants=tuple(variants),
        seeds=tuple(config.seeds),
        settings=config.settings,
        record=config.record,
        reference=reference,
    )


def shown_value(value: Any) -> str:
    """A setting's value as it stands in names and tables."""
    if isinstance(value, str):
        return value
    if isinstance(value, Sequence):
        return "+".join(map(shown_value, value)) or "none"
    return json.dumps(value)


def setting_labels(names: Sequence[str]) -> dict[str, str]:
    """Short names of settings: their last part, with the one before where two have the same."""
    last = [name.split(".")[-1] for name in names]
    return {
        name: ".".join(name.split(".")[-2:]) if last.count(short) > 1 else short
        for name, short in zip(names, last, strict=True)
    }


def _variants(config: StudyConfig) -> list[Variant]:
    labels = setting_labels(list(config.grid))
    found = []
    for alternative, changes in (config.variants or {"": {}}).items():
        for values in product(*config.grid.values()):
            point = dict(zip(config.grid, values, strict=True))
            parts = [f"{labels[name]}={shown_value(value)}" for name, value in point.items()]
            name = ",".join([alternative, *parts] if alternative else parts) or "all"
            if not re.fullmatch(r"[\w.,=+-]+", name) or name.startswith("."):
                raise ValueError(
                    f"variant {name!r} cannot name a folder; give it a name under `variants`, of "
                    "letters, digits and . , = + - _"
                )
            if name in KEPT:
                raise ValueError(f"variant {name!r}: a folder of the study has that name")
            settings = {key: value for key, value in changes.items() if key != "experiment"}
            experiment = str(changes.get("experiment", config.experiment))
            found.append(Variant(name=name, experiment=experiment, settings=settings | point))
    return found


def _arguments(settings: Mapping[str, Any]) -> list[str]:
    return [
        f"--{name}={value if isinstance(value, str) else json.dumps(value)}"
        for name, value in settings.items()
    ]


def _studies_beside(path: Path) -> str:
    names = sorted(file.stem for file in path.parent.glob("*.yaml"))
    return f"these exist: {', '.join(names)}" if names else "there are none"
