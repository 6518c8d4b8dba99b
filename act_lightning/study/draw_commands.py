"""Draws what was commanded in one world, executed in several ways: each joint over time."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from numpy.typing import NDArray

Array = NDArray[np.floating[Any]]
Episode = tuple[Array, Sequence[int]]
"""(T, A) commands, and the steps at which a new prediction begins."""

WIDTH, DPI = 15.0, 110
"""Of the picture: inches, and dots an inch."""
MAX_PANELS = 64
"""Values drawn; the speed is that of all."""
COLOURS = (
    "#d6338a", "#1f77b4", "#e6820e", "#2a9d4b", "#7b4fb5",
    "#17a2a2", "#8c564b", "#c9a400", "#5f6b7a", "#000000",
)  # fmt: skip
"""Of the ways of executing."""


def draw_commands(
    episodes: Mapping[str, Episode],
    fps: float,
    title: str,
    *,
    values: Sequence[int] | None = None,
    unit: str = "",
) -> bytes:
    """Draws the commands of the ways of executing over each other, one panel a value.

    On top is the speed of the commanded path, where jumps stand out. Ticks below the curves say
    where a new prediction begins, except for ways that ask the policy at every step.

    Args:
        episodes: commands and queries (see `sim.results.EpisodeResult`) by way of executing, at
            most 10.
        fps: control steps a second.
        title: written above.
        values: which of the A values make the speed (see `smoothness.arm_values`); None: all. All
            have a panel.
        unit: of the values that make the speed, as rad.

    Returns:
        A PNG file.

    Raises:
        ValueError: there is nothing to draw or too much, or the ways differ in A.
    """
    sizes = {commands.shape[1] for commands, _ in episodes.values()}
    if len(sizes) != 1 or len(episodes) > len(COLOURS):
        raise ValueError(
            f"draw_commands: {len(episodes)} ways of executing with {sorted(sizes)} values; give 1 "
            f"to {len(COLOURS)} ways, with the same values"
        )
    count = min(sizes.pop(), MAX_PANELS)
    columns = min(4, count)
    rows = -(-count // columns)
    figure = Figure(figsize=(WIDTH, 3.2 + 1.5 * rows), dpi=DPI, layout="constrained")
    figure.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold", parse_math=False)
    grid = figure.add_gridspec(rows + 2, columns, height_ratios=[1.4, 0.05, *[1] * rows])
    top = figure.add_subplot(grid[0, :])
    _draw_speed(top, episodes, fps, values)
    top.set_ylabel(f"{unit}/s" if unit else "per s", fontsize=8, parse_math=False)
    for index in range(count):
        place = grid[2 + index // columns, index % columns]
        axes = figure.add_subplot(place, sharex=top)
        for colour, (commands, _) in zip(COLOURS, episodes.values(), strict=False):
            seconds = np.arange(len(commands)) / fps
            axes.plot(seconds, commands[:, index], color=colour, linewidth=0.9)
        _decorate(axes, str(index), is_last=index + columns >= count)
        _draw_borders(axes, episodes, fps)
    handles = [
        Line2D([], [], color=colour, linewidth=2, label=_label(name, *episode))
        for colour, (name, episode) in zip(COLOURS, episodes.items(), strict=False)
    ]
    handles.append(
        Line2D([], [], color="#666666", marker="|", linestyle="", label="a new prediction begins")
    )
    legend = figure.legend(handles=handles, loc="outside lower left", ncols=6, frameon=False)
    for text in legend.get_texts():
        text.set_fontsize(9)
        text.set_parse_math(False)
    content = io.BytesIO()
    figure.savefig(content, format="png")
    return content.getvalue()


def _draw_speed(
    axes: Axes, episodes: Mapping[str, Episode], fps: float, values: Sequence[int] | None
) -> None:
    for colour, (commands, _) in zip(COLOURS, episodes.values(), strict=False):
        included = commands[:, list(values)] if values is not None else commands
        speed = np.linalg.norm(np.diff(included.astype(np.float64), axis=0), axis=1) * fps
        axes.plot(np.arange(1, len(speed) + 1) / fps, speed, color=colour, linewidth=0.9)
    _decorate(axes, "speed of the commanded path", is_last=True)
    axes.set_ylim(bottom=0)
    _draw_borders(axes, episodes, fps)


def _draw_borders(axes: Axes, episodes: Mapping[str, Episode], fps: float) -> None:
    """Ticks below the curves, a row for each way that has borders."""
    bordered = [
        (colour, queries)
        for colour, (commands, queries) in zip(COLOURS, episodes.values(), strict=False)
        if len(queries) < len(commands)
    ]
    for row, (colour, queries) in enumerate(bordered):
        axes.plot(
            np.asarray(queries) / fps,
            np.full(len(queries), -0.035 - 0.05 * row),
            "|",
            color=colour,
            markersize=4,
            markeredgewidth=0.8,
            transform=axes.get_xaxis_transform(),
            clip_on=False,
        )


def _decorate(axes: Axes, name: str, is_last: bool) -> None:
    axes.margins(x=0.01)
    axes.tick_params(labelsize=7, length=2, pad=6, labelbottom=is_last)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#e6e6e6", linewidth=0.5)
    axes.set_title(name, loc="left", fontsize=8, fontweight="bold", pad=2, parse_math=False)
    if is_last:
        axes.set_xlabel("s", fontsize=8, labelpad=1)


def _label(name: str, commands: Array, queries: Sequence[int]) -> str:
    asked = "at every step" if len(queries) == len(commands) else f"{len(queries)} times"
    return f"{name} (asked {asked})"
