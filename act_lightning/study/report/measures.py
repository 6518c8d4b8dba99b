"""Sections of a report about all but success: shown as measured, and not tested.

Each is None where no run has what it shows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from act_lightning.sim.config import OBJECT_RANGES
from act_lightning.study.report.cells import (
    defined,
    shown_all,
    shown_mean,
    shown_spread,
    shown_time,
)
from act_lightning.study.report.over_steps import BAND, CURVES, curves_over_steps
from act_lightning.study.report.pages import Picture, Section, Table
from act_lightning.study.report.plots import Axis, Curve, ForestRow, draw_curves, draw_forest
from act_lightning.study.report.runs import ReportRun, ReportRuns, ReportVariant
from act_lightning.study.smoothness import METRICS, Smoothness, mean_smoothness

PICTURES = (*CURVES, "success", "error_by_horizon", "smoothness")
"""Names of all plots."""
HELD_OUT = (
    "Each training seed holds out other demonstrations, the same for all variants of a study, and "
    "much of the {spread} is that: compare variants seed by seed. Standard deviations are those of "
    "each run's own training demonstrations."
)


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
            rows.append((variant.name, _graded_steps(variant), *values))
    pictures = curves_over_steps(runs, captions)
    if not rows:
        return None
    text = (
        "Of the checkpoints that were evaluated; of a variant without evaluation, at the last "
        "validation. L1 in standard deviations of each action value. Mean (lowest to highest). "
    )
    text += HELD_OUT.format(spread="range")
    headings = ("variant", "evaluated at step", *names.values())
    table = Table(headings=headings, rows=tuple(rows))
    return Section(heading="Latent", text=(text,), pictures=pictures, tables=(table,))


def error_by_horizon(runs: ReportRuns) -> Section | None:
    """How far off the prediction is at each step of the chunk."""
    curves = {}
    for variant in runs.variants:
        errors = [run.report.get("prediction", {}).get("l1_by_horizon") for run in variant.runs]
        members = [_horizon(values) for values in errors if values and defined(values)]
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
        f"evaluated checkpoint. {BAND} {HELD_OUT.format(spread='band')}"
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
    picture = Picture.of("error_by_horizon", caption, content)
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
    units = dict.fromkeys(METRICS, unit) | {
        "mean_squared_jerk": unit and " (rad\u00b2/s\u2076)",
        "spectral_arc_length": "",
    }
    labels = {
        "mean_squared_jerk": f"mean squared jerk\n{units['mean_squared_jerk']}",
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
        "that is larger than elsewhere means that successive predictions disagree. Where the "
        "policy is asked at every step (ensembling, chunks of 1) every step is a border and there "
        "is none elsewhere: compare such rows with the inner jump of the others. Arc length: of "
        "the speed's spectrum, without unit, the nearer to 0 the smoother; all else: less is "
        "smoother. Marks: training seeds; ticks: their mean. Variants succeed in different worlds, "
        "so small differences mean little."
    )
    rows_of_table = [
        (*key, *(shown_spread([mean[metric] for mean in means], ".3g") for metric in METRICS))
        for key, means in found.items()
    ]
    table = Table(
        headings=("variant", "execution", *(f"{METRICS[name]}{units[name]}" for name in METRICS)),
        rows=tuple(rows_of_table),
        num_names=2,
    )
    picture = Picture.of("smoothness", caption, draw_forest(panels))
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
    pictures = curves_over_steps(runs, {"modes_over_steps": caption})
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
                _graded_steps(variant),
                shown_time(times),
                f"{shown_time([min(times)])} to {shown_time([max(times)])}",
                shown_mean([_last(run, "rollout/share") for run in graded], ".0%"),
                shown_time(defined(t.get("cpu_seconds") for t in training)),
            )
        )
    if not rows:
        return None
    headings = ("variant", "device", "parameters", "steps", "evaluated at step", "train time",
                "least to most", "rollouts' share", "processor time")  # fmt: skip
    text = (
        "Of a run until the checkpoint that was evaluated was saved, mean of the training seeds; "
        "rollouts included, whose share of the whole training is given. Processor time is that of "
        "the training process, without simulators; it depends less on what else the machine did."
    )
    table = Table(headings=headings, rows=tuple(rows), num_names=2)
    return Section(heading="Time and cost", text=(text,), tables=(table,))


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


def latent_value(run: ReportRun, name: str) -> float | None:
    """Of the evaluated checkpoint; of a run without evaluation, at its last validation."""
    if run.graded is None:
        return _last(run, f"val/{name}")
    value = run.report.get("latent", {}).get(name)
    return None if value is None else float(value)


def _graded_steps(variant: ReportVariant) -> str:
    """Steps of the checkpoints that were evaluated."""
    return shown_all(sorted({run.report["step"] for run in variant.graded if "step" in run.report}))


def _last(run: ReportRun, tag: str) -> float | None:
    return float(run.scalars[tag].values[-1]) if tag in run.scalars else None
