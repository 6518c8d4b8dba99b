"""What a report says, section by section; one without data is left out.

What is concluded from success comes from `findings`; all else is shown as measured, and not tested.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from act_lightning.sim.splits import STANDARD
from act_lightning.study.comparison import LEVEL
from act_lightning.study.report.cells import (
    counted,
    defined,
    shown_interval,
    shown_mean,
    shown_p_value,
    shown_time,
)
from act_lightning.study.report.findings import Difference, Findings, conclusions
from act_lightning.study.report.measures import (
    cost,
    error_by_horizon,
    latent,
    latent_value,
    modes,
    smoothness,
)
from act_lightning.study.report.over_steps import success_over_steps
from act_lightning.study.report.pages import Page, Picture, Section, Table
from act_lightning.study.report.plots import Axis, ForestRow, draw_forest
from act_lightning.study.report.runs import ReportRuns
from act_lightning.study.study import setting_labels


def make_page(runs: ReportRuns, findings: Findings) -> Page:
    """Puts a report together."""
    made = (
        _conclusions(runs, findings),
        _summary(runs, findings),
        _caveats(runs, findings),
        _success(findings),
        _differences(findings),
        success_over_steps(runs),
        latent(runs),
        error_by_horizon(runs),
        smoothness(runs),
        modes(runs),
        cost(runs),
        _variants(runs),
    )
    graded = [run.graded for run in runs.runs if run.graded is not None]
    told = f"{len(runs.runs)} runs of {counted(len(runs.variants), 'variant')}, {len(graded)} "
    told += "evaluated"
    if graded:
        worlds = "" if runs.split == STANDARD else f" ({runs.split})"
        told += f" in {len(graded[0].seeds)} worlds{worlds} of {graded[0].task}, executed "
        told += ", ".join(runs.executions)
    text = (runs.question, f"{told}.")
    return Page(
        title=runs.title,
        text=tuple(line for line in text if line),
        sections=tuple(section for section in made if section is not None),
    )


def summary_table(runs: ReportRuns, findings: Findings) -> Table:
    """One row a variant, and one more for each further way of executing."""
    against = {(d.within, d.first): d for d in findings.variants}
    compared = runs.reference is not None
    rows = []
    for variant in runs.variants:
        mine = [e for e in findings.estimates if e.variant == variant.name]
        own = [
            shown_mean([latent_value(run, "kl") for run in variant.graded], ".3g"),
            shown_mean([latent_value(run, "active_units") for run in variant.graded], ".3g"),
            shown_time(defined(run.report.get("train_seconds") for run in variant.graded)),
        ]
        if not mine:
            empty = ["-"] * (4 if compared else 2)
            rows.append((variant.name, "-", "0", *empty, *own))
        for i, estimate in enumerate(mine):
            difference = against.get((estimate.execution, variant.name)) if compared else None
            cells = [f"{estimate.mean:.1%}", shown_interval(estimate.interval)]
            if compared and difference is not None:
                cells += [f"{100 * difference.mean:+.1f}", shown_p_value(difference.p_holm)]
            elif compared:
                cells += ["reference" if variant.name == runs.reference else "-", "-"]
            rows.append(
                (
                    variant.name if i == 0 else "",
                    estimate.execution,
                    str(len(estimate.rates)),
                    *cells,
                    *(own if i == 0 else [""] * len(own)),
                )
            )
    headings = ["variant", "execution", "seeds", "success", "95% interval"]
    headings += ["difference", "adjusted p"] if compared else []
    headings += ["KL", "active units", "train time"]
    table = Table(headings=tuple(headings), rows=tuple(rows), num_names=2)
    return table if len(runs.executions) > 1 else table.without(1)


def differences_table(differences: Sequence[Difference], heading: str) -> Table:
    """Differences, as they are and adjusted.

    Args:
        differences: of one kind.
        heading: what is the same in both sides of each; it has no column if it is in all.
    """
    table = Table(
        headings=(heading, "first", "second", "seeds", "difference, points", "95% interval", "p",
                  "adjusted p"),
        rows=tuple(
            (
                d.within, d.first, d.second, f"{d.runs[0]} - {d.runs[1]}", f"{100 * d.mean:+.1f}",
                shown_interval(d.interval, "+"), shown_p_value(d.p_value), shown_p_value(d.p_holm),
            )
            for d in differences
        ),
        num_names=3,
    )  # fmt: skip
    return table if len({d.within for d in differences}) > 1 else table.without(0)


def _conclusions(runs: ReportRuns, findings: Findings) -> Section | None:
    points = [*conclusions(findings), *_collapsed(runs)]
    return Section(heading="Conclusions", points=tuple(points)) if points else None


def _collapsed(runs: ReportRuns) -> Iterator[str]:
    """Whether latents are used; only of evaluated runs, as only they have come to their end."""
    units = {
        variant.name: defined(latent_value(run, "active_units") for run in variant.graded)
        for variant in runs.variants
    }
    ignored = [name for name, values in units.items() if values and max(values) == 0]
    mixed = [name for name, values in units.items() if values and min(values) == 0 < max(values)]
    if ignored:
        yield f"No latent dimension is active in any run of {', '.join(ignored)}."
    if mixed:
        yield f"In some runs, but not all, no latent dimension is active: {', '.join(mixed)}."


def _summary(runs: ReportRuns, findings: Findings) -> Section:
    text = (
        "KL, active units and train time (rollouts included): means of the evaluated training "
        "seeds, until and at the checkpoint that was evaluated."
    )
    if runs.reference:
        text = f"Differences are those from {runs.reference}, in percentage points. {text}"
    return Section(heading="Summary", text=(text,), tables=(summary_table(runs, findings),))


def _caveats(runs: ReportRuns, findings: Findings) -> Section | None:
    points = (*runs.remarks, *findings.remarks)
    return Section(heading="To keep in mind", points=points) if points else None


def _success(findings: Findings) -> Section | None:
    rows = [
        ForestRow(group=e.variant, name=e.execution, dots=e.rates, mean=e.mean, interval=e.interval)
        for e in findings.estimates
    ]
    if not rows:
        return None
    caption = (
        "Success rate in the evaluation worlds. Marks: training seeds; ticks: their mean; lines: "
        "95% intervals, over training seeds and worlds where there are several seeds, over worlds "
        "only (Wilson) where there is one."
    )
    axis = Axis(label="success rate", limits=(-0.03, 1.03))
    return Section(
        heading="Success", pictures=(Picture.of("success", caption, draw_forest([(axis, rows)])),)
    )


def _differences(findings: Findings) -> Section | None:
    text, tables = [], []
    families = (
        (findings.variants, "execution", "variants"),
        (findings.ways, "variant", "ways of executing"),
    )
    for differences, heading, kind in families:
        if differences:
            shown = sum(d.p_holm < LEVEL for d in differences)
            text.append(
                f"{counted(len(differences), 'comparison')} between {kind}: {shown} with an "
                f"adjusted p below {LEVEL} (Holm, over all of them)."
            )
            tables.append(differences_table(differences, heading))
    if not tables:
        return None
    text.append(
        "First less second. Of several training seeds: bootstrap over seeds and worlds, the same "
        "worlds for both, and for ways of executing the same policies. Of one seed each: McNemar's "
        "exact test in the same worlds, which says nothing of other seeds. Intervals and the first "
        "p are those of each comparison alone."
    )
    return Section(heading="Differences", text=tuple(text), tables=tuple(tables))


def _variants(runs: ReportRuns) -> Section | None:
    names = list(dict.fromkeys(name for v in runs.variants for name in v.settings))
    if not names:
        return None
    labels = setting_labels(names)
    rows = [(v.name, *(v.settings.get(name, "-") for name in names)) for v in runs.variants]
    table = Table(
        headings=("variant", *labels.values()), rows=tuple(rows), num_names=1 + len(names)
    )
    text = "What varies; -: as in the experiment that all start from."
    return Section(heading="Variants", text=(text,), tables=(table,))
