"""A report's text, tables and plots as Markdown and as one HTML page, both from the same content.

The HTML page holds its pictures, and asks nothing of the network. Whatever is said in it counts as
plain text, so names of runs cannot be taken for markup.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, FileSystemLoader


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows of text."""

    headings: tuple[str, ...]
    """(C,) of the columns."""
    rows: tuple[tuple[str, ...], ...]
    """C cells each."""
    num_names: int = 1
    """Columns, from the left, that hold names; the others hold numbers, and end at the right."""

    def without(self, column: int) -> Table:
        """The table less a column of names, counted from 0."""
        return Table(
            headings=self.headings[:column] + self.headings[column + 1 :],
            rows=tuple(row[:column] + row[column + 1 :] for row in self.rows),
            num_names=self.num_names - 1,
        )


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A plot."""

    name: str
    """Of its file."""
    caption: str
    """What it shows."""
    content: bytes
    """A PNG file."""

    @classmethod
    def of(cls, plot: str, caption: str, content: bytes) -> Picture:
        """The picture of a plot, whose name is that of the file without .png."""
        return cls(name=f"{plot}.png", caption=caption, content=content)

    @property
    def url(self) -> str:
        """The picture itself."""
        return f"data:image/png;base64,{base64.b64encode(self.content).decode()}"


@dataclass(frozen=True, kw_only=True)
class Section:
    """A part of the report: paragraphs, then what they speak of."""

    heading: str
    """Its name."""
    text: tuple[str, ...] = ()
    """Paragraphs."""
    points: tuple[str, ...] = ()
    """A list."""
    pictures: tuple[Picture, ...] = ()
    """Plots."""
    tables: tuple[Table, ...] = ()
    """Tables."""


@dataclass(frozen=True, kw_only=True)
class Page:
    """A report."""

    title: str
    """Its heading."""
    text: tuple[str, ...]
    """Paragraphs below it."""
    sections: tuple[Section, ...]
    """In their order."""

    @property
    def pictures(self) -> list[Picture]:
        """Of all sections."""
        return [picture for section in self.sections for picture in section.pictures]


def to_html(page: Page) -> str:
    """The page as one HTML file."""
    loader = FileSystemLoader(Path(__file__).parent)
    environment = Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return environment.get_template("page.html").render(page=page)


def to_markdown(page: Page) -> str:
    """The page as Markdown; its pictures are files beside it."""
    return "\n".join(_markdown(page))


def _markdown(page: Page) -> Iterator[str]:
    yield f"# {_plain(page.title)}\n"
    yield from (f"{_plain(text)}\n" for text in page.text)
    for section in page.sections:
        yield f"## {_plain(section.heading)}\n"
        yield from (f"{_plain(text)}\n" for text in section.text)
        if section.points:
            yield from (f"- {_plain(point)}" for point in section.points)
            yield ""
        for picture in section.pictures:
            yield f"![{_plain(section.heading)}]({picture.name})\n"
            yield f"{_plain(picture.caption)}\n"
        for table in section.tables:
            rule = ["---"] * table.num_names + ["---:"] * (len(table.headings) - table.num_names)
            for row in (table.headings, rule, *table.rows):
                plain = row if row is rule else map(_plain, row)
                yield f"| {' | '.join(plain)} |"
            yield ""


def _plain(text: str) -> str:
    """Text whose signs mean nothing in Markdown."""
    return re.sub(r"([\\`*_\[\]<>|#~&$])", r"\\\1", " ".join(text.split()))
