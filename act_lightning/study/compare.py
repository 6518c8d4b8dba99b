"""The verb `compare`: which run is better, and how sure that is.

It reads nothing but what `fit` and `evaluate` wrote, so it needs neither simulator nor network.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich import get_console
from rich.console import Console
from rich.table import Table
from rich.text import Text

from act_lightning.sim.splits import SPLITS, STANDARD
from act_lightning.study.comparison import (
    Comparison,
    compare_groups,
    compare_runs,
    conclusions,
)
from act_lightning.study.plain_table import plain_table
from act_lightning.study.report.reading import read_folders, read_study_runs
from act_lightning.study.report.writing import write_report
from act_lightning.study.study import read_study


def compare_verb(args: list[str]) -> None:
    """`compare RUN [RUN ...] [options]`, or `compare --study FILE [options]`."""
    parser = argparse.ArgumentParser(
        prog="act_lightning compare",
        description="Compare evaluated runs in the same worlds: two by two; a single run's ways of "
        "executing; with --against, two ways of training, each by runs of several seeds; with "
        "--study or --report, everything that a study or the runs named left, as a report.",
    )
    parser.add_argument(
        "runs", metavar="RUN", type=Path, nargs="*", help="a run's folder, as runs/insertion/seed_0"
    )
    parser.add_argument(
        "--against", metavar="RUN", type=Path, nargs="+", help="the runs of the other group"
    )
    parser.add_argument(
        "--study", metavar="FILE", type=Path, help="report on it, as experiments/studies/demos.yaml"
    )
    parser.add_argument(
        "--report",
        "--out",
        metavar="DIR",
        type=Path,
        help="write the report here (default the study's folder, in report/)",
    )
    parser.add_argument("--execution", metavar="NAME", help="look at this way of executing only")
    parser.add_argument(
        "--split",
        choices=[STANDARD, *SPLITS],
        default=STANDARD,
        help="which worlds (default %(default)s)",
    )
    parser.add_argument("--json", action="store_true", help="print plain JSON")
    options = parser.parse_args(args)
    if bool(options.runs) == bool(options.study):
        parser.error("give either runs or --study")
    if (options.study or options.report) and (options.against or options.json):
        parser.error("--against and --json do not go with a report")
    how: dict[str, Any] = {"execution": options.execution, "split": options.split}
    if options.study:
        study = read_study(options.study)
        folder = options.report or study.folder / "report"
        write_report(read_study_runs(study, **how), folder, get_console())
        return
    if options.report:
        write_report(read_folders(options.runs, **how), options.report, get_console())
        return
    if options.against:
        comparison = compare_groups(options.runs, options.against, **how)
    else:
        comparison = compare_runs(options.runs, **how)
    if options.json:
        document = asdict(comparison) | {"conclusions": conclusions(comparison)}
        print(json.dumps(document, indent=1, allow_nan=False))
        return
    print_comparison(comparison, get_console())


def print_comparison(comparison: Comparison, console: Console) -> None:
    """Prints the rates, the differences, what they mean, and what else to know."""
    tables = [_rates_table(comparison)]
    if comparison.pairs:
        tables.append(_pairs_table(comparison))
    if comparison.groups:
        tables.append(_groups_table(comparison))
    for table in tables:
        console.print(table)
        console.print()
    for line in (*conclusions(comparison), *(f"Note: {r}" for r in comparison.remarks)):
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def _rates_table(comparison: Comparison) -> Table:
    worlds = "" if comparison.split == STANDARD else f", {comparison.split} worlds"
    table = _table(f"{comparison.task}{worlds}: success", ("", "run", "execution"))
    for heading in ("success", "95% interval", "worlds"):
        table.add_column(heading, justify="right", no_wrap=True)
    for rate in comparison.rates:
        table.add_row(
            rate.run,
            Text(rate.folder, overflow="fold"),
            rate.execution,
            f"{rate.successes / rate.worlds:.1%}",
            _interval(rate.wilson_95, ""),
            f"{rate.successes}/{rate.worlds}",
        )
    return table


def _pairs_table(comparison: Comparison) -> Table:
    """Differences; p-values adjusted for the number of comparisons if there are several."""
    several = len(comparison.pairs) > 1
    # A single run's ways of executing are compared with each other, not within one of them.
    executions = any(pair.execution for pair in comparison.pairs)
    title = "first less second, in points; worlds in which only one succeeded"
    table = _table(title, ("", *["execution"] * executions))
    headings = ["difference", "95% interval", "first", "second", "p"]
    for heading in headings + ["adjusted"] * several:
        table.add_column(heading, justify="right", no_wrap=True)
    for pair in comparison.pairs:
        table.add_row(
            f"{pair.first} - {pair.second}",
            *[pair.execution or ""] * executions,
            f"{100 * pair.test.difference:+.1f}",
            _interval(pair.test.interval, "+"),
            str(pair.test.only_first),
            str(pair.test.only_second),
            f"{pair.test.p_value:.2g}",
            *[f"{pair.p_holm:.2g}"] * several,
        )
    return table


def _groups_table(comparison: Comparison) -> Table:
    """Groups and differences; p-values adjusted for the ways of executing if there are several."""
    several = sum(group.p_holm is not None for group in comparison.groups) > 1
    table = _table("over training seeds and worlds", ("", "execution"))
    for heading in ["runs", "mean, points", "95% interval", "p"] + ["adjusted"] * several:
        table.add_column(heading, justify="right", no_wrap=True)
    for group in comparison.groups:
        sign = "+" if len(group.runs) == 2 else ""
        table.add_row(
            group.name,
            group.execution,
            " - ".join(str(count) for count in group.runs),
            f"{100 * group.result.mean:{sign}.1f}",
            _interval(group.result.interval, sign),
            _p_value(group.result.p_value),
            *[_p_value(group.p_holm)] * several,
        )
    return table


def _table(title: str, headings: tuple[str, ...]) -> Table:
    table = plain_table(title)
    for heading in headings:
        table.add_column(heading)
    return table


def _p_value(value: float | None) -> str:
    return "" if value is None else f"{value:.2g}"


def _interval(interval: tuple[float, float], sign: str) -> str:
    low, high = interval
    return f"[{100 * low:{sign}.1f}, {100 * high:{sign}.1f}]"
