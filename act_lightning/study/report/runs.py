"""The runs of a report: which belong together, what each of them left, and what is missing.

Runs in the same folder are trainings of one variant, which differ in their seeds. A run that was
not evaluated, because it was interrupted or still goes on, has its event files only.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from act_lightning.sim.splits import STANDARD
from act_lightning.study.comparison import check_distinct
from act_lightning.study.events import RunEvents, Series
from act_lightning.study.graded import (
    GradedRun,
    check_comparable,
    read_graded,
    results_path,
    stopped_episodes,
)
from act_lightning.study.study import Study, shown_value


@dataclass(frozen=True, kw_only=True)
class ReportRun:
    """One training."""

    variant: str
    """Name of the variant that it is a training of."""
    folder: Path
    """The run's folder."""
    graded: GradedRun | None
    """Its evaluation; None if there is none."""
    scalars: Mapping[str, Series]
    """What it logged, by tag; empty without event files."""

    @property
    def label(self) -> str:
        """Variant and run."""
        return f"{self.variant}/{self.folder.name}"

    @property
    def report(self) -> Mapping[str, Any]:
        """Content of its results.json; empty without one."""
        return {} if self.graded is None else self.graded.report

    @property
    def training(self) -> Mapping[str, Any]:
        """Which training it was and what it took; empty if the file does not say."""
        training: Mapping[str, Any] = self.report.get("training", {})
        return training

    @cached_property
    def last_step(self) -> int | None:
        """The last optimizer step that it logged something at."""
        steps = [int(series.steps[-1]) for series in self.scalars.values() if len(series.steps)]
        return max(steps, default=None)


@dataclass(frozen=True, kw_only=True)
class ReportVariant:
    """A way of training."""

    name: str
    """The folder of its runs, as far as it tells them from those of the others."""
    settings: Mapping[str, str]
    """What varies in the study, and its values here; empty without a study."""
    runs: tuple[ReportRun, ...]
    """In the order of the study's seeds, or as given."""

    @property
    def graded(self) -> list[ReportRun]:
        """The runs that were evaluated."""
        return [run for run in self.runs if run.graded is not None]

    @property
    def finished(self) -> Sequence[ReportRun]:
        """The runs that were evaluated; all if none was, as there is nothing better to show."""
        return self.graded or self.runs

    def playing(self, execution: str) -> list[GradedRun]:
        """Evaluations of the runs that were played in this way of executing."""
        graded = [run.graded for run in self.runs if run.graded is not None]
        return [run for run in graded if execution in run.successes]


@dataclass(frozen=True, kw_only=True)
class ReportRuns:
    """All that a report is made from."""

    title: str
    """Of the report."""
    question: str
    """What it is to answer; empty without a study."""
    reference: str | None
    """Variant that the others are compared with; None: all pairs are compared."""
    split: str
    """Which worlds."""
    variants: tuple[ReportVariant, ...]
    """Those with a run at least; in the order of the study, or as given."""
    executions: tuple[str, ...]
    """Ways of executing that some run was evaluated in."""
    remarks: tuple[str, ...]
    """What the reader should know of the runs, a sentence each."""

    @property
    def runs(self) -> list[ReportRun]:
        """Of all variants."""
        return [run for variant in self.variants for run in variant.runs]


def read_folders(
    folders: Sequence[Path], *, execution: str | None = None, split: str = STANDARD
) -> ReportRuns:
    """Reads runs of any folders.

    Args:
        folders: the runs'; those in one folder are trainings of one variant.
        execution: the only way of executing to look at; None: all.
        split: which worlds.

    Raises:
        OSError: a folder does not exist, or holds no run.
        ValueError: a file is damaged, or runs were evaluated in different worlds; says in what.
    """
    groups: dict[Path, list[Path]] = {}
    for folder in folders:
        if not folder.is_dir():
            raise FileNotFoundError(f"run {folder} does not exist; name runs' folders")
        groups.setdefault(folder.resolve().parent, []).append(folder)
    check_distinct(folders)
    names = _names(list(groups))
    variants = []
    for parent, members in groups.items():
        name = names[parent]
        runs = [_read_run(name, folder, split) for folder in members]
        for run in runs:
            if run.graded is None and not run.scalars:
                raise FileNotFoundError(
                    f"{run.folder} holds neither {results_path(run.folder, split).name} nor event "
                    "files, so it is no run; name folders such as runs/insertion/version_0"
                )
        variants.append(ReportVariant(name=name, settings={}, runs=tuple(runs)))
    return _checked(
        title=", ".join(variant.name for variant in variants),
        question="",
        reference=None,
        variants=variants,
        planned={},
        execution=execution,
        split=split,
    )


