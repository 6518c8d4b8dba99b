"""An inspection as tables in a terminal, readable from 80 columns on."""

from __future__ import annotations

import numpy as np
from rich import box
from rich.columns import Columns
from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from act_lightning.study.inspect.report import Dimension, Finding, Report

PLACES_SHOWN = 5
"""Places of a finding that are printed; the JSON file has them all."""
DIMENSIONS_SHOWN = 64
"""Dimensions of an array that are printed."""
REMARK_STYLES = {"not finite": "bold red", "constant": "dim"}
"""Style of a remark; others are yellow."""


def print_report(report: Report, console: Console) -> None:
    """Prints the whole report."""
    console.print(_overview(report))
    console.print(_arrays(report))
    tables = [_dimensions(report, name) for name in report.dimensions]
    console.print(Columns(tables, padding=(0, 4)))
    for finding in report.findings:
        console.print(_finding(finding))
    console.print(Text(*_verdict(report)))


def _overview(report: Report) -> RenderableType:
    lengths, rows = report.lengths, Table.grid(padding=(0, 2))
    rows.add_column(style="bold", no_wrap=True)
    rows.add_column()
    of = f" of {report.expected_episodes}" if report.expected_episodes is not None else ""
    state = "complete" if report.complete else f"still being recorded{of}"
    rows.add_row("store", Text(f"{report.location}, format version {report.version}, {state}"))
    rows.add_row("task", Text(f"{report.task}, {report.fps:g} steps a second"))
    rows.add_row(
        "episodes",
        f"{len(lengths)} with {report.frames} steps, {_duration(report.seconds)}",
    )
    if lengths:
        rows.add_row(
            "lengths", f"{min(lengths)} to {max(lengths)} steps, median {np.median(lengths):g}"
        )
    rows.add_row(
        "success",
        f"{report.successes} yes, {report.failures} no, {report.unknown} unknown; "
        f"{report.skipped} more were tried and not stored",
    )
    cameras = "none"
    if report.cameras:
        height, width = report.image_size
        cameras = f"{', '.join(report.cameras)} at {height} x {width} (height x width)"
    rows.add_row("cameras", Text(cameras))
    if report.cameras:
        which = "the first, middle and last of each episode" if report.quick else "all"
        rows.add_row("pictures", f"{report.pictures} read and checked: {which}")
    rows.add_row("actions", _actions(report))
    return rows


def _actions(report: Report) -> str:
    fit = report.action_fit
    if fit is None:
        return "not compared with qpos: other dimensions"
    if fit.lag is None:
        return "follow no joint: not positions of qpos, or nothing moves"
    total = len(report.dimensions["action"])
    lag = f"{fit.lag} steps ({fit.lag / report.fps:.2g} s)"
    return f"{len(fit.comparable)} of {total} dimensions go with qpos, which follows by {lag}"


def _arrays(report: Report) -> Table:
    table = _table(Text("arrays", style="bold"))
    table.add_column("")
    for name in ("in memory", "on disk", "ratio"):
        table.add_column(name, justify="right", no_wrap=True)
    total = [0, 0]
    for array in report.arrays:
        total[0] += array.raw
        total[1] += array.stored or 0
        table.add_row(Text(array.name), *_sizes(array.raw, array.stored))
    table.add_section()
    table.add_row("all", *_sizes(total[0], total[1] or None))
    return table


def _sizes(raw: int, stored: int | None) -> tuple[str, str, str]:
    """Both sizes and their ratio; below 1 for short tables, whose last chunk is padded."""
    if not stored:
        return _bytes(raw), "unknown", ""
    ratio = raw / stored
    return _bytes(raw), _bytes(stored), f"{ratio:.1f}" if ratio >= 0.1 else "-"


def _table(title: Text) -> Table:
    return Table(
        title=title,
        title_justify="left",
        title_style="",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
    )


def _dimensions(report: Report, name: str) -> Table:
    dimensions, units = report.dimensions[name], report.units.get(name, "")
    table = _table(Text.assemble((name, "bold"), f"  units: {units}" if units else ""))
    for column in ("", "min", "max", "mean", "std"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("", max_width=32)
    for index, dimension in enumerate(dimensions[:DIMENSIONS_SHOWN]):
        table.add_row(str(index), *_values(dimension), _remarks(dimension))
    if (more := len(dimensions) - DIMENSIONS_SHOWN) > 0:
        table.add_row("", "", "", "", "", f"and {more} more; see --json")
    return table


def _values(dimension: Dimension) -> list[str]:
    values = (dimension.min, dimension.max, dimension.mean, dimension.std)
    return ["" if value is None else f"{value:.3g}" for value in values]


def _remarks(dimension: Dimension) -> Text:
    parts = [
        Text(remark, style=REMARK_STYLES.get(remark, "yellow")) for remark in dimension.remarks
    ]
    return Text(", ").join(parts)


def _finding(finding: Finding) -> RenderableType:
    colour = "red" if finding.damaged else "yellow"
    word = "damaged" if finding.damaged else "odd"
    head = Text.assemble(
        (f"{word}  ", f"bold {colour}"), (finding.subject, "bold"), f"  {finding.title}"
    )
    lines: list[RenderableType] = [head]
    if finding.rule:
        lines.append(Padding(Text(f"rule: {finding.rule}", style="dim"), (0, 0, 0, 4)))
    for place in finding.places[:PLACES_SHOWN]:
        lines.append(Padding(Text(str(place)), (0, 0, 0, 4)))
    if (more := len(finding.places) - PLACES_SHOWN) > 0:
        lines.append(Padding(Text(f"and {more} more places; --json FILE has all"), (0, 0, 0, 4)))
    return Group(*lines)


def _verdict(report: Report) -> tuple[str, str]:
    if report.damaged:
        return "damaged: this store does not open for training", "bold red"
    if report.findings:
        return "readable; look at what is odd", "bold yellow"
    return "readable, and nothing odd was found", "bold green"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _bytes(number: int) -> str:
    size, units = float(number), ["B", "kB", "MB", "GB", "TB"]
    while size >= 1000 and len(units) > 1:
        size, units = size / 1000, units[1:]
    return f"{size:.3g} {units[0]}"
