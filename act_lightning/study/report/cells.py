"""Numbers as they stand in the cells of a report's tables; - where there are none."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from act_lightning.study.statistics import Interval


def defined(values: Iterable[float | None]) -> list[float]:
    """Those that are finite numbers."""
    return [float(value) for value in values if value is not None and np.isfinite(value)]


def shown_mean(values: Iterable[float | None], form: str) -> str:
    """Their mean.

    Args:
        values: of runs.
        form: how to write it, as .3g.
    """
    known = defined(values)
    return f"{np.mean(known):{form}}" if known else "-"


def shown_spread(values: Iterable[float | None], form: str) -> str:
    """Their mean, and where they differ the lowest and the highest; see `shown_mean`."""
    known = defined(values)
    if not known:
        return "-"
    mean, low, high = (f"{value:{form}}" for value in (np.mean(known), min(known), max(known)))
    return mean if low == high else f"{mean} ({low} to {high})"


def shown_all(values: Iterable[int | None]) -> str:
    """A number that runs have in common, or all that occur."""
    return ", ".join(f"{value:,}" for value in dict.fromkeys(values) if value is not None) or "-"


def shown_time(seconds: Sequence[float]) -> str:
    """Their mean, as 45 s, 12.5 min or 1.2 h."""
    if not seconds:
        return "-"
    mean = float(np.mean(seconds))
    if mean < 100:
        return f"{mean:.0f} s"
    return f"{mean / 60:.1f} min" if mean < 6000 else f"{mean / 3600:.1f} h"


def shown_interval(interval: Interval, sign: str = "") -> str:
    """Limits of rates, in percent; `sign` may be +."""
    low, high = interval
    return f"[{100 * low:{sign}.1f}, {100 * high:{sign}.1f}]"


def shown_p_value(value: float) -> str:
    """Two digits, as more say nothing."""
    return "<0.001" if value < 0.001 else f"{value:.2g}"


def counted(number: int, what: str) -> str:
    """A number of things, whose plural ends in s."""
    return f"{number} {what}{'' if number == 1 else 's'}"
