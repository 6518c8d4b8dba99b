"""Looks at the low-dimensional arrays: their values, and how these change.

Each dimension is looked at by itself, so that memory stays a small multiple of one column. The
rules are those of `Limits`; they were chosen on simulated demonstrations, where nothing may be
found, and with the planted faults of tests/test_inspect.py, where everything must be.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import numpy as np
from numpy.typing import NDArray

from act_lightning.study.inspect.opening import Opened
from act_lightning.study.inspect.report import Dimension, Finding, Limits

Column = NDArray[np.floating[Any]]

MIN_JUMP_SHARE = 0.05
"""Smallest jump, as a share of the dimension's range."""
MIN_REST_STEPS = 3
"""Steps at an extreme that count as a visit."""
STEADY = 0.75
"""A dimension that comes to rest moves by less than this share of the step before; see `Limits`."""
SWITCH_SHARE, SWITCH_SIDE_SHARE = 0.5, 0.1
"""A switch spends at least these shares of its steps at both extremes, and at each of them."""


def look_at_table(
    opened: Opened, name: str, limits: Limits
) -> tuple[tuple[Dimension, ...], list[Finding]]:
    """Describes every dimension of an array, and finds what is not finite, clipped or jumps."""
    table, is_start, subject = opened.tables[name], opened.is_start, f"data/{name}"
    dimensions: list[Dimension] = []
    jumps: dict[int, list[tuple[int, float, float]]] = defaultdict(list)
    clipped: list[tuple[int, int, str]] = []
    bad = ~np.isfinite(table)
    for index in range(table.shape[1]):
        column = table[:, index].astype(np.float64)
        finite = column[~bad[:, index]]
        remarks = ["not finite"] if len(finite) < len(column) else []
        if len(finite) == 0:
            nothing = Dimension(min=None, max=None, mean=None, std=None, remarks=("not finite",))
            dimensions.append(nothing)
            continue
        if finite.min() == finite.max():
            remarks.append("constant")
        else:
            for side, visits in clipped_visits(column, is_start, limits.clipped).items():
                remarks.append(f"clipped at {side}")
                clipped += [
                    (*visit, f"dimension {index} at {column[visit[0]]:.4g}") for visit in visits
                ]
            for frame, change, usual in find_jumps(column, is_start, limits.jump):
                jumps[frame].append((index, change, usual))
                if "jumps" not in remarks:
                    remarks.append("jumps")
        dimensions.append(
            Dimension(
                min=float(finite.min()),
                max=float(finite.max()),
                mean=float(finite.mean()),
                std=float(finite.std()),
                remarks=tuple(remarks),
            )
        )
    findings = [*_not_finite(opened, name, bad)]
    if jumps:
        findings.append(
            Finding(
                kind="jump",
                subject=subject,
                damaged=False,
                title="values jump from one step to the next",
                rule=f"a change above {limits.jump:g} times what 99% of the dimension's changes "
                f"stay below, and above {MIN_JUMP_SHARE:.0%} of its range",
                places=opened.places((frame, _jump_text(found)) for frame, found in jumps.items()),
            )
        )
    if clipped:
        findings.append(
            Finding(
                kind="clipped",
                subject=subject,
                damaged=False,
                title="values are cut off at an extreme",
                rule=f"at least {limits.clipped:.1%} of the steps exactly at the extreme, twice or "
                f"more, for {MIN_REST_STEPS} steps or longer, arrived at without slowing down",
                places=tuple(
                    opened.place(first, text, last) for first, last, text in sorted(clipped)
                ),
            )
        )
    return tuple(dimensions), findings


def changes(column: Column, is_start: NDArray[np.bool_]) -> Column:
    """(T,) change since the step before; 0 at an episode's first step, NaN beside NaN."""
    with np.errstate(invalid="ignore"):  # infinity less infinity
        change = np.diff(column, prepend=column[:1])
    change[is_start] = 0
    return change


