"""How smooth the commands of an episode are, to compare ways of executing chunks.

Measured are the commands sent to the environment, not the motion that came of them: the arms'
inertia and controllers hide from the motion much of what the commands do to the motors.

A comparison of two ways is fair only in worlds where both succeeded: a failed episode is longer,
and stands still or jerks for reasons of its own. `both_succeeded` picks those, `paired_differences`
compares them world by world.

Sources: spectral arc length (SPARC) of Balasubramanian et al. 2015, J NeuroEng Rehabil 12:112, with
the settings of the authors' code (github.com/siva82kb/SPARC). Departure: frequencies end at half of
the sampling rate, where the authors' code goes on into the mirrored half of the spectrum if the
rate is below 20 Hz.

Shape suffixes: T commands, A values in each.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich import box
from rich.table import Table
from scipy.stats import t as student_t

from act_lightning.sim.config import GRIPPERS, EnvConfig

Array = NDArray[np.floating[Any]]

MIN_COMMANDS = 4
"""Fewer have no jerk."""
CUTOFF_HZ, THRESHOLD, PADDING = 10.0, 0.05, 4
"""Of the spectral arc length: highest frequency, smallest magnitude relative to the largest, and
powers of two by which the spectrum is refined with zeros."""


@dataclass(frozen=True, kw_only=True)
class Smoothness:
    """Of one episode; None where a number is not defined."""

    mean_squared_jerk: float | None
    """Mean over steps and values of the third derivative squared; the commands' unit^2 / s^6."""
    spectral_arc_length: float | None
    """Negative length of the magnitude spectrum of the commands' speed, both axes scaled to 1; the
    nearer to 0 the smoother. One smooth reach has -1.4; a task of several movements less. It counts
    movements and tremor below 10 Hz, and hardly sees what changes from step to step: jumps and
    noise add to the mean speed, which the spectrum is relative to. None if the commands stand
    still."""
    border_jump: float | None
    """How far, on average, the command jumps where a new prediction begins: the Euclidean length by
    which that step differs from the mean of the steps before and after it; in the commands' unit.
    A plan shifted by d gives d, steady motion and steady acceleration 0. Where the policy is asked
    at every step, as for ensembling, every step is a border. None without a border that has a step
    on either side."""
    inner_jump: float | None
    """The same where no prediction begins: how far commands jump anyway. None if there is none."""
    path_length: float | None
    """Sum of the Euclidean distances between successive commands, in their unit."""

    def as_dict(self) -> dict[str, float | None]:
        """As plain numbers by name, for results.json."""
        return asdict(self)


METRICS: dict[str, str] = {
    "mean_squared_jerk": "jerk\u00b2",
    "spectral_arc_length": "arc length",
    "border_jump": "border jump",
    "inner_jump": "inner jump",
    "path_length": "path",
}
"""Fields of `Smoothness`, and what heads their columns in a table."""


@dataclass(frozen=True, kw_only=True)
class PairedDifference:
    """One measure of the same worlds, executed in two ways."""

    first: float
    """Mean of the first way, over the worlds with both."""
    second: float
    """Mean of the second way, over the worlds with both."""
    interval: tuple[float, float] | None
    """Student's t 95% interval of second - first; None for a single pair."""


def smoothness(
    commands: Array, queries: Sequence[int], fps: float, values: Sequence[int] | None = None
) -> Smoothness:
    """Measures the commands of one episode.

    Args:
        commands: (T, A) actions sent to the environment, physical units.
        queries: steps at which the first action of a new prediction was taken, ascending; those
            past the end are ignored.
        fps: control steps a second.
        values: which of the A values to include, so that rad are not added to gripper openings (see
            `arm_values`); None: all.

    Returns:
        Nothing but None for fewer than 4 commands, and if one is not finite.

    Raises:
        ValueError: `commands` is not a matrix, or `fps` is not positive.
    """
    if commands.ndim != 2 or fps <= 0:
        raise ValueError(f"commands {commands.shape} must be (T, A), and fps={fps} positive")
    chosen = list(range(commands.shape[1]) if values is None else values)
    included_ta = commands[:, chosen].astype(np.float64)
    if len(commands) < MIN_COMMANDS or not np.isfinite(included_ta).all():
        return Smoothness(**dict.fromkeys(METRICS))
    steps_ta = np.diff(included_ta, axis=0)
    lengths_t = np.linalg.norm(steps_ta, axis=1)
    third_ta = np.diff(steps_ta, n=2, axis=0)
    # A step less the mean of its neighbours is half of a third difference: of commands t to t + 3
    # for the step that leads to command t + 2.
    jumps_t = np.linalg.norm(third_ta, axis=1) / 2
    is_border_t = np.isin(np.arange(2, len(commands) - 1), queries)
    return Smoothness(
        mean_squared_jerk=float(np.square(third_ta * fps**3).mean()),
        spectral_arc_length=spectral_arc_length(lengths_t * fps, fps),
        border_jump=_mean(jumps_t[is_border_t]),
        inner_jump=_mean(jumps_t[~is_border_t]),
        path_length=float(lengths_t.sum()),
    )


