"""Plots of a report over optimizer steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from act_lightning.study.report.pages import Picture, Section
from act_lightning.study.report.plots import Axis, Curve, draw_curves
from act_lightning.study.report.runs import ReportRuns, ReportVariant

CURVES = {
    "success_over_steps": (
        "rollout/success_rate",
        Axis(label="success rate", limits=(-0.03, 1.03)),
    ),
    "kl_over_steps": ("val/kl", Axis(label="KL to the prior (nats)", log=True)),
    "active_units_over_steps": (
        "val/active_units",
        Axis(label="active units of the latent", counts=True),
    ),
    "modes_over_steps": (
        "val/modes/within_tolerance",
        Axis(label="share of samples at a mode", limits=(-0.03, 1.03)),
    ),
}
"""By name: the scalar, and the axis."""
BAND = (
    "Lines: mean of the training seeds, where not all were measured of those that were; bands: "
    "from the lowest to the highest of them; grey, where each variant has a panel: the means of "
    "the others."
)


def success_over_steps(runs: ReportRuns) -> Section | None:
    """How the rollouts during training went; of one variant, in each way of executing."""
    name = "success_over_steps"
    told = "Few episodes each, in other worlds than the evaluation's."
    mean = f"Success rate of the rollouts during training, mean of the ways of executing. {told}"
    pictures = curves_over_steps(runs, {name: f"{mean} {BAND}"})
    if len(runs.variants) == 1 and len(runs.executions) > 1:
        (variant,) = runs.variants
        ways = {way: _members(variant, f"rollout/{way}/success_rate") for way in runs.executions}
        if curves := {way: members for way, members in ways.items() if members}:
            each = f"Success rate of the rollouts during training, by way of executing. {told}"
            pictures = (_picture(name, f"{each} {BAND}", curves),)
    return Section(heading="Success over steps", pictures=pictures) if pictures else None


def curves_over_steps(runs: ReportRuns, captions: Mapping[str, str]) -> tuple[Picture, ...]:
    """Those plots of `CURVES` that there is something for.

    Args:
        runs: what is drawn.
        captions: of the plots asked for, by name.
    """
    pictures = []
    for name, caption in captions.items():
        tag, axis = CURVES[name]
        curves = {v.name: members for v in runs.variants if (members := _members(v, tag, axis.log))}
        if curves:
            pictures.append(_picture(name, caption, curves))
    return tuple(pictures)


def _picture(name: str, caption: str, curves: Mapping[str, Sequence[Curve]]) -> Picture:
    _, axis = CURVES[name]
    return Picture.of(name, caption, draw_curves(curves, Axis(label="optimizer steps"), axis))


def _members(variant: ReportVariant, tag: str, positive: bool = False) -> list[Curve]:
    """A scalar of each run that logged it; on a log axis without what cannot be drawn there."""
    found = []
    for run in variant.runs:
        if tag in run.scalars:
            steps, values, _ = run.scalars[tag]
            kept = (values > 0) if positive else np.isfinite(values)
            if kept.any():
                found.append((steps[kept].astype(np.float64), values[kept]))
    return found
