"""Writes a report into a folder, and prints its summary."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.text import Text

from act_lightning.new_file import write_file
from act_lightning.study.comparison import LEVEL
from act_lightning.study.plain_table import plain_table
from act_lightning.study.report.cells import counted
from act_lightning.study.report.contents import differences_table, make_page, summary_table
from act_lightning.study.report.findings import Findings, conclusions, find
from act_lightning.study.report.measures import PICTURES
from act_lightning.study.report.pages import Table, to_html, to_markdown
from act_lightning.study.report.runs import ReportRuns

MOST_PRINTED = 15
"""Of more comparisons only those that show a difference are printed."""
NAME_WIDTH = 32
"""Characters that a name has at least, if it is as long."""


def write_report(runs: ReportRuns, folder: Path, console: Console) -> None:
    """Writes report.html, report.md and the plots, and prints what came out.

    Args:
        runs: what the report is made from.
        folder: is made if need be; plots of an earlier report there that this one lacks are
            deleted.
        console: prints the summary.
    """
    findings = find(runs)
    page = make_page(runs, findings)
    for name in PICTURES:
        (folder / f"{name}.png").unlink(missing_ok=True)
    for picture in page.pictures:
        write_file(folder / picture.name, picture.content)
    write_file(folder / "report.md", to_markdown(page).encode())
    write_file(folder / "report.html", to_html(page).encode())
    print_findings(runs, findings, console)
    line = f"written to {folder / 'report.html'}, with report.md and plots beside it"
    console.print(line, highlight=False, markup=False, soft_wrap=True)


def print_findings(runs: ReportRuns, findings: Findings, console: Console) -> None:
    """Prints the summary, the differences, what they mean, and what else to know."""
    _print_table(runs.title, summary_table(runs, findings), console)
    families = (
        (findings.variants, "execution", "variants"),
        (findings.ways, "variant", "ways of executing"),
    )
    for differences, heading, kind in families:
        printed = differences
        compared = f"{counted(len(differences), 'comparison')} between {kind}"
        title = f"{compared}: first less second, in points"
        if len(differences) > MOST_PRINTED:
            printed = tuple(d for d in differences if d.p_holm < LEVEL)
            title += f"; the {len(printed)} with an adjusted p below {LEVEL}"
        if printed:
            _print_table(title, differences_table(printed, heading), console)
    notes = (f"Note: {remark}" for remark in (*runs.remarks, *findings.remarks))
    for line in (*conclusions(findings), *notes):
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def _print_table(title: str, content: Table, console: Console) -> None:
    table = plain_table(title)
    for i, heading in enumerate(content.headings):
        if i < content.num_names:
            # Or a narrow terminal would take the names' room for the numbers.
            widest = max(len(row[i]) for row in content.rows)
            table.add_column(heading, overflow="fold", min_width=min(widest, NAME_WIDTH))
        else:
            table.add_column(heading.replace(" ", "\n"), justify="right", no_wrap=True)
    for row in content.rows:
        table.add_row(*(Text(cell) for cell in row))
    # All columns, also where the terminal, or the 80 characters of a log file, are too narrow.
    least = console.measure(table, options=console.options.update(width=1000)).minimum
    console.print(table, width=max(console.width, least), crop=False)
    console.print()