def find_jumps(
    column: Column, is_start: NDArray[np.bool_], limit: float
) -> list[tuple[int, float, float]]:
    """Steps at which a dimension jumps.

    Returns:
        Frame, change, and the limit of usual changes. A value that is off for one step, and so
        jumps there and back, is given once.
    """
    change = changes(column, is_start)
    size = np.abs(change)
    moving = size[np.isfinite(size) & (size > 0)]
    if len(moving) == 0:
        return []
    usual = float(np.quantile(moving, 0.99))
    finite = column[np.isfinite(column)]
    with np.errstate(invalid="ignore"):
        least = max(limit * usual, MIN_JUMP_SHARE * float(np.ptp(finite)))
        frames = np.flatnonzero(np.isfinite(size) & (size > least)).tolist()
    found: list[tuple[int, float, float]] = []
    back = -1
    for frame in frames:
        if frame == back:
            continue
        after = frame + 1
        is_spike = after < len(column) and not is_start[after] and size[after] > least
        if is_spike and abs(column[after] - column[frame - 1]) <= least:
            back = after
        found.append((frame, float(change[frame]), usual))
    return found


def clipped_visits(
    column: Column, is_start: NDArray[np.bool_], limit: float
) -> dict[str, list[tuple[int, int]]]:
    """First and last frames of a dimension's visits to "min" and "max", where it is clipped.

    The rule is that of `Limits.clipped`.
    """
    finite = column[np.isfinite(column)]
    extremes = {"min": finite.min(), "max": finite.max()}
    at = {side: column == value for side, value in extremes.items()}
    shares = {side: float(flags.mean()) for side, flags in at.items()}
    if sum(shares.values()) > SWITCH_SHARE and min(shares.values()) > SWITCH_SIDE_SHARE:
        return {}
    size = np.nan_to_num(np.abs(changes(column, is_start)), posinf=0.0)
    usual = float(np.median(size[size > 0])) if np.any(size > 0) else np.inf
    found = {}
    for side, flags in at.items():
        entered = np.flatnonzero(flags & ~np.append(False, flags[:-1])).tolist()
        visits = [
            (start, _last_of_run(flags, is_start, start))
            for start in entered
            if not is_start[max(0, start - 3) : start + 1].any()
            and size[start - 1] >= max(usual / 2, STEADY * size[start - 2])
        ]
        visits = [(first, last) for first, last in visits if last - first + 1 >= MIN_REST_STEPS]
        if len(visits) >= 2 and shares[side] >= limit:
            found[side] = visits
    return found


def _last_of_run(flags: NDArray[np.bool_], is_start: NDArray[np.bool_], first: int) -> int:
    last = first
    while last + 1 < len(flags) and flags[last + 1] and not is_start[last + 1]:
        last += 1
    return last


def _not_finite(opened: Opened, name: str, bad: NDArray[np.bool_]) -> list[Finding]:
    """Rows with NaN or infinity, those apart that could not be read at all."""
    table = opened.tables[name]
    rows = np.flatnonzero(bad.any(axis=1) & ~opened.lost[name]).tolist()
    if not rows:
        return []
    places = opened.places(
        (row, f"{name_dimensions(dims := np.flatnonzero(bad[row]).tolist())}: "
         f"{', '.join(sorted({str(value) for value in table[row, dims]}))}")
        for row in rows
    )  # fmt: skip
    title = "values are not finite"
    subject = f"data/{name}"
    return [Finding(kind="not_finite", subject=subject, damaged=True, title=title, places=places)]


def _jump_text(found: list[tuple[int, float, float]]) -> str:
    index, change, usual = max(found, key=lambda jump: abs(jump[1]) / jump[2])
    most = f"{change:+.4g}, usually up to {usual:.2g}"
    if len(found) == 1:
        return f"dimension {index}: {most}"
    return f"{name_dimensions([jump[0] for jump in found])}; dimension {index}: {most}"


def name_dimensions(indices: list[int]) -> str:
    """Names dimensions, neighbours as a range: "dimensions 0-6, 9"."""
    runs: list[list[int]] = []
    for index in indices:
        if runs and runs[-1][-1] == index - 1:
            runs[-1].append(index)
        else:
            runs.append([index])
    text = ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
    return f"dimension{'s' if len(indices) > 1 else ''} {text}"