def spectral_arc_length(speed: Array, fps: float) -> float | None:
    """The spectral arc length of a speed profile; see the head of this file for its source.

    Args:
        speed: (T,) not negative, in any unit.
        fps: its samples a second.

    Returns:
        A negative number without unit; None if there is no speed but 0, or too little of it.
    """
    if len(speed) == 0 or not speed.any():
        return None
    size = 2 ** (math.ceil(math.log2(len(speed))) + PADDING)
    frequency = np.fft.rfftfreq(size, 1 / fps)
    magnitude = np.abs(np.fft.rfft(speed, size))
    magnitude /= magnitude.max()
    last = np.flatnonzero((magnitude >= THRESHOLD) & (frequency <= CUTOFF_HZ))[-1]
    if last == 0:  # too short to tell frequencies below the cutoff apart
        return None
    across = np.diff(frequency[: last + 1]) / frequency[last]
    return -float(np.hypot(across, np.diff(magnitude[: last + 1])).sum())


def arm_values(env: EnvConfig, dim_action: int) -> tuple[int, ...]:
    """The values of an action that have one unit: for the ALOHA tasks, all but the grippers.

    The grippers' openings, from 0 to 1, are no rad; they open and close at once, and by their size
    they would be most of every measure.
    """
    excluded = GRIPPERS if env.is_aloha else ()
    return tuple(i for i in range(dim_action) if i not in excluded)


def mean_smoothness(episodes: Iterable[Smoothness]) -> dict[str, float | None]:
    """Means of each measure over the episodes that have it, by name; None where none has."""
    episodes = list(episodes)
    means: dict[str, float | None] = {}
    for name in METRICS:
        known = [value for e in episodes if (value := getattr(e, name)) is not None]
        means[name] = _mean(np.array(known))
    return means


def both_succeeded(
    worlds: Iterable[Mapping[str, Any]], first: str, second: str
) -> list[tuple[Smoothness, Smoothness]]:
    """The pairs that compare two ways of executing fairly.

    Args:
        worlds: as in results.json, each with `success` and `smoothness` by execution.
        first: name of one way of executing.
        second: name of the other.

    Raises:
        KeyError: one of them was not played, or its smoothness was not measured.
    """
    return [
        (Smoothness(**world[first]["smoothness"]), Smoothness(**world[second]["smoothness"]))
        for world in worlds
        if world[first]["success"] and world[second]["success"]
    ]


def paired_differences(
    pairs: Sequence[tuple[Smoothness, Smoothness]],
) -> dict[str, PairedDifference | None]:
    """Compares two ways of executing world by world; by measure, None where no pair has it."""
    return {name: _paired_difference(name, pairs) for name in METRICS}


def smoothness_table(executions: Mapping[str, Mapping[str, float | None]], unit: str = "") -> Table:
    """A table of the means of `mean_smoothness`, one row a way of executing.

    Args:
        executions: means by way of executing.
        unit: of the commands, as rad; written behind the measures that have it.
    """
    table = _table("smoothness of the commands", ("execution",), unit)
    for name, means in executions.items():
        table.add_row(name, *(_format(means[metric]) for metric in METRICS))
    return table


def paired_table(
    worlds: Sequence[Mapping[str, Any]], executions: Sequence[str], unit: str = ""
) -> Table:
    """A table that compares the first way of executing with each other way, world by world.

    Args:
        worlds: as in results.json; see `both_succeeded`.
        executions: names of the ways.
        unit: see `smoothness_table`.
    """
    first, *others = executions
    title = (
        f"from {first} to others, mean of the worlds where both succeeded "
        "(*: 95% interval of the difference without 0)"
    )
    table = _table(title, ("execution", "worlds"), unit)
    for other in others:
        pairs = both_succeeded(worlds, first, other)
        found = paired_differences(pairs)
        table.add_row(other, str(len(pairs)), *(_change(found[metric]) for metric in METRICS))
    return table


def _table(title: str, headings: Sequence[str], unit: str) -> Table:
    units = (f"{unit}\u00b2/s\u2076" if unit else "", "", unit, unit, unit)
    table = Table(title=title, box=box.SIMPLE, collapse_padding=True, pad_edge=False)
    for heading in headings:
        table.add_column(heading, no_wrap=True)
    for heading, measured_in in zip(METRICS.values(), units, strict=True):
        table.add_column(f"{heading} {measured_in}".rstrip(), justify="right")
    return table


def _change(found: PairedDifference | None) -> str:
    if found is None:
        return "-"
    low, high = found.interval or (0.0, 0.0)
    mark = "" if low <= 0 <= high else "*"
    return f"{_format(found.first)} \u2192 {_format(found.second)}{mark}"


def _mean(values: Array) -> float | None:
    return float(values.mean()) if len(values) else None


def _paired_difference(
    name: str, pairs: Sequence[tuple[Smoothness, Smoothness]]
) -> PairedDifference | None:
    both = [(getattr(first, name), getattr(second, name)) for first, second in pairs]
    known = np.array([pair for pair in both if None not in pair], dtype=np.float64)
    if len(known) == 0:
        return None
    differences = known[:, 1] - known[:, 0]
    interval = None
    if len(known) > 1:
        margin = student_t.ppf(0.975, len(known) - 1) * differences.std(ddof=1) / len(known) ** 0.5
        interval = (float(differences.mean() - margin), float(differences.mean() + margin))
    first, second = known.mean(axis=0).tolist()
    return PairedDifference(first=first, second=second, interval=interval)


def _format(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.1e}" if abs(value) >= 1e5 else f"{value:.3g}"
