"""Comparisons of evaluated runs: which is better, and how sure that is.

Runs are compared pair by pair in the same worlds; groups of runs, each a way of training with
several seeds, by their means; the ways of executing of a single run, with each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from string import ascii_uppercase

import numpy as np

from act_lightning.sim.results import wilson_interval
from act_lightning.sim.splits import STANDARD
from act_lightning.study.graded import GradedRun, check_comparable, common_executions, read_graded
from act_lightning.study.statistics import (
    Bootstrap,
    Interval,
    McNemar,
    hierarchical_bootstrap,
    holm,
    least_difference,
    mcnemar_exact,
)

LEVEL = 0.05
"""P-values below it are called a difference."""


@dataclass(frozen=True, kw_only=True)
class Rate:
    """One run, executed one way."""

    run: str
    """Label of the run."""
    folder: str
    """Its folder."""
    execution: str
    """Way of executing."""
    successes: int
    """Worlds that ended in success."""
    worlds: int
    """All worlds."""
    wilson_95: Interval
    """Interval of the success rate."""


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Two policies in the same worlds."""

    first: str
    """Label of a run; or a way of executing, if a single run is looked at."""
    second: str
    """The other one."""
    execution: str | None
    """Way of executing of both; None if that is what they differ in."""
    test: McNemar
    """What the worlds say."""
    p_holm: float
    """The p-value, adjusted for all pairs that are compared at once."""
    least_difference: float
    """Differences below it could not have been told from none."""