def read_study_runs(
    study: Study, *, execution: str | None = None, split: str = STANDARD
) -> ReportRuns:
    """Reads what there is of a study, which need not be finished.

    Args:
        study: names the runs' folders.
        execution: the only way of executing to look at; None: all.
        split: which worlds.

    Raises:
        OSError: none of its runs has begun.
        ValueError: a file is damaged, or runs were evaluated in different worlds; says in what.
    """
    variants, planned, missing = [], {}, []
    for variant in study.variants:
        runs = []
        for seed in study.seeds:
            plan = study.run(variant, seed)
            found = _read_run(variant.name, plan.folder, split)
            if found.graded is None and not found.scalars:
                missing.append(found.label)
                continue
            runs.append(found)
            settings = study.settings | variant.settings
            planned[found.label] = {
                "experiment": f"studies/{study.name}/{variant.name}",
                "seed": seed,
                "max_steps": settings.get("trainer.max_steps"),
            }
        if runs:
            settings = {name: shown_value(value) for name, value in variant.settings.items()}
            variants.append(ReportVariant(name=variant.name, settings=settings, runs=tuple(runs)))
    if not variants:
        raise FileNotFoundError(
            f"no run of study {study.name} has begun (there is nothing in {study.folder}); "
            f"`python -m act_lightning sweep experiments/studies/{study.name}.yaml` runs them"
        )
    remarks = [f"Not begun: {', '.join(missing)}."] if missing else []
    reference = study.reference
    evaluated = {variant.name for variant in variants if variant.graded}
    if reference is not None and reference not in evaluated:
        remarks.append(f"{reference} is the reference, but no run of it is evaluated: all pairs of "
                       "variants are compared instead.")  # fmt: skip
        reference = None
    return _checked(
        title=study.title,
        question=study.question,
        reference=reference,
        variants=variants,
        planned=planned,
        execution=execution,
        split=split,
        remarks=remarks,
    )


def _read_run(variant: str, folder: Path, split: str) -> ReportRun:
    graded = None
    if results_path(folder, split).is_file():
        graded = read_graded(folder, f"{variant}/{folder.name}", split)
    events = RunEvents(folder)
    events.reload()
    return ReportRun(variant=variant, folder=folder, graded=graded, scalars=events.scalars)


def _names(parents: Sequence[Path]) -> dict[Path, str]:
    """Short names of folders: their paths from the last folder that they have in common."""
    if len(parents) == 1:
        return {parents[0]: parents[0].name}
    common = Path(os.path.commonpath(parents))
    if common in parents:
        common = common.parent
    return {parent: str(parent.relative_to(common)) for parent in parents}


def _checked(
    *,
    variants: Sequence[ReportVariant],
    planned: Mapping[str, Mapping[str, Any]],
    execution: str | None,
    split: str,
    remarks: Sequence[str] = (),
    **named: Any,
) -> ReportRuns:
    """Sees that the evaluations can be compared, and gathers what there is to say of the runs."""
    runs = [run for variant in variants for run in variant.runs]
    graded = [run.graded for run in runs if run.graded is not None]
    executions = list(dict.fromkeys(name for run in graded for name in run.successes))
    if execution is not None and graded:
        if execution not in executions:
            raise ValueError(f"--execution {execution}: runs were played {', '.join(executions)}")
        executions = [execution]
    found = list(remarks)
    if graded:
        found += check_comparable(graded, [])
    for name in executions:
        playing = [run for run in graded if name in run.successes]
        check_comparable(playing, [name])
        found += stopped_episodes(playing, [name])
        if len(playing) < len(graded):
            others = [run.label for run in graded if run not in playing]
            found.append(f"Not played {name}: {', '.join(others)}.")
    for variant in variants:
        found += _interruptions(variant, planned)
    found += _deviations(runs, planned)
    return ReportRuns(
        variants=tuple(variants),
        split=split,
        executions=tuple(executions),
        remarks=tuple(found),
        **named,
    )


def _interruptions(
    variant: ReportVariant, planned: Mapping[str, Mapping[str, Any]]
) -> Iterator[str]:
    """Runs without evaluation: interrupted, or not at their end yet."""
    others = [run.training.get("max_steps") for run in variant.runs]
    for run in variant.runs:
        if run.graded is not None:
            continue
        candidates = [planned.get(run.label, {}).get("max_steps"), *others]
        steps = next((n for n in candidates if n is not None), None)
        of = "" if steps is None else f" of {steps}"
        yield (
            f"{run.label} was interrupted at step {run.last_step}{of}, or still runs: it is in the "
            "curves, and in nothing else."
        )


def _deviations(
    runs: Sequence[ReportRun], planned: Mapping[str, Mapping[str, Any]]
) -> Iterator[str]:
    """Runs that were not made as the study now plans them, and variants trained unequally long."""
    for run in runs:
        for name, wanted in planned.get(run.label, {}).items():
            made = run.training.get(name, wanted)
            if wanted is not None and made != wanted:
                yield (
                    f"{run.label} was made with other settings than planned: {name} {made}, not "
                    f"{wanted}."
                )
    lengths: dict[int, list[str]] = {}
    for run in runs:
        if (steps := run.training.get("max_steps")) is not None:
            lengths.setdefault(steps, []).append(run.label)
    if len(lengths) > 1:
        told = "; ".join(f"{steps} steps: {', '.join(names)}" for steps, names in lengths.items())
        yield f"The runs were not trained equally long. {told}."
