"""The picture of success over the table."""

from __future__ import annotations

import io

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from act_lightning.sim.config import FIRST_EVALUATION_SEED, EnvConfig
from act_lightning.sim.poses import object_ranges
from act_lightning.sim.splits import GRID, object_poses, split_env
from act_lightning.study.heat_map import count_cells, draw_heat_map

TITLE = "insertion, runs/insertion/version_0, ensembled, grid"


def worlds(num: int) -> list[tuple[int, bool]]:
    """Every third world fails."""
    return [(FIRST_EVALUATION_SEED + i, i % 3 > 0) for i in range(num)]


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """Every figure that is saved."""
    drawn: list[Figure] = []
    save = Figure.savefig

    def savefig(self: Figure, *args: object, **settings: object) -> None:
        drawn.append(self)
        save(self, *args, **settings)  # type: ignore[arg-type]

    monkeypatch.setattr(Figure, "savefig", savefig)
    return drawn


def test_cells_count_as_brute_force_does() -> None:
    bounds = ((0.1, 0.2), (0.4, 0.6))
    places = np.random.default_rng(0).uniform([0.1, 0.4], [0.2, 0.6], (300, 2))
    successes = np.random.default_rng(1).random(300) < 0.4
    episodes, successful = count_cells(places, successes, bounds, 5)
    for row in range(5):
        for column in range(5):
            x0, y0 = 0.1 + 0.02 * column, 0.4 + 0.04 * row
            inside = (places[:, 0] >= x0) & (places[:, 0] < x0 + 0.02)
            inside &= (places[:, 1] >= y0) & (places[:, 1] < y0 + 0.04)
            assert episodes[row, column] == inside.sum()
            assert successful[row, column] == (inside & successes).sum()
    assert episodes.sum() == 300


def test_the_grid_fills_every_cell_equally() -> None:
    env = split_env(EnvConfig(), "grid")
    seeds = [seed for seed, _ in worlds(512)]
    for name, places in object_poses(env, seeds).items():
        episodes, _ = count_cells(places, np.ones(512, bool), object_ranges(env)[name], GRID)
        assert (episodes == 8).all()


def test_grid_is_drawn_with_rates_and_counts(figures: list[Figure]) -> None:
    env = split_env(EnvConfig(), "grid")
    picture = Image.open(io.BytesIO(draw_heat_map(env, worlds(130), TITLE)))
    assert picture.format == "PNG"
    assert min(picture.size) > 400
    (figure,) = figures
    title = figure.get_suptitle()
    assert title.startswith(TITLE)
    assert "86 of 130 worlds: 66.2% (95% interval 57.7% - 73.7%)" in title
    peg, socket, colours = figure.axes
    assert colours.get_ylabel() == "success rate"
    for axes, name in ((peg, "peg"), (socket, "socket")):
        assert axes.get_title().startswith(name)
        counts = [text.get_text().split("/") for text in axes.texts]
        assert len(counts) == 64
        assert sum(int(won) for won, _ in counts) == 86
        assert sorted(int(played) for _, played in counts) == [2] * 62 + [3] * 2
        rates = axes.collections[0].get_array().ravel()
        expected = [int(won) / int(played) for won, played in counts]
        np.testing.assert_allclose(np.sort(rates), np.sort(expected))


def test_cells_without_a_world_stay_empty(figures: list[Figure]) -> None:
    draw_heat_map(split_env(EnvConfig(task="transfer_cube"), "grid"), worlds(5), TITLE)
    cube = figures[0].axes[0]
    assert len(cube.texts) == 5
    assert np.ma.count(cube.collections[0].get_array()) == 5


@pytest.mark.parametrize("split", ["standard", "far"])
def test_other_worlds_are_marks_where_the_objects_stood(split: str, figures: list[Figure]) -> None:
    env = split_env(EnvConfig(), split)
    draw_heat_map(env, worlds(20), TITLE)
    places = object_poses(env, [seed for seed, _ in worlds(20)])
    won = np.array([success for _, success in worlds(20)])
    for axes, xy in zip(figures[0].axes, places.values(), strict=True):
        successes, failures = axes.collections
        np.testing.assert_allclose(successes.get_offsets(), xy[won])
        np.testing.assert_allclose(failures.get_offsets(), xy[~won])
        low, high = axes.viewLim.get_points()
        assert (xy > low).all()
        assert (xy < high).all()


@pytest.mark.parametrize("success", [False, True])
def test_all_or_none_succeeded(success: bool, figures: list[Figure]) -> None:
    env = split_env(EnvConfig(), "grid" if success else "far")
    draw_heat_map(env, [(FIRST_EVALUATION_SEED, success)], TITLE)
    assert f"{int(success)} of 1 worlds" in figures[0].get_suptitle()


def test_what_cannot_be_drawn_is_named() -> None:
    with pytest.raises(ValueError, match="no episodes"):
        draw_heat_map(EnvConfig(), [], TITLE)
    foreign = EnvConfig(task="CartPole-v1", observation_keys={"qpos": ""})
    with pytest.raises(ValueError, match="CartPole-v1 does not say where"):
        draw_heat_map(foreign, worlds(1), TITLE)
