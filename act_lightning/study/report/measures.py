"""Sections of a report about all but success: shown as measured, and not tested.

Each is None where no run has what it shows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from act_lightning.sim.config import OBJECT_RANGES
from act_lightning.study.report.cells import defined, shown_all, shown_spread, shown_time
from act_lightning.study.report.pages import Picture, Section, Table
from act_lightning.study.report.plots import Axis, Curve, ForestRow, draw_curves, draw_forest
from act_lightning.study.report.runs import ReportRun, ReportRuns, ReportVariant
from act_lightning.study.smoothness import METRICS, Smoothness, mean_smoothness

CURVES = {
    "success_over_steps": (
        "rollout/success_rate",
        Axis(label="success rate", limits=(-0.03, 1.03)),
    ),
    "kl_over_steps": ("val/kl", Axis(label="KL to the prior (nats)", log=True)),
    "active_units_over_steps": ("val/active_units", Axis(label="active units of the latent")),
    "modes_over_steps": (
        "val/modes/within_tolerance",
        Axis(label="share of samples at a mode", limits=(-0.03, 1.03)),
    ),
}
"""Plots over optimizer steps, by name: the scalar, and the axis."""
PICTURES = (*CURVES, "success", "error_by_horizon", "smoothness")
"""Names of all plots."""
BAND = (
    "Lines: mean of the training seeds; bands: from the lowest to the highest of them; grey, where "
    "each variant has a panel: the means of the others."
)


def success_over_steps(runs: ReportRuns) -> Section | None:
    """How the rollouts during training went."""
    caption = (
        "Success rate of the rollouts during training, mean of the ways of executing. Few episodes "
        f"each, in other worlds than the evaluation's. {BAND}"
    )
    pictures = _curves(runs, {"success_over_steps": caption})
    return Section(heading="Success over steps", pictures=pictures) if pictures else None


def latent(runs: ReportRuns) -> Section | None:
    """What the latent holds, over steps and in the end."""
    captions = {
        "kl_over_steps": f"KL of the posterior to the prior, on held-out demonstrations. {BAND}",
        "active_units_over_steps": "Latent dimensions whose posterior mean varies over the "
        f"demonstrations. {BAND}",
    }
    names = {
        "kl": "KL, nats",
        "active_units": "active units",
        "l1_posterior": "L1, posterior's z",
        "l1_prior": "L1, z = 0",
        "l1_sampled": "L1, z ~ N(0, I)",
    }
    rows = []
    for variant in runs.variants:
        values = [
            shown_spread([latent_value(run, name) for run in variant.finished], ".3g")
            for name in names
        ]
        if values[0] != "-":
            rows.append((variant.name, *values))
    pictures = _curves(runs, captions)
    if not rows:
        return None
    text = (
        "Of the checkpoints that were evaluated; of a variant without evaluation, at the last "
        "validation. L1 in standard deviations of each action value. Mean (lowest to highest)."
    )
    table = Table(headings=("variant", *names.values()), rows=tuple(rows))
    return Section(heading="Latent", text=(text,), pictures=pictures, tables=(table,))


def error_by_horizon(runs: ReportRuns) -> Section | None:
    """How far off the prediction is at each step of the chunk."""
    curves = {}
    for variant in runs.variants:
        errors = [run.report.get("prediction", {}).get("l1_by_horizon") for run in variant.runs]
        members = [_horizon(values) for values in errors if values]
        if members:
            curves[variant.name] = members
    if not curves:
        return None
    content = draw_curves(
        curves,
        Axis(label="control steps ahead (1: the next action)"),
        Axis(label="L1 error (standard deviations)"),
    )
    caption = (
        "Error of each action of the predicted chunk, on held-out demonstrations, z = 0, at the "
        f"evaluated checkpoint. {BAND}"
    )
    rows = []
    for name, members in curves.items():
        ends = [[values[i] for _, values in members] for i in (0, -1)]
        whole = [float(np.nanmean(values)) for _, values in members]
        size = str(len(members[0][0]))
        rows.append(
            (name, size, *(shown_spread(values, ".3f") for values in (ends[0], ends[1], whole)))
        )
    table = Table(
        headings=("variant", "chunk", "first action", "last action", "whole chunk"),
        rows=tuple(rows),
    )
    picture = picture_of("error_by_horizon", caption, content)
    return Section(heading="Prediction error by horizon", pictures=(picture,), tables=(table,))


def smoothness(runs: ReportRuns) -> Section | None:
    """How smooth the commands are."""
    found = {
        (variant.name, name): [_mean_smoothness(run, name) for run in variant.graded]
        for variant in runs.variants
        for name in runs.executions
        if variant.playing(name)
    }
    found = {
        key: measured
        for key, means in found.items()
        if (measured := [mean for mean in means if mean["path_length"] is not None])
    }
    if not found:
        return None
    task = next(run.graded.task for run in runs.runs if run.graded is not None)
    unit = " (rad)" if task in OBJECT_RANGES else ""
    jerk = " (rad\u00b2/s\u2076)" if unit else ""
    labels = {
        "mean_squared_jerk": f"mean squared jerk\n{jerk}",
        "border_jump": f"jump where a\nprediction begins{unit}",
        "inner_jump": f"jump\nelsewhere{unit}",
        "path_length": f"path length\n{unit}",
    }
    panels = []
    for metric, label in labels.items():
        rows = [_smoothness_row(key, means, metric) for key, means in found.items()]
        if dots := [dot for row in rows for dot in row.dots]:
            log = min(dots) > 0 and max(dots) > 30 * min(dots)
            panels.append((Axis(label=label, log=log, num_ticks=3), rows))
    caption = (
        "Smoothness of the commands in successful episodes. A jump where a new prediction begins "
        "that is larger than elsewhere means that successive predictions disagree. Marks: training "
        "seeds; ticks: their mean. Variants succeed in different worlds, so small differences mean "
        "little."
    )
    rows_of_table = [
        (*key, *(shown_spread([mean[metric] for mean in means], ".3g") for metric in METRICS))
        for key, means in found.items()
    ]
    table = Table(
        headings=("variant", "execution", *METRICS.values()), rows=tuple(rows_of_table), num_names=2
    )
    picture = picture_of("smoothness", caption, draw_forest(panels))
    return Section(heading="Smoothness", pictures=(picture,), tables=(table,))


def modes(runs: ReportRuns) -> Section | None:
    """Which of the few right chunks sampled chunks come near to, where these are known."""
    prefix = "val/modes/"
    tags = [tag for run in runs.runs for tag in run.scalars if tag.startswith(prefix)]
    names = sorted({tag.removeprefix(prefix) for tag in tags}, key=lambda n: ("share_" in n, n))
    if not names:
        return None
    rows = []
    for variant in runs.variants:
        values = [
            shown_spread([_last(run, prefix + name) for run in variant.finished], ".2f")
            for name in names
        ]
        rows.append((variant.name, *values))
    caption = f"Share of sampled chunks that lie within tolerance of a mode. {BAND}"
    pictures = _curves(runs, {"modes_over_steps": caption})
    text = (
        "Of sampled chunks, at the last validation: how near they come to the few right chunks "
        "(modes), and how they are shared among them. Mean (lowest to highest)."
    )
    table = Table(headings=("variant", *(n.replace("_", " ") for n in names)), rows=tuple(rows))
    return Section(heading="Modes", text=(text,), pictures=pictures, tables=(table,))


def cost(runs: ReportRuns) -> Section | None:
    """What training took."""
    rows = []
    for variant in runs.variants:
        graded = variant.graded
        times = defined(run.report.get("train_seconds") for run in graded)
        if not times:
            continue
        training = [run.training for run in graded]
        devices = dict.fromkeys(
            f"{t['num_devices']} x {t['device']}" for t in training if "device" in t
        )
        rows.append(
            (
                variant.name,
                ", ".join(devices) or "-",
                shown_all([t.get("num_parameters") for t in training]),
                shown_all([t.get("max_steps") for t in training]),
                shown_time(times),
                f"{shown_time([min(times)])} to {shown_time([max(times)])}",
                shown_time(defined(t.get("cpu_seconds") for t in training)),
            )
        )
    if not rows:
        return None
    headings = ("variant", "device", "parameters", "steps", "train time", "least to most",
                "processor time")  # fmt: skip
    text = (
        "Of a run, mean of the training seeds. Runs that shared a machine with others took longer "
        "than they would have alone; processor time tells less of that."
    )
    table = Table(headings=headings, rows=tuple(rows), num_names=2)
    return Section(heading="Time and cost", text=(text,), tables=(table,))


def _curves(runs: ReportRuns, captions: Mapping[str, str]) -> tuple[Picture, ...]:
    """Those plots of `CURVES` that there is something for."""
    pictures = []
    for name, caption in captions.items():
        tag, axis = CURVES[name]
        curves = {v.name: members for v in runs.variants if (members := _members(v, tag, axis.log))}
        if curves:
            content = draw_curves(curves, Axis(label="optimizer steps"), axis)
            pictures.append(picture_of(name, caption, content))
    return tuple(pictures)


def _members(variant: ReportVariant, tag: str, positive: bool) -> list[Curve]:
    """A scalar of each run that logged it; on a log axis without what cannot be drawn there."""
    found = []
    for run in variant.runs:
        if tag in run.scalars:
            steps, values, _ = run.scalars[tag]
            kept = (values > 0) if positive else np.isfinite(values)
            if kept.any():
                found.append((steps[kept].astype(np.float64), values[kept]))
    return found


def _horizon(values: Sequence[float | None]) -> Curve:
    """Errors of steps 1 to K; those that no demonstration reaches are NaN."""
    errors = np.array([np.nan if value is None else value for value in values], np.float64)
    return np.arange(1.0, len(errors) + 1), errors


def _mean_smoothness(run: ReportRun, execution: str) -> Mapping[str, float | None]:
    """Of the episodes that succeeded."""
    played = [world[execution] for world in run.report["worlds"] if execution in world]
    return mean_smoothness(
        Smoothness(**episode["smoothness"])
        for episode in played
        if episode["success"] and "smoothness" in episode
    )


def _smoothness_row(
    key: tuple[str, str], means: Sequence[Mapping[str, float | None]], metric: str
) -> ForestRow:
    dots = defined(mean[metric] for mean in means)
    return ForestRow(
        group=key[0],
        name=key[1],
        dots=tuple(dots),
        mean=float(np.mean(dots)) if dots else float("nan"),
    )


def picture_of(name: str, caption: str, content: bytes) -> Picture:
    """A plot of that name, without .png."""
    return Picture(name=f"{name}.png", caption=caption, content=content)


def latent_value(run: ReportRun, name: str) -> float | None:
    """Of the evaluated checkpoint; of a run without evaluation, at its last validation."""
    if run.graded is None:
        return _last(run, f"val/{name}")
    value = run.report.get("latent", {}).get(name)
    return None if value is None else float(value)


def _last(run: ReportRun, tag: str) -> float | None:
    return float(run.scalars[tag].values[-1]) if tag in run.scalars else None
