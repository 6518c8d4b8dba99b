"""Compares actions with joints, where actions are positions that the joints shall take."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from act_lightning.study.inspect.opening import Opened
from act_lightning.study.inspect.report import ActionFit, Finding, Limits
from act_lightning.study.inspect.tables import Column, name_dimensions

MIN_CORRELATION = 0.9
"""Action and joint with less correlation, at every lag, do not mean the same."""
MAX_SCALE = 3.0
"""An action that spans so many times its joint's range, or so small a part, has other units."""
MAX_LAG_S = 0.5
"""Longest lag looked for."""
LAG_FRAMES = 100_000
"""Frames that are enough to find the lag."""


def compare_actions(opened: Opened, limits: Limits) -> tuple[ActionFit | None, list[Finding]]:
    """Compares actions with joints, where both have the same dimensions."""
    qpos, actions = opened.tables["qpos"], opened.tables["action"]
    if qpos.shape != actions.shape or len(qpos) == 0:
        return None, []
    lags, best = _correlate(opened)
    comparable = np.flatnonzero(best.max(axis=0) >= MIN_CORRELATION)
    if len(comparable) == 0:
        return ActionFit(comparable=(), lag=None), []
    lag = round(float(np.median(lags[best[:, comparable].argmax(axis=0)])))
    findings = _lag_findings(qpos, actions, lag, opened.spec.fps)
    findings += _range_findings(opened, comparable.tolist(), limits)
    return ActionFit(comparable=tuple(comparable.tolist()), lag=lag), findings


def _correlate(opened: Opened) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Lags, and (lags, D) correlation of each action with the joint so many steps later."""
    most = max(2, round(MAX_LAG_S * opened.spec.fps))
    lags = np.arange(-most, most + 1)
    number = np.cumsum(opened.is_start)[:LAG_FRAMES]  # equal within an episode
    qpos = opened.tables["qpos"][:LAG_FRAMES].astype(np.float64)
    actions = opened.tables["action"][:LAG_FRAMES].astype(np.float64)
    finite = np.isfinite(np.concatenate([qpos, actions], axis=1))
    usable = np.asarray(finite.all(axis=1))
    correlations = np.zeros((len(lags), qpos.shape[1]))
    for row, lag in enumerate(lags.tolist()):
        length = len(qpos) - abs(lag)
        if length < 3:
            continue
        early, late = slice(0, length), slice(abs(lag), None)
        act, pos = (early, late) if lag >= 0 else (late, early)
        pairs = usable[act] & usable[pos] & (number[act] == number[pos])
        if pairs.sum() > 2:
            correlations[row] = _correlation(actions[act][pairs], qpos[pos][pairs])
    return lags, correlations


def _correlation(first: NDArray[np.float64], second: NDArray[np.float64]) -> NDArray[np.float64]:
    """(D,) correlation of the columns; 0 where one of them is constant."""
    first, second = first - first.mean(axis=0), second - second.mean(axis=0)
    scale = np.sqrt((first**2).sum(axis=0) * (second**2).sum(axis=0))
    correlation = np.zeros(len(scale))
    np.divide((first * second).sum(axis=0), scale, out=correlation, where=scale > 1e-12)
    return correlation


def _lag_findings(qpos: Column, actions: Column, lag: int, fps: float) -> list[Finding]:
    subject = "data/action"
    if float(np.mean((qpos == actions).all(axis=1))) > 0.99:
        title = (
            "actions equal the joint positions of the same step: to copy is all there is to learn"
        )
        return [Finding(kind="lag", subject=subject, damaged=False, title=title)]
    if lag < 0:
        title = (
            f"actions trail the joints by {-lag} steps: they were recorded late, or the joints "
            "are of a later step"
        )
    elif lag >= max(2, round(MAX_LAG_S * fps)):
        title = f"the joints follow the actions after {lag} steps or more ({lag / fps:.2g} s)"
    else:
        return []
    rule = f"best correlation among lags of up to {MAX_LAG_S:g} s, median over the dimensions"
    return [Finding(kind="lag", subject=subject, damaged=False, title=title, rule=rule)]


def _range_findings(opened: Opened, comparable: Sequence[int], limits: Limits) -> list[Finding]:
    qpos, actions = opened.tables["qpos"], opened.tables["action"]
    scales: list[str] = []
    outside: dict[int, list[int]] = defaultdict(list)
    for index in comparable:
        joint, action = (
            values[np.isfinite(values)] for values in (qpos[:, index], actions[:, index])
        )
        low, high = float(joint.min()), float(joint.max())
        # Not the extremes: one wild action is no other unit.
        spans = [np.ptp(np.quantile(values, (0.05, 0.95))) for values in (action, joint)]
        if spans[1] > 0 and not 1 / MAX_SCALE <= spans[0] / spans[1] <= MAX_SCALE:
            scales.append(f"dimension {index} {spans[0] / spans[1]:.3g} times")
            continue
        margin = limits.outside * (high - low)
        wild = (actions[:, index] < low - margin) | (actions[:, index] > high + margin)
        frames = np.flatnonzero(wild & np.isfinite(actions[:, index]))
        for frame in frames.tolist():
            outside[frame].append(index)
    findings = []
    if scales:
        title = f"actions span another range than their joints, {', '.join(scales)}: other units?"
        rule = f"the middle 90% of the values, by more than a factor of {MAX_SCALE:g}"
        findings.append(
            Finding(kind="scale", subject="data/action", damaged=False, title=title, rule=rule)
        )
    if outside:
        places = opened.places(
            (frame, f"{name_dimensions(dims)}: {_values(actions[frame, dims])}")
            for frame, dims in outside.items()
        )
        findings.append(
            Finding(
                kind="outside",
                subject="data/action",
                damaged=False,
                title="actions are far outside of the range of their joints",
                rule=f"by more than {limits.outside:g} times the joint's range",
                places=places,
            )
        )
    return findings


def _values(values: NDArray[Any]) -> str:
    shown = ", ".join(f"{value:.4g}" for value in values[:4])
    return f"{shown}, ..." if len(values) > 4 else shown
