"""Success over the table as one picture: where the objects stood when a policy succeeded or failed.

On a grid of object places (split `grid`) each cell is coloured by its share of successes; in other
worlds each one is a mark. An object has a panel of its own, in which every world counts: whether it
was this object's place that made the difference shows only over many worlds.
"""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from numpy.typing import NDArray

from act_lightning.sim.config import EnvConfig, Range
from act_lightning.sim.poses import object_ranges
from act_lightning.sim.results import wilson_interval
from act_lightning.sim.splits import object_poses

_COLOURS = "viridis"
_PANEL_HEIGHT, _DPI = 5.4, 110  # inches, and dots an inch
_UNVISITED = "#e6e6e6"
_SUCCESS, _FAILURE = "#1f77b4", "#d1495b"


def draw_heat_map(env: EnvConfig, worlds: Sequence[tuple[int, bool]], title: str) -> bytes:
    """Draws where a policy succeeded.

    Args:
        env: the worlds it played, as `split_env` makes them; their object ranges are outlined.
        worlds: seed and success of each episode.
        title: what was played: task, run, way of executing.

    Returns:
        A PNG file; the overall rate and its Wilson 95% interval stand below the title.

    Raises:
        ValueError: there are no episodes, or the task's objects have no known places.
    """
    if not worlds:
        raise ValueError(f"{title}: no episodes; there is nothing to draw")
    seeds = [seed for seed, _ in worlds]
    successes = np.array([success for _, success in worlds])
    places = object_poses(env, seeds)
    aspects = [_aspect(xy, object_ranges(env)[name]) for name, xy in places.items()]
    width = sum(_PANEL_HEIGHT * aspect + 0.9 for aspect in aspects) + 1.2
    figure = Figure(figsize=(max(width, 6.5), _PANEL_HEIGHT + 1.3), dpi=_DPI, layout="constrained")
    panels = figure.subplots(1, len(places), squeeze=False, width_ratios=aspects)[0]
    for axes, (name, xy) in zip(panels, places.items(), strict=True):
        bounds = object_ranges(env)[name]
        if env.object_grid:
            _draw_cells(axes, xy, successes, bounds, env.object_grid)
        else:
            _draw_marks(axes, xy, successes)
        _draw_table(axes, name, bounds)
    if env.object_grid:
        figure.colorbar(ScalarMappable(Normalize(0, 1), _COLOURS), ax=panels, label="success rate")
    figure.suptitle(f"{title}\n{_rate(successes)}", fontsize=11, parse_math=False)
    content = io.BytesIO()
    figure.savefig(content, format="png")
    return content.getvalue()


def count_cells(
    places: NDArray[np.float64],
    successes: NDArray[np.bool_],
    bounds: tuple[Range, Range],
    num_cells: int,
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Counts episodes by the cell of a grid that one object stood in.

    Args:
        places: (n, 2), x and y in m.
        successes: (n,).
        bounds: ((x0, x1), (y0, y1)) in m, over which the grid lies.
        num_cells: cells along each side.

    Returns:
        Episodes and successes, (num_cells, num_cells) each: first index along y, second along x.
    """
    low, high = np.array(bounds).T
    cells = np.floor((places - low) / (high - low) * num_cells).astype(int)
    x, y = np.clip(cells, 0, num_cells - 1).T
    episodes = np.zeros((num_cells, num_cells), np.int64)
    successful = np.zeros_like(episodes)
    np.add.at(episodes, (y, x), 1)
    np.add.at(successful, (y, x), successes)
    return episodes, successful


def _draw_cells(
    axes: Axes,
    places: NDArray[np.float64],
    successes: NDArray[np.bool_],
    bounds: tuple[Range, Range],
    num_cells: int,
) -> None:
    """Cells coloured by success rate, with successes and episodes written in."""
    episodes, successful = count_cells(places, successes, bounds, num_cells)
    rates = np.ma.masked_invalid(successful / np.where(episodes, episodes, np.nan))
    x, y = (np.linspace(*side, num_cells + 1) for side in bounds)
    axes.set_facecolor(_UNVISITED)
    axes.pcolormesh(x, y, rates, vmin=0, vmax=1, cmap=_COLOURS, edgecolors="white", linewidth=0.5)
    for (row, column), count in np.ndenumerate(episodes):
        if count:
            light = rates[row, column] > 0.6
            middle = (x[column] + x[column + 1]) / 2, (y[row] + y[row + 1]) / 2
            axes.annotate(
                f"{successful[row, column]}/{count}",
                middle,
                ha="center",
                va="center",
                fontsize=8,
                color="black" if light else "white",
            )


def _draw_marks(axes: Axes, places: NDArray[np.float64], successes: NDArray[np.bool_]) -> None:
    for value, marker, colour, name in (
        (True, "o", _SUCCESS, "success"),
        (False, "x", _FAILURE, "failure"),
    ):
        chosen = places[successes == value]
        axes.scatter(
            chosen[:, 0],
            chosen[:, 1],
            s=26,
            marker=marker,
            color=colour,
            label=f"{name} ({len(chosen)})",
        )
    axes.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=2, frameon=False)


def _draw_table(axes: Axes, name: str, bounds: tuple[Range, Range]) -> None:
    (x0, x1), (y0, y1) = bounds
    axes.add_patch(
        Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, edgecolor="black", linewidth=1.5)
    )
    axes.margins(0.04)
    axes.set_aspect("equal")
    axes.set_title(f"{name} (box: range of the demonstrations)", fontsize=9, parse_math=False)
    axes.set_xlabel("x (m)", fontsize=9)
    axes.set_ylabel("y (m)", fontsize=9)
    axes.tick_params(labelsize=8)
    axes.locator_params(axis="x", nbins=5)


def _aspect(places: NDArray[np.float64], bounds: tuple[Range, Range]) -> float:
    """Width over height of what a panel shows."""
    corners = np.concatenate([places, np.array(bounds).T])
    width, height = np.ptp(corners, axis=0) + 0.01
    return float(np.clip(width / height, 0.3, 3))


def _rate(successes: NDArray[np.bool_]) -> str:
    count, total = int(successes.sum()), len(successes)
    low, high = wilson_interval(count, total)
    return f"{count} of {total} worlds: {count / total:.1%} (95% interval {low:.1%} - {high:.1%})"
