"""What the evaluations of a report say: how well each variant does, and which do better.

Variants of 2 or more training seeds are compared as ways of training (`hierarchical_bootstrap`),
single runs as the policies that they are (`mcnemar_exact`). Ways of executing are compared within
a variant, each with the first: there both are the same policies in the same worlds, so they are
paired by training seed and by world.

P-values are adjusted (`holm`) for all comparisons that answer one question: one family of those
between variants, whatever the way of executing, and one of those between ways of executing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from act_lightning.sim.results import wilson_interval
from act_lightning.study.comparison import LEVEL, better, points, shown_p
from act_lightning.study.report.runs import ReportRuns, ReportVariant
from act_lightning.study.statistics import Interval, hierarchical_bootstrap, holm, mcnemar_exact

MOST_SENTENCES = 10
"""Of more differences the largest are told, and the others counted."""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """How well a variant does, executed one way."""

    variant: str
    """Its name."""
    execution: str
    """Way of executing."""
    rates: tuple[float, ...]
    """Success rate of each of its runs."""
    worlds: int
    """In which each was played."""
    mean: float
    """Of the rates."""
    interval: Interval
    """95%: over training seeds and worlds; of a single run over worlds only (Wilson)."""


@dataclass(frozen=True, kw_only=True)
class Difference:
    """Two variants, or two ways of executing one."""

    within: str
    """What is the same in both: a way of executing, or a variant."""
    first: str
    """Variant, or way of executing."""
    second: str
    """The other one, such as the reference."""
    runs: tuple[int, int]
    """Runs of each."""
    worlds: int
    """In which each was played."""
    mean: float
    """Success rate of the first less that of the second."""
    interval: Interval
    """95%, of this comparison alone."""
    p_value: float
    """Of this comparison alone."""
    p_holm: float = 1.0
    """Adjusted for all comparisons of the same kind."""


@dataclass(frozen=True, kw_only=True)
class Findings:
    """All that is concluded from success."""

    estimates: tuple[Estimate, ...]
    """Of each variant that was evaluated, in each way of executing."""
    variants: tuple[Difference, ...]
    """Between variants."""
    ways: tuple[Difference, ...]
    """Between ways of executing."""
    remarks: tuple[str, ...]
    """What could not be compared, and what the intervals do not hold."""


def find(runs: ReportRuns) -> Findings:
    """Estimates and compares success."""
    estimates = [
        _estimate(variant, name)
        for variant in runs.variants
        for name in runs.executions
        if variant.playing(name)
    ]
    differences, uneven = [], []
    for name in runs.executions:
        for first, second in _pairs(runs, name):
            ours, theirs = _outcomes(first, name), _outcomes(second, name)
            if 1 in (len(ours), len(theirs)) and len(ours) != len(theirs):
                uneven += [v.name for v, rows in ((first, ours), (second, theirs)) if len(rows) < 2]
            else:
                differences.append(_difference(name, first.name, second.name, ours, theirs))
    ways = []
    for variant in runs.variants:
        played = [name for name in runs.executions if variant.playing(name)]
        for other in played[1:]:
            # Those runs that were played both ways, in the same order.
            both = [run for run in variant.playing(other) if played[0] in run.successes]
            if both:
                rows = [np.stack([r.successes[name] for r in both]) for name in (other, played[0])]
                ways.append(_difference(variant.name, other, played[0], *rows, same=True))
    remarks = [
        f"{name} has one training seed, which does not show how much training seeds vary: it is "
        "not compared with variants of several."
        for name in dict.fromkeys(uneven)
    ]
    return Findings(
        estimates=tuple(estimates),
        variants=_adjusted(differences),
        ways=_adjusted(ways),
        remarks=(*remarks, *_doubts(estimates)),
    )


def conclusions(findings: Findings) -> list[str]:
    """What came out of the comparisons, in plain sentences; largest differences first."""
    sentences = list(_highest(findings.estimates))
    families = ((findings.variants, "variants"), (findings.ways, "ways of executing"))
    for differences, kind in families:
        shown = sorted((d for d in differences if d.p_holm < LEVEL), key=lambda d: -abs(d.mean))
        sentences += [
            f"{d.within}: {better(d.first, d.second, d.mean, d.interval)}; "
            f"{shown_p(d.p_holm, len(differences))}{_of_what(d, kind)}."
            for d in shown[:MOST_SENTENCES]
        ]
        if len(shown) > MOST_SENTENCES:
            more = len(shown) - MOST_SENTENCES
            sentences.append(f"{more} smaller differences between {kind} are shown, too.")
        others = [d for d in differences if d.p_holm >= LEVEL]
        sentences += _not_shown(others, kind, len(differences))
    return sentences


def _pairs(runs: ReportRuns, execution: str) -> Iterator[tuple[ReportVariant, ReportVariant]]:
    played = [variant for variant in runs.variants if variant.playing(execution)]
    if runs.reference is None:
        yield from combinations(played, 2)
        return
    for reference in played:
        if reference.name == runs.reference:
            yield from ((variant, reference) for variant in played if variant is not reference)


def _outcomes(variant: ReportVariant, execution: str) -> NDArray[np.bool_]:
    """(S, W) success of each run in each world; all runs of a report have the same worlds."""
    return np.stack([run.successes[execution] for run in variant.playing(execution)])


def _estimate(variant: ReportVariant, execution: str) -> Estimate:
    rows = _outcomes(variant, execution)
    if len(rows) > 1:
        interval = hierarchical_bootstrap(rows).interval
    else:
        interval = wilson_interval(int(rows.sum()), rows.size)
    return Estimate(
        variant=variant.name,
        execution=execution,
        rates=tuple(rows.mean(axis=1).tolist()),
        worlds=rows.shape[1],
        mean=float(rows.mean()),
        interval=interval,
    )


def _difference(
    within: str,
    first: str,
    second: str,
    ours: NDArray[np.bool_],
    theirs: NDArray[np.bool_],
    *,
    same: bool = False,
) -> Difference:
    """Of (S, W) outcomes; of one run each, the very policies are compared."""
    if len(ours) == 1:
        test = mcnemar_exact(ours[0], theirs[0])
        mean, interval, p_value = test.difference, test.interval, test.p_value
    else:
        result = hierarchical_bootstrap(ours, theirs, same_policies=same)
        assert result.p_value is not None
        mean, interval, p_value = result.mean, result.interval, result.p_value
    return Difference(
        within=within,
        first=first,
        second=second,
        runs=(len(ours), len(theirs)),
        worlds=ours.shape[1],
        mean=mean,
        interval=interval,
        p_value=p_value,
    )


def _adjusted(differences: Sequence[Difference]) -> tuple[Difference, ...]:
    adjusted = holm([difference.p_value for difference in differences])
    return tuple(replace(d, p_holm=p) for d, p in zip(differences, adjusted, strict=True))


def _doubts(estimates: Sequence[Estimate]) -> Iterator[str]:
    """Intervals that say less of training seeds than they seem to."""
    single = [e.variant for e in estimates if len(e.rates) == 1]
    if single and len({e.variant for e in estimates}) > 1:
        yield (
            f"One training seed only: {', '.join(dict.fromkeys(single))}; intervals and p-values "
            "there are of the worlds alone, and say nothing of another training."
        )
    alike = [e for e in estimates if len(e.rates) > 1 and len(set(e.rates)) == 1]
    if alike:
        names = ", ".join(f"{e.variant} ({e.execution})" for e in alike)
        yield (
            f"All training seeds have the same rate: {names}. Their intervals then tell of the "
            "worlds only; a rare bad training would not show in so few seeds."
        )


def _highest(estimates: Sequence[Estimate]) -> Iterator[str]:
    """Which variant did best, as observed, by way of executing; or which way, of one variant."""
    if len({estimate.variant for estimate in estimates}) == 1:
        yield _best(list(estimates), [e.execution for e in estimates], "ways of executing")
        return
    for execution in dict.fromkeys(estimate.execution for estimate in estimates):
        mine = [estimate for estimate in estimates if estimate.execution == execution]
        yield f"{execution}: {_best(mine, [e.variant for e in mine], 'variants')}"


def _best(estimates: Sequence[Estimate], names: Sequence[str], kind: str) -> str:
    most = max(estimate.mean for estimate in estimates)
    best = [(e, name) for e, name in zip(estimates, names, strict=True) if e.mean == most]
    low, high = best[0][0].interval
    rate = f"{most:.1%} [{low:.1%}, {high:.1%}]" if len(best) == 1 else f"{most:.1%}"
    of = f" of {len(estimates)} {kind}" if len(estimates) > 1 else ""
    told = [f"{name} (one training seed)" if len(e.rates) == 1 else name for e, name in best]
    return f"the highest rate observed{of} is {rate}, of {', '.join(told)}."


def _of_what(difference: Difference, kind: str) -> str:
    seeds = difference.runs
    if seeds == (1, 1) and kind == "variants":
        return (
            f", of these two policies in {difference.worlds} worlds; of one training seed each, so "
            "it may be chance which training came out well"
        )
    if seeds == (1, 1):
        return f", of one policy in {difference.worlds} worlds; another training may differ"
    several = f"{seeds[0]}" if seeds[0] == seeds[1] else f"{seeds[0]} and {seeds[1]}"
    return f", over {several} training seeds in {difference.worlds} worlds"


def _not_shown(others: Sequence[Difference], kind: str, total: int) -> Iterator[str]:
    """One sentence for all comparisons that show nothing, and how much they could have missed."""
    if not others:
        return
    if len(others) <= 3:
        for d in others:
            yield (
                f"{d.within}: no difference between {d.first} and {d.second} was shown: "
                f"{points(d.mean, d.interval)}; {shown_p(d.p_holm, total)}."
            )
        return
    widths = [(d.interval[1] - d.interval[0]) / 2 for d in others]
    yield (
        f"{len(others)} of {total} comparisons between {kind} show no difference; these are known "
        f"to {100 * min(widths):.0f} to {100 * max(widths):.0f} points either way, before "
        "adjustment, so smaller differences may well exist."
    )