@dataclass(frozen=True, kw_only=True)
class Group:
    """A way of training, by several seeds of it; or the difference of two."""

    name: str
    """A, B, or A - B."""
    execution: str
    """Way of executing."""
    runs: tuple[int, ...]
    """Runs in the group, or in each of the two."""
    result: Bootstrap
    """Mean success rate over training seeds and worlds, or the difference."""
    p_holm: float | None = None
    """The difference's p-value, adjusted for all ways of executing; None for a single group."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """All that `compare` says, before it is put into tables."""

    task: str
    """What was played."""
    split: str
    """Which worlds of it."""
    worlds: int
    """How many."""
    rates: tuple[Rate, ...]
    """Each run, each way of executing."""
    pairs: tuple[Pair, ...] = ()
    """Two by two; empty if groups are compared."""
    groups: tuple[Group, ...] = ()
    """For each way of executing the two groups and their difference; empty without groups."""
    remarks: tuple[str, ...]
    """What else the reader should know."""


def compare_runs(
    folders: Sequence[Path], *, execution: str | None = None, split: str = STANDARD
) -> Comparison:
    """Compares runs two by two, or the ways of executing of a single one.

    Args:
        folders: the runs' folders.
        execution: the only way of executing to look at; None: all that the runs have in common.
        split: which worlds.

    Raises:
        OSError: a run was not evaluated.
        ValueError: the runs cannot be compared; says why.
    """
    check_distinct(folders)
    runs = [read_graded(path, _label(i), split) for i, path in enumerate(folders)]
    names = common_executions(runs, execution)
    if len(runs) == 1 and len(names) == 1:
        raise ValueError(
            f"{folders[0]} alone, executed {names[0]}, has nothing to be compared with; name "
            "another run, or evaluate it in another way of executing"
        )
    remarks = check_comparable(runs, names)
    tests: list[tuple[str, str, str | None, McNemar]]
    if len(runs) == 1:
        outcomes = runs[0].successes
        tests = [
            (a, b, None, mcnemar_exact(outcomes[a], outcomes[b])) for a, b in combinations(names, 2)
        ]
    else:
        tests = [
            (a.label, b.label, name, mcnemar_exact(a.successes[name], b.successes[name]))
            for name in names
            for a, b in combinations(runs, 2)
        ]
    return Comparison(
        task=runs[0].task,
        split=split,
        worlds=len(runs[0].seeds),
        rates=_rates(runs, names),
        pairs=_pairs(tests),
        remarks=tuple(remarks),
    )


def compare_groups(
    first: Sequence[Path],
    second: Sequence[Path],
    *,
    execution: str | None = None,
    split: str = STANDARD,
) -> Comparison:
    """Compares two ways of training, each by runs that differ in nothing but their training seed.

    Args:
        first: folders of the one, 2 or more.
        second: folders of the other, 2 or more.
        execution: the only way of executing to look at; None: all that the runs have in common.
        split: which worlds.

    Raises:
        OSError: a run was not evaluated.
        ValueError: the runs cannot be compared; says why.
    """
    check_distinct([*first, *second])
    for folders in (first, second):
        if len(folders) < 2:
            raise ValueError(
                f"{folders[0]} alone does not show how much training seeds vary; give 2 or more "
                "runs on each side of --against, or compare two runs without it"
            )
    ours = [read_graded(path, f"A{i + 1}", split) for i, path in enumerate(first)]
    theirs = [read_graded(path, f"B{i + 1}", split) for i, path in enumerate(second)]
    runs = [*ours, *theirs]
    names = common_executions(runs, execution)
    remarks = check_comparable(runs, names)
    return Comparison(
        task=runs[0].task,
        split=split,
        worlds=len(runs[0].seeds),
        rates=_rates(runs, names),
        groups=_adjusted([group for name in names for group in _groups(ours, theirs, name)]),
        remarks=tuple(remarks),
    )


def conclusions(comparison: Comparison) -> list[str]:
    """What came out, in a plain sentence for each pair or each two groups."""
    pairs = [
        _conclude_pair(pair, len(comparison.pairs), comparison.worlds) for pair in comparison.pairs
    ]
    adjusted = [(g, g.p_holm) for g in comparison.groups if g.p_holm is not None]
    return pairs + [
        _conclude_groups(group, p_holm, len(adjusted), comparison.worlds)
        for group, p_holm in adjusted
    ]


def check_distinct(folders: Sequence[Path]) -> None:
    """Sees that no run is named twice.

    Raises:
        ValueError: one is.
    """
    known: set[Path] = set()
    for folder in folders:
        if folder.resolve() in known:
            raise ValueError(f"{folder} is named twice; a run cannot be compared with itself")
        known.add(folder.resolve())


def _label(index: int) -> str:
    """A to Z, then A1 to Z1, ..."""
    repeat, letter = divmod(index, len(ascii_uppercase))
    return ascii_uppercase[letter] + (str(repeat) if repeat else "")


def _rates(runs: Sequence[GradedRun], names: Sequence[str]) -> tuple[Rate, ...]:
    return tuple(
        Rate(
            run=run.label,
            folder=str(run.folder),
            execution=name,
            successes=int(run.successes[name].sum()),
            worlds=len(run.seeds),
            wilson_95=wilson_interval(int(run.successes[name].sum()), len(run.seeds)),
        )
        for run in runs
        for name in names
    )


def _pairs(tests: Sequence[tuple[str, str, str | None, McNemar]]) -> tuple[Pair, ...]:
    adjusted = holm([test.p_value for *_, test in tests])
    pairs = []
    for (first, second, execution, test), p_holm in zip(tests, adjusted, strict=True):
        differing = test.only_first + test.only_second
        worlds = differing + test.both + test.neither
        # Holm's first step, so this is what the smallest of the p-values would need.
        least = least_difference(differing, worlds, LEVEL / len(tests))
        pairs.append(
            Pair(
                first=first,
                second=second,
                execution=execution,
                test=test,
                p_holm=p_holm,
                least_difference=least,
            )
        )
    return tuple(pairs)


def _groups(ours: Sequence[GradedRun], theirs: Sequence[GradedRun], name: str) -> list[Group]:
    """Both groups and their difference, for one way of executing."""
    first, second = (np.stack([run.successes[name] for run in runs]) for runs in (ours, theirs))
    sizes = len(ours), len(theirs)
    return [
        Group(name="A", execution=name, runs=sizes[:1], result=hierarchical_bootstrap(first)),
        Group(name="B", execution=name, runs=sizes[1:], result=hierarchical_bootstrap(second)),
        Group(
            name="A - B", execution=name, runs=sizes, result=hierarchical_bootstrap(first, second)
        ),
    ]


def _adjusted(groups: Sequence[Group]) -> tuple[Group, ...]:
    """The groups, and their differences adjusted for how many there are."""
    p_values = [g.result.p_value for g in groups if g.result.p_value is not None]
    adjusted = iter(holm(p_values))
    return tuple(
        g if g.result.p_value is None else replace(g, p_holm=next(adjusted)) for g in groups
    )


def _conclude_pair(pair: Pair, num_pairs: int, worlds: int) -> str:
    about = f"{pair.execution}: " if pair.execution else ""
    p_value = shown_p(pair.p_holm, num_pairs)
    difference, interval = pair.test.difference, pair.test.interval
    if pair.p_holm < LEVEL:
        return f"{about}{better(pair.first, pair.second, difference, interval)}; {p_value}."
    return (
        f"{about}no difference between {pair.first} and {pair.second} was shown in {worlds} "
        f"worlds: {points(difference, interval)}; {p_value}. Differences below about "
        f"{100 * pair.least_difference:.1f} points could not have been shown."
    )


def _conclude_groups(group: Group, p_holm: float, num_differences: int, worlds: int) -> str:
    difference, interval = group.result.mean, group.result.interval
    over = f"over {group.runs[0]} and {group.runs[1]} training seeds in {worlds} worlds"
    p_value = shown_p(p_holm, num_differences)
    if p_holm < LEVEL:
        return f"{group.execution}: {better('A', 'B', difference, interval)}, {over}; {p_value}."
    return (
        f"{group.execution}: no difference between A and B was shown {over}: "
        f"{points(difference, interval)}; {p_value}."
    )


def shown_p(p_value: float, num_compared: int) -> str:
    """A p-value in words; of how many it was adjusted for, if of more than one."""
    shown = "p < 0.001" if p_value < 0.001 else f"p = {p_value:.2g}"
    return f"{shown} (adjusted for {num_compared} comparisons)" if num_compared > 1 else shown


def better(first: str, second: str, difference: float, interval: Interval) -> str:
    """Which of two did better, the first by `difference` if that is positive; rates from 0 to 1."""
    if difference < 0:
        first, second = second, first
        difference, interval = -difference, (-interval[1], -interval[0])
    low, high = interval
    return (
        f"{first} is better than {second} by {100 * difference:.1f} points "
        f"[{100 * low:.1f}, {100 * high:.1f}]"
    )


def points(difference: float, interval: Interval) -> str:
    """A difference of rates and its interval, in percentage points."""
    low, high = interval
    return f"{100 * difference:+.1f} points [{100 * low:+.1f}, {100 * high:+.1f}]"
