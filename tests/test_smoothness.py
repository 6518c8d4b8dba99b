"""Measures of smoothness against their definitions, published values and known motions."""

import io
import json
import math
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image
from rich.console import Console
from scipy.stats import ttest_rel

from act_lightning.execution import ExecutionConfig
from act_lightning.sim.config import EnvConfig
from act_lightning.study.draw_commands import draw_commands
from act_lightning.study.smoothness import (
    METRICS,
    Smoothness,
    arm_values,
    both_succeeded,
    mean_smoothness,
    paired_differences,
    paired_table,
    smoothness,
    smoothness_table,
    spectral_arc_length,
)

ROOT = Path(__file__).parent.parent
FPS = 50.0
NOTHING = dict.fromkeys(METRICS)


def min_jerk(seconds: float, fps: float = FPS) -> np.ndarray:
    """Positions (T,) of a minimum-jerk reach from 0 to 1 (Flash and Hogan 1985)."""
    time = np.linspace(0, 1, round(seconds * fps) + 1)
    return 10 * time**3 - 15 * time**4 + 6 * time**5


def wave(num_steps: int, num_values: int = 3) -> np.ndarray:
    time = np.arange(num_steps)[:, None] / FPS
    return np.sin(time * np.arange(1, num_values + 1)).astype(np.float32)


def measured(commands, queries=(0,), **kwargs) -> Smoothness:
    return smoothness(np.asarray(commands, dtype=np.float64), queries, FPS, **kwargs)


def example(value: float, **changes) -> Smoothness:
    return Smoothness(**(dict.fromkeys(METRICS, value) | changes))


