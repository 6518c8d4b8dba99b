"""The runs of a report: which belong together, and what each of them left.

Runs in the same folder are trainings of one variant, which differ in their seeds. A run that was
not evaluated, because it was interrupted or still goes on, has its event files only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from act_lightning.study.events import Series
from act_lightning.study.graded import GradedRun


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
        """How many optimizer steps it had taken when it last logged something."""
        # Training steps are logged while they are taken, all else by the steps taken before.
        taken = [
            int(series.steps[-1]) + tag.startswith("train/")
            for tag, series in self.scalars.items()
            if len(series.steps)
        ]
        return max(taken, default=None)


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
