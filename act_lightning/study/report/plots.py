"""The plots of a report, each a small PNG file; the same values give the same bytes.

Up to seven variants share one panel, in colours that colour-blind readers can tell apart (Okabe and
Ito, jfly.uni-koeln.de/color). More of them get a panel each, with all others in grey behind.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter
from matplotlib.typing import LineStyleType
from numpy.typing import NDArray
from PIL import Image

from act_lightning.study.statistics import Interval

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
LINES: tuple[LineStyleType, ...] = ("-", "--", ":", "-.", "-", "--", ":")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">")
DPI, WIDTH, NUM_COLOURS = 144, 8.0, 64
"""Dots an inch, inches, and colours of a picture's palette."""
GREY = "#c9c9c9"

Array = NDArray[np.float64]
Curve = tuple[Array, Array]
"""(N,) where, and (N,) what."""


@dataclass(frozen=True, kw_only=True)
class Axis:
    """What an axis shows."""

    label: str
    """With its unit."""
    limits: tuple[float, float] | None = None
    """Of what is shown; None: of the values."""
    log: bool = False
    """Whether powers of ten are equally far apart."""
    num_ticks: int = 5
    """At most, if not `log`."""


@dataclass(frozen=True, kw_only=True)
class ForestRow:
    """Values of one variant, executed one way."""

    group: str
    """Named once for successive rows."""
    name: str
    """Of the row; chooses its colour."""
    dots: tuple[float, ...]
    """One for each run."""
    mean: float
    """Drawn as a tick; NaN: it is not."""
    interval: Interval | None = None
    """Drawn as a line; None: nothing is drawn."""


def draw_curves(curves: Mapping[str, Sequence[Curve]], x: Axis, y: Axis) -> bytes:
    """Draws curves of several runs each: their mean, and a band from the lowest to the highest.

    Where the runs were not measured at the same places, each place shows those that were.

    Args:
        curves: of each run, by variant.
        x: the axis along which they run.
        y: what they show.

    Returns:
        A PNG file.
    """
    with _style():
        if len(curves) <= len(COLOURS):
            return _draw_together(curves, x, y)
        return _draw_apart(curves, x, y)


def draw_forest(panels: Sequence[tuple[Axis, Sequence[ForestRow]]]) -> bytes:
    """Draws values as rows: a dot for each run, their mean, and its interval.

    Args:
        panels: what each shows, and its rows; the same groups and names in all panels.

    Returns:
        A PNG file.
    """
    rows = panels[0][1]
    names = list(dict.fromkeys(row.name for row in rows))
    groups = list(dict.fromkeys(row.group for row in rows))
    alone = len(groups) == 1 or len(names) == 1  # then rows need no second name
    with _style():
        figure = Figure(figsize=(WIDTH, 1.0 + 0.17 * len(rows) + 0.12 * len(groups)), dpi=DPI,
                        layout="constrained")  # fmt: skip
        axes_of = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0].tolist()
        places = _places(rows)
        for axes, (axis, mine) in zip(axes_of, panels, strict=True):
            for row, place in zip(mine, places, strict=True):
                index = 0 if len(names) == 1 else names.index(row.name)
                _draw_row(axes, row, place, index)
            _set_axis(axes, axis, "x")
            axes.grid(axis="y", visible=False)
        if len(groups) == 1:
            ticks = [(row.name, place) for row, place in zip(rows, places, strict=True)]
        else:
            ticks = [
                (g, float(np.mean([p for r, p in zip(rows, places, strict=True) if r.group == g])))
                for g in groups
            ]
        axes_of[0].set_yticks([p for _, p in ticks], [name for name, _ in ticks])
        axes_of[0].set_ylim(max(places) + 0.7, min(places) - 0.7)
        if not alone:
            handles = [
                Line2D([], [], color=COLOURS[i % len(COLOURS)], marker=MARKERS[i % len(MARKERS)],
                       markerfacecolor="white")
                for i in range(len(names))
            ]  # fmt: skip
            _legend(figure, names, handles)
        return _png(figure)


def _draw_together(curves: Mapping[str, Sequence[Curve]], x: Axis, y: Axis) -> bytes:
    figure = Figure(figsize=(WIDTH, 3.6), dpi=DPI, layout="constrained")
    axes = figure.subplots()
    for colour, line, members in zip(COLOURS, LINES, curves.values(), strict=False):
        _draw_curve(axes, members, colour, line)
    _set_axis(axes, x, "x")
    _set_axis(axes, y, "y")
    if len(curves) > 1:
        styles = zip(COLOURS, LINES, strict=False)
        handles = [Line2D([], [], color=colour, linestyle=line) for colour, line in styles]
        _legend(figure, list(curves), handles[: len(curves)])
    return _png(figure)


