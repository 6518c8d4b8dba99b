"""What the reader of a report should know of its runs, a sentence each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from act_lightning.study.report.runs import ReportRun, ReportVariant

NEARLY = 0.95
"""Share of its steps from which on a training counts as complete: not every step is logged."""


def remarks_on(
    variants: Sequence[ReportVariant], planned: Mapping[str, Mapping[str, Any]]
) -> Iterator[str]:
    """Says which runs are incomplete, and which were not made alike or not as planned.

    Args:
        variants: with their runs.
        planned: what a study wants of its runs by their labels: `experiment`, `seed`, `max_steps`.
    """
    runs = [run for variant in variants for run in variant.runs]
    for variant in variants:
        yield from _interruptions(variant, runs, planned)
    for variant in variants:
        yield from _unlike_seeds(variant)
    yield from _deviations(runs, planned)
    yield from _unequal_lengths(runs)
    yield from _early(runs)


def _interruptions(
    variant: ReportVariant, runs: Sequence[ReportRun], planned: Mapping[str, Mapping[str, Any]]
) -> Iterator[str]:
    """Runs that were interrupted or are not at their end yet, evaluated or not."""
    others = [run.training.get("max_steps") for run in (*variant.runs, *runs)]
    for run in variant.runs:
        wanted = planned.get(run.label, {}).get("max_steps")
        candidates = [run.training.get("max_steps"), wanted, *others]
        steps = next((n for n in candidates if n is not None), None)
        if run.graded is None:
            of = "" if steps is None else f" of {steps}"
            shown = (
                "in the curves, and in nothing else"
                if variant.graded
                else "in the curves and, as no run of its variant is evaluated, with its last "
                "validation in the tables of KL, L1 and modes"
            )
            yield (
                f"{run.label} was interrupted at step {run.last_step}{of}, or still runs: it is "
                f"{shown}."
            )
        elif steps is not None and run.last_step is not None and run.last_step < NEARLY * steps:
            yield (
                f"{run.label} was evaluated, though its training only came to step "
                f"{run.last_step} of {steps}; its success counts like the others'."
            )


def _unlike_seeds(variant: ReportVariant) -> Iterator[str]:
    """Runs of a variant that differ in more than their seeds, or not even in these."""
    training = [run.training for run in variant.runs if run.training]
    seeds = Counter(t["seed"] for t in training if t.get("seed") is not None)
    if repeated := [str(seed) for seed, count in seeds.items() if count > 1]:
        yield (
            f"{variant.name}: runs with the same training seed ({', '.join(repeated)}) count as "
            "several; intervals and p-values take them for independent."
        )
    for name in ("experiment", "num_parameters"):
        values = dict.fromkeys(t[name] for t in training if t.get(name) is not None)
        if len(values) > 1:
            yield (
                f"{variant.name}: its runs differ in {name} ({', '.join(map(str, values))}), so "
                "they are not one way of training."
            )


def _deviations(
    runs: Sequence[ReportRun], planned: Mapping[str, Mapping[str, Any]]
) -> Iterator[str]:
    """Runs that were not made as the study now plans them."""
    for run in runs:
        for name, wanted in planned.get(run.label, {}).items():
            made = run.training.get(name, wanted)
            if wanted is not None and made != wanted:
                yield (
                    f"{run.label} was made with other settings than planned: {name} {made}, not "
                    f"{wanted}."
                )


def _unequal_lengths(runs: Sequence[ReportRun]) -> Iterator[str]:
    lengths: dict[int, list[str]] = {}
    for run in runs:
        if (steps := run.training.get("max_steps")) is not None:
            lengths.setdefault(steps, []).append(run.label)
    if len(lengths) > 1:
        told = "; ".join(f"{steps} steps: {', '.join(names)}" for steps, names in lengths.items())
        yield f"The runs were not trained equally long. {told}."


def _early(runs: Sequence[ReportRun]) -> Iterator[str]:
    """Runs whose best checkpoint is not the last one, so that all else is measured early, too."""
    found = []
    for run in runs:
        step, steps = run.report.get("step"), run.training.get("max_steps")
        if step is not None and steps is not None and step < steps:
            found.append(f"{run.label} ({run.report['checkpoint']}, step {step} of {steps})")
    if found:
        yield (
            f"The checkpoint that was evaluated is not the last of {', '.join(found)}: their KL, "
            "L1, error by horizon, smoothness and times are those of that step, and do not compare "
            "with those of runs evaluated later."
        )