def arc_length_by_definition(speed, fps):
    """Balasubramanian et al. 2015, with a sum for each frequency."""
    size = 16
    while size < 16 * len(speed):
        size *= 2
    frequencies = [k * fps / size for k in range(size // 2 + 1)]
    samples = np.arange(len(speed))
    spectrum = np.array(
        [abs(np.sum(speed * np.exp(-2j * math.pi * f / fps * samples))) for f in frequencies]
    )
    spectrum /= spectrum[0]
    last = max(k for k, f in enumerate(frequencies) if f <= 10 and spectrum[k] >= 0.05)
    return -sum(math.hypot(1 / last, spectrum[k + 1] - spectrum[k]) for k in range(last))


def test_spectral_arc_length_equals_the_value_its_authors_publish():
    """The example in the docstring of `sparc` in github.com/siva82kb/SPARC."""
    time = np.arange(-1, 1, 0.01)
    found = spectral_arc_length(np.exp(-5 * time**2), 100.0)
    assert found == pytest.approx(-1.41403, abs=5e-6)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("length", [4, 31, 32, 33, 250])
def test_spectral_arc_length_equals_its_definition(seed, length):
    speed = np.abs(np.random.default_rng(seed).normal(size=length).cumsum())
    expected = arc_length_by_definition(speed, FPS)
    assert spectral_arc_length(speed, FPS) == pytest.approx(expected, rel=1e-9)


def test_spectral_arc_length_of_commands_is_that_of_their_speed():
    commands = np.random.default_rng(0).normal(size=(120, 3)).cumsum(axis=0)
    speed = FPS * np.linalg.norm(commands[1:] - commands[:-1], axis=1)
    expected = arc_length_by_definition(speed, FPS)
    assert measured(commands).spectral_arc_length == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("fps", [10.0, 50.0, 200.0])
@pytest.mark.parametrize("seconds", [1.0, 3.0])
def test_spectral_arc_length_of_a_reach_does_not_depend_on_its_size_time_or_sampling(fps, seconds):
    commands = 0.3 * min_jerk(seconds, fps)[:, None] * [1.0, -2.0]
    found = smoothness(commands, (0,), fps).spectral_arc_length
    assert found == pytest.approx(-1.42, abs=0.03)


def test_several_movements_and_tremor_are_less_smooth_than_one_movement():
    one = min_jerk(2)[:, None]
    two = np.concatenate([one, 1 + one])
    tremor = one + 0.003 * np.sin(2 * math.pi * 6 * np.arange(len(one)) / FPS)[:, None]
    found = [measured(commands) for commands in (one, two, tremor)]
    assert found[1].spectral_arc_length < found[0].spectral_arc_length - 0.5
    assert found[2].spectral_arc_length < found[0].spectral_arc_length - 0.5
    assert found[2].mean_squared_jerk > 10 * found[0].mean_squared_jerk


def test_jerk_of_a_cubic_path_is_six_times_its_coefficients():
    time = np.arange(40)[:, None] / FPS
    coefficients = np.array([1.0, -2.0, 0.0])
    commands = coefficients * time**3 + 4 * time**2 - time
    expected = np.mean((6 * coefficients) ** 2)
    assert measured(commands).mean_squared_jerk == pytest.approx(expected, rel=1e-6)


def test_path_length_is_the_sum_of_euclidean_steps():
    assert measured([[0, 0], [3, 4], [3, 4], [0, 4], [0, 16]]).path_length == pytest.approx(20)


def test_border_jump_of_a_shifted_plan_is_the_shift_and_smooth_motion_has_none():
    time = np.arange(30)[:, None]
    accelerating = 0.01 * time**2 * [1.0, 2.0] - 0.3 * time
    shift = np.zeros((30, 2))
    shift[10:] = [3.0, 4.0]
    shift[20:] += [0.0, -1.0]
    assert measured(accelerating, range(0, 30, 10)).border_jump == pytest.approx(0, abs=1e-12)
    both = measured(accelerating + shift, range(0, 30, 10))
    assert both.border_jump == pytest.approx((5 + 1) / 2)
    assert measured(accelerating + shift, (0, 20)).border_jump == pytest.approx(1)
    # A shift is seen where it is, and by half in the steps beside it.
    assert both.inner_jump == pytest.approx((5 + 1) / 25)
    elsewhere = measured(accelerating + shift, (0, 15))
    assert elsewhere.border_jump == pytest.approx(0, abs=1e-12)
    assert elsewhere.inner_jump == pytest.approx(2 * (5 + 1) / 26)
    every = measured(accelerating + shift, range(30))
    assert every.border_jump == pytest.approx(2 * (5 + 1) / 27)
    assert every.inner_jump is None


@pytest.mark.parametrize("queries", [(), (0,), (0, 1), (0, 19), (0, 20), (0, 25)])
def test_border_jump_needs_a_border_with_a_step_on_either_side(queries):
    assert measured(wave(20), queries).border_jump is None
    assert measured(wave(20), queries).inner_jump is not None
    assert measured(wave(20), (*queries, 10)).border_jump is not None


@pytest.mark.parametrize("num_steps", [0, 1, 2, 3])
def test_nothing_is_said_of_fewer_than_four_commands(num_steps):
    assert measured(wave(num_steps), (0, 1, 2)).as_dict() == NOTHING
    found = measured(wave(4), (0, 1, 2)).as_dict()
    assert [name for name, value in found.items() if value is None] == ["inner_jump"]


def test_nothing_is_said_of_commands_that_are_not_finite():
    commands = wave(20)
    commands[7, 1] = math.nan
    assert measured(commands).as_dict() == NOTHING
    assert measured(commands, (0, 10), values=(0, 2)) == measured(wave(20)[:, [0, 2]], (0, 10))


def test_commands_that_stand_still_have_no_spectrum():
    found = measured(np.ones((20, 3)), (0, 10))
    assert found == example(0.0, spectral_arc_length=None)


def test_aloha_grippers_are_left_out_and_other_tasks_measured_whole():
    values = arm_values(EnvConfig(task="insertion"), 14)
    assert values == (0, 1, 2, 3, 4, 5, 7, 8, 9, 10, 11, 12)
    foreign = EnvConfig(task="some/Task-v0", observation_keys={"qpos": "state"})
    assert arm_values(foreign, 7) == tuple(range(7))
    commands = wave(40, 14)
    queries = (0, 20)
    before = measured(commands, queries, values=values)
    commands[10:, 6] += 1.0
    commands[20:, 13] -= 1.0
    assert measured(commands, queries, values=values) == before
    assert measured(commands, queries) != before


def test_float32_commands_are_measured_in_float64():
    commands = wave(200) + np.float32(3.0)
    assert measured(commands, (0, 100)) == smoothness(commands, (0, 100), FPS)


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match=r"\(20,\) must be \(T, A\)"):
        smoothness(wave(20)[:, 0], (0,), FPS)
    with pytest.raises(ValueError, match="fps=0"):
        smoothness(wave(20), (0,), 0)


def test_mean_is_over_the_episodes_that_have_the_measure():
    episodes = [example(1.0), example(2.0, border_jump=None), Smoothness(**NOTHING)]
    assert mean_smoothness(iter(episodes)) == dict.fromkeys(METRICS, 1.5) | {"border_jump": 1.0}
    assert mean_smoothness([Smoothness(**NOTHING)]) == NOTHING
    assert mean_smoothness([]) == NOTHING
    assert tuple(METRICS) == tuple(example(0.0).as_dict())


def test_worlds_are_compared_where_both_ways_succeeded():
    def outcome(success, value):
        return {"success": success, "smoothness": example(value).as_dict()}

    worlds = [
        {"seed": 0, "chunked": outcome(True, 5.0), "ensembled": outcome(True, 1.0)},
        {"seed": 1, "chunked": outcome(False, 99.0), "ensembled": outcome(True, 2.0)},
        {"seed": 2, "chunked": outcome(True, 7.0), "ensembled": outcome(False, 99.0)},
        {"seed": 3, "chunked": outcome(True, 8.0), "ensembled": outcome(True, 3.0)},
    ]
    worlds = json.loads(json.dumps(worlds))
    pairs = both_succeeded(worlds, "chunked", "ensembled")
    assert pairs == [(example(5.0), example(1.0)), (example(8.0), example(3.0))]
    with pytest.raises(KeyError, match="newest"):
        both_succeeded(worlds, "chunked", "newest")


def test_paired_differences_are_those_of_a_paired_t_test():
    values = np.random.default_rng(0).normal(size=(2, 30)) + [[0.0], [0.3]]
    pairs = [(example(a), example(b, border_jump=None)) for a, b in values.T]
    pairs[0] = (example(values[0, 0]), example(values[1, 0]))
    found = paired_differences(pairs)
    jerk = found["mean_squared_jerk"]
    expected = ttest_rel(values[1], values[0]).confidence_interval(0.95)
    assert jerk.interval == pytest.approx((expected.low, expected.high))
    assert (jerk.first, jerk.second) == pytest.approx(tuple(values.mean(axis=1)))
    assert found["border_jump"].interval is None  # of a single pair
    assert paired_differences(pairs[1:])["border_jump"] is None
    assert paired_differences([]) == NOTHING


def rows(table) -> dict[str, list[str]]:
    """What a table says, by first cell, and the title and headings under "" ."""
    console = Console(file=io.StringIO(), width=150)
    console.print(table)
    lines = [line.split("  ") for line in console.file.getvalue().splitlines()]
    cells = [[cell.strip() for cell in line if cell.strip()] for line in lines]
    return {line[0]: line[1:] for line in cells if line}


def test_table_has_a_row_a_way_and_says_units():
    means = {"chunked": example(123456.0).as_dict(), "ensembled": NOTHING}
    found = rows(smoothness_table(means, unit="rad"))
    assert found["chunked"] == ["1.2e+05"] * len(METRICS)
    assert found["ensembled"] == ["-"] * len(METRICS)
    headings = list(METRICS.values())
    assert found["execution"] == [
        f"{headings[0]} rad²/s⁶", headings[1], *(f"{name} rad" for name in headings[2:])
    ]  # fmt: skip
    assert rows(smoothness_table(means))["execution"] == headings


def test_paired_table_marks_what_differs():
    def world(*values, success=True):
        smooth = [example(value, path_length=None).as_dict() for value in values]
        ways = zip(("a", "b", "c"), smooth, strict=True)
        return {name: {"success": success, "smoothness": values} for name, values in ways}

    worlds = [world(1, 11, 0), world(2, 12, 4), world(3, 13.5, 2), world(50, 0, 0, success=False)]
    worlds[2]["c"]["success"] = False
    found = rows(paired_table(worlds, ["a", "b", "c"], "rad"))
    assert found["b"] == ["3", *["2 → 12.2*"] * 4, "-"]
    assert found["c"] == ["2", *["1.5 → 2"] * 4, "-"]


def picture(episodes, **kwargs) -> np.ndarray:
    content = draw_commands(episodes, FPS, r"insertion, world 1 ($\no$)", **kwargs)
    return np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))


