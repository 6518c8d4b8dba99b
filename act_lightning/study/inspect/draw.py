"""An inspection as one picture: camera frames, joints with actions, and lengths of the episodes."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator
from numpy.typing import NDArray

from act_lightning.data.layout import StoreError
from act_lightning.study.inspect.opening import Opened
from act_lightning.study.inspect.report import Report

WIDTH, DPI = 16.0, 110
"""Of the picture: inches, and dots an inch."""
NUM_EPISODES = 3
"""Episodes drawn if none are asked for."""
MAX_EPISODES = 5
"""More would hide each other."""
MAX_PANELS = 64
"""Dimensions drawn."""
COLOURS = ("#1f77b4", "#e6820e", "#7b4fb5", "#17a2a2", "#d6338a")
"""Of the episodes drawn."""
SUCCESS = {1: ("success", "#6aa84f"), 0: ("failure", "#b03a2e"), -1: ("not known", "#a6a6a6")}


def draw_report(opened: Opened, report: Report, episodes: Sequence[int] | None = None) -> bytes:
    """Draws a store.

    Args:
        opened: the store.
        report: what was found in it.
        episodes: which to show; default three: where findings begin, then at equal distances.

    Returns:
        A PNG file.

    Raises:
        ValueError: there is no such episode, or they are too many.
    """
    chosen = _choose(opened, report, episodes)
    panels = _panels(opened, report)
    cameras = report.cameras if chosen else ()
    heights = [2.9]
    if cameras:
        heights.append(0.75 + len(cameras) * _row_height(report, len(chosen)))
    heights += [0.8 + _rows(count) * _panel_height(count) for *_, count in panels]
    engine = ConstrainedLayoutEngine(w_pad=0.03, h_pad=0.03)
    figure = Figure(figsize=(WIDTH, sum(heights)), dpi=DPI, layout=engine)
    parts = (
        figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False).ravel().tolist()
    )
    _draw_summary(parts.pop(0), report, opened)
    if cameras:
        _draw_frames(parts.pop(0), opened, report, chosen)
    for part, (title, names, count) in zip(parts, panels, strict=True):
        _draw_joints(part, opened, chosen, title, names, count)
    content = io.BytesIO()
    figure.savefig(content, format="png")
    return content.getvalue()


def _choose(opened: Opened, report: Report, episodes: Sequence[int] | None) -> list[int]:
    lengths = opened.ends - opened.starts
    if episodes is not None:
        if wrong := [i for i in episodes if not 0 <= i < len(lengths)]:
            raise ValueError(f"--episodes {wrong[0]}: {report.location} has {len(lengths)}, from 0")
        if len(episodes) > MAX_EPISODES:
            raise ValueError(f"--episodes: {len(episodes)} given; at most {MAX_EPISODES} are drawn")
        return [i for i in episodes if lengths[i] > 0]
    usable = np.flatnonzero(lengths > 0)
    if len(usable) == 0:
        return []
    found = [finding.places[0].episode for finding in report.findings if finding.places]
    odd = [i for i in found if i is not None and lengths[i] > 0]
    apart = usable[np.linspace(0, len(usable) - 1, NUM_EPISODES).round().astype(int)].tolist()
    wanted = dict.fromkeys([*odd, *apart, *usable[:NUM_EPISODES].tolist()])
    return sorted([*wanted][:NUM_EPISODES])


def _panels(opened: Opened, report: Report) -> list[tuple[str, tuple[str, ...], int]]:
    """Title, arrays laid over each other, and number of panels, of each block of small plots."""
    widths = {name: opened.tables[name].shape[1] for name in ("qpos", "action")}
    together = report.action_fit is not None and report.action_fit.lag is not None
    blocks = [("qpos", "action")] if together else [("qpos",), ("action",)]
    panels: list[tuple[str, tuple[str, ...], int]] = []
    for names in blocks:
        title = "qpos (line) and action (dashed)" if len(names) > 1 else names[0]
        if widths[names[0]] > MAX_PANELS:
            title += f", the first {MAX_PANELS} of {widths[names[0]]} dimensions"
        panels.append((title, names, min(widths[names[0]], MAX_PANELS)))
    return panels


def _columns(count: int) -> int:
    return 4 if count <= 16 else 5 if count <= 30 else 6


def _rows(count: int) -> int:
    return -(-count // _columns(count))


def _panel_height(count: int) -> float:
    return 1.5 if count <= 16 else 1.25


def _row_height(report: Report, num_episodes: int) -> float:
    """Inches of a row of camera frames."""
    height, width = report.image_size
    return float(np.clip((WIDTH - 1) / (3 * num_episodes) * height / width, 0.5, 3.0) + 0.06)


def _draw_summary(part: SubFigure, report: Report, opened: Opened) -> None:
    """Lengths on the left, words on the right."""
    lengths, words = part.subplots(1, 2, width_ratios=(1, 1.6))
    _draw_lengths(lengths, report, opened)
    words.axis("off")
    lines = [
        f"{len(report.lengths)} episodes, {report.frames} steps, {report.seconds:.0f} s at "
        f"{report.fps:g} steps a second; task {report.task}",
        f"{report.successes} succeeded, {report.failures} failed, {report.unknown} not known; "
        f"{report.skipped} more not stored",
    ]
    for finding in report.findings[:5]:
        word = "DAMAGED" if finding.damaged else "odd"
        first = f", first {finding.places[0]}" if finding.places else ""
        count = f" ({len(finding.places)} places{first})" if len(finding.places) > 1 else first
        text = f"{word}: {finding.subject}: {finding.title}{count}"
        lines.append(textwrap.shorten(text, 200, placeholder=" ..."))
    if (more := len(report.findings) - 5) > 0:
        lines.append(f"and {more} more findings")
    if not report.findings:
        lines.append("nothing damaged, nothing odd")
    text = "\n".join(textwrap.fill(line, 110, subsequent_indent="    ") for line in lines)
    words.text(0, 1, text, va="top", fontsize=9, linespacing=1.35, parse_math=False,
               transform=words.transAxes)  # fmt: skip
    words.set_title(report.location, loc="left", fontsize=11, fontweight="bold", parse_math=False)


def _draw_lengths(axes: Axes, report: Report, opened: Opened) -> None:
    lengths = np.array(report.lengths)
    axes.set_title("length of the episodes", loc="left", fontsize=10, fontweight="bold")
    axes.set_xlabel("steps", fontsize=8)
    axes.set_ylabel("episodes", fontsize=8)
    axes.tick_params(labelsize=7)
    axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    axes.spines[["top", "right"]].set_visible(False)
    if len(lengths) == 0:
        return
    groups = {value: lengths[opened.success == value] for value in SUCCESS}
    groups = {value: group for value, group in groups.items() if len(group)}
    edges = _edges(lengths)
    axes.hist(
        list(groups.values()),
        bins=edges.tolist(),
        stacked=True,
        color=[SUCCESS[value][1] for value in groups],
        label=[SUCCESS[value][0] for value in groups],
        edgecolor="white",
        linewidth=0.5,
    )
    if len(lengths) > 1:
        axes.axvline(float(np.median(lengths)), color="black", linewidth=0.8, linestyle=":")
    axes.legend(fontsize=7, frameon=False)
    span = edges[-1] - edges[0]
    axes.set_xlim(edges[0] - 0.05 * span, edges[-1] + 0.05 * span)
    top = axes.secondary_xaxis("top")
    top.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    top.xaxis.set_major_formatter(FuncFormatter(lambda steps, _: f"{steps / report.fps:.3g} s"))
    top.tick_params(labelsize=7)


def _edges(lengths: NDArray[np.int64]) -> NDArray[np.float64]:
    """Bins between whole numbers, at most 40 of equal width."""
    low, high = int(lengths.min()), int(lengths.max())
    if high - low < 4:  # a few bars, with room around them
        return np.arange(low - 2.5, high + 3)
    width = -(-(high - low + 1) // min(40, max(8, int(2 * np.sqrt(len(lengths))))))
    return np.arange(low - 0.5, high + width, width)


def _draw_frames(part: SubFigure, opened: Opened, report: Report, episodes: list[int]) -> None:
    """First, middle and last frame of each episode, one camera a row."""
    part.suptitle("camera frames", x=0.005, ha="left", fontsize=10, fontweight="bold")
    grid = part.subplots(len(report.cameras), 3 * len(episodes), squeeze=False)
    for row, camera in enumerate(report.cameras):
        for column in range(3 * len(episodes)):
            axes, episode = grid[row, column], episodes[column // 3]
            length = int(opened.ends[episode] - opened.starts[episode])
            step = (0, (length - 1) // 2, length - 1)[column % 3]
            axes.set_xticks([])
            axes.set_yticks([])
            axes.spines[:].set_color(COLOURS[column // 3])
            if row == 0:
                text = (
                    f"episode {episode} (id {opened.ids[episode]})\n" if column % 3 == 0 else "\n"
                )
                axes.set_title(f"{text}step {step}", fontsize=8, loc="left")
            if column == 0:
                axes.set_ylabel(camera, fontsize=8, parse_math=False)
            picture = _frame(opened, camera, int(opened.starts[episode]) + step)
            if picture is None:
                axes.set_facecolor("#f3d0d0")
                axes.set_box_aspect(report.image_size[0] / report.image_size[1])
                middle = {"ha": "center", "va": "center", "transform": axes.transAxes}
                axes.text(0.5, 0.5, "unreadable", fontsize=8, **middle)
            else:
                axes.imshow(picture)


def _frame(opened: Opened, camera: str, frame: int) -> NDArray[np.uint8] | None:
    picture = np.empty((*opened.spec.image_size, 3), np.uint8)
    try:
        opened.cameras[camera].read_into(frame, picture)
    except (KeyError, StoreError, OSError):
        return None
    return picture


def _draw_joints(
    part: SubFigure,
    opened: Opened,
    episodes: list[int],
    title: str,
    names: tuple[str, ...],
    count: int,
) -> None:
    """Small plots over time, one a dimension, of the first array as lines, the second dashed."""
    units = opened.units.get(names[0], "")
    heading = f"{title}; units: {units}" if units else title
    part.suptitle(heading, x=0.005, ha="left", fontsize=10, fontweight="bold", parse_math=False)
    if not episodes:
        return
    grid = part.subplots(_rows(count), _columns(count), sharex=True, squeeze=False).ravel()
    for index, axes in enumerate(grid.tolist()):
        if index >= count:
            axes.axis("off")
            continue
        for colour, episode in zip(COLOURS, episodes, strict=False):
            rows = slice(int(opened.starts[episode]), int(opened.ends[episode]))
            for name, style in zip(names, ("-", "--"), strict=False):
                values = opened.tables[name][rows, index].astype(np.float64)
                _draw_line(axes, values, opened.spec.fps, colour, style)
        if index + _columns(count) >= count:
            axes.tick_params(labelbottom=True)
            axes.set_xlabel("s", fontsize=8, labelpad=1)
        axes.margins(x=0.01)
        axes.tick_params(labelsize=6.5, length=2, pad=1.5)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="#e6e6e6", linewidth=0.5)
        box = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1.0}
        axes.text(0.01, 0.99, str(index), va="top", fontsize=8, fontweight="bold", bbox=box,
                  transform=axes.transAxes)  # fmt: skip
    part.supylabel(_short(units, _rows(count)), fontsize=8, parse_math=False)
    _draw_legend(part, opened, episodes)


def _draw_line(
    axes: Axes, values: NDArray[np.float64], fps: float, colour: str, style: str
) -> None:
    """A curve over seconds, and red marks below where it is not finite."""
    seconds = np.arange(len(values)) / fps
    finite = np.isfinite(values)
    width = 1.0 if style == "-" else 0.8
    marker = "." if len(values) == 1 else ""
    axes.plot(seconds, np.where(finite, values, np.nan), color=colour, linestyle=style,
              linewidth=width, marker=marker)  # fmt: skip
    if not finite.all():
        bad = seconds[~finite]
        axes.plot(bad, np.zeros(len(bad)), "|", color="red", markersize=9,
                  transform=axes.get_xaxis_transform(), clip_on=False)  # fmt: skip


def _draw_legend(part: SubFigure, opened: Opened, episodes: list[int]) -> None:
    handles = [
        Line2D([], [], color=colour, label=f"episode {episode} (id {opened.ids[episode]})")
        for colour, episode in zip(COLOURS, episodes, strict=False)
    ]
    part.legend(handles=handles, loc="upper right", ncols=len(handles), fontsize=8, frameon=False)


def _short(units: str, num_rows: int) -> str:
    """The start of the units, as long as fits beside so many rows."""
    text = units.split(";")[0]
    return text if len(text) <= 14 * num_rows else ""
