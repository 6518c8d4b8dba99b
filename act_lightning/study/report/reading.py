"""Reads the runs of a report, and sees that their evaluations can be compared."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from act_lightning.sim.splits import STANDARD
from act_lightning.study.comparison import check_distinct
from act_lightning.study.events import RunEvents
from act_lightning.study.graded import (
    check_comparable,
    read_graded,
    results_path,
    stopped_episodes,
)
from act_lightning.study.report.remarks import remarks_on
from act_lightning.study.report.runs import ReportRun, ReportRuns, ReportVariant
from act_lightning.study.study import Study, shown_value


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
    found += remarks_on(variants, planned)
    return ReportRuns(
        variants=tuple(variants),
        split=split,
        executions=tuple(executions),
        remarks=tuple(found),
        **named,
    )