def test_picture_shows_each_way_and_its_borders():
    first, second = wave(100, 2), wave(80, 2) ** 2
    one = picture({"chunked": (first, (0, 50)), "ensembled": (second, range(80))})
    other = picture({"chunked": (first, (0, 40)), "ensembled": (second, range(80))})
    assert one.shape == other.shape
    assert one.shape[1] == 1650
    assert 0 < (one != other).any(axis=-1).mean() < 0.001  # ticks only
    lines = picture({"chunked": (first, (0, 50)), "ensembled": (second + 0.1, range(80))})
    assert (lines != one).any(axis=-1).mean() > 0.001  # in the panels; the speed is the same


def test_ways_that_ask_at_every_step_have_no_ticks():
    drawn = [picture({"a": (wave(100, 1), range(0, 100, n))}) for n in (1, 2)]
    pixels = [(p == [0xD6, 0x33, 0x8A]).all(axis=-1).sum() for p in drawn]
    assert 0 < pixels[0] < pixels[1]


@pytest.mark.parametrize(("length", "num_values"), [(0, 1), (1, 3), (60, 5)])
def test_picture_of_odd_episodes(length, num_values):
    wrong = r"$\no$"  # would raise, were it read as mathematics
    picture({wrong: (wave(length, num_values), range(length))}, unit=wrong)


def test_what_cannot_be_drawn_is_named():
    with pytest.raises(ValueError, match="0 ways"):
        picture({})
    with pytest.raises(ValueError, match=r"\[2, 3\] values"):
        picture({"a": (wave(9, 2), (0,)), "b": (wave(9, 3), (0,))})
    with pytest.raises(ValueError, match="11 ways"):
        picture({str(i): (wave(9), (0,)) for i in range(11)})


def test_the_ways_of_executing_that_ship_fit_a_chunk_of_25():
    described = yaml.safe_load((ROOT / "experiments" / "executions.yaml").read_text())
    executions = {name: ExecutionConfig(**fields) for name, fields in described.items()}
    built = {name: config.build(1, 25, 3) for name, config in executions.items()}
    assert len(set(executions.values())) == len(built) >= 6
    assert any((config.ensemble_decay or 0) < 0 for config in executions.values())