def _draw_apart(curves: Mapping[str, Sequence[Curve]], x: Axis, y: Axis) -> bytes:
    num_columns = 4
    num_rows = -(-len(curves) // num_columns)
    figure = Figure(figsize=(WIDTH, 0.4 + 1.55 * num_rows), dpi=DPI, layout="constrained")
    grid = figure.subplots(num_rows, num_columns, sharex=True, sharey=True, squeeze=False).ravel()
    means = [_band(members) for members in curves.values()]
    for index, axes in enumerate(grid.tolist()):
        if index >= len(curves):
            axes.axis("off")
            continue
        name = list(curves)[index]
        for places, mean, _, _ in means:
            axes.plot(places, mean, color=GREY, linewidth=0.6, zorder=1)
        _draw_curve(axes, curves[name], COLOURS[0], "-")
        _set_axis(axes, Axis(label="", limits=x.limits, log=x.log), "x")
        _set_axis(axes, Axis(label="", limits=y.limits, log=y.log), "y")
        axes.set_title(name, fontsize=7.5 if len(name) < 26 else 6)
        axes.tick_params(labelsize=7, labelbottom=index + num_columns >= len(curves))
    figure.supxlabel(x.label, fontsize=9)
    figure.supylabel(y.label, fontsize=9)
    return _png(figure)


def _draw_curve(axes: Axes, members: Sequence[Curve], colour: str, line: LineStyleType) -> None:
    places, mean, low, high = _band(members)
    if len(members) > 1:
        axes.fill_between(places, low, high, color=colour, alpha=0.18, linewidth=0, zorder=2)
    marker = "o" if len(places) == 1 else ""
    axes.plot(places, mean, color=colour, linestyle=line, linewidth=1.6, marker=marker,
              markersize=4, zorder=3)  # fmt: skip


def _band(members: Sequence[Curve]) -> tuple[Array, Array, Array, Array]:
    """Places, and there the mean, the lowest and the highest of the runs measured there."""
    found: dict[float, list[float]] = {}
    for places, values in members:
        for place, value in zip(places.tolist(), values.tolist(), strict=True):
            if np.isfinite(value):
                found.setdefault(place, []).append(value)
    order = sorted(found)
    statistics = [[float(f(found[place])) for place in order] for f in (np.mean, min, max)]
    mean, low, high = (np.array(values) for values in statistics)
    return np.array(order), mean, low, high


def _places(rows: Sequence[ForestRow]) -> list[float]:
    """Heights of rows, with a gap between groups."""
    places, place = [], 0.0
    for i, row in enumerate(rows):
        place += 0 if i == 0 else 1 if row.group == rows[i - 1].group else 1.7
        places.append(place)
    return places


def _draw_row(axes: Axes, row: ForestRow, place: float, index: int) -> None:
    colour, marker = COLOURS[index % len(COLOURS)], MARKERS[index % len(MARKERS)]
    if row.interval is not None:
        axes.plot(row.interval, [place, place], color=colour, linewidth=1.6, zorder=2)
    if np.isfinite(row.mean):
        axes.plot([row.mean], [place], "|", color=colour, markersize=9, markeredgewidth=1.8,
                  zorder=3)  # fmt: skip
    axes.scatter(row.dots, [place] * len(row.dots), s=16, marker=marker, facecolor="white",
                 edgecolor=colour, linewidth=0.9, zorder=4)  # fmt: skip


def _set_axis(axes: Axes, axis: Axis, which: str) -> None:
    part = axes.xaxis if which == "x" else axes.yaxis
    if axis.log:
        axes.set(**{f"{which}scale": "log"})
        part.set_minor_formatter(NullFormatter())
    else:
        part.set_major_locator(MaxNLocator(axis.num_ticks))
    part.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set(**{f"{which}label": axis.label})
    if axis.limits is not None:
        axes.set(**{f"{which}lim": axis.limits})


def _legend(figure: Figure, names: Sequence[str], handles: Sequence[Line2D]) -> None:
    """Below the plot. Names are set last, as Matplotlib leaves out those that begin with _."""
    columns = max(1, min(len(names), int(110 / (max(map(len, names)) + 8))))
    legend = figure.legend(handles, [" "] * len(handles), loc="outside lower center",
                           ncols=columns, frameon=False, fontsize=8)  # fmt: skip
    for text, name in zip(legend.get_texts(), names, strict=True):
        text.set_text(name)


@contextmanager
def _style() -> Iterator[None]:
    """Settings of all plots; names of variants may hold signs that mean mathematics elsewhere."""
    settings: dict[Any, Any] = {
        "text.parse_math": False,
        "font.family": "DejaVu Sans",
        "font.size": 8.5,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.color": "#e8e8e8",
        "axes.axisbelow": True,
    }
    with matplotlib.rc_context(settings):
        yield


def _png(figure: Figure) -> bytes:
    """The picture with a small palette, which is a third of its size."""
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png")
    # Of Pillow's methods the one that keeps thin lines of all colours apart in so few.
    small = (
        Image.open(drawn)
        .convert("RGB")
        .quantize(NUM_COLOURS, method=Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE)
    )
    content = io.BytesIO()
    small.save(content, "png", optimize=True)
    return content.getvalue()
