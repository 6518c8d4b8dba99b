"""The plots of a report, each a small PNG file; the same values give the same bytes.

Up to seven variants share one panel, in colours that colour-blind readers can tell apart (Okabe and
Ito, jfly.uni-koeln.de/color). More of them get a panel each, with all others in grey behind.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator
from matplotlib.transforms import offset_copy
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
SUPERSCRIPTS = str.maketrans(
    "-0123456789", "\u207b\u2070\u00b9\u00b2\u00b3\u2074\u2075\u2076\u2077\u2078\u2079"
)

Array = NDArray[np.float64]
Curve = tuple[Array, Array]
"""(N,) where, and (N,) what."""
Band = tuple[Array, Array, Array, Array]
"""(N,) where, and (N,) the mean, the lowest and the highest of the runs measured there."""


@dataclass(frozen=True, kw_only=True)
class Axis:
    """What an axis shows."""

    label: str
    """With its unit."""
    limits: tuple[float, float] | None = None
    """Of what is shown; None: of the values."""
    log: bool = False
    """Whether powers of ten are equally far apart."""
    counts: bool = False
    """Whether whole numbers from 0 are shown; 0 and 1 are then always in view."""
    num_ticks: int = 5
    """About at most."""


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

    Between its measurements a run counts with what lies on the straight line between them; before
    the first and after the last it does not count.

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
    bands = {name: _band(members) for name, members in curves.items()}
    dots = [name for name, (places, *_) in bands.items() if len(places) == 1]
    handles = []
    for name, colour, line in zip(curves, COLOURS, LINES, strict=False):
        # Side by side, as dots at the same place would hide each other.
        shift = 6 * (dots.index(name) - (len(dots) - 1) / 2) if name in dots else 0.0
        _draw_band(axes, bands[name], colour, line, shift)
        style: Any = {"marker": "o", "linestyle": ""} if name in dots else {"linestyle": line}
        handles.append(Line2D([], [], color=colour, **style))
    _set_axis(axes, x, "x")
    _set_axis(axes, y, "y")
    if len(curves) > 1:
        _legend(figure, list(curves), handles)
    return _png(figure)


def _draw_apart(curves: Mapping[str, Sequence[Curve]], x: Axis, y: Axis) -> bytes:
    num_columns = 4
    num_rows = -(-len(curves) // num_columns)
    figure = Figure(figsize=(WIDTH, 0.4 + 1.55 * num_rows), dpi=DPI, layout="constrained")
    grid = figure.subplots(num_rows, num_columns, sharex=True, sharey=True, squeeze=False).ravel()
    bands = [_band(members) for members in curves.values()]
    for index, axes in enumerate(grid.tolist()):
        if index >= len(curves):
            axes.axis("off")
            continue
        name = list(curves)[index]
        for places, mean, _, _ in bands:
            axes.plot(places, mean, color=GREY, linewidth=0.6, zorder=1)
        _draw_band(axes, bands[index], COLOURS[0], "-")
        axes.set_title(name, fontsize=7.5 if len(name) < 26 else 6)
        axes.tick_params(labelsize=7, labelbottom=index + num_columns >= len(curves))
    # All panels share them.
    _set_axis(grid[0], replace(x, label=""), "x")
    _set_axis(grid[0], replace(y, label=""), "y")
    figure.supxlabel(x.label, fontsize=9)
    figure.supylabel(y.label, fontsize=9)
    return _png(figure)


def _draw_band(
    axes: Axes, band: Band, colour: str, line: LineStyleType, shift: float = 0.0
) -> None:
    """Draws a mean and its band; of a single place, a dot and a bar, `shift` points aside."""
    places, mean, low, high = band
    if len(places) > 1:
        axes.fill_between(places, low, high, color=colour, alpha=0.18, linewidth=0, zorder=2)
        axes.plot(places, mean, color=colour, linestyle=line, linewidth=1.6, zorder=3)
        return
    # Matplotlib takes no notice of what is moved aside when it chooses the limits.
    axes.update_datalim([(places[0], low[0]), (places[0], high[0])])
    aside = offset_copy(axes.transData, axes.get_figure(root=True), x=shift, units="points")
    axes.vlines(places, low, high, color=colour, linewidth=1.6, transform=aside, zorder=2)
    axes.plot(places, mean, "o", color=colour, markersize=4, transform=aside, zorder=3)


def _band(members: Sequence[Curve]) -> Band:
    """Every run counts at the places of all, from its first to its last measurement."""
    measured = [(places[np.isfinite(v)], v[np.isfinite(v)]) for places, v in members]
    order = np.unique(np.concatenate([places for places, _ in measured]))
    values = np.array([np.interp(order, *run, left=np.nan, right=np.nan) for run in measured])
    return order, np.nanmean(values, axis=0), np.nanmin(values, axis=0), np.nanmax(values, axis=0)


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
    axes.set(**{f"{which}label": axis.label, f"{which}scale": "log" if axis.log else "linear"})
    low, high = part.get_view_interval()
    if axis.counts:
        axes.set(**{f"{which}lim": (-0.3, max(high, 1.3))})
    elif axis.limits is not None:
        axes.set(**{f"{which}lim": axis.limits})
    # Fewer powers of ten in view would not show how long one is.
    if axis.log and np.floor(np.log10(high)) - np.ceil(np.log10(low)) >= 1:
        part.set_major_locator(LogLocator(numticks=axis.num_ticks))
        part.set_major_formatter(FuncFormatter(lambda value, _: _power_of_ten(value)))
        part.set_minor_formatter(NullFormatter())
    else:
        part.set_major_locator(MaxNLocator(axis.num_ticks, integer=axis.counts))
        part.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        part.set_minor_locator(NullLocator())


def _power_of_ten(value: float) -> str:
    """As 10⁻³; mathematics in names is off, see `_style`."""
    return "10" + f"{np.log10(value):.0f}".translate(SUPERSCRIPTS)


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
